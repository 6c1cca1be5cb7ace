"""What every Baton service runs on: config, errors, logging, telemetry, gRPC, lifecycle, discovery."""

import os

# gRPC's C core writes plain text to stderr, among our JSON lines, when a peer goes away. It reads this once, when grpc is first
# imported, so it stands here and not in a setting.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
