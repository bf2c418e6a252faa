"""The benchmark of compiled steps: `python -m train.bench [--FIELD VALUE ...]`, or in a notebook

from train.bench import BenchConfig, bench
result = bench(BenchConfig(model="resnet20", batch=128))
print(result["images_per_second"])
"""

from train.bench.config import BenchConfig
from train.bench.measure import bench

__all__ = ["BenchConfig", "bench"]
