"""Engines behind one interface: block manager, scheduler, sampling, the sim and torch engines."""
