"""The checks at points that matter: kinks, tails, extremes, NaN, and integers out of range."""

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
"""How a point is named where elements are equal, after the argument and before the axis."""


def inside(case: Case, leaf: int, value: np.ndarray) -> np.ndarray:
    """Which elements lie in the declared range of a leaf."""
    low, high = case.ranges[leaf]
    return (value > low) & (value < high) if (low, high) != (-math.inf, math.inf) else np.ones(np.shape(value), bool)


def special_points(case: Case) -> Iterator[tuple[str, Case]]:
    """Points where functions have kinks: zeros, ones, ties; in every real leaf by turns, inside its range."""
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
    """At zeros, ones and ties the rule is the oracle's, or at a kink the subgradient of least norm, or as declared."""
    try:
        wide = case.in_float64
    except NotApplicable:
        wide = case
        if case.computes_in != np.float32:  # a slope of half precision says too little
            raise
    compared = bool(case.at_kink)
    for point, slope in case.at_kink.items():
        at = wide.with_reals([np.full_like(wide.reals[0], point), *wide.reals[1:]])
        got = at.by_rule([np.ones(out.shape, out.dtype) for out in at.outs])[0]
        off = np.argwhere(~(got == np.asarray(slope, got.dtype)))
        if len(off):
            index = tuple(int(i) for i in off[0])
            message = f"at {point:g} the derivative was declared to be {slope:g}"
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
            off |= np.isnan(b) & np.isfinite(a)  # some rules exist for the points where autodiff is NaN
            if is_complex(at.reals[leaf]):
                continue
            for index in np.argwhere(off)[:4]:
                found, kinked = _at_kink(at, g, leaf, tuple(int(i) for i in index), a, b, ties)
                # A maximum has its kinks where elements are equal, and may give all to any one of them.
                ties = ties or (kinked and TIED in name)
                if found and not (ties and kinked and TIED in name):
                    yield dataclasses.replace(found, message=f"{found.message} ({name})")
                    return
    if not compared:
        raise Inconclusive("the oracle has no gradient at any of the points")


def _tied_elements(case: Case, g: list, got: list, expected: list, name: str) -> Iterator[Finding]:
    """Equal elements along an axis may share a gradient at will, but not be given it several times over."""
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
                f"the elements of {path.strip()} along axis {axis} are equal, and the sum of their gradients is off"
            )
            values = tuple(int(i) for i in index), float(a[index]), left
            yield finding(case, message, case.paths[leaf], *values)
            return


def _tied_arguments(case: Case) -> Iterator[Finding]:
    """Where two arguments are equal, as in a maximum, their gradients may be shared at will, but not given twice."""
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
        # Along both, the function has a slope that automatic differentiation knows.
        got_sum, expected_sum = got[first] + got[second], expected[first] + expected[second]
        tolerance = max(1e-9, 256 * tied.eps) + case.rtol
        size = max_abs(expected[first]) + max_abs(expected[second]) + 1
        off = np.isfinite(expected_sum) & ~(np.abs(got_sum - expected_sum) <= tolerance * size + case.atol)
        for index in map(tuple, np.argwhere(off)[:1]):
            left, right = _slopes_along(tied, g, (first, second), index)
            near = _near(tied) * (1 + abs(left))
            if abs(left - right) < near < abs(left - got_sum[index]):
                message = f"where {case.paths[first]} and {case.paths[second]} are equal, their sum is off"
                values = tuple(int(i) for i in index), float(got_sum[index]), float(expected_sum[index])
                yield finding(tied, message, case.paths[first], *values)
                return


def _slopes_along(case: Case, g: list, leaves: tuple[int, ...], index: tuple) -> tuple[float, float]:
    """The slopes to the left and right where one element of several leaves moves; NaN where the function jumps."""

    def value(delta):
        reals = [a.copy() for a in case.reals]
        for leaf in leaves:
            reals[leaf][index] += delta
        return sum(float(np.sum(a * b).real) for a, b in zip(case.with_reals(reals).outputs(), g, strict=True))

    h, center = (1e-6 if case.dtype == np.float64 else 1e-3), value(0.0)

    def slope(step):
        far, close = value(step) - center, value(step / 4) - center
        jumps = abs(close) > 0.75 * abs(far) > 1e-4 * (1 + abs(center))  # as a pseudoinverse where the rank drops
        return np.nan if jumps else far / step

    return slope(-h), slope(h)


def _near(case: Case) -> float:
    """By how much the slopes of `_slopes_along` may be off."""
    return 1e-4 if case.dtype == np.float64 else 2e-2


def _at_kink(case, g, leaf, index, got, expected, ties) -> tuple[Finding | None, bool]:
    """Whether a gradient that is not the oracle's is wrong, and whether there is a kink."""
    left, right = _slopes_along(case, g, (leaf,), index)
    if not np.isfinite(left + right):
        return None, False  # the function ends or jumps here
    center = sum(float(np.sum(a * b).real) for a, b in zip(case.outputs(), g, strict=True))
    size = max(abs(left), abs(right), 1.0) + abs(center)
    low, high = min(left, right), max(left, right)
    least = 0.0 if low <= 0 <= high else (low if low > 0 else high)
    a, b = float(got[index]), float(expected[index])
    near, path = _near(case) * size, case.paths[leaf]
    if high - low < near:
        if abs(a - (left + right) / 2) < near:
            return None, False  # the oracle is the one that is wrong here
        b = b if np.isfinite(b) else (left + right) / 2
        return finding(case, "the function is smooth here, and the rule is wrong", path, index, a, b), False
    declared = leaf == 0 and any(abs(case.reals[0][index] - point) < 1e-5 for point in case.at_kink)
    between = low - near < a < high + near
    if abs(a - least) < near or declared or (between and (ties or np.isnan(b))):
        return None, True
    b = b if np.isfinite(b) else least
    message = (
        f"at a kink, where the slopes on both sides are {left:.4g} and {right:.4g}, this is neither automatic "
        "differentiation's derivative nor the one of least norm; if it is meant, declare it with at_kink="
    )
    return finding(case, message, path, index, a, b), True


def nan_at_zero(case: Case) -> Iterator[Finding]:
    """Where all elements of an argument are 0 and the function is finite, the gradient is not NaN, as of a norm."""
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
                message = f"{case.paths[leaf]} is 0 everywhere: the function is finite, and this gradient is NaN"
                yield finding(case, message, path, index)
                return


def accuracy(case: Case) -> Iterator[Finding]:
    """In tails, with tiny elements and at a common offset, each element is about as accurate as autodiff's."""
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
                yield dataclasses.replace(found, message=f"{found.message}, {case.paths[leaf]} {name}")
                return
    if not compared:
        raise NotApplicable("no tail and no offset is in the range of an argument")


def _elementwise(case: Case) -> Iterator[Finding]:
    """Each element against float64, by the error of autodiff there and by how far it moves with its inputs."""
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
    for path, a, t, auto_a, bound, terms in zip(
        case.paths, map(widened, got), truth, map(widened, auto), allowed, of_terms, strict=True
    ):
        bound = np.where(t == 0, np.maximum(bound, terms), bound)  # what cancels to 0 leaves a rounding of its terms
        off = np.isfinite(t) & np.isfinite(auto_a) & ~(np.abs(a - t) <= bound + case.atol + case.rtol * np.abs(t))
        if off.any():
            index = tuple(int(i) for i in np.argwhere(off)[0])
            message = "this element is much less accurate than by automatic differentiation"
            ulps = in_ulps(case, float(abs(a[index] - t[index])), float(abs(t[index])))
            yield finding(case, message, path, index, float(a[index]), float(t[index]), ulps)
            return


def _spoiled(case: Case) -> Iterator[tuple[str, Case, int, tuple]]:
    """The case with an extreme element, or one in each of two leaves: a name, the case, the leaf and the index."""
    limits = jnp.finfo(case.dtype)
    large = 1e30 if limits.maxexp > 100 else 1e4
    values = (large, -large, np.inf, -np.inf, np.nan, float(limits.tiny) / 8)
    floating = [i for i, a in enumerate(case.reals) if a.size and not is_complex(a)]
    gradients = case.by_rule(case.cotangent(120))
    for leaf in floating:
        value = case.reals[leaf]
        places = [case.rng(121 + leaf + 50 * draw).integers(0, value.shape) for draw in range(2)]
        masked = np.argwhere(gradients[leaf] == 0)  # what does not count must not do harm
        for place in [*places, *masked[:1]]:
            at = tuple(int(i) for i in place)
            for extreme in values:
                moved = value.copy()
                moved[at] = extreme
                in_range = inside(case, leaf, moved)[at] or (np.isinf(extreme) and extreme in case.ranges[leaf])
                if np.isnan(extreme) or in_range:
                    yield f"{case.paths[leaf]}{list(at)} = {extreme:g}", case.with_real(leaf, moved), leaf, at
    rank = max((case.reals[i].ndim for i in floating), default=0)  # weights, which have fewer axes, are not infinite
    for first, second in itertools.permutations(floating, 2):
        a, b = case.reals[first], case.reals[second]
        if not a.ndim or a.ndim < rank or (a.shape[:1] != b.shape[:1] and a.ndim <= b.ndim):
            continue
        # Next to an infinity in row 0 a 0 or 1: in the same row, or all of an argument that has other rows.
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
    """±1e30, ±inf, NaN, denormals, alone and with a 0: the oracle's gradient where that is finite, in its row alone."""
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
                message = f"{where}: the output is not the reference's"
                yield from different_outputs(spoiled, alike, finite, 1e5, message)
            infinite = any(not np.isfinite(widened(out)).all() for out in outs)
            value = spoiled.reals[leaf][at]
            for i, (a, b) in enumerate(zip(map(widened, got), map(widened, expected), strict=True)):
                scale = 64 * case.eps * (1 + max_abs(clean_oracle[i]) + max_abs(b))
                near = np.abs(a - b) <= 0.05 * np.abs(b) + scale
                wrong = np.isfinite(b) & ~near
                if wrong.any() and (
                    infinite or _infinite_beside(spoiled, where, i)
                ):  # no finite output and no finite gradient: right, whatever the oracle says
                    wrong = wrong & np.isfinite(a) & ~np.isnan(value)
                if 0 < abs(value) < 1e-3:  # flushed to 0, where the oracle can be wrong itself; `kinks` looks there
                    wrong = wrong & ~np.isfinite(a)
                leaked = _same(expected[i], clean_oracle[i]) & ~_same(got[i], clean[i]) & ~near
                if i == leaf and a.ndim:
                    leaked[at[0]] = False  # its own row
                for mask, message in (
                    (wrong, f"{where}: the oracle's gradient is finite, and the rule's is another"),
                    (leaked, f"{where} reaches the gradient of another row"),
                ):
                    if mask.any():
                        index = tuple(int(j) for j in np.argwhere(mask)[0])
                        yield finding(case, message, case.paths[i], index, a[index].item(), b[index].item())
                        return


def _infinite_beside(case: Case, where: str, leaf: int) -> bool:
    """Whether an output that is 0 · inf = 0 becomes infinite as soon as the 0 or 1 of a leaf is moved."""
    if " and " not in where:
        return False
    a = case.reals[leaf]
    moved = case.with_real(leaf, np.where((a == 0) | (a == 1), a + np.asarray(1e-3, a.dtype), a))
    return any(not np.isfinite(widened(out)).all() for out in moved.outputs())


def _same(a: np.ndarray, b: np.ndarray) -> Any:
    return (a == b) | (np.isnan(a) & np.isnan(b))


def nan_kept(case: Case) -> Iterator[Finding]:
    """Where a row of the output is NaN, its gradient is not finite: a loss that is NaN must not train.

    Where a reference is NaN for an integer that is out of range, or masked, so is the function.
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
                yield finding(case, f"{where}: the reference is NaN, and the function is not")
                return
        # A linear function of a NaN has a finite gradient, and so says automatic differentiation; a label that is not
        # a class has no gradient, whatever automatic differentiation makes of it.
        wrong = row & _finite_rows(spoiled.by_rule(g)[leaf])
        if not where.startswith("an integer"):
            wrong &= ~_finite_rows(spoiled.by_oracle(g)[leaf])
        if wrong.any():
            k = int(np.argmax(wrong))
            message = f"{where}: the output of row {k} is NaN, and its gradient is finite"
            yield finding(case, message, case.paths[leaf])
            return
    if not tried:
        raise NotApplicable("the rows of the outputs are not those of an argument")


def _finite_rows(a: np.ndarray) -> Any:
    return np.isfinite(widened(a)).reshape(len(a), -1).all(axis=1)


def _impossible(case: Case) -> Iterator[tuple[str, Case, int, tuple]]:
    """The case with an integer out of range or a mask changed, with the first real leaf as the one to look at."""
    for i, a in enumerate(case.leaves):
        if i in case.where or is_key(a) or not a.size:
            continue
        if a.dtype == bool and a.ndim:
            moved = a.copy()
            moved.flat[0] = not a.flat[0]
            leaves = replaced(case.leaves, [i], [moved])
            if moved[(0,) * (a.ndim - 1)].any():  # a row of which nothing counts may be 0 / 0
                yield "a mask with another first element", dataclasses.replace(case, leaves=tuple(leaves)), 0, (0,)
        if not jnp.issubdtype(a.dtype, jnp.integer) or not a.ndim:  # a single one may be a number of steps
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
    """Integers of 8, 16 and 64 bits, signed or not, give the gradients of 32; those out of range, the oracle's."""
    whole = [
        i
        for i, a in enumerate(case.leaves)
        if i not in case.where and not is_key(a) and jnp.issubdtype(a.dtype, jnp.integer)
    ]
    if not whole:
        raise NotApplicable("no argument is an array of integers")
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
            continue  # a function may insist on a dtype
        for path, a, b, tolerance in zip(case.paths, map(widened, got), map(widened, expected), allowed, strict=True):
            off = ~(np.abs(a - b) <= tolerance)
            if off.any():
                index = tuple(int(j) for j in np.argwhere(off)[0])
                message = f"with integers of dtype {name} the gradient is another"
                yield finding(case, message, path, index, a[index].item(), b[index].item())
                return
    for where, spoiled, _, _ in _impossible(case):
        rule, auto = spoiled.by_rule(g), spoiled.by_oracle(g)
        outs = spoiled.outputs()
        if any(not np.isfinite(widened(out)).all() for out in outs):
            continue  # `nan_kept` looks there
        for path, a, b, tolerance in zip(case.paths, map(widened, rule), map(widened, auto), allowed, strict=True):
            off = np.isfinite(b) & ~(np.abs(a - b) <= tolerance + 0.01 * np.abs(b))
            if off.any():
                index = tuple(int(j) for j in np.argwhere(off)[0])
                message = f"{where}: the output is finite, and the gradient is not the oracle's"
                yield finding(case, message, path, index, a[index].item(), b[index].item())
                return


def spoiled_cotangents(case: Case) -> Iterator[Finding]:
    """An infinity or a NaN in one row of the cotangent leaves the gradients of the other rows as they are."""
    g = case.cotangent(190)
    rows = g[0].shape[0] if g and g[0].ndim else 0
    leaves = [i for i, a in enumerate(case.reals) if a.ndim and a.shape[0] == rows]
    if rows < 2 or not leaves:
        raise NotApplicable("the rows of the output are not those of an argument")
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
                message = f"a cotangent of {value:g} in row 0 reaches the gradient of another row"
                values = (got[i][index].item(), clean[i][index].item())
                yield finding(case, message, case.paths[i], index, *values)
                return
