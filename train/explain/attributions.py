"""Heat maps of images by several methods, and scores of how far to trust each."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.explain import (
    METHODS,
    Network,
    Target,
    area,
    cascade,
    class_difference,
    class_probability,
    class_score,
    completeness_error,
    deletion,
    infidelity,
    insertion,
    rank_correlation,
    road,
    similarity,
)
from train.runtime import compiler_options

SCORES = ("deletion", "insertion", "road", "infidelity", "randomization")
"""Scores that every method has."""
COMPLETE = {"integrated_gradients": "completeness_error"}
"""Methods whose values sum to a difference of scores, and the name of the score that says how far they do."""
REFERENCE = "random"
COUNTEREXAMPLE = "guided_backprop"
"""The method that `cascade` is known to expose."""


@dataclass(frozen=True)
class Aim:
    """What is explained of N images.

    Attributes:
      score: makes the target from `arrays`, of which each row belongs to an image.
      judge: the same for the target of deletion and insertion.
      arrays: [N, ...] each.
      texts: what is explained, in words, one per image.
      others: uint8 [N, H, W, C], for similarity the images that each is compared with.
    """

    score: Callable[..., Target]
    judge: Callable[..., Target]
    arrays: tuple[np.ndarray, ...]
    texts: Sequence[str]
    others: np.ndarray | None = None


def class_aim(classes: np.ndarray, names: Sequence[str]) -> Aim:
    """Explain one class per image, int [N]: its logit, judged by its probability."""
    return Aim(class_score, class_probability, (classes.astype(np.int32),), [names[at] for at in classes])


def difference_aim(first: int, second: int, count: int, names: Sequence[str]) -> Aim:
    """Explain why the first class rather than the second, judged by the probability of the first."""
    arrays = tuple(np.full(count, at, np.int32) for at in (first, second))
    texts = [f"{names[first]} rather than {names[second]}"] * count
    return Aim(class_difference, lambda a, b: class_probability(a), arrays, texts)


def similarity_aim(embeddings: np.ndarray, texts: Sequence[str], others: np.ndarray) -> Aim:
    """Explain the similarity to an embedding per image, float [N, D], which is that of `others`."""
    return Aim(similarity, similarity, (embeddings,), texts, others)


class Attribution(NamedTuple):
    """Heat maps by one method, with scores.

    Attributes:
      heat: float32 [N, H, W].
      scores: float32 [N] by name.
      cascade: rank correlations with the map after each layer of the cascade has got random weights, too: float32 [N]
        by the name of the layer, from the head down.
      randomized: these maps of the first image, float32 [L, H, W].
    """

    heat: np.ndarray
    scores: dict[str, np.ndarray]
    cascade: dict[str, np.ndarray]
    randomized: np.ndarray


def options_of(method: str, shape: Sequence[int]) -> dict[str, Any]:
    """Options that depend on the size of the images: windows of occlusion are an eighth of the side."""
    window = max(min(shape[:2]) // 8, 1)
    return {"window": window, "stride": max(window // 2, 1)} if method == "occlusion" else {}


def explain_images(
    network: Network,
    images: np.ndarray,
    aim: Aim,
    methods: Sequence[str],
    *,
    layer: str | None,
    batch: int,
    seed: int,
    dtype: Any,
    every_layer: bool = False,
) -> Iterator[tuple[str, Attribution]]:
    """Yield (method, its heat maps and scores) of normalised images [N, H, W, C], `batch` of them at a time.

    Scores are `deletion` and `insertion` (areas under the curves), `road` (`Road.combined`), `infidelity`, and
    `randomization`: the rank correlation with the map of the same network with random weights. Without
    `every_layer` the cascade has only this network. Integrated gradients also have their `completeness_error`.
    """
    count, options = len(images), compiler_options(dtype)
    batch = min(batch, count)
    key = jax.random.key(seed)
    others = [*cascade(network, jnp.asarray(images[:1]), key=jax.random.fold_in(key, 1))][0 if every_layer else -1 :]
    similar = jax.jit(rank_correlation, compiler_options=options)

    @partial(jax.jit, compiler_options=options)
    def trust(
        network: Network, images: jax.Array, score: Target, judge: Target, heat: jax.Array
    ) -> dict[str, jax.Array]:
        return {
            "deletion": area(deletion(network, images, judge, heat)),
            "insertion": area(insertion(network, images, judge, heat)),
            "road": road(network, images, judge, heat, key=jax.random.fold_in(key, 3)).combined(),
            "infidelity": infidelity(network, images, score, heat, key=jax.random.fold_in(key, 2)),
            "completeness_error": jnp.abs(completeness_error(network, images, score, heat)),
        }

    for name in methods:
        method = partial(METHODS[name], layer=layer, **options_of(name, images.shape[1:]))
        compiled = jax.jit(method, compiler_options=options)
        kept = (*SCORES, *([COMPLETE[name]] if name in COMPLETE else []))
        parts, randomized = [], np.zeros(0)
        for start in range(0, count, batch):
            # The last images fill up a batch, so that all batches share one compiled program.
            rows = np.minimum(np.arange(start, start + batch), count - 1)
            x, own = jnp.asarray(images[rows]), jax.random.fold_in(key, start)
            arrays = [jnp.asarray(array[rows]) for array in aim.arrays]
            score, judge = aim.score(*arrays), aim.judge(*arrays)
            heat = compiled(network, x, score, key=own)
            maps = [compiled(other, x, score, key=own) for _, other in others]
            changes = jnp.stack([similar(heat, other) for other in maps], axis=1)
            part = {"heat": heat, **trust(network, x, score, judge, heat)}
            part |= {"cascade": changes, "randomization": changes[:, -1]}
            parts.append({name: np.asarray(values)[: count - start] for name, values in part.items()})
            if start == 0:
                randomized = np.stack([other[0] for other in maps])
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        by_layer = {layer: column for (layer, _), column in zip(others, whole["cascade"].T, strict=True)}
        yield name, Attribution(whole["heat"], {score: whole[score] for score in kept}, by_layer, randomized)
