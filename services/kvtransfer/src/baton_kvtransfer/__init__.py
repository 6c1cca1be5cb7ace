"""Introduces pairs, keeps the books of handoffs, spreads news of deaths."""

import baton_runtime  # noqa: F401 - before anything imports grpc: it settles how gRPC treats forks and stderr
