"""The KV handoff: state machine, pulls, transports, books client."""
