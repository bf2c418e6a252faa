"""Image sets, from where they are stored to batches on the devices: `load` one by name, or make one `from_arrays`."""

from train.data.sets import Dataset, from_arrays, load

__all__ = ["Dataset", "from_arrays", "load"]
