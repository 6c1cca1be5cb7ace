"""`baton bench`: load for any OpenAI-compatible server, with every answer checked."""
