"""Reproductions, control experiments and tools around the core: python -m experiments.NAME."""
