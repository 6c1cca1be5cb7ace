"""The baton command: up, down, status, chat."""

import baton_runtime  # noqa: F401 - before anything imports grpc: it settles how gRPC treats forks and stderr
