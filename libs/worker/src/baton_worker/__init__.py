"""What prefill and decode share: Attach server, engine driver, cache events, statistics, drain."""
