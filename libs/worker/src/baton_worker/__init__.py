"""What prefill and decode share. The way of a Start through the files: attach_service, frontends, attach, starts, dispatch."""
