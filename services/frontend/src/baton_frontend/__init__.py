"""OpenAI-compatible HTTP server of Baton; owns each request."""

import baton_runtime  # noqa: F401 - before anything imports grpc: it settles how gRPC treats forks and stderr
