"""Computes the KV of prompts and hands it over."""
