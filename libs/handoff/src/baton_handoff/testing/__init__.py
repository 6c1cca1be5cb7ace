"""Fakes for tests of this package and of those that use it: a loopback transport, a small engine, a simulated world."""

from baton_handoff.testing.engine import FakeEngine, MiniEngine
from baton_handoff.testing.world import Frontend, Process, World

__all__ = ["FakeEngine", "Frontend", "MiniEngine", "Process", "World"]
