"""Pulls KV and generates tokens."""
