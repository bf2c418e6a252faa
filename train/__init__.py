"""Supervised training: `python -m train`, and its pieces for your own scripts."""

__all__: list[str] = []
