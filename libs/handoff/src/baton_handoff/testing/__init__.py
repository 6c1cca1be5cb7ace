"""Fakes for tests of this package and of those that use it: a loopback transport, a small engine, a worker, a simulated world."""

from baton_handoff.testing.engine import FakeEngine, MiniEngine
from baton_handoff.testing.loopback import LoopbackNetwork, LoopbackTransport
from baton_handoff.testing.worker import TestWorker, introduce
from baton_handoff.testing.world import Frontend, Process, World

__all__ = ["FakeEngine", "Frontend", "LoopbackNetwork", "LoopbackTransport", "MiniEngine", "Process", "TestWorker", "World", "introduce"]
