"""Object detection: `python -m train.detect PRESET`."""
