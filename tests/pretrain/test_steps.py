"""The pretraining step: every objective on one device and on eight, and the effect of each part."""

from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pretrain.config import PretrainConfig
from pretrain.from_config import make_momentum, make_network
from pretrain.heads import Network
from pretrain.objectives import OBJECTIVES, Objective, Views
from pretrain.state import init_pretrain_state, pretrain_digest, target_of
from pretrain.steps import contrastive_step, feature_step, outputs_of, similarities, view_step
from pretrain.views import make_views
from resnet_jax.augment import augment_batch, identity, normalize, random_crop
from resnet_jax.layers import BatchNorm, conv
from resnet_jax.masks import apply_masks, no_masks
from resnet_jax.parallel import axis_of, compile_step, make_mesh, replicated, shard_batch
from resnet_jax.tree import ema, is_kernel, leaves, map_with_path
from tests.reference.compare import assert_close, assert_near
from tests.reference.nets import CLASSES, tiny_tx

B, STEPS, FEATURES = 16, 3, 8
MODES = ("jit", "pmap", "shard_map")
MOMENTUM = 0.9
FROZEN = 2  # of the three steps
TX, PROBE_TX = tiny_tx(), optax.sgd(0.5)
FIELDS = ("params", "batch_stats", "ema", "memory", "probe", "opt_state")
WITH_TARGET = tuple(name for name, o in OBJECTIVES.items() if o.target is not None)


# ---- networks, views, runs -------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """The least that has a kernel and statistics: convolution, norm, mean."""

    axis_name: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, *, train):
        x = conv(FEATURES, 3, 2, dtype=self.dtype, name="conv")(x.astype(self.dtype))
        x = BatchNorm(use_running_average=not train, axis_name=self.axis_name, dtype=self.dtype, name="norm")(x)
        return nn.relu(x).mean((1, 2))


def small(name: str) -> Objective:
    o = OBJECTIVES[name]
    sizes = {"projector": (12, 12), "predictor": (12, 12)[: len(o.predictor)]}
    return replace(o, **sizes, queue=min(o.queue, 2 * B), prototypes=min(o.prototypes, 10))


def network_of(o: Objective, *, axis_name: str | None = None, dtype: str = "float32") -> Network:
    encoder = Encoder(axis_name, jnp.dtype(dtype))
    return make_network(PretrainConfig(dtype=dtype), o, axis_name, encoder=encoder)


def variables_of(model: nn.Module) -> dict[str, Any]:
    """Variables drawn by NumPy, which compiles nothing and never changes; biases too, so that all is at work."""
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name = path.rsplit("/", 1)[-1]
        if name == "kernel":
            return jnp.asarray(rng.normal(size=leaf.shape) * np.prod(leaf.shape[:-1]) ** -0.5, jnp.float32)
        values = rng.normal(size=leaf.shape) * 0.1 + (name in ("scale", "var"))
        return jnp.asarray(values if name in ("scale", "bias") else np.full(leaf.shape, name == "var"), jnp.float32)

    return {"batch_stats": {}, **map_with_path(draw, dict(shapes))}


def half_masks(params):
    """Half of each kernel's weights pruned, not by whole channels."""
    rng = np.random.default_rng(1)
    return map_with_path(
        lambda path, p: jnp.asarray(rng.permutation(p.size).reshape(p.shape) % 2 == 0 if is_kernel(path, p) else True),
        params,
    )


def init(objective: Objective, model: nn.Module, *, masks: bool = True, seed: int = 1) -> Any:
    variables = variables_of(model)
    masks = (half_masks if masks else no_masks)(variables["params"])
    variables = {**variables, "params": apply_masks(variables["params"], masks)}
    sizes = {"features": FEATURES, "classes": CLASSES}
    return init_pretrain_state(variables, objective, TX, PROBE_TX, jax.random.key(seed), **sizes, masks=masks)


def corner(key, image):
    """A small view: a random 4x4 cut."""
    top, left = jax.random.randint(key, (2,), 0, 5)
    return jax.lax.dynamic_slice(image, (top, left, jnp.zeros_like(top)), (4, 4, 3))


def views_of(name: str) -> tuple[Any, ...]:
    """Two views of one draw each, a third one for SupCon, and a small one where the objective takes them."""
    return (random_crop(1),) * (3 if name == "supcon" else 2) + (corner,) * small(name).small_views


def options_of(name: str, model: nn.Module) -> dict[str, Any]:
    return {
        "model": model,
        "tx": TX,
        "probe_tx": PROBE_TX,
        "views": views_of(name),
        "objective": small(name),
        "momentum": lambda step: jnp.asarray(MOMENTUM),
        "frozen_prototypes": FROZEN,
    }


# Coarse patterns, so that images differ after pooling too.
RNG = np.random.default_rng(0)
PATTERNS = RNG.integers(0, 256, (B, 2, 2, 3), dtype=np.uint8).repeat(4, axis=1).repeat(4, axis=2)
BATCH = {"image": PATTERNS, "label": RNG.integers(0, CLASSES, B).astype(np.int32)}


@dataclass(frozen=True)
class Run:
    """What three steps left: `states` before the first and after each one, on the host."""

    states: list[Any]
    metrics: list[dict[str, float]]
    traces: int
    donated: bool
    compiled: Any
    model: nn.Module

    def step(self, state, batch):
        """The compiled step again, on one device."""
        mesh = make_mesh(jax.devices()[:1])
        return self.compiled(jax.device_put(on_device(state), replicated(mesh)), shard_batch(batch, mesh))


@cache
def run(name: str, mode: str = "jit", devices: int = 1) -> Run:
    mesh = make_mesh(jax.devices()[:devices])
    model = network_of(small(name), axis_name=axis_of(mode))
    traces = []

    def counted(state, batch, **kwargs):
        traces.append(mode)
        return contrastive_step(state, batch, **options_of(name, model), **kwargs)

    step = compile_step(counted, mesh=mesh, mode=mode)
    first = state = jax.device_put(init(small(name), model), replicated(mesh))
    states, history = [on_host(state)], []
    for _ in range(STEPS):
        state, metrics = step(state, shard_batch(BATCH, mesh, mode=mode))
        states.append(on_host(state))
        history.append({key: float(value) for key, value in metrics.items()})
    # What a step only reads may be handed over or not; the key among it.
    moved = [leaf for field in FIELDS for leaf in jax.tree.leaves(getattr(first, field))]
    return Run(states, history, len(traces), all(leaf.is_deleted() for leaf in moved), step, model)


def on_host(state):
    """A copy that donation leaves alone; keys stay where they are."""
    return jax.tree.map(np.array, state.replace(key=None)).replace(key=jax.random.clone(state.key))


def on_device(state):
    """A state to hand to a compiled step, which may consume it."""
    return jax.tree.map(jnp.array, state.replace(key=None)).replace(key=jax.random.clone(state.key))


def differ(a, b):
    """Whether any leaf differs."""
    return any(not np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


# ---- modes -----------------------------------------------------------------------------------------------------------


MODES_OF = [("mocov2", "shard_map"), ("mocov2", "jit"), ("dino", "pmap")]
MODES_OF += [(name, "shard_map") for name in OBJECTIVES if name != "mocov2"]


@pytest.mark.parametrize(
    ("name", "mode"), [MODES_OF[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in MODES_OF[1:])]
)
def test_eight_devices_equal_one(name, mode):
    want, got = run(name), run(name, mode, 8)
    assert (got.traces, want.traces) == (1, 1)
    assert got.donated and want.donated
    assert int(got.states[-1].step) == STEPS
    for field in FIELDS:
        assert_near(getattr(got.states[-1], field), getattr(want.states[-1], field), floor=1)
        # An objective may have none; but what there is moves.
        first, last = (getattr(s, field) for s in (want.states[0], want.states[-1]))
        assert differ(first, last) == bool(jax.tree.leaves(first)), field
    for mine, one in zip(got.metrics, want.metrics, strict=True):
        assert mine == pytest.approx(one, rel=1e-4, abs=1e-5)


METRICS = (
    "loss", "probe_loss", "probe_accuracy", "grad_norm",
    "projection_std", "projection_similarity", "projection_negative_similarity",
)  # fmt: skip
GOLDEN = {
    "simclr": (2.532343, 1.300386, 0.375, 2.888364, 0.971766, 0.617823, -0.029670),
    "supcon": (3.856457, 1.292140, 0.375, 0.678163, 0.178947, 0.987330, 0.954810),
    "mocov2": (2.648452, 1.290803, 0.375, 1.283198, 0.235161, 0.981751, 0.923423),
    "mocov3": (11.225862, 1.285000, 0.375, 3.637693, 0.989352, 0.634836, -0.047971),
    "byol": (3.422010, 1.300222, 0.375, 4.019266, 0.795680, 0.629391, 0.248334),
    "simsiam": (0.033517, 1.285148, 0.375, 1.001562, 0.988878, 0.644160, -0.048720),
    "barlow": (0.373290, 1.286947, 0.375, 5.085277, 0.760414, 0.872746, 0.290890),
    "vicreg": (16.081476, 1.287262, 0.375, 12.962824, 0.751538, 0.831034, 0.299625),
    "nnclr": (3.964437, 1.284711, 0.375, 14.391061, 0.976854, 0.676522, -0.031270),
    "swav": (2.793377, 1.286976, 0.375, 5.273396, 0.718348, 0.836012, 0.359030),
    "dino": (0.746790, 1.290696, 0.375, 1.777965, 0.119212, 0.996345, 0.980675),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_metrics(name):
    """The metrics of the second step, pinned: any change of the mathematics shows here."""
    got = run(name).metrics[1]
    assert [got[metric] for metric in METRICS] == pytest.approx(GOLDEN[name], rel=1e-3, abs=1e-4)
    assert got.keys() == set(METRICS)


# ---- one step, written out again -------------------------------------------------------------------------------------


def views_by_hand(name, key, step):
    """The step's views [V, B, h, w, C], one array for each size, by the run's key."""
    key = jax.random.fold_in(key, step)
    made = []
    for v, view in enumerate(views_of(name)):
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.fold_in(key, v)))(jnp.arange(B))
        made.append(augment_batch(view, keys, jnp.asarray(BATCH["image"])))
    parts = [[x for x in made if x.shape[1] == size] for size in (8, 4)]
    return [jnp.stack(part) for part in parts if part]


def test_byol_step_is_the_gradient_towards_a_target_that_stands_still():
    """Gradient, decay, momentum, masks; the probe; the target's parameters and statistics. From the second step on."""
    before, after, metrics = run("byol").states[1], run("byol").states[2], run("byol").metrics[1]
    model = run("byol").model

    @jax.jit
    def plain(state):
        flat = views_by_hand("byol", state.key, state.step)[0].reshape(-1, 8, 8, 3)
        target, target_stats = model.apply(state.ema, flat, train=True, predict=False, mutable=["batch_stats"])
        ours = target["projection"].reshape(2, B, -1)

        def loss(params, probe):
            variables = {"params": params, "batch_stats": state.batch_stats}
            online, stats = model.apply(variables, flat, train=True, mutable=["batch_stats"])
            predictions = online["prediction"].reshape(2, B, -1)
            value = 0.0
            for v in (0, 1):
                p, t = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (predictions[v], ours[1 - v]))
                value += jnp.sum(jnp.square(p - t), axis=-1).mean()
            still = jax.lax.stop_gradient(online["features"][:B])
            logits = still @ probe["kernel"] + probe["bias"][None]
            probe_loss = optax.softmax_cross_entropy_with_integer_labels(logits, BATCH["label"]).mean()
            return value + probe_loss, (stats["batch_stats"], value, probe_loss)

        gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
        grads, (stats, value, probe_loss) = gradient(state.params, state.probe["params"])
        updates, _ = TX.update(grads[0], state.opt_state, state.params)
        params = apply_masks(optax.apply_updates(state.params, updates), state.masks)
        probe = jax.tree.map(lambda p, g: p - 0.5 * g, state.probe["params"], grads[1])
        return params, stats, probe, target_stats["batch_stats"], value, probe_loss, optax.tree.norm(grads[0])

    params, stats, probe, target_stats, *values = plain(on_device(before))
    assert_close(after.params, params, atol=1e-6, rtol=1e-5)
    assert_close(after.batch_stats, stats, atol=1e-6, rtol=1e-5)
    assert_close(after.probe["params"], probe, atol=1e-6, rtol=1e-5)
    assert_close(after.ema["batch_stats"], target_stats, atol=1e-6, rtol=1e-5)
    assert [metrics[key] for key in ("loss", "probe_loss", "grad_norm")] == pytest.approx(
        [float(value) for value in values], rel=1e-4
    )
    # The target's statistics are not the trained network's.
    assert differ(target_of({"batch_stats": stats})["batch_stats"], target_stats)


@cache
def views_seen(name: str) -> Any:
    """`state -> Views`, the inputs of the objective in a step of the run on one device, by passes of their own."""
    model = run(name).model

    @jax.jit
    def compiled(state):
        images, target = [x.swapaxes(0, 1) for x in views_by_hand(name, state.key, state.step)], {}
        online, _ = outputs_of(model, state.variables, images)
        if state.ema is not None:
            target, _ = outputs_of(model, state.ema, images[:1], predict=False)
        return online, target, state.memory, BATCH["label"], state.step

    return lambda state: Views(*jax.device_get(compiled(on_device(state))))


@cache
def embeddings_by_hand(name: str, number: int) -> Views:
    return views_seen(name)(run(name).states[number])


@pytest.mark.parametrize("name", ["mocov2", "nnclr", "dino"])
def test_losses_are_of_what_the_networks_make_of_the_views(name):
    views, metrics = embeddings_by_hand(name, 2), run(name).metrics[2]
    loss = jax.jit(partial(small(name).loss, axis_name=None))(views)
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-4)
    # The probe learns from the network that is used afterwards.
    features = (views.target if name == "dino" else views.online)["features"][0]
    probe = run(name).states[2].probe["params"]
    logits = features @ probe["kernel"] + probe["bias"]
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(B), BATCH["label"]]
    assert metrics["probe_loss"] == pytest.approx(losses.mean(), rel=1e-4)
    assert metrics["probe_accuracy"] == pytest.approx((logits.argmax(1) == BATCH["label"]).mean())
    spread = spread_of(*views.online["projection"][:2])
    assert {key: metrics[key] for key in spread} == pytest.approx(spread, rel=1e-3, abs=1e-4)


# ---- what stands still -----------------------------------------------------------------------------------------------


def test_target_is_not_differentiated():
    objective = small("mocov2")
    model = network_of(objective)
    state = init(objective, model, masks=False)
    # From parameters of its own, where the loss is not at its least.
    state = state.replace(ema=jax.tree.map(lambda x: x + 0.1, state.ema))
    options = {**options_of("mocov2", model), "views": (identity, lambda key, image: 1 - image)}

    @jax.jit
    @jax.grad
    def gradient(both):
        new = state.replace(params=both[0], ema=both[1])
        return contrastive_step(new, BATCH, **options)[1]["loss"]

    ours, target = gradient((state.params, state.ema))
    assert any(np.any(g) for g in jax.tree.leaves(ours))
    assert jax.tree.leaves(target) and not any(np.any(g) for g in jax.tree.leaves(target))


def test_nothing_learns_from_the_probe():
    """Other labels, another probe: the network goes the same way to the last bit. The probe starts by guessing."""
    done = run("simclr")
    losses = [metrics["probe_loss"] for metrics in done.metrics]
    assert losses == sorted(losses, reverse=True) and losses[0] == pytest.approx(np.log(CLASSES), rel=1e-5)
    labels = (BATCH["label"] + 1) % CLASSES
    other, metrics = done.step(done.states[0], {**BATCH, "label": labels})
    assert pretrain_digest(other) != pretrain_digest(done.states[1])
    for field in ("params", "batch_stats", "opt_state"):
        assert not differ(getattr(other, field), getattr(done.states[1], field))
    assert differ(other.probe["params"], done.states[1].probe["params"])
    assert float(metrics["grad_norm"]) == done.metrics[0]["grad_norm"]

    rng = np.random.default_rng(0)
    probe = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), done.states[0].probe)
    other, metrics = done.step(done.states[0].replace(probe=probe), BATCH)
    assert not differ(other.params, done.states[1].params)
    assert float(metrics["probe_loss"]) != pytest.approx(done.metrics[0]["probe_loss"], rel=1e-2)


# ---- target, memory, prototypes, masks -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_TARGET)
def test_target_follows(name):
    for old, new in pairwise(run(name).states):
        assert new.ema["params"].keys() == {"encoder", "projector"} | ({"prototypes"} if name == "dino" else set())
        trained = {part: new.params[part] for part in new.ema["params"]}
        assert_close(new.ema["params"], ema(old.ema["params"], trained, MOMENTUM), atol=1e-6, rtol=1e-5)
        assert new.ema["batch_stats"].keys() == {"encoder", "projector"} & new.batch_stats.keys()
    # At first both networks are the same, and so are their statistics of the large views, but not for long.
    own = [target_of({"batch_stats": s.batch_stats})["batch_stats"] for s in run(name).states]
    assert not differ(own[0], run(name).states[0].ema["batch_stats"])
    assert differ(own[2], run(name).states[2].ema["batch_stats"])


def test_target_without_a_momentum():
    model = network_of(small("byol"))
    options = {**options_of("byol", model), "momentum": None}
    with pytest.raises(ValueError, match="target network, which needs a momentum: pass one"):
        jax.eval_shape(partial(contrastive_step, **options), jax.eval_shape(lambda: init(small("byol"), model)), BATCH)


def test_momentum_schedules():
    assert make_momentum(OBJECTIVES["simclr"], 100) is None
    constant = make_momentum(OBJECTIVES["mocov2"], 100)
    assert [float(constant(jnp.int32(step))) for step in (0, 50, 100)] == pytest.approx([0.999] * 3)
    grows = make_momentum(replace(OBJECTIVES["byol"], target=0.9), 100)
    got = [float(grows(jnp.int32(step))) for step in (0, 25, 50, 100)]
    assert got == pytest.approx([0.9, 1 - 0.1 * (1 + 0.5**0.5) / 2, 0.95, 1.0], abs=1e-6)
    fixed = make_momentum(replace(OBJECTIVES["byol"], momentum_schedule="constant"), 100)
    assert float(fixed(jnp.int32(100))) == pytest.approx(0.996)


@pytest.mark.parametrize(("name", "network"), [("mocov2", "target"), ("nnclr", "online")])
@pytest.mark.parametrize("number", [1, 2])
def test_queue_takes_the_first_view(name, network, number):
    """The second batch behind the first, the third in place of it."""
    old, new = (s.memory["queue"] for s in run(name).states[number : number + 2])
    rows = getattr(embeddings_by_hand(name, number), network)["projection"][0]
    want, start = old.copy(), B * (number % 2)
    want[start : start + B] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(new, want, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(run(name).states[0].memory["queue"], axis=1), 1, atol=1e-6)


def test_center_moves_to_the_mean_of_the_targets_scores():
    old, new = (s.memory["center"] for s in run("dino").states[2:])
    scores = embeddings_by_hand("dino", 2).target["scores"]
    assert scores.shape == (2, B, 10)
    np.testing.assert_allclose(new, 0.9 * old + 0.1 * scores.mean((0, 1)), atol=1e-6)
    assert not run("dino").states[0].memory["center"].any()


@pytest.mark.parametrize("name", ["swav", "dino"])
def test_prototypes_are_frozen_for_so_many_steps(name):
    """Against weight decay too, which pulls at what has no gradient."""
    kernels = [s.params["prototypes"]["kernel"] for s in run(name).states]
    for kernel in kernels[1 : FROZEN + 1]:
        np.testing.assert_array_equal(kernel, kernels[0])
    assert differ(kernels[FROZEN + 1], kernels[0])
    others = [{k: v for k, v in s.params.items() if k != "prototypes"} for s in run(name).states]
    assert all(differ(a, b) for a, b in pairwise(others))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_masked_weights_stay_zero_under_momentum_and_decay(name):
    first, *states = run(name).states
    for state in states:
        assert not differ(state.params, apply_masks(state.params, first.masks))
        if state.ema is not None:
            masks = target_of({"params": first.masks})["params"]
            assert not differ(state.ema["params"], apply_masks(state.ema["params"], masks))
        assert not differ(state.masks, first.masks)
    for path, leaf in leaves(states[-1].params).items():
        if path.endswith("kernel"):
            assert (leaf == 0).mean() == pytest.approx(0.5, abs=0.05), path


def test_target_is_masked_as_the_network_is():
    """Though it was not before: what has just been pruned leaves the target at once."""
    first = run("byol").states[0]
    full = jax.tree.map(lambda x: x + 1, first.ema["params"])
    new, _ = run("byol").step(first.replace(ema={**first.ema, "params": full}), BATCH)
    trained, masks = target_of({"params": new.params, "masks": first.masks}).values()
    assert_close(new.ema["params"], apply_masks(ema(full, trained, MOMENTUM), masks), atol=1e-6)


def test_state_at_the_start():
    objective = small("byol")
    state = init(objective, network_of(objective))
    assert state.ema["params"].keys() == {"encoder", "projector"} != state.params.keys()
    assert not differ(state.ema, target_of({"params": state.params, "batch_stats": state.batch_stats}))
    assert {id(x) for x in jax.tree.leaves(state.ema)}.isdisjoint(id(x) for x in jax.tree.leaves(state.params))
    assert not any(x.any() for x in jax.tree.leaves(state.probe["params"]))
    assert state.memory == {}
    assert state.variables == {"params": state.params, "batch_stats": state.batch_stats}  # not the target's
    assert not differ(state.encoder()["params"], state.params["encoder"])
    changed = state.replace(ema=jax.tree.map(lambda x: x + 1, state.ema))
    assert not differ(changed.encoder(target=True), jax.tree.map(lambda x: x + 1, state.encoder()))


def test_digest_sees_every_part():
    state = run("dino").states[1]

    def other(tree):
        return jax.tree.map(lambda x: x ^ True if x.dtype == bool else x + 1, tree)

    names = ("params", "batch_stats", "masks", "ema", "memory", "probe")
    digests = {pretrain_digest(state.replace(**{name: other(getattr(state, name))})) for name in names}
    assert len(digests | {pretrain_digest(state)}) == 7
    assert pretrain_digest(on_device(state)) == pretrain_digest(state)


# ---- what the objective is shown -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["supcon", "mocov2", "mocov3", "nnclr", "swav", "dino"])
def test_objective_sees_views_by_name(name):
    shown = []

    def loss(views, *, axis_name):
        shown.append(jax.tree.map(jnp.shape, views))
        return views.online["projection"].sum()

    objective = replace(small(name), loss=loss)
    model = network_of(objective)
    options = {**options_of(name, model), "objective": objective}
    state = jax.eval_shape(lambda: init(objective, model))
    new, _ = jax.eval_shape(partial(contrastive_step, **options), state, BATCH)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), state)

    views = {"supcon": 3, "swav": 3, "dino": 3}.get(name, 2)
    online = {"features": (views, B, FEATURES), "projection": (views, B, 12)}
    online |= {"prediction": (views, B, 12)} if objective.predictor else {}
    online |= {"scores": (views, B, 10)} if objective.prototypes else {}
    # Large views alone, and no predictor.
    target = {key: (2, *shape[1:]) for key, shape in online.items() if key != "prediction"}
    memory = {"mocov2": {"queue": (32, 12)}, "nnclr": {"queue": (32, 12)}, "dino": {"center": (10,)}}.get(name, {})
    assert shown == [Views(online, target if name in WITH_TARGET else {}, memory, (B,), ())]


def test_passes_follow_one_another_in_the_statistics():
    """Views of two sizes: the second pass starts from the statistics of the first."""
    model = network_of(small("simclr"))
    variables = variables_of(model)
    images = [jnp.asarray(BATCH["image"][:, None, :size, :size], jnp.float32) / 255 for size in (8, 4)]
    go = jax.jit(partial(outputs_of, model))
    both, stats = go(variables, images)
    first, between = go(variables, images[:1])
    second, after = go({**variables, "batch_stats": between}, images[1:])
    assert_close(stats, after, atol=1e-6)
    assert_close(both, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second), atol=1e-5)
    assert differ(between, after)


# ---- metrics ---------------------------------------------------------------------------------------------------------


def spread_of(a, b):
    """The metrics of embeddings in float64, pair by pair."""
    a, b = (x.astype(np.float64) / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    pairs = [(i, j) for i in range(len(a)) for j in range(len(a)) if i != j]
    return {
        "projection_std": np.mean([x.std(0).mean() * a.shape[1] ** 0.5 for x in (a, b)]),
        "projection_similarity": np.mean([x @ y for x, y in zip(a, b, strict=True)]),
        "projection_negative_similarity": np.mean([x[i] @ x[j] for x in (a, b) for i, j in pairs]),
    }


def test_similarities():
    """Of isotropic embeddings, against NumPy; of embeddings collapsed to zero and to a point."""
    rng = np.random.default_rng(0)
    go = jax.jit(similarities)
    a, b = rng.normal(size=(2, 200, 32)).astype(np.float32)
    got = {key: float(value) for key, value in go(a, b).items()}
    assert got == pytest.approx(spread_of(a, b), rel=1e-4, abs=1e-6)
    assert got["projection_std"] == pytest.approx(1, abs=0.02)
    for point, cosine in ((np.zeros(32), 0), (rng.normal(size=32), 1)):
        same = np.broadcast_to(point, a.shape).astype(np.float32)
        got = {key: float(value) for key, value in go(same, same).items()}
        want = {"projection_similarity": cosine, "projection_negative_similarity": cosine, "projection_std": 0}
        assert got == pytest.approx(want, abs=1e-3)


def test_bfloat16_computes_low_and_keeps_float32():
    model = network_of(small("simclr"), dtype="bfloat16")
    state = init(small("simclr"), model)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    views = jax.eval_shape(partial(model.apply, train=False), variables, jnp.zeros((1, 8, 8, 3)))
    assert {x.dtype for x in views.values()} == {jnp.dtype(jnp.float32)}
    state, metrics = jax.jit(partial(contrastive_step, **options_of("simclr", model)))(state, BATCH)
    for leaf in jax.tree.leaves((state.params, state.batch_stats, state.probe, metrics)):
        assert leaf.dtype == jnp.float32 and np.isfinite(leaf).all()
    exact = run("simclr").metrics[0]
    assert float(metrics["loss"]) == pytest.approx(exact["loss"], rel=0.02)
    assert float(metrics["loss"]) != exact["loss"]


# ---- features --------------------------------------------------------------------------------------------------------

ROWS = {**BATCH, "valid": np.arange(B) < 13}


@pytest.mark.parametrize("mode", MODES)
def test_features_of_the_whole_batch_in_order(mode):
    """Those of the images, and those of two views, which are the same in every call; equal on all devices."""
    mesh, encoder, views = make_mesh(), Encoder(), (random_crop(1), random_crop(2))
    variables = variables_of(encoder)

    def step(variables, batch, **options):
        plain = feature_step(variables, batch, encoder=encoder, preprocess=normalize(0.5, 0.25), **options)
        return plain, view_step(variables, batch, encoder=encoder, views=views, **options)

    compiled = compile_step(step, mesh=mesh, mode=mode, donate=False)
    got = compiled(jax.device_put(variables, replicated(mesh)), shard_batch(ROWS, mesh, mode=mode))
    assert all(x.is_fully_replicated for x in jax.tree.leaves(got))
    plain, pair = jax.device_get(got)

    @jax.jit
    def by_hand(images):
        (both,) = make_views(views, jax.random.key(0), jnp.arange(B), images)
        normal = (images.astype(jnp.float32) / 255 - 0.5) / 0.25
        return [encoder.apply(variables, x, train=False) for x in (normal, both[:, 0], both[:, 1])]

    for x, want in zip((plain["features"], pair["a"], pair["b"]), by_hand(BATCH["image"]), strict=True):
        np.testing.assert_allclose(x, want, atol=1e-5)
        assert x.dtype == np.float32 and len(np.unique(x.round(4), axis=0)) == B
    np.testing.assert_array_equal(plain["label"], BATCH["label"])
    for rows in (plain, pair):
        np.testing.assert_array_equal(rows["valid"], ROWS["valid"])
    assert pair.keys() == {"a", "b", "valid"}
