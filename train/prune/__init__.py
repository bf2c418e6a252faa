"""Pruning: `python -m train.prune PRESET`."""
