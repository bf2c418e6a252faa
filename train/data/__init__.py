"""Image sets, from where they are stored to batches on the devices: `load` one by name, or make one `from_arrays`."""

from train import lazy_names

# Loaded on first use: a process that only decodes images needs none of these.
__all__, __getattr__ = lazy_names("train.data", {"sets": "Dataset from_arrays load"})
