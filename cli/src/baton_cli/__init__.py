"""The baton command: up, down, status, chat."""
