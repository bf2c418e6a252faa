"""What is explained: a network, its image set, some images, and a target."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from resnet_jax.explain import Network
from train.config import DataConfig, RunConfig
from train.data.decode import read_pixels
from train.data.sets import Dataset
from train.data.sources import Arrays, Encoded, sample
from train.errors import UsageError, suggestion
from train.explain.attributions import Aim, class_aim, difference_aim, similarity_aim
from train.explain.config import ExplainConfig
from train.explain.embeddings import neighbours
from train.explain.images import Images, choose, read_images
from train.explain.outputs import Outputs, make_outputs
from train.from_config import load_data
from train.runtime import say
from train.trained import Trained

FORWARD = 8  # times the images of a batch of explanations: a forward pass alone needs less memory
LISTED = 100  # most classes that a message lists


@dataclass(frozen=True)
class Subject:
    """A network, and what its explanations share; `source` is the name by which it was loaded."""

    source: str
    trained: Trained
    config: ExplainConfig

    @cached_property
    def dataset(self) -> Dataset:
        """The set that the config names, or else the run's own.

        Raises:
          UsageError: there is no set, as a model by name has none of its own, or its images have a different shape.
        """
        wanted, own = self.config.data, self.trained.config
        if own and wanted.name in (None, own.data.name):
            data = replace(own.data, dir=wanted.dir or own.data.dir)
        elif wanted.name:
            if own is None and wanted.split != "test":
                say(f"note: {self.source} may have been trained on these images; see --data.split test")
            data = DataConfig(name=wanted.name, dir=wanted.dir, image_size=min(self.trained.shape[:2]))
        else:
            raise UsageError(f"{self.source} has no image set of its own: name one with --data.name, or name images")
        dataset = load_data(replace(own or RunConfig(), data=data))
        if dataset.image_shape != self.trained.shape:
            shape, takes = ("x".join(map(str, shape)) for shape in (dataset.image_shape, self.trained.shape))
            raise UsageError(f"the images of {dataset.name} are {shape}, but {self.source} takes {takes}")
        return dataset

    @cached_property
    def outputs(self) -> Callable[[Any], Outputs]:
        """Computes the outputs of a split."""
        return make_outputs(self.trained, self.config.batch * FORWARD)

    @cached_property
    def split(self) -> Arrays | Encoded:
        """Images of the split to look at."""
        return sample(self.dataset.splits[self.config.data.split], self.config.most)

    @cached_property
    def seen(self) -> Outputs:
        """The outputs of the split."""
        return self.outputs(self.split)

    @cached_property
    def bank(self) -> Arrays | Encoded:
        """Training images, to find neighbours among."""
        return sample(self.dataset.train, self.config.most)

    @cached_property
    def bank_outputs(self) -> Outputs:
        """The outputs of `bank`."""
        return self.outputs(self.bank)

    def outputs_of(self, pixels: np.ndarray) -> Outputs:
        """The outputs of images uint8 [N, H, W, C]; their labels are 0."""
        return self.outputs(Arrays(images=pixels, labels=np.zeros(len(pixels), np.int32)))

    def images(self, paths: Sequence[str]) -> Images:
        """The images to explain: those in `paths`, or some of the set.

        Raises:
          UsageError: an image that cannot be read, or there are neither paths nor a set.
        """
        if paths:
            return read_images(paths, self.trained.shape, self.config.count)
        comparable = len(self.trained.classes) == len(self.dataset.classes)  # else right and wrong have no meaning
        seen = self.seen if comparable else None
        return choose(self.split, seen, self.dataset.classes, self.config.count, self.config.data.split)

    def aim(self, images: Images, seen: Outputs) -> tuple[Aim, Network]:
        """What the config wants explained of images with these outputs, and the network whose outputs that is about.

        Raises:
          UsageError: a class that does not exist, an encoder without classes, an image that cannot be read.
        """
        classes, variables = self.trained.classes, self.trained.variables
        target, count = self.config.target or ("predicted" if classes else "neighbour"), len(images.names)
        if target.startswith("image:") or target == "neighbour":
            params = {name: tree for name, tree in variables["params"].items() if name != "head"}
            encoder = Network(self.trained.model.clone(num_classes=None), {**variables, "params": params})
            if target == "neighbour":
                return self._neighbour_aim(seen), encoder
            path = target.removeprefix("image:")
            others = np.repeat(read_pixels(path, self.trained.shape)[None], count, axis=0)
            embeddings = np.repeat(self.outputs_of(others[:1]).features, count, axis=0)
            return similarity_aim(embeddings, [f"similar to {path}"] * count, others), encoder
        network = Network(self.trained.model, variables)
        if not classes:
            raise UsageError(f"{self.source} has no classes: pass --target image:PATH or --target neighbour")
        if target == "predicted":
            return class_aim(seen.predicted, classes), network
        first, colon, second = target.partition(":")
        if target in classes or not colon:
            return class_aim(np.full(count, class_index(target, classes)), classes), network
        pair = class_index(first, classes), class_index(second, classes)
        if pair[0] == pair[1]:
            raise UsageError(f"--target {target} names one class twice: the difference would be 0")
        return difference_aim(*pair, count, classes), network

    def _neighbour_aim(self, seen: Outputs) -> Aim:
        """Similarity to the nearest training image that is not the image itself."""
        features = self.bank_outputs.features
        nearest, similarity = neighbours(seen.features, features, 2)
        chosen = np.where(similarity[:, 0] > 1 - 1e-5, nearest[:, -1], nearest[:, 0])
        examples = [self.bank[int(at)] for at in chosen]
        texts = [f"similar to a training image of {self.dataset.classes[example['label']]}" for example in examples]
        return similarity_aim(features[chosen], texts, np.stack([example["image"] for example in examples]))


def class_index(text: str, classes: Sequence[str]) -> int:
    """The position of a class, by name or else by number.

    Raises:
      UsageError: there is no such class; the message lists them.
    """
    if text in classes:
        return list(classes).index(text)
    if text.isdecimal() and int(text) < len(classes):
        return int(text)
    more = f" and {len(classes) - LISTED} more" if len(classes) > LISTED else ""
    listed = f"choose one of {', '.join(classes[:LISTED])}{more}, or a number from 0 to {len(classes) - 1}"
    raise UsageError(f"unknown class {text!r}: {'' if text.isdecimal() else suggestion(text, classes)}{listed}")
