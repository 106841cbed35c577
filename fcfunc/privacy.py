"""Differentially private training (DP-SGD): clipped, noisy gradients, Poisson-sampled batches, and privacy accounting.

The final parameters are (ε, δ)-differentially private with respect to adding or removing one example, if

- every batch is drawn by `poisson_batch` with a new key,
- every step uses `private_mean`, and
- `epsilon` is called with the sampling rate, the noise multiplier and the total number of steps that were taken.

The guarantee covers the parameters and nothing else. It does not cover the metrics of a step, hyperparameters or a step
chosen by looking at the data, or statistics of the data such as a standardization.

The guarantee needs the following:

- The rate and the expected batch size are fixed without looking at the data.
- The loss and the inputs of an example depend only on that example. Clipping does not bound a loss that is divided by
  the number of included examples.
- The keys are secret, come from the operating system's random source, and are used for a single run. Two runs with the
  same key share their noise. A saved state contains its key.

The arithmetic is in floating point, and `jax.random` is not a cryptographic generator.
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
"""The probability that a random batch exceeds its capacity, so that some of its examples are dropped."""


LEAST_NOISE = 0.2
"""The smallest noise multiplier; below it, the accountant needs gigabytes and there is hardly any privacy."""


class PoissonBatch(NamedTuple):
    """A batch with a random number of examples, in arrays of a fixed size.

    Attributes:
      examples: arrays `[capacity, ...]` in the structure of the data; rows that are not included repeat an example.
      included: which rows are included, booleans `[capacity]`.
    """

    examples: Any
    included: jax.Array


def batch_capacity(count: int, rate: float) -> int:
    """Returns the array size of a batch that includes each of `count` examples with probability `rate`.

    By the Chernoff bound, more examples are drawn with a probability below 1e-12.

    Args:
      count: the number of examples, at least 1.
      rate: the sampling rate, above 0 and at most 1.

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
    while low < high:  # the smallest capacity with a small enough tail probability
        middle = (low + high) // 2
        if log_tail(middle) <= math.log(OVERFLOW):
            high = middle
        else:
            low = middle + 1
    return low


def poisson_batch(key: jax.Array, data: Any, *, rate: float) -> PoissonBatch:
    """Draws a batch by Poisson sampling: it includes each example independently with probability `rate`.

    Args:
      key: a random key; use a new one for each step.
      data: a pytree of arrays with the examples along their common leading axis.
      rate: the sampling rate, above 0 and at most 1; the average batch has `rate` times the number of examples.

    Returns:
      A `PoissonBatch` of `batch_capacity` examples, also inside a compiled function. If the examples of `data` are
      sharded over a mesh, so is the batch, and its size is rounded up to a multiple of the number of devices.

    Raises:
      ValueError: `rate` is out of range, or the arrays differ in their number of examples.
      TypeError: `key` is not a random key.

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
    # Integer bits, because uniform floats would include each example slightly too often.
    threshold = min(math.floor(_rate(where, rate) * 2**32), 2**32 - 1)
    drawn = jax.random.bits(key, (count,), jnp.uint32) < jnp.uint32(threshold)
    (indices,) = jnp.nonzero(drawn, size=capacity, fill_value=0)
    leaves, treedef = jax.tree.flatten(data)
    rows = [_layout.gather_rows(a, s, indices=indices) for a, s in zip(leaves, shardings, strict=True)]
    return PoissonBatch(treedef.unflatten(rows), jnp.arange(capacity) < jnp.sum(drawn))


def private_mean(*, max_norm: float, noise_multiplier: float, expected_batch_size: float) -> Callable:
    r"""Returns an `aggregate` for `train.make_train_step` that clips and sums the gradients and adds noise.

    .. math:: \Big(\sum_i ∇_i \min(1, C / |∇_i|) + C σ z\Big) / B, \quad z \sim N(0, I)

    Examples that are not included contribute 0. So do examples with a non-finite gradient, whose clipped gradient would
    be undefined, so the guarantee holds for them too. If `metrics["loss"]` is NaN and `clipped` is 1 in every step, the
    loss mixes examples: all of them contribute 0, and the updates are pure noise.

    Args:
      max_norm: the bound `C`, above 0, on the contribution of one example to the sum.
      noise_multiplier: `σ`, at least 0; with 0, gradients are clipped but there is no privacy.
      expected_batch_size: `B`, the sampling rate times the number of examples; the actual number is not private.

    Returns:
      `aggregate(losses, gradients, batch, key) -> (loss, gradient, metrics)`. The metrics, which are NOT private, are
      `included`, the number of included examples, and `clipped`, the fraction of them whose gradient norm exceeds `C`.

    Raises:
      ValueError: a number is out of range.
      TypeError: the batch of a step does not come from `poisson_batch`.

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
                f"{where}: the batch must come from privacy.poisson_batch, which the guarantee requires, got {given}"
            )
        squared = per_example.whole_squared_norms(where, gradients)
        if not losses.shape == squared.shape == batch.included.shape:
            shapes = f"{list(losses.shape)}, {list(squared.shape)} and {list(batch.included.shape)}"
            raise ValueError(f"{where}: losses, gradients and batch must have equal numbers of examples, got {shapes}")
        counted = batch.included & jnp.isfinite(squared)
        # set the rows themselves to 0, because 0 times NaN is NaN
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
    """Standard normal numbers with tails up to 10; in float32, those of `jax.random.normal` end at 5.2.

    An output beyond the end of the tails would reveal an example, with a probability that can exceed δ.
    """
    return jnp.sum(jax.random.normal(key, (4, *shape), dtype), axis=0) / 2


def epsilon(*, rate: float, noise_multiplier: float, steps: int, delta: float) -> float:
    """Computes the ε of the parameters after the given number of steps, for adding or removing one example.

    It uses the privacy loss distribution of the subsampled Gaussian mechanism. Needs dp-accounting:
    `pip install "fcfunc[privacy]"`.

    Args:
      rate: the sampling rate of `poisson_batch`.
      noise_multiplier: the noise multiplier of `private_mean`, at least 0.2.
      steps: the total number of steps that were taken, at least 1: `int(state.step)`.
      delta: δ, above 0 and below 1; choose it well below one over the number of examples.

    Returns:
      ε, a float.

    Raises:
      ValueError: a number is out of range.
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
    """The accounting library, the rate, the steps, and the δ that remains for the noise."""
    rate, delta = _rate(where, rate), _arguments.number(where, delta=delta)
    _arguments.positive(where, steps=steps)
    if not 0 < delta < 1:
        raise ValueError(f"{where}: delta must be above 0 and below 1, got {delta}")
    # Examples beyond the capacity of a batch are dropped, which adds at most OVERFLOW to the δ of each step.
    if steps * OVERFLOW >= delta / 2:
        raise ValueError(f"{where}: delta must be above {2 * steps * OVERFLOW:g} for {steps} steps, got {delta}")
    return _accounting(), rate, int(steps), delta - steps * OVERFLOW


def _event(accounting, rate: float, sigma: float, steps: int) -> Any:
    sampled = accounting.PoissonSampledDpEvent(rate, accounting.GaussianDpEvent(sigma))
    return accounting.SelfComposedDpEvent(sampled, steps)


def _spent(accounting, rate: float, sigma: float, steps: int, delta: float) -> float:
    return float(accounting.pld.PLDAccountant().compose(_event(accounting, rate, sigma, steps)).get_epsilon(delta))


def noise_multiplier(*, epsilon: float, rate: float, steps: int, delta: float) -> float:
    """Finds the smallest noise multiplier, to three digits, for which the parameters have at most the given ε.

    Args:
      epsilon: the target ε, above 0.
      rate, steps, delta: the sampling rate, the number of steps and δ, as in the function `epsilon`.

    Returns:
      The `noise_multiplier` for `private_mean`.

    Raises:
      ValueError: a number is out of range, or no noise multiplier reaches `epsilon`.
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

    # Rényi accounting is fast and a little pessimistic: it brackets the slow privacy loss distribution.
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
