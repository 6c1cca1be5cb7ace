"""What every Baton service runs on: config, errors, logging, telemetry, gRPC, lifecycle, discovery."""

import os

# gRPC's C core reads these once, when grpc is first imported, so they stand here and not in a setting; import this package first.
# It writes plain text to stderr, among our JSON lines, when a peer goes away.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
# Its fork handlers hang the child of a process with live gRPC threads before exec (measured: tests and `baton up`). We never fork
# without exec, so nothing needs them.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
