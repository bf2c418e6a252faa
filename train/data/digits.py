"""scikit-learn's handwritten digits as a TFDS set: real 8x8 scans, on every machine, without network or TensorFlow."""

import io
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


class Digits(tfds.core.GeneratorBasedBuilder):
    """1,797 digits, https://archive.ics.uci.edu/dataset/80: 1,437 to train on, 360 to test, the same for everybody."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "A fifth of each class, drawn once with seed 0, is the test split."}

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://scikit-learn.org/stable/datasets/toy_dataset.html",
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        images, labels = load_digits(return_X_y=True)
        pixels = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
        return {
            "train": self._generate_examples(pixels, labels, np.sort(train)),
            "test": self._generate_examples(pixels, labels, np.sort(test)),
        }

    def _generate_examples(self, pixels, labels, indices):
        for index in indices:
            encoded = io.BytesIO()
            Image.fromarray(pixels[index]).save(encoded, "PNG")
            # Bytes, not arrays: TFDS encodes arrays with TensorFlow.
            yield int(index), {"image": io.BytesIO(encoded.getvalue()), "label": int(labels[index])}
