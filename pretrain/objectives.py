"""Pretraining objectives: pure functions of the two networks' outputs for the views of a batch.

`OBJECTIVES[name]` lists the parts that a method needs in addition to its function, with the sizes of its authors' code
for ImageNet. A new method needs a function here and an entry there.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from resnet_jax import contrastive as c

Arrays = dict[str, jax.Array]


class Views(NamedTuple):
    """The inputs of an objective.

    Attributes:
      online: outputs of the trained network by name, [V, B, D], for the large views first, then for the small ones.
      target: outputs of the target network for the large views, [G, B, D], without a gradient; empty without one.
      memory: state that the objective keeps from step to step: `queue` [K, D], or `center` [K].
      labels: int [B], for objectives that use them.
      step: int32 scalar, the number of steps done before this one.
    """

    online: Arrays
    target: Arrays
    memory: Arrays
    labels: jax.Array
    step: jax.Array


# --- losses -----------------------------------------------------------------------------------------------------------


def simclr(views: Views, *, temperature: float = 0.5, axis_name: str | None = None) -> jax.Array:
    """NT-Xent over all views, https://arxiv.org/abs/2002.05709."""
    return c.nt_xent(*views.online["projection"], temperature=temperature, axis_name=axis_name).mean()


def supcon(views: Views, *, temperature: float = 0.1, axis_name: str | None = None) -> jax.Array:
    """Supervised contrastive loss: images of the same class are positives, https://arxiv.org/abs/2004.11362."""
    projections = views.online["projection"]
    return c.sup_con(projections, views.labels, temperature=temperature, axis_name=axis_name).mean()


def mocov2(views: Views, *, temperature: float = 0.2, axis_name: str | None = None) -> jax.Array:
    """InfoNCE against a queue of earlier keys, https://arxiv.org/abs/2003.04297, in both directions.

    The paper predicts view 2 from view 1 only. Both directions cost twice as much per step, which paid off for others.
    """
    # Every device has the whole queue.
    loss = partial(c.info_nce, negatives=views.memory["queue"], temperature=temperature)
    return _crosswise(loss, views.online["projection"], views.target["projection"])


def mocov3(views: Views, *, temperature: float = 1.0, axis_name: str | None = None) -> jax.Array:
    """InfoNCE of predictions against the batch's keys, times 2 T, https://arxiv.org/abs/2104.02057."""
    loss = partial(c.info_nce, temperature=temperature, axis_name=axis_name)
    return 2 * temperature * 2 * _crosswise(loss, views.online["prediction"], views.target["projection"])


def byol(views: Views, *, axis_name: str | None = None) -> jax.Array:
    """Predict the target network's projection of the other view, https://arxiv.org/abs/2006.07733."""
    return 2 * _crosswise(c.byol, views.online["prediction"], views.target["projection"])


def simsiam(views: Views, *, axis_name: str | None = None) -> jax.Array:
    """Predict the same network's projection of the other view, without a gradient into it, https://arxiv.org/abs/2011.10566."""
    return -_crosswise(c.cosine, views.online["prediction"], jax.lax.stop_gradient(views.online["projection"]))


def barlow(views: Views, *, redundancy: float = 0.0051, scale: float = 1.0, axis_name: str | None = None) -> jax.Array:
    """Barlow Twins, times `scale`, https://arxiv.org/abs/2103.03230."""
    a, b = views.online["projection"]
    return scale * c.barlow_twins(a, b, redundancy=redundancy, axis_name=axis_name)


def vicreg(
    views: Views,
    *,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    axis_name: str | None = None,
) -> jax.Array:
    """VICReg, https://arxiv.org/abs/2105.04906."""
    a, b = views.online["projection"]
    weights = {"invariance": invariance, "variance": variance, "covariance": covariance}
    return c.vicreg(a, b, **weights, axis_name=axis_name)


def nnclr(views: Views, *, temperature: float = 0.1, axis_name: str | None = None) -> jax.Array:
    """InfoNCE with each projection replaced by its nearest neighbour in a queue, https://arxiv.org/abs/2104.14548."""

    def loss(rows: jax.Array, predictions: jax.Array) -> jax.Array:
        neighbours = c.nearest(rows, views.memory["queue"])
        return c.info_nce(neighbours, predictions, temperature=temperature, axis_name=axis_name)

    return _crosswise(loss, jax.lax.stop_gradient(views.online["projection"]), views.online["prediction"])


def swav(
    views: Views,
    *,
    temperature: float = 0.1,
    epsilon: float = 0.05,
    sinkhorn_iterations: int = 3,
    axis_name: str | None = None,
) -> jax.Array:
    """Predict the other views' balanced assignments to prototypes, https://arxiv.org/abs/2006.09882."""
    return c.swav(
        views.online["scores"],
        temperature=temperature,
        epsilon=epsilon,
        iterations=sinkhorn_iterations,
        axis_name=axis_name,
    ).mean()


def dino(
    views: Views, *, temperature: float = 0.1, teacher_temperature: float = 0.04, axis_name: str | None = None
) -> jax.Array:
    """Predict the target network's centred and sharpened scores of other views, https://arxiv.org/abs/2104.14294."""
    temperatures = {"temperature": temperature, "teacher_temperature": teacher_temperature}
    return c.dino(views.online["scores"], views.target["scores"], views.memory["center"], **temperatures).mean()


def _crosswise(loss: Callable[..., jax.Array], a: jax.Array, b: jax.Array) -> jax.Array:
    """Mean loss [B] of each view's rows of `a` with the other view's rows of `b`, both [2, B, D]."""
    return jnp.stack([loss(a[v], b[1 - v]) for v in (0, 1)]).mean()


# --- memories ---------------------------------------------------------------------------------------------------------


def queue_of_keys(views: Views, *, axis_name: str | None = None) -> Arrays:
    """Replace the queue's oldest rows with the target's projections of the first view."""
    return {"queue": c.enqueue(views.memory["queue"], views.target["projection"][0], views.step, axis_name=axis_name)}


def queue_of_projections(views: Views, *, axis_name: str | None = None) -> Arrays:
    """Replace the queue's oldest rows with the projections of the first view."""
    return {"queue": c.enqueue(views.memory["queue"], views.online["projection"][0], views.step, axis_name=axis_name)}


def moving_center(views: Views, *, center_momentum: float = 0.9, axis_name: str | None = None) -> Arrays:
    """Move the center towards the mean of the target's scores."""
    center, scores = views.memory["center"], views.target["scores"]
    return {"center": c.update_center(center, scores, momentum=center_momentum, axis_name=axis_name)}


# --- the family -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A method: its loss, and the parts that the loss needs.

    Attributes:
      loss: `(Views, *, axis_name, options) -> scalar`; its mean over shards is the loss of the whole batch.
      projector, predictor: layer sizes; an empty predictor means none.
      norm, last_norm: norms between the projector's layers and after the last one, see `heads.MLP`.
      activation: the function between the projector's layers.
      prototypes: number of prototypes; 0 means none.
      target: initial momentum with which a target network follows the trained one; None means no target network.
      momentum_schedule: `constant`, or `cosine` from the initial momentum to 1.
      queue: number of rows of the memory's queue; 0 means none.
      remember: `(Views, *, axis_name, options) -> memory`, its update after a step; None without a memory.
      many_views: whether the loss takes more than two large views.
      small_views: whether the loss takes additional small views (multi-crop).
      evaluate_target: whether the target's encoder is the one to evaluate and keep.
    """

    loss: Callable[..., jax.Array]
    projector: tuple[int, ...]
    predictor: tuple[int, ...] = ()
    norm: bool = True
    last_norm: str | None = None
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu
    prototypes: int = 0
    target: float | None = None
    momentum_schedule: str = "constant"
    queue: int = 0
    remember: Callable[..., Arrays] | None = None
    many_views: bool = False
    small_views: bool = False
    evaluate_target: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Options of `loss` and `remember`, with their defaults."""
        functions = [f for f in (self.loss, self.remember) if f is not None]
        parameters = {name: p for f in functions for name, p in signature(f).parameters.items()}
        return {name: p.default for name, p in parameters.items() if name not in ("views", "axis_name")}

    def bind(self, **options: Any) -> "Objective":
        """Set options of `loss` and `remember`, such as a temperature or weights."""

        def bound(function: Any) -> Any:
            known = signature(function).parameters if function else {}
            taken = {name: value for name, value in options.items() if name in known}
            return partial(function, **taken) if taken else function

        return replace(self, loss=bound(self.loss), remember=bound(self.remember))

    def init_memory(self, key: jax.Array) -> Arrays:
        """Make the initial memory: a queue of random directions [queue, D], or a center of zeros [prototypes]."""
        if self.queue:
            return {"queue": c.unit(jax.random.normal(key, (self.queue, self.projector[-1]), jnp.float32))}
        return {"center": jnp.zeros(self.prototypes, jnp.float32)} if self.remember is not None else {}


OBJECTIVES: dict[str, Objective] = {
    "simclr": Objective(loss=simclr, projector=(2048, 2048, 128), last_norm="affine", many_views=True),
    "supcon": Objective(loss=supcon, projector=(2048, 128), norm=False, many_views=True),
    "mocov2": Objective(
        loss=mocov2, projector=(2048, 128), norm=False, target=0.999, queue=65536, remember=queue_of_keys
    ),
    "mocov3": Objective(
        loss=mocov3,
        projector=(4096, 256),
        last_norm="plain",
        predictor=(4096, 256),
        target=0.99,
        momentum_schedule="cosine",
    ),
    "byol": Objective(
        loss=byol, projector=(4096, 256), predictor=(4096, 256), target=0.996, momentum_schedule="cosine"
    ),
    "simsiam": Objective(loss=simsiam, projector=(2048, 2048, 2048), last_norm="plain", predictor=(512, 2048)),
    "barlow": Objective(loss=barlow, projector=(8192, 8192, 8192)),
    "vicreg": Objective(loss=vicreg, projector=(8192, 8192, 8192)),
    "nnclr": Objective(
        loss=nnclr,
        projector=(2048, 2048, 256),
        last_norm="affine",
        predictor=(4096, 256),
        queue=98304,
        remember=queue_of_projections,
    ),
    "swav": Objective(loss=swav, projector=(2048, 128), prototypes=3000, small_views=True),
    "dino": Objective(
        loss=dino,
        projector=(2048, 2048, 256),
        norm=False,
        activation=jax.nn.gelu,  # the tanh approximation: jax 0.12 cannot trace erf under shard_map
        prototypes=65536,
        target=0.996,
        momentum_schedule="cosine",
        remember=moving_center,
        small_views=True,
        evaluate_target=True,
    ),
}
"""Methods by name."""
