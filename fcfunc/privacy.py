"""Differentially private training: clipped gradients with noise, random batches, and what they guarantee.

The guarantee: the parameters after all steps are (ε, δ)-differentially private with respect to adding or removing one
example, if every batch is drawn by `poisson_batch` with a key of its own, every step uses `private_mean`, and `epsilon`
is given the rate, the noise multiplier and the number of all steps that were taken. It does not cover what is published
besides the parameters: the metrics of a step, a choice of hyperparameters or of a step by looking at the data, and
statistics of the data such as a standardization. The rate and the expected batch size must be fixed without looking at
the data, and the loss and the inputs of an example must depend on that example alone: clipping does not bound a loss
that is divided by the number of included examples. The keys must be secret, drawn from the operating system and used
for one run alone, and a saved state holds one: what two runs with one key publish shares its noise. Arithmetic is in
floating-point numbers, and the random numbers are those of `jax.random`, which are not made for cryptography.
"""

from __future__ import annotations  # short signatures in help()

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fcfunc import _arguments, _layout, per_example
from fcfunc._rule import upcast

__all__ = ["PoissonBatch", "batch_capacity", "epsilon", "noise_multiplier", "poisson_batch", "private_mean"]

OVERFLOW = 1e-12
"""The probability with which a random batch is larger than its capacity, and some of its examples are left out."""


LEAST_NOISE = 0.2
"""The noise multiplier below which the accountant needs gigabytes, and there is hardly any privacy."""


class PoissonBatch(NamedTuple):
    """A batch of a random number of examples, in arrays of a fixed size.

    Attributes:
      examples: arrays `[capacity, ...]`, in the structure of the data; those that are not included repeat an example.
      included: `[capacity]`, booleans.
    """

    examples: Any
    included: jax.Array


def batch_capacity(count: int, rate: float) -> int:
    """The size of the arrays of a batch that holds each of `count` examples with probability `rate`.

    More examples than that are drawn with a probability below 1e-12, by the Chernoff bound.

    Args:
      count: the number of examples, at least 1.
      rate: above 0 and at most 1.

    Returns:
      The capacity, at most `count`.

    Raises:
      ValueError: `count` or `rate` is out of range.

    Example:
      >>> batch_capacity(60_000, 256 / 60_000)
      384
    """
    _arguments.positive("batch_capacity", count=count)
    rate = _rate("batch_capacity", rate)

    def log_tail(k):  # log P(at least k) ≤ −n KL(k/n ‖ rate)
        a = k / count
        rest = 0.0 if k == count else (1 - a) * math.log((1 - a) / (1 - rate))
        return -count * (a * math.log(a / rate) + rest)

    low, high = max(math.ceil(rate * count), 1), count
    while low < high:  # the smallest capacity that others than one example fill with a small enough probability
        middle = (low + high) // 2
        if log_tail(middle) <= math.log(OVERFLOW):
            high = middle
        else:
            low = middle + 1
    return low


def poisson_batch(key: jax.Array, data: Any, *, rate: float) -> PoissonBatch:
    """A batch that includes each example with probability `rate`, independently: Poisson sampling.

    Args:
      key: a random key, another one for each step.
      data: arrays that share their leading axis, the examples.
      rate: above 0 and at most 1; `rate` times the number of examples are included on average.

    Returns:
      A `PoissonBatch` of `batch_capacity` examples, also inside a compiled function. Data whose examples are divided
      over the devices of a mesh give a batch that is too, with room for a few more if they do not divide the capacity.

    Raises:
      ValueError: `rate` is out of range; the arrays differ in their number of examples.
      TypeError: no key.

    Source: Abadi et al. 2016, Deep Learning with Differential Privacy, section 3.1.

    Example:
      >>> batch = poisson_batch(jax.random.key(0), (jnp.arange(1000.0), jnp.arange(1000)), rate=0.05)
      >>> batch.examples[0].shape, int(jnp.sum(batch.included))
      ((109,), 53)
    """
    where = "poisson_batch"
    _arguments.key(where, key)
    count = _arguments.count(where, data)
    shardings = _layout.shardings(data)
    over = _layout.example_axes(shardings)
    devices = over.devices if over else 1
    capacity = devices * math.ceil(batch_capacity(count, rate) / devices)
    # Bits, and not uniform floats, which would include each example a little too often.
    threshold = min(math.floor(_rate(where, rate) * 2**32), 2**32 - 1)
    drawn = jax.random.bits(key, (count,), jnp.uint32) < jnp.uint32(threshold)
    (indices,) = jnp.nonzero(drawn, size=capacity, fill_value=0)
    leaves, treedef = jax.tree.flatten(data)
    rows = [_layout.gather_rows(a, s, indices=indices) for a, s in zip(leaves, shardings, strict=True)]
    return PoissonBatch(treedef.unflatten(rows), jnp.arange(capacity) < jnp.sum(drawn))


def private_mean(*, max_norm: float, noise_multiplier: float, expected_batch_size: float) -> Callable:
    r"""The gradient of a private step, as the `aggregate` of `train.make_train_step`: clipped, summed, with noise.

    .. math:: \Big(\sum_i ∇_i \min(1, C / |∇_i|) + C σ z\Big) / B, \quad z \sim N(0, I)

    Examples that are not included count as 0. So does an example whose gradient is not finite, whose clipped gradient
    would be undefined: the guarantee holds for it too. If `metrics["loss"]` is NaN and `clipped` is 1 in every
    step, the loss mixes examples, all of them count as 0, and the parameters move by the noise alone.

    Args:
      max_norm: `C`, above 0: what an example adds to the sum at most.
      noise_multiplier: `σ`, at least 0; with 0 there is no privacy, only clipping.
      expected_batch_size: `B`, the sampling rate times the number of examples; the actual number is not private.

    Returns:
      `aggregate(losses, gradients, batch, key) -> (loss, gradient, metrics)`. The metrics, which are NOT private, are
      `included`, the number of examples, and `clipped`, the fraction of them whose gradient was larger than `C`.

    Raises:
      ValueError: a number out of range.
      TypeError: a step is given a batch that is not from `poisson_batch`.

    Source: Abadi et al. 2016, Deep Learning with Differential Privacy, algorithm 1.

    Example:
      >>> import optax
      >>> from fcfunc import train
      >>> net, optimizer = fcfunc.mlp([2, 1]), optax.sgd(0.1)
      >>> def loss_fn(params, batch, key):
      ...     x, y = batch.examples
      ...     return net.example_gradients(params, x, lambda outputs: (outputs[:, 0] - y) ** 2)
      >>> aggregate = private_mean(max_norm=1.0, noise_multiplier=1.1, expected_batch_size=50)
      >>> step = train.make_train_step(loss_fn, optimizer, aggregate=aggregate)
      >>> state = train.init_state(net.init(jax.random.key(0)), optimizer, jax.random.key(1))
      >>> data = jnp.ones((1000, 2)), jnp.ones(1000)
      >>> state, metrics = step(state, poisson_batch(jax.random.key(2), data, rate=0.05))
      >>> sorted(metrics)
      ['clipped', 'included', 'loss']
    """
    where = "private_mean"
    numbers = {"max_norm": max_norm, "noise_multiplier": noise_multiplier, "expected_batch_size": expected_batch_size}
    clip, sigma, size = (_arguments.number(where, **{name: value}) for name, value in numbers.items())
    if not (0 < clip < math.inf and 0 <= sigma < math.inf and 0 < size < math.inf):
        given = ", ".join(f"{name}={value}" for name, value in numbers.items())
        raise ValueError(f"{where}: expected max_norm > 0, noise_multiplier >= 0, expected_batch_size > 0, got {given}")

    def aggregate(losses, gradients, batch, key):
        if not isinstance(batch, PoissonBatch):
            given = type(batch).__name__
            raise TypeError(
                f"{where}: a step needs a batch from privacy.poisson_batch, as the guarantee does, got {given}"
            )
        squared = per_example.whole_squared_norms(where, gradients)
        if not losses.shape == squared.shape == batch.included.shape:
            shapes = f"{list(losses.shape)}, {list(squared.shape)} and {list(batch.included.shape)}"
            raise ValueError(f"{where}: losses, gradients and batch must have as many examples, got {shapes}")
        counted = batch.included & jnp.isfinite(squared)
        # 0 in the rows themselves: a factor of 0 would leave a NaN as it is
        gradients = jax.tree.map(lambda a: jnp.where(counted[:, None], a, 0), gradients)
        factors = per_example.clip_factors(where, gradients, jnp.where(counted, squared, 0), clip)
        total = per_example.weighted_sum(gradients, factors)
        leaves, treedef = jax.tree.flatten(total)
        keys = jax.random.split(key, len(leaves))
        noisy = [(a + clip * sigma * _gaussian(k, a.shape, a.dtype)) / size for a, k in zip(leaves, keys, strict=True)]
        included = jnp.sum(batch.included)
        at_least_one = jnp.maximum(included, 1).astype(squared.dtype)
        loss = jnp.sum(jnp.where(batch.included, upcast(losses), 0)) / at_least_one.astype(upcast(losses).dtype)
        clipped = jnp.sum(batch.included & ~(squared <= clip**2)).astype(squared.dtype) / at_least_one
        return loss, treedef.unflatten(noisy), {"included": included, "clipped": clipped}

    return aggregate


def _gaussian(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    """Standard normal numbers with tails up to 10: in float32 those of `jax.random.normal` end at 5.2.

    An output beyond the end of the tails would show that an example is there, with a probability that can exceed δ.
    """
    return jnp.sum(jax.random.normal(key, (4, *shape), dtype), axis=0) / 2


def epsilon(*, rate: float, noise_multiplier: float, steps: int, delta: float) -> float:
    """The ε of the parameters after a number of steps, for adding or removing one example.

    Needs dp-accounting: `pip install "fcfunc[privacy]"`.

    Args:
      rate: of `poisson_batch`.
      noise_multiplier: of `private_mean`, at least 0.2.
      steps: all steps that were taken, at least 1: `int(state.step)`.
      delta: δ, above 0 and below 1; well below one over the number of examples.

    Returns:
      ε, from the distribution of the privacy loss of the subsampled Gaussian mechanism.

    Raises:
      ValueError: a number out of range.
      ImportError: dp-accounting is not installed.

    Source: Koskela et al. 2020, Computing Tight Differential Privacy Guarantees Using FFT; the dp-accounting library.

    Example:
      >>> round(epsilon(rate=0.01, noise_multiplier=1.0, steps=1000, delta=1e-5), 2)
      1.83
    """
    where = "epsilon"
    sigma = _arguments.number(where, noise_multiplier=noise_multiplier)
    if not LEAST_NOISE <= sigma < math.inf:
        raise ValueError(f"{where}: noise_multiplier must be at least {LEAST_NOISE}, got {sigma}")
    accounting, rate, steps, delta = _checked(where, rate, steps, delta)
    return _spent(accounting, rate, sigma, steps, delta)


def _checked(where: str, rate, steps, delta) -> tuple[Any, float, int, float]:
    """The accounting library, the rate, the steps, and the δ that is left to the noise."""
    rate, delta = _rate(where, rate), _arguments.number(where, delta=delta)
    _arguments.positive(where, steps=steps)
    if not 0 < delta < 1:
        raise ValueError(f"{where}: delta must be above 0 and below 1, got {delta}")
    # What exceeds the capacity of a batch is left out: a step's δ grows by at most OVERFLOW.
    if steps * OVERFLOW >= delta / 2:
        raise ValueError(f"{where}: delta must be above {2 * steps * OVERFLOW:g} for {steps} steps, got {delta}")
    return _accounting(), rate, int(steps), delta - steps * OVERFLOW


def _event(accounting, rate: float, sigma: float, steps: int) -> Any:
    sampled = accounting.PoissonSampledDpEvent(rate, accounting.GaussianDpEvent(sigma))
    return accounting.SelfComposedDpEvent(sampled, steps)


def _spent(accounting, rate: float, sigma: float, steps: int, delta: float) -> float:
    return float(accounting.pld.PLDAccountant().compose(_event(accounting, rate, sigma, steps)).get_epsilon(delta))


def noise_multiplier(*, epsilon: float, rate: float, steps: int, delta: float) -> float:
    """The smallest noise multiplier, to three digits, with which the parameters have an ε of at most `epsilon`.

    Args:
      epsilon: above 0.
      rate, steps, delta: as for the function `epsilon`.

    Returns:
      The `noise_multiplier` for `private_mean`.

    Raises:
      ValueError: a number out of range.
      ImportError: dp-accounting is not installed.

    Example:
      >>> round(noise_multiplier(epsilon=0.5, rate=0.01, steps=1000, delta=1e-5), 2)
      2.38
    """
    where = "noise_multiplier"
    target = _arguments.number(where, epsilon=epsilon)
    if not 0 < target < math.inf:
        raise ValueError(f"{where}: epsilon must be above 0, got {target}")
    accounting, rate, steps, delta = _checked(where, rate, steps, delta)

    def calibrated(accountant, *bracket, tol):
        event = lambda sigma: _event(accounting, rate, sigma, steps)  # noqa: E731
        try:
            return float(accounting.calibrate_dp_mechanism(accountant, event, target, delta, *bracket, tol=tol))
        except ValueError:
            given = f"epsilon={target}, rate={rate}, steps={steps} and delta={delta:g}"
            raise ValueError(f"{where}: found no noise multiplier for {given}") from None

    # Rényi privacy is quick, and needs a little more noise than the distribution of the loss, which is slow.
    orders = [*range(2, 65), *(2**k for k in range(7, 16))]
    high = max(calibrated(lambda: accounting.rdp.RdpAccountant(orders), tol=1e-3), LEAST_NOISE)
    low = max(0.7 * high, LEAST_NOISE)
    while _spent(accounting, rate, low, steps, delta) <= target:
        low, high = max(0.5 * low, LEAST_NOISE), low
        if high == LEAST_NOISE:
            return high
    bracket = accounting.mechanism_calibration.ExplicitBracketInterval(low, 1.01 * high)
    return calibrated(accounting.pld.PLDAccountant, bracket, tol=1e-3 * high)


def _accounting() -> Any:
    return _arguments.library("privacy", "dp-accounting", "dp_accounting", "dp_accounting.pld", "dp_accounting.rdp")


def _rate(where: str, rate) -> float:
    value = _arguments.number(where, rate=rate)
    if not 0 < value <= 1:
        raise ValueError(f"{where}: rate must be above 0 and at most 1, got {value}")
    return value
