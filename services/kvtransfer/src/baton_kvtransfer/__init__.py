"""Introduces pairs, keeps the books of handoffs, spreads news of deaths."""
