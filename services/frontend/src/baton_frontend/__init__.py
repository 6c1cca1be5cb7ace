"""OpenAI-compatible HTTP server of Baton; owns each request."""
