"""What every Baton service runs on: config, errors, logging, telemetry, gRPC, lifecycle, discovery."""
