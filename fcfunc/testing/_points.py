"""Checks at special points: kinks, tails, extremes, NaN, and integers out of range."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from fcfunc.testing._case import (
    Case,
    Inconclusive,
    NotApplicable,
    RuleRaised,
    is_complex,
    is_key,
    replaced,
    widened,
)
from fcfunc.testing._compare import (
    Finding,
    finding,
    in_ulps,
    max_abs,
    moved_by_rounding,
    rounding,
    truth_and_allowance,
    underflow,
)
from fcfunc.testing._contract import different_outputs

TIED = " equal along axis "
"""The part of a point's name between the argument and the axis along which its elements are equal."""


def inside(case: Case, leaf: int, value: np.ndarray) -> np.ndarray:
    """Which elements are inside the declared range of a leaf."""
    low, high = case.ranges[leaf]
    return (value > low) & (value < high) if (low, high) != (-math.inf, math.inf) else np.ones(np.shape(value), bool)


def special_points(case: Case) -> Iterator[tuple[str, Case]]:
    """Points where functions tend to have kinks: zeros, ones and ties, in one real leaf at a time, inside its range."""
    for leaf, value in enumerate(case.reals):
        if is_complex(value):
            continue
        rng = case.rng(100 + leaf)
        some = rng.uniform(size=value.shape) < 0.3
        ties = {
            f"{TIED}{axis}": np.broadcast_to(np.take(value, [0], axis), value.shape)
            for axis in range(value.ndim)
            if value.size
        }
        signs = rng.choice([-1.0, 1.0], value.shape)
        for name, moved in {
            **ties,
            "large in places": np.where(some, signs * rng.choice([3.0, 10, 30, 100, 1000], value.shape), value),
            "tiny in places": np.where(some, signs * rng.choice([0.0, 1e-20, 1e-8, 1e-4], value.shape), value),
            "zero everywhere": np.zeros_like(value),
            "zero in places": np.where(some, 0.0, value),
            "one in places": np.where(some, 1.0, value),
            "minus one in places": np.where(some, -1.0, value),
        }.items():
            moved = np.where(inside(case, leaf, moved), moved, value)
            if not np.array_equal(moved, value):
                yield f"{case.paths[leaf]}{name if name.startswith(TIED) else f' {name}'}", case.with_real(leaf, moved)


def kinks(case: Case) -> Iterator[Finding]:
    """Checks at zeros, ones and ties: the oracle's derivative, or at a kink the least subgradient or `at_kink`."""
    try:
        wide = case.in_float64
    except NotApplicable:
        wide = case
        if case.computes_in != np.float32:  # slopes in half precision are too inaccurate
            raise
    compared = bool(case.at_kink)
    for point, slope in case.at_kink.items():
        at = wide.with_reals([np.full_like(wide.reals[0], point), *wide.reals[1:]])
        got = at.by_rule([np.ones(out.shape, out.dtype) for out in at.outs])[0]
        off = np.argwhere(~(got == np.asarray(slope, got.dtype)))
        if len(off):
            index = tuple(int(i) for i in off[0])
            message = f"at_kink= declares a derivative of {slope:g} at {point:g}, but the rule returns a different one"
            yield finding(at, message, case.paths[0], index, float(got[index]), float(slope))
    yield from _tied_arguments(wide)
    ties = False
    for name, at in special_points(wide):
        g = at.cotangent(110)
        try:
            expected = at.by_oracle(g)
        except Inconclusive:
            continue
        compared, got = True, at.by_rule(g)
        if TIED in name:
            yield from _tied_elements(at, g, got, expected, name)
        for leaf, (a, b) in enumerate(zip(got, expected, strict=True)):
            tolerance = max(1e-9, 256 * at.eps) + case.rtol
            off = np.isfinite(b) & ~(np.abs(a - b) <= tolerance * (max_abs(b) + 1) + case.atol)
            off |= np.isnan(b) & np.isfinite(a)  # some rules exist to avoid the NaN of autodiff
            if is_complex(at.reals[leaf]):
                continue
            for index in np.argwhere(off)[:4]:
                found, kinked = _at_kink(at, g, leaf, tuple(int(i) for i in index), a, b, ties)
                # At ties, a maximum may give the whole gradient to any one of the tied elements.
                ties = ties or (kinked and TIED in name)
                if found and not (ties and kinked and TIED in name):
                    yield dataclasses.replace(found, message=f"with {name}, {found.message}")
                    return
    if not compared:
        raise Inconclusive("the oracle raises at every point")


def _tied_elements(case: Case, g: list, got: list, expected: list, name: str) -> Iterator[Finding]:
    """Checks that tied elements along an axis share the gradient in some way and do not each receive all of it."""
    path, _, axis = name.partition(TIED)
    leaf = case.paths.index(path.strip())
    a, b = (np.sum(arrays[leaf], axis=int(axis)) for arrays in (got, expected))
    size = max(1e-9, 256 * case.eps) + case.rtol
    off = np.isfinite(b) & ~(
        np.abs(a - b) <= size * case.reals[leaf].shape[int(axis)] * (max_abs(expected[leaf]) + 1) + case.atol
    )
    for index in map(tuple, np.argwhere(off)[:1]):
        line = (*index[: int(axis)], slice(None), *index[int(axis) :])
        left, right = _slopes_along(case, g, (leaf,), line)
        near = _near(case) * (1 + abs(left))
        if abs(left - right) < near < abs(left - a[index]):
            message = (
                f"the elements of {path.strip()} along axis {axis} are equal, but their gradients do not sum to the "
                "slope along all of them"
            )
            values = tuple(int(i) for i in index), float(a[index]), left
            yield finding(case, message, case.paths[leaf], *values)
            return


def _tied_arguments(case: Case) -> Iterator[Finding]:
    """Checks that two equal arguments, as in a maximum, share the gradient and do not each receive all of it."""
    for first, second in itertools.combinations(range(len(case.reals)), 2):
        a, b = case.reals[first], case.reals[second]
        if a.shape != b.shape or is_complex(a) or not (inside(case, first, b).all() and inside(case, second, a).all()):
            continue
        tied = case.with_real(second, a.copy())
        g = tied.cotangent(111)
        try:
            expected = tied.by_oracle(g)
        except Inconclusive:
            return
        got = tied.by_rule(g)
        # Along both together, the function has a slope, which automatic differentiation computes.
        got_sum, expected_sum = got[first] + got[second], expected[first] + expected[second]
        tolerance = max(1e-9, 256 * tied.eps) + case.rtol
        size = max_abs(expected[first]) + max_abs(expected[second]) + 1
        off = np.isfinite(expected_sum) & ~(np.abs(got_sum - expected_sum) <= tolerance * size + case.atol)
        for index in map(tuple, np.argwhere(off)[:1]):
            left, right = _slopes_along(tied, g, (first, second), index)
            near = _near(tied) * (1 + abs(left))
            if abs(left - right) < near < abs(left - got_sum[index]):
                pair = f"{case.paths[first]} and {case.paths[second]}"
                message = f"where {pair} are equal, the sum of their gradients is wrong"
                values = tuple(int(i) for i in index), float(got_sum[index]), float(expected_sum[index])
                yield finding(tied, message, case.paths[first], *values)
                return


def _slopes_along(case: Case, g: list, leaves: tuple[int, ...], index: tuple) -> tuple[float, float]:
    """The one-sided slopes as one element of several leaves moves together; NaN if the function jumps."""

    def value(delta):
        reals = [a.copy() for a in case.reals]
        for leaf in leaves:
            reals[leaf][index] += delta
        return sum(float(np.sum(a * b).real) for a, b in zip(case.with_reals(reals).outputs(), g, strict=True))

    h, center = (1e-6 if case.dtype == np.float64 else 1e-3), value(0.0)

    def slope(step):
        far, close = value(step) - center, value(step / 4) - center
        jumps = abs(close) > 0.75 * abs(far) > 1e-4 * (1 + abs(center))  # like a pseudoinverse where the rank drops
        return np.nan if jumps else far / step

    return slope(-h), slope(h)


def _near(case: Case) -> float:
    """The error that the slopes of `_slopes_along` may have."""
    return 1e-4 if case.dtype == np.float64 else 2e-2


def _at_kink(case, g, leaf, index, got, expected, ties) -> tuple[Finding | None, bool]:
    """A finding if a gradient that differs from the oracle's is wrong, and whether there is a kink."""
    left, right = _slopes_along(case, g, (leaf,), index)
    if not np.isfinite(left + right):
        return None, False  # the function is undefined or jumps here
    center = sum(float(np.sum(a * b).real) for a, b in zip(case.outputs(), g, strict=True))
    size = max(abs(left), abs(right), 1.0) + abs(center)
    low, high = min(left, right), max(left, right)
    least = 0.0 if low <= 0 <= high else (low if low > 0 else high)
    a, b = float(got[index]), float(expected[index])
    near, path = _near(case) * size, case.paths[leaf]
    if high - low < near:
        if abs(a - (left + right) / 2) < near:
            return None, False  # here the oracle is wrong
        b = b if np.isfinite(b) else (left + right) / 2
        message = "the function is smooth and the rule's derivative is wrong"
        return finding(case, message, path, index, a, b), False
    declared = leaf == 0 and any(abs(case.reals[0][index] - point) < 1e-5 for point in case.at_kink)
    between = low - near < a < high + near
    if abs(a - least) < near or declared or (between and (ties or np.isnan(b))):
        return None, True
    b = b if np.isfinite(b) else least
    message = (
        f"the function has a kink with one-sided slopes {left:.4g} and {right:.4g}, and the rule returns neither the "
        "derivative of automatic differentiation nor the slope of smallest magnitude between them; if that is "
        "intended, declare it with at_kink="
    )
    return finding(case, message, path, index, a, b), True


def nan_at_zero(case: Case) -> Iterator[Finding]:
    """Checks that no gradient is NaN where an argument is 0 everywhere and the function is finite, as for a norm."""
    for leaf, value in enumerate(case.reals):
        zeros = np.zeros_like(value)
        if not value.size or not inside(case, leaf, np.real(zeros)).all():
            continue
        at = case.with_real(leaf, zeros)
        if not all(np.isfinite(widened(out)).all() for out in at.outputs()):
            continue
        for path, a in zip(case.paths, map(widened, at.by_rule(case.cotangent(165))), strict=True):
            if np.isnan(a).any():
                index = tuple(int(i) for i in np.argwhere(np.isnan(a))[0])
                message = f"with {case.paths[leaf]} = 0 everywhere, the function is finite but this gradient is NaN"
                yield finding(case, message, path, index)
                return


def accuracy(case: Case) -> Iterator[Finding]:
    """Checks that each element is about as accurate as autodiff's, in tails and at a common offset."""
    case.in_float64  # noqa: B018  (NotApplicable without)
    compared = False
    for leaf, value in enumerate(case.reals):
        if is_complex(value) or not value.size:
            continue
        rng = case.rng(160 + leaf)
        tails = rng.choice([-90.0, -20, -6, -1e-6, 1e-6, 6, 20, 90], value.shape)
        for name, moved in {
            "in tails": np.where(rng.uniform(size=value.shape) < 0.5, tails, value),
            "at a common offset of 1e4": value + 1e4,
            "at a common offset of 1e6": value + 1e6,
        }.items():
            moved = moved.astype(value.dtype)
            if not inside(case, leaf, moved).all() or not np.isfinite(widened(moved)).all():
                continue
            compared = True
            for found in _elementwise(case.with_real(leaf, moved)):
                yield dataclasses.replace(found, message=f"with {case.paths[leaf]} {name}, {found.message}")
                return
    if not compared:
        raise NotApplicable("the ranges of the arguments contain no tails and no offsets")


def _elementwise(case: Case) -> Iterator[Finding]:
    """Compares each element with float64; the tolerance is as in `truth_and_allowance`, but for each element."""
    wide, g, rng = case.in_float64, case.cotangent(161), case.rng(162)
    wide_g = [widened(a) for a in g]
    truth, auto, got = wide.by_oracle(wide_g), case.by_oracle(g), case.by_rule(g)
    allowed = [
        16 * np.abs(widened(a) - t) + 64 * case.eps * np.abs(t) + underflow(case)
        for a, t in zip(auto, truth, strict=True)
    ]
    for _ in range(6):
        moved = wide.with_reals(moved_by_rounding(case, wide.reals, rng))
        shifted = moved.by_oracle(moved_by_rounding(case, wide_g, rng))
        allowed = [np.maximum(t, 16 * np.abs(s - u)) for t, s, u in zip(allowed, shifted, truth, strict=True)]
    of_terms = rounding(case, auto, 4.0, g)
    again = [wide.with_reals(moved_by_rounding(wide, wide.reals, rng)).by_oracle(wide_g) for _ in range(4)]
    for path, a, t, others, auto_a, bound, terms in zip(
        case.paths,
        map(widened, got),
        truth,
        zip(*again, strict=True),
        map(widened, auto),
        allowed,
        of_terms,
        strict=True,
    ):
        # A sum that cancels to 0, or to the rounding of float64, has the rounding error of its terms. Autodiff's error
        # may be 0 for one such element by chance, so those of the leaf are taken together.
        cancels = np.max(np.abs(np.stack(others) - t), axis=0) >= 0.1 * np.abs(t)
        terms = max(terms, 16 * float(np.max(np.abs(auto_a - t), where=cancels & np.isfinite(auto_a), initial=0.0)))
        bound = np.where(cancels, np.maximum(bound, terms), bound)
        off = np.isfinite(t) & np.isfinite(auto_a) & ~(np.abs(a - t) <= bound + case.atol + case.rtol * np.abs(t))
        if off.any():
            index = tuple(int(i) for i in np.argwhere(off)[0])
            message = "this element is much less accurate than that of automatic differentiation"
            ulps = in_ulps(case, float(abs(a[index] - t[index])), float(abs(t[index])))
            yield finding(case, message, path, index, float(a[index]), float(t[index]), ulps)
            return


def _spoiled(case: Case) -> Iterator[tuple[str, Case, int, tuple]]:
    """The case with an extreme element, or one in each of two leaves, as name, case, leaf and index."""
    limits = jnp.finfo(case.dtype)
    large = 1e30 if limits.maxexp > 100 else 1e4
    values = (large, -large, np.inf, -np.inf, np.nan, float(limits.tiny) / 8)
    floating = [i for i, a in enumerate(case.reals) if a.size and not is_complex(a)]
    gradients = case.by_rule(case.cotangent(120))
    for leaf in floating:
        value = case.reals[leaf]
        places = [case.rng(121 + leaf + 50 * draw).integers(0, value.shape) for draw in range(2)]
        masked = np.argwhere(gradients[leaf] == 0)  # a masked element must not affect the result
        for place in [*places, *masked[:1]]:
            at = tuple(int(i) for i in place)
            for extreme in values:
                moved = value.copy()
                moved[at] = extreme
                in_range = inside(case, leaf, moved)[at] or (np.isinf(extreme) and extreme in case.ranges[leaf])
                if np.isnan(extreme) or in_range:
                    yield f"{case.paths[leaf]}{list(at)} = {extreme:g}", case.with_real(leaf, moved), leaf, at
    rank = max((case.reals[i].ndim for i in floating), default=0)  # weights have fewer axes and are kept finite
    for first, second in itertools.permutations(floating, 2):
        a, b = case.reals[first], case.reals[second]
        if not a.ndim or a.ndim < rank or (a.shape[:1] != b.shape[:1] and a.ndim <= b.ndim):
            continue
        # Combine an infinity in row 0 with a 0 or 1 in the same row, or in all of an argument without these rows.
        by_row, origin = a.shape[:1] == b.shape[:1], (0,) * a.ndim
        places = [origin] if by_row else [(*origin[:-1], j) for j in range(min(a.shape[-1], 4))]
        for place, infinity, factor in itertools.product(places, (np.inf, -np.inf), (0, 1) if by_row else (0,)):
            pair = [a.copy(), b.copy() if by_row else np.full_like(b, factor)]
            pair[0][place] = infinity
            if by_row:
                pair[1][(0,) * b.ndim] = factor
            if inside(case, second, pair[1]).all() and infinity in case.ranges[first]:
                moved = case.with_real(first, pair[0]).with_real(second, pair[1])
                yield (
                    f"{case.paths[first]}{list(place)} = {infinity:g} and {case.paths[second]} = {factor}",
                    moved,
                    first,
                    place,
                )


def extremes(case: Case) -> Iterator[Finding]:
    """Checks ±1e30, ±inf, NaN and denormals: the oracle's gradient if that is finite, and no effect on other rows."""
    g = case.cotangent(120)
    small = [(a * np.asarray(2.0**-7, a.dtype)).astype(a.dtype) for a in g]
    for weight in (g, small):
        clean, clean_oracle = case.by_rule(weight), case.by_oracle(weight)
        for where, spoiled, leaf, at in _spoiled(case):
            got, expected, outs = spoiled.by_rule(weight), spoiled.by_oracle(weight), spoiled.outputs()
            if spoiled.has_reference and weight is g:
                reference = spoiled.outputs(spoiled.oracle)
                finite = [np.where(np.isfinite(widened(a)), widened(a), 0) for a in reference]
                alike = [np.where(np.isfinite(widened(b)), widened(a), 0) for a, b in zip(outs, reference, strict=True)]
                message = f"with {where}, the output differs from that of the reference"
                yield from different_outputs(spoiled, alike, finite, 1e5, message)
            infinite = any(not np.isfinite(widened(out)).all() for out in outs)
            value = spoiled.reals[leaf][at]
            for i, (a, b) in enumerate(zip(map(widened, got), map(widened, expected), strict=True)):
                scale = 64 * case.eps * (1 + max_abs(clean_oracle[i]) + max_abs(b))
                near = np.abs(a - b) <= 0.05 * np.abs(b) + scale
                wrong = np.isfinite(b) & ~near
                if wrong.any():
                    wrong = wrong & ~_cancelled(spoiled, weight, i, a, b)
                if wrong.any() and (
                    infinite or _infinite_beside(spoiled, where, i)
                ):  # a non-finite gradient of a non-finite output is correct, even if the oracle's is finite
                    wrong = wrong & np.isfinite(a) & ~np.isnan(value)
                if 0 < abs(value) < 1e-3:  # flushed to 0, where the oracle itself can be wrong; `kinks` checks it
                    wrong = wrong & ~np.isfinite(a)
                leaked = _same(expected[i], clean_oracle[i]) & ~_same(got[i], clean[i]) & ~near
                if i == leaf and a.ndim:
                    leaked[at[0]] = False  # its own row
                for mask, message in (
                    (wrong, f"with {where}, the rule's gradient differs from the oracle's, which is finite"),
                    (leaked, f"{where} changes the gradient of a different row"),
                ):
                    if mask.any():
                        index = tuple(int(j) for j in np.argwhere(mask)[0])
                        yield finding(case, message, case.paths[i], index, a[index].item(), b[index].item())
                        return


def _cancelled(case: Case, g: list, leaf: int, got: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Elements where large terms cancel: the oracle is off by more than 5 % of float64, and the rule by as much."""
    try:
        truth = case.in_float64.by_oracle([widened(a) for a in g])[leaf]
    except (Inconclusive, NotApplicable):
        return np.zeros(got.shape, bool)
    error = np.where(np.isfinite(expected), np.abs(expected - truth), 0)
    return (error > 0.05 * np.abs(truth)) & (np.abs(got - truth) <= 16 * max_abs(error))


def _infinite_beside(case: Case, where: str, leaf: int) -> bool:
    """Whether an output that is 0 · inf = 0 becomes infinite once the 0 or 1 of a leaf is perturbed."""
    if " and " not in where:
        return False
    a = case.reals[leaf]
    moved = case.with_real(leaf, np.where((a == 0) | (a == 1), a + np.asarray(1e-3, a.dtype), a))
    return any(not np.isfinite(widened(out)).all() for out in moved.outputs())


def _same(a: np.ndarray, b: np.ndarray) -> Any:
    return (a == b) | (np.isnan(a) & np.isnan(b))


def nan_kept(case: Case) -> Iterator[Finding]:
    """Checks that a row whose output is NaN has a non-finite gradient, so that a NaN loss does not train.

    If a reference is NaN for an integer out of range or a mask, the function must be NaN too.
    """
    g, tried = case.cotangent(170), 0
    for where, spoiled, leaf, _ in [*_spoiled(case), *_impossible(case)]:
        value = spoiled.reals[leaf]
        if not value.ndim or any(not out.ndim or out.shape[0] != value.shape[0] for out in g):
            continue
        tried += 1
        outs, row = spoiled.outputs(), np.ones(value.shape[0], bool)
        for out in outs:
            row &= np.isnan(widened(out)).reshape(len(out), -1).all(axis=1)
        if case.has_reference and not where.startswith("args"):
            given = spoiled.outputs(spoiled.oracle)
            if any(
                (np.isnan(b) & ~np.isnan(a)).any() for a, b in zip(map(widened, outs), map(widened, given), strict=True)
            ):
                yield finding(case, f"with {where}, the reference is NaN but the function is not")
                return
        # A linear function of NaN has a finite gradient, also by automatic differentiation. A label that is not a class
        # has no gradient, even if automatic differentiation returns one.
        wrong = row & _finite_rows(spoiled.by_rule(g)[leaf])
        if not where.startswith("an integer"):
            wrong &= ~_finite_rows(spoiled.by_oracle(g)[leaf])
        if wrong.any():
            k = int(np.argmax(wrong))
            message = f"with {where}, the output of row {k} is NaN but its gradient is finite"
            yield finding(case, message, case.paths[leaf])
            return
    if not tried:
        raise NotApplicable("no argument shares the leading axis of the outputs")


def _finite_rows(a: np.ndarray) -> Any:
    return np.isfinite(widened(a)).reshape(len(a), -1).all(axis=1)


def _impossible(case: Case) -> Iterator[tuple[str, Case, int, tuple]]:
    """The case with an integer out of range or a changed mask; the leaf to check is the first real one."""
    for i, a in enumerate(case.leaves):
        if i in case.where or is_key(a) or not a.size:
            continue
        if a.dtype == bool and a.ndim:
            moved = a.copy()
            moved.flat[0] = not a.flat[0]
            leaves = replaced(case.leaves, [i], [moved])
            if moved[(0,) * (a.ndim - 1)].any():  # a fully masked row may be 0 / 0
                yield "a mask with its first element flipped", dataclasses.replace(case, leaves=tuple(leaves)), 0, (0,)
        if not jnp.issubdtype(a.dtype, jnp.integer) or not a.ndim:  # a scalar may be a number of steps
            continue
        above = int(a.max()) + 1
        limits = jnp.iinfo(a.dtype)
        largest = [int(n) for n in (case.sizes.values() if case.sizes else ()) if isinstance(n, int) and n >= above]
        for value in (-1, limits.max, *sorted({above, *largest})):
            if not limits.min <= value <= limits.max:
                continue
            moved = a.copy()
            moved.flat[0] = value
            leaves = replaced(case.leaves, [i], [moved])
            yield f"an integer argument of {value}", dataclasses.replace(case, leaves=tuple(leaves)), 0, (0,)


def other_integers(case: Case) -> Iterator[Finding]:
    """Checks that other integer dtypes give the same gradients, and integers out of range the oracle's."""
    whole = [
        i
        for i, a in enumerate(case.leaves)
        if i not in case.where and not is_key(a) and jnp.issubdtype(a.dtype, jnp.integer)
    ]
    if not whole:
        raise NotApplicable("no argument is an integer array")
    g = case.cotangent(180)
    expected = case.by_rule(g)
    allowed = truth_and_allowance(case, g)[1]
    dtypes = ("int8", "uint8", "int16", "uint32") if "extremes" in case.required else ("int8",)
    for name in dtypes:
        cast = [case.leaves[i].astype(name) for i in whole]
        if any((a != case.leaves[i]).any() for a, i in zip(cast, whole, strict=True)):
            continue
        other = dataclasses.replace(case, leaves=tuple(replaced(case.leaves, whole, cast)))
        try:
            got = other.by_rule(g)
        except (NotApplicable, RuleRaised):
            continue  # a function may require a dtype
        for path, a, b, tolerance in zip(case.paths, map(widened, got), map(widened, expected), allowed, strict=True):
            off = ~(np.abs(a - b) <= tolerance)
            if off.any():
                index = tuple(int(j) for j in np.argwhere(off)[0])
                message = f"with integers of dtype {name}, the gradient changes"
                yield finding(case, message, path, index, a[index].item(), b[index].item())
                return
    for where, spoiled, _, _ in _impossible(case):
        rule, auto = spoiled.by_rule(g), spoiled.by_oracle(g)
        outs = spoiled.outputs()
        if any(not np.isfinite(widened(out)).all() for out in outs):
            continue  # `nan_kept` checks it
        for path, a, b, tolerance in zip(case.paths, map(widened, rule), map(widened, auto), allowed, strict=True):
            off = np.isfinite(b) & ~(np.abs(a - b) <= tolerance + 0.01 * np.abs(b))
            if off.any():
                index = tuple(int(j) for j in np.argwhere(off)[0])
                message = f"with {where}, the output is finite but the gradient differs from the oracle's"
                yield finding(case, message, path, index, a[index].item(), b[index].item())
                return


def spoiled_cotangents(case: Case) -> Iterator[Finding]:
    """Checks that an infinity or NaN in one row of the cotangent does not change the gradients of other rows."""
    g = case.cotangent(190)
    rows = g[0].shape[0] if g and g[0].ndim else 0
    leaves = [i for i, a in enumerate(case.reals) if a.ndim and a.shape[0] == rows]
    if rows < 2 or not leaves:
        raise NotApplicable("no argument shares the leading axis of the output, or it has fewer than two rows")
    clean, clean_oracle = case.by_rule(g), case.by_oracle(g)
    for value in (np.inf, np.nan):
        spoiled = [a.copy() for a in g]
        for a in spoiled:
            if a.ndim and a.shape[0] == rows:
                a[0] = value
        got, expected = case.by_rule(spoiled), case.by_oracle(spoiled)
        for i in leaves:
            kept = _same(expected[i], clean_oracle[i])
            moved = kept & ~_same(got[i], clean[i])
            moved &= ~(np.abs(widened(got[i]) - widened(clean[i])) <= 64 * case.eps * max_abs(clean[i]))
            moved[0] = False  # its own row
            if np.isnan(value):
                erased = np.isnan(widened(expected[i][0])) & np.isfinite(widened(got[i][0])) & (clean_oracle[i][0] != 0)
                if erased.any():
                    index = (0, *(int(j) for j in np.argwhere(erased)[0]))
                    message = "a cotangent of NaN is lost: the gradient of its row is finite"
                    yield finding(case, message, case.paths[i], index, got[i][index].item(), expected[i][index].item())
                    return
            if moved.any():
                index = tuple(int(j) for j in np.argwhere(moved)[0])
                message = f"a cotangent of {value:g} in row 0 changes the gradient of a different row"
                values = (got[i][index].item(), clean[i][index].item())
                yield finding(case, message, case.paths[i], index, *values)
                return
