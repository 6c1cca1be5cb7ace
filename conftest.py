"""For every test: gRPC is told how to behave before anything imports it."""

import baton_runtime  # noqa: F401 - for its environment settings
