"""Computes the KV of prompts and hands it over."""

import baton_runtime  # noqa: F401 - before anything imports grpc: it settles how gRPC treats forks and stderr
