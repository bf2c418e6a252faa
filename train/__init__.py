"""Supervised training: `python -m train`, and its pieces for your own scripts."""
