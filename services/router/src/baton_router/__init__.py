"""Chooses prefill and decode instances by predicted time and cache locality."""

import baton_runtime  # noqa: F401 - before anything imports grpc: it settles how gRPC treats forks and stderr
