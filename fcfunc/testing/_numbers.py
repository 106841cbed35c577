"""Checks of the values: against automatic differentiation, differences and forward mode, in other dtypes and sizes.

A check yields a `Finding` for each error. It raises `NotApplicable` with the reason if it does not apply, and
`Inconclusive` if it cannot decide. To add a check, write a function and list it in `_checks.py`.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fcfunc.testing import _case, _contract, _draw, _oracle
from fcfunc.testing._case import (
    Case,
    Inconclusive,
    NotApplicable,
    first_line,
    in_float64_if_taken,
    is_complex,
    to_numpy,
    x64_for,
)
from fcfunc.testing._compare import (
    EVERY_ARGUMENT,
    Finding,
    attempt,
    compare,
    disagreements,
    finding,
    max_abs,
    moved_by_rounding,
    rounding,
    says_nothing,
    systematic_error,
    where_defined,
)


def oracle(case: Case) -> Any:
    """Compares the rule with automatic differentiation of its undecorated function, in the given dtype and float64."""
    message = "the rule's gradient differs from automatic differentiation of its function"
    yield from disagreements(case, 3, message)
    try:
        wide = case.in_float64
    except NotApplicable as e:
        yield from systematic_error(case, "the gradient")
        return f"compared only in {case.dtype}, to the precision of {case.computes_in}: {e}"
    if wide.dtype != case.dtype:
        yield from disagreements(wide, 3, message)
    return None


def precision_of_dtypes(case: Case) -> Any:
    """Checks in float16, bfloat16 and float32 that the error relative to float64 is like that of autodiff."""
    if len({a.dtype for a in case.reals}) > 1:
        raise NotApplicable("the arguments have different dtypes and are checked only in those")
    refused, taken = [], 0
    for name in case.dtypes:
        if jnp.dtype(name) == case.dtype:
            continue
        message = f"in {name}, the rule is much further from the float64 gradient than automatic differentiation is"
        try:
            narrow = case.cast(name)
            narrow.outs  # noqa: B018  (NotApplicable if the function does not take this dtype)
            yield from _contract.cotangent_types(narrow)
            yield from _contract.same_forward_pass(narrow)
            found, ended = attempt(disagreements(narrow, 1, message))
            if not found and ended is None:
                found, _ = attempt(systematic_error(narrow, f"in {name}, the gradient"))
        except NotApplicable as e:
            found, ended = [], e
        except _case.RuleRaised:
            try:
                case.cast(name).outputs()
            except Exception as e:  # the compiled function does not accept this dtype
                found, ended = [], NotApplicable(f"the function itself raises: {first_line(e)}")
            else:
                raise
        yield from found
        if ended is not None:
            refused.append(f"{name}: {ended}")
        taken += ended is None
    if not taken:
        raise NotApplicable(f"no other dtype was compared ({(refused or ['dtypes= names no other'])[0]})")
    return "; ".join(refused)


def central_differences(case: Case, g: list, leaf: int, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Derivatives of `Re sum(g * outputs)` along `[k, *shape]` directions of a leaf, with estimated errors.

    Each is a Richardson extrapolation from three step sizes. Of three scales, the one with the smallest estimated error
    is used, which avoids steps across a kink. If all scales cross it, the slopes on the left and on the right differ at
    every step size, and the difference counts as an error.
    """
    point = case.reals[leaf]

    def value(moved):
        outs = case.with_real(leaf, moved).outputs()
        return sum(float(np.sum(a * b).real) for a, b in zip(outs, g, strict=True))

    count, best, error = len(directions), np.zeros(len(directions)), np.full(len(directions), np.inf)
    steps = np.array([scale / half for scale in (1e-2, 1e-3, 1e-4) for half in (1, 2, 4)])
    center = value(point)
    values = np.array([[value(point + h * d) for d in directions] for h in (*steps, *-steps)])
    right, left = values[:9].reshape(3, 3, count), values[9:].reshape(3, 3, count)
    size = np.maximum(np.abs(values).max(axis=0), abs(center))
    for i in range(3):
        h = steps[3 * i : 3 * i + 3, None]
        d = (right[i] - left[i]) / (2 * h)
        first, second = (4 * d[1] - d[0]) / 3, (4 * d[2] - d[1]) / 3
        extrapolated = (16 * second - first) / 15
        bend = (right[i] + left[i] - 2 * center) / h  # falls with h where the function is smooth
        jump = (4 * bend[2] - bend[0]) / 3
        estimate = np.abs(extrapolated - second) + np.abs(jump) + 1e-14 * size / h[2]
        take = estimate < error
        best, error = np.where(take, extrapolated, best), np.where(take, estimate, error)
    return best, error


def against_differences(case: Case, directions_of: Callable) -> Iterator[Finding]:
    wide = case.in_float64
    g = wide.cotangent(20)
    kept = 0
    for leaf, (path, gradient) in enumerate(zip(wide.paths, wide.by_rule(g), strict=True)):
        if not gradient.size:
            continue
        directions, labels = directions_of(wide.rng(21 + leaf), gradient)
        slopes, errors = central_differences(wide, g, leaf, directions)

        def along(a, directions=directions):
            return np.real(np.tensordot(directions, a, axes=a.ndim))

        scale = np.abs(directions).reshape(len(directions), -1) @ np.abs(gradient).ravel()
        scale = np.maximum(scale, np.abs(slopes))
        # A difference across a kink is discarded. The bound has the size of a sum with random signs: in a large array,
        # the sum of magnitudes would let a few kinks pass.
        size = np.abs(directions.reshape(len(directions), -1)) ** 2
        spread = np.sqrt(size @ (np.abs(gradient) ** 2).ravel())
        smooth = errors < 1e-6 * (spread + max_abs(gradient)) + 1e-9
        if wide.has_reference:  # a surrogate's gradient is not the derivative of its values
            smooth = smooth & (np.abs(along(wide.by_oracle(g)[leaf]) - slopes) <= 1e-6 * scale)
        kept += int(smooth.sum())
        off = np.abs(along(gradient) - slopes)
        allowed = 1e-7 * scale + 1e-9 * max_abs(gradient) + 20 * errors + wide.rtol * scale + wide.atol
        wrong = smooth & ~(off <= allowed)
        if wrong.any() and stops_gradients(case):
            raise NotApplicable(STOPS)
        if wrong.any():
            k = int(np.argmax(np.where(wrong, off, -1)))
            message = f"the rule's gradient differs from central differences {labels[k]}"
            index = (
                tuple(int(i) for i in np.argwhere(directions[k])[0]) if np.count_nonzero(directions[k]) == 1 else None
            )
            yield finding(wide, message, path, index, float(along(gradient)[k]), float(slopes[k]))
    if not kept:
        raise Inconclusive("every difference crossed a kink, the arguments are empty, or the reference is a surrogate")


STOPS = "the function calls stop_gradient, which differences do not see; automatic differentiation decides"


def stops_gradients(case: Case) -> bool:
    """Whether the function calls `stop_gradient`."""
    return not case.has_reference and _oracle.contains(case.oracle, "stop_gradient", *case.leaves)


def oracle_misleads(case: Case) -> bool:
    """Whether differences of the function agree with the rule but not with automatic differentiation."""
    if case.has_reference or case.is_complex or stops_gradients(case):
        return False
    try:
        wide = case.in_float64
        g = wide.cotangent(20)
        rule, auto = wide.by_rule(g), wide.by_oracle(g)
    except Exception:  # other checks report it
        return False
    off = False
    for leaf, (a, b) in enumerate(zip(rule, auto, strict=True)):
        if not a.size:
            continue
        directions = wide.rng(29 + leaf).choice([-1.0, 1.0], (3, *a.shape))
        slopes, errors = central_differences(wide, g, leaf, directions)
        by_rule, by_auto = (np.abs(np.tensordot(directions, x, axes=x.ndim) - slopes) for x in (a, b))
        scale = np.abs(slopes) + max_abs(a)
        if not (by_rule <= 1e-5 * scale + 20 * errors).all():
            return False
        off |= bool((by_auto > 1e-3 * scale + 40 * errors).any())
    return off


def as_in_float64(case: Case) -> Iterator[Finding]:
    """Compares the rule in each dtype with the rule itself in float64, if there is no other oracle."""
    for name in dict.fromkeys((case.dtype.name, *case.dtypes)):
        narrow = case.cast(name)
        g, rng = narrow.cotangent(0), case.rng(97)
        try:
            wide, got = narrow.in_float64, narrow.by_rule(g)
        except (NotApplicable, _case.RuleRaised):  # other checks report it
            continue
        wide_g = [_case.widened(a) for a in g]
        truth, allowed = wide.by_rule(wide_g), rounding(narrow, got, 64.0, g)
        for _ in range(3):
            moved = wide.with_reals(moved_by_rounding(narrow, wide.reals, rng)).by_rule(wide_g)
            allowed = [max(t, 16 * max_abs(a - b)) for t, a, b in zip(allowed, moved, truth, strict=True)]
        message = f"in {name}, the rule's gradient differs from its own gradient in float64"
        yield from compare(narrow, got, truth, allowed, message)


def finite_differences(case: Case) -> Iterator[Finding]:
    """Compares the rule with central differences for up to 64 single elements, fewer for large arrays."""

    def elements(rng, gradient):
        count = int(np.clip(2**18 // gradient.size, 4, 64))
        flat = rng.permutation(gradient.size)[:count]
        directions = np.zeros((len(flat), gradient.size), gradient.dtype)
        directions[np.arange(len(flat)), flat] = 1
        return directions.reshape(-1, *gradient.shape), ["for this element"] * len(flat)

    yield from against_differences(case, elements)


def projected_differences(case: Case) -> Iterator[Finding]:
    """Compares the rule with central differences along random directions, which cover all elements at once."""

    def signs(rng, gradient):
        values = [1.0, -1.0, 1.0j, -1.0j] if is_complex(gradient) else [1.0, -1.0]
        return rng.choice(values, (3, *gradient.shape)), ["along a random direction"] * 3

    yield from against_differences(case, signs)


def forward_mode(case: Case) -> Iterator[Finding]:
    """Compares forward mode with the oracle's, if the function has one."""
    rng = case.rng(40)
    v = [_case.normal(rng, a.shape, a.dtype) for a in case.reals]
    try:
        got = _tangents(case, case.fun, v)
    except (TypeError, NotImplementedError) as e:
        raise NotApplicable(f"the rule has no forward mode ({first_line(e)[:60]}...)") from None
    expected = _oracle_tangents(case, v)
    outputs = dataclasses.replace(case, paths=tuple(f"output {i}" for i in range(len(got))))
    allowed = rounding(case, expected)
    yield from compare(outputs, got, where_defined(got, expected), allowed, "forward mode differs from the oracle's")


def _tangents(case: Case, fun: Callable, v: list) -> list[np.ndarray]:
    with x64_for(case.dtype):
        return to_numpy(_case.compiled_push(fun, case.where, _case.to_jax(case.leaves), _case.to_jax(v)))


def _oracle_tangents(case: Case, v: list) -> list[np.ndarray]:
    try:
        return _tangents(case, case.oracle, v)
    except Exception as e:
        raise Inconclusive(f"the oracle has no forward mode: {first_line(e)}") from None


def adjoint(case: Case) -> Iterator[Finding]:
    """Checks that <J^T u, v> by the rule equals <u, J v> by the oracle's forward mode, or by a custom_jvp's own."""
    wide = case.in_float64
    for trial in range(3):
        u, rng = wide.cotangent(50 + trial), case.rng(70 + trial)
        v = [_case.normal(rng, a.shape, a.dtype) for a in wide.reals]
        push = _tangents(wide, wide.fun, v) if wide.forward_rule else _oracle_tangents(wide, v)
        reason = says_nothing(wide, wide.by_rule(u), push)
        if reason or not all(np.isfinite(a).all() for a in push):
            raise Inconclusive(reason or "forward mode is not finite here")
        forward = [a * b for a, b in zip(push, u, strict=True)]
        back = [a * b for a, b in zip(wide.by_rule(u), v, strict=True)]
        left, right = (sum(float(np.sum(a).real) for a in parts) for parts in (forward, back))
        size = sum(np.abs(a).sum() for a in [*forward, *back])
        noise = 1e-13 * sum(np.abs(a).sum() for a in u)
        if not abs(left - right) <= (1e-11 + wide.rtol) * size + noise + wide.atol:
            message = "<J^T u, v> by the rule differs from <u, J v> by forward mode"
            yield finding(wide, message, EVERY_ARGUMENT, None, right, left)
            return


AT_SIZES = "at these sizes, the rule's gradient differs from automatic differentiation"


def shape_sweep(case: Case) -> Iterator[Finding]:
    """Compares with the oracle at sizes 1, for an empty batch and for large batches."""
    yield from _sweep(case, _draw.few_sizes, AT_SIZES)


def every_size(case: Case) -> Iterator[Finding]:
    """Compares with the oracle at many sizes: batch 1, square, 0, primes, more than 32, more than a tile of 128."""
    yield from _sweep(case, _draw.many_sizes, AT_SIZES)


def ranks(case: Case) -> Iterator[Finding]:
    """Compares with the oracle for one row without a batch axis, and for two batch axes, if the function allows it."""
    if case.redraw is not None and not case.draws_ranks:
        raise NotApplicable("the arguments are drawn by a function, which fixes their ranks")
    message = "at this rank, the rule's gradient differs from automatic differentiation"
    yield from _sweep(case, _draw.other_ranks, message)


def _sweep(case: Case, sizes_of: Callable, message: str) -> Iterator[Finding]:
    if case.redraw is None or not case.letters:
        raise NotApplicable("the sizes were given; to sweep them, describe the arguments by shapes, as in 'n d, d m'")
    ended: list[Exception | str | None] = []
    for sizes in sizes_of(list(case.letters)):
        found, end = attempt(_at_sizes(case, sizes, message))
        yield from found
        if found:
            return
        ended.append(end)
    reasons = [end for end in ended if isinstance(end, Exception)]
    if len(reasons) == len(ended):
        raise reasons[0]


def _takes(case: Case, fun: Callable, sizes: dict) -> bool:
    """Whether a function can be called at other sizes."""
    try:
        other = case.at(sizes)
        with x64_for(other.dtype):
            jax.eval_shape(fun, *other.leaves)
    except Exception:
        return False
    return True


def _at_sizes(case: Case, sizes: dict, message: str) -> Iterator[Finding]:
    try:
        other = in_float64_if_taken(case.at(sizes))  # one dtype to compile
        other.outs  # noqa: B018  (NotApplicable if the function does not take these sizes)
        jax.block_until_ready(other.outputs())
    except Exception as e:
        if "sizes" in case.required and case.has_reference and _takes(case, case.oracle, sizes):
            message = f"the function raises at these sizes, but the reference does not: {first_line(e)}"
            yield finding(case.at(sizes), message)
            return
        if isinstance(e, NotApplicable):
            raise
        raise NotApplicable(f"the function does not accept these sizes: {first_line(e)}") from None
    yield from disagreements(other, 1, message)
    yield from _contract.same_forward_pass(other)
