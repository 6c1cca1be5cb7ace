"""Chooses prefill and decode instances by predicted time and cache locality."""
