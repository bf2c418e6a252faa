"""Learning-rate schedules and optimizers by name; any optax chain works in place of these."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from resnet_jax.tree import Predicate, is_kernel, select
from train.errors import UsageError, unknown

Schedule = Callable[[Any], Any]  # step -> learning rate


def step_decay(peak: float, steps: int, milestones: Sequence[float] = (0.5, 0.75), factor: float = 0.1) -> Schedule:
    """Multiply `peak` by `factor` at each of `milestones`, fractions of all steps (He et al. 2015 on CIFAR)."""
    drops: dict[int, float] = {}
    for m in milestones:  # several fall on the same step of a short run
        drops[round(m * steps)] = drops.get(round(m * steps), 1.0) * factor
    return optax.piecewise_constant_schedule(peak, drops)


def one_cycle(peak: float, steps: int, warmup: int = 0) -> Schedule:
    """Rise to `peak` along a cosine for `warmup` steps (30 % of all if 0), then fall: https://arxiv.org/abs/1708.07120."""
    rise = warmup or max(int(0.3 * steps), 1)
    # The first rate is 1/25 of the peak, and the last 1/10,000 of the first.
    return optax.piecewise_interpolate_schedule("cosine", peak / 25, {rise: 25.0, max(steps, rise + 1): 1 / 25e4})


# (peak, steps, **options) -> schedule
SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "cosine": optax.cosine_decay_schedule,  # half a cosine to 0, https://arxiv.org/abs/1608.03983
    "linear": lambda peak, steps: optax.linear_schedule(peak, 0.0, steps),
    "step": step_decay,
    "constant": lambda peak, steps: optax.constant_schedule(peak),
}


def make_schedule(name: str, *, peak: float, steps: int, warmup: int = 0, **options: Any) -> Schedule:
    """Make a schedule by name over `steps` in total, with a linear rise to `peak` over the first `warmup`.

    `one_cycle` rises along a cosine instead, see there. `options` are passed to the schedule: `milestones`, fractions
    of all steps including the warm-up, and `factor` for `step`.

    Raises:
      UsageError: an unknown name.
    """
    if name == "one_cycle":
        return one_cycle(peak, steps, warmup)
    if name not in SCHEDULES:
        raise unknown("schedule", name, [*SCHEDULES, "one_cycle"])
    if name == "step":
        whole = step_decay(peak, steps, **options)
        after: Schedule = lambda step: whole(step + warmup)  # noqa: E731
    else:
        after = SCHEDULES[name](peak, max(steps - warmup, 1), **options)
    if not warmup:
        return after
    # Step 0 already has a nonzero rate, and the line reaches the peak at step `warmup`.
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, after], [warmup])


def sgd(schedule: Schedule, *, momentum: float, nesterov: bool, weight_decay: float, mask: Any) -> Any:
    """SGD with momentum and L2 added to the gradient, as in torch.optim.SGD."""
    decay = optax.add_decayed_weights(weight_decay, mask)
    return optax.chain(decay, optax.sgd(schedule, momentum=momentum, nesterov=nesterov))


def lars(schedule: Schedule, *, mask: Any, **options: Any) -> Any:
    """LARS, https://arxiv.org/abs/1708.03888: the trust ratio applies where weight decay does."""
    return optax.lars(schedule, weight_decay_mask=mask, trust_ratio_mask=mask, **options)


# (schedule, *, momentum, nesterov, weight_decay, mask, **options) -> optimizer
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": sgd,
    # https://arxiv.org/abs/1711.05101
    "adamw": lambda schedule, momentum, **options: optax.adamw(schedule, b1=momentum, **options),
    "lars": lars,
    # https://arxiv.org/abs/1904.00962; Nesterov does not apply
    "lamb": lambda schedule, momentum, nesterov, **options: optax.lamb(schedule, b1=momentum, **options),
}


def make_optimizer(
    name: str,
    schedule: Schedule,
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decay: Predicate = is_kernel,
    clip_norm: float | None = None,
    trainable: Predicate | None = None,
    **options: Any,
) -> optax.GradientTransformation:
    """Make an optimizer by name: one of `OPTIMIZERS`, or any optax optimizer with a learning rate, e.g. `optax.adan`.

    Args:
      weight_decay: applies to the parameters that `decay` selects; not to norms and biases by default.
      clip_norm: largest global norm of the gradient, > 0; None does not clip.
      trainable: selects the parameters to update; the rest stay fixed. None updates all.
      options: specific to the optimizer: `trust_coefficient` for `lars`.

    Raises:
      UsageError: an unknown name.
    """
    mask = partial(select, predicate=decay)
    if name in OPTIMIZERS:
        tx = OPTIMIZERS[name](
            schedule, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, mask=mask, **options
        )
    else:
        tx = _from_optax(name, schedule, weight_decay, mask)
    if clip_norm is not None:
        tx = optax.chain(optax.clip_by_global_norm(clip_norm), tx)
    if trainable is None:
        return tx

    def group(params: Any) -> Any:
        return jax.tree.map(lambda selected: "train" if selected else "freeze", select(params, trainable))

    return optax.partition({"train": tx, "freeze": optax.set_to_zero()}, group)


def _from_optax(name: str, schedule: Schedule, weight_decay: float, mask: Any) -> optax.GradientTransformation:
    factory: Any = optax if name.startswith("optax.") else None
    for part in name.split(".")[1:]:  # optax.NAME and optax.contrib.NAME
        factory = getattr(factory, part, None)
    accepted = inspect.signature(factory).parameters if inspect.isfunction(factory) else {}
    if "learning_rate" not in accepted:
        raise unknown("optimizer", name, [*OPTIMIZERS, "optax.NAME"], other=_optax_names())
    options: dict[str, Any] = {}
    masked = next((option for option in ("mask", "weight_decay_mask") if option in accepted), None)
    if "weight_decay" in accepted:
        options = {"weight_decay": weight_decay, masked: mask} if masked else {"weight_decay": 0.0}
    else:
        masked = None
    try:
        tx = factory(learning_rate=schedule, **options)
        _check_fits(tx)
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{name} does not fit a train step, which passes only gradients and parameters to an "
                         f"optimizer with a scheduled rate: {str(error).splitlines()[0]}") from None  # fmt: skip
    # An optimizer that cannot decay the masked parameters alone gets L2 in its gradient.
    return tx if masked or not weight_decay else optax.chain(optax.add_decayed_weights(weight_decay, mask), tx)


def _check_fits(tx: optax.GradientTransformation) -> None:
    """Update a small tree of parameters, abstractly; raises what the optimizer raises, or `ValueError`."""
    params = {"layer": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}

    def update(params: Any) -> Any:
        state = tx.init(params)
        return state, tx.update(params, state, params)[1]

    states, _ = jax.eval_shape(update, params)
    if any(jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(states)):
        raise ValueError("its state holds a random key, which checkpoints do not store")
    free = optax.contrib.ScheduleFreeState
    if any(isinstance(x, free) for x in jax.tree.leaves(states, is_leaf=lambda x: isinstance(x, free))):
        raise ValueError("it trains different parameters from those to evaluate")


def _optax_names() -> list[str]:
    functions = {"optax.": vars(optax), "optax.contrib.": vars(optax.contrib)}
    return [
        prefix + name
        for prefix, members in functions.items()
        for name, f in members.items()
        if inspect.isfunction(f) and name[0] != "_" and "learning_rate" in inspect.signature(f).parameters
    ]
