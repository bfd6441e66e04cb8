"""Sweeps: many runs of one recipe on Ray Tune, and what they say together."""
