"""Objectives as functions of random embeddings: which rows they compare, what they learn from, their options."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pretrain.objectives import OBJECTIVES, Views
from resnet_jax import contrastive as c
from tests.pretrain.test_steps import BATCH, B, small
from tests.reference.compare import assert_close


def random_views(seed=0):
    rng = np.random.default_rng(seed)

    def embeddings(count):
        sizes = {"features": 8, "projection": 12, "prediction": 12, "scores": 10}
        return {key: (rng.normal(size=(count, B, size)) * 0.3).astype(np.float32) for key, size in sizes.items()}

    rows = rng.normal(size=(2 * B, 12)).astype(np.float32)
    memory = {"queue": rows, "center": (rng.normal(size=10) * 0.1).astype(np.float32)}
    return Views(embeddings(2), embeddings(2), memory, BATCH["label"], np.int32(0))


@cache
def gradients(name: str) -> Any:
    """(value, gradient by online, target and memory) of the loss, compiled."""

    def loss(parts, labels):
        return small(name).loss(Views(*parts, labels, jnp.int32(0)), axis_name=None)

    return jax.jit(jax.value_and_grad(loss))


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def cosines(a, b):
    return np.sum(unit(a) * unit(b), axis=1)


def asked(queries, keys, temperature, negatives=None):
    """Mean cross entropy of finding each query's own key among all keys, or among it and the negatives."""
    own, others = cosines(queries, keys)[:, None], unit(queries) @ unit(keys if negatives is None else negatives).T
    logits = others if negatives is None else np.concatenate([own, others], axis=1)
    return np.mean(np.log(np.exp(logits / temperature).sum(1)) - own[:, 0] / temperature)


def crosswise(f, a, b, **options):
    """Of each view's rows of `a` with the other view's of `b`, both [2, B, D]."""
    return f(a[0], b[1], **options) + f(a[1], b[0], **options)


def of_nnclr(s):
    queue = s.memory["queue"]
    nearest = [queue[(unit(rows) @ unit(queue).T).argmax(1)] for rows in s.online["projection"]]
    return crosswise(asked, nearest, s.online["prediction"], temperature=0.1) / 2


def of_mocov2(s):
    queue = s.memory["queue"]
    return crosswise(asked, s.online["projection"], s.target["projection"], temperature=0.2, negatives=queue) / 2


# Who is compared with whom; the losses themselves have their references in test_contrastive.
REFERENCES = {
    "mocov2": of_mocov2,
    "mocov3": lambda s: 2 * crosswise(asked, s.online["prediction"], s.target["projection"], temperature=1),
    "byol": lambda s: 4 - 2 * crosswise(cosines, s.online["prediction"], s.target["projection"]).mean(),
    "simsiam": lambda s: -crosswise(cosines, s.online["prediction"], s.online["projection"]).mean() / 2,
    "nnclr": of_nnclr,
}


@pytest.mark.parametrize("name", REFERENCES)
def test_objective_compares_each_view_with_the_other(name):
    views = random_views()
    value, _ = gradients(name)(views[:3], views.labels)
    assert float(value) == pytest.approx(float(REFERENCES[name](views)), rel=1e-5)


def test_options_reach_the_loss_and_the_memory():
    barlow = OBJECTIVES["barlow"].bind(scale=2.0, redundancy=0.5)
    dino = OBJECTIVES["dino"].bind(temperature=0.5, teacher_temperature=0.2, center_momentum=0.3)

    @jax.jit
    def both(views):
        scores = views.online["scores"], views.target["scores"], views.memory["center"]
        got = barlow.loss(views), dino.loss(views), dino.remember(views)["center"]
        want = (
            2 * c.barlow_twins(*views.online["projection"], redundancy=0.5),
            c.dino(*scores, temperature=0.5, teacher_temperature=0.2).mean(),
            0.3 * views.memory["center"] + 0.7 * scores[1].mean((0, 1)),
        )
        return got, want

    assert_close(*both(random_views()), rtol=1e-5, atol=1e-6)
    assert OBJECTIVES["dino"].options == {"temperature": 0.1, "teacher_temperature": 0.04, "center_momentum": 0.9}
    assert OBJECTIVES["byol"].options == {}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_flows_into_one_output_alone(name):
    """Not through projections in the target's place, nor through a target, nor through neighbours or assignments."""
    views, o = random_views(), OBJECTIVES[name]
    learns = "scores" if o.prototypes else "prediction" if o.predictor else "projection"
    value, (online, target, memory) = gradients(name)(views[:3], views.labels)
    assert {key for key, g in online.items() if np.abs(g).max() > 0} == {learns}
    assert all(np.abs(g).max(-1).all() for g in online[learns])  # both views, every example
    if name in ("byol", "dino"):  # the step takes care of the other targets
        assert not any(np.any(g) for g in jax.tree.leaves((target, memory)))
    # Labels matter only to SupCon.
    other, _ = gradients(name)(views[:3], np.roll(views.labels, 1))
    assert (float(value) != float(other)) == (name == "supcon")


def test_assignments_of_swav_stand_still():
    """The gradient of a cross entropy with fixed targets is softmax - target."""
    views, scores = random_views(), random_views().online["scores"]
    _, (online, _, _) = gradients("swav")(views[:3], views.labels)
    for v in (0, 1):
        want = (jax.nn.softmax(scores[v] / 0.1) - jax.jit(c.sinkhorn)(scores[1 - v])) / 0.1 / B / 2
        np.testing.assert_allclose(online["scores"][v], want, atol=1e-6)
