"""The checks of a rule's numbers: each is one function from a case to what it found.

A check yields a `Finding` for each thing that is wrong and nothing if all is well, and raises `NotApplicable` with the
reason if it cannot be made. A new check is a new function, listed in `_checks.py`.
"""

import dataclasses
from collections.abc import Callable, Iterator

import chex
import jax
import jax.numpy as jnp
import numpy as np

from fcfunc.testing import _case, _oracle
from fcfunc.testing._case import Case, NotApplicable, first_line, to_jax, to_numpy, x64_for
from fcfunc.testing._compare import (
    EVERY_ARGUMENT,
    Finding,
    both,
    compare,
    disagreements,
    finding,
    max_abs,
    rounding,
    truth_and_allowance,
)


def repeatable(case: Case) -> Iterator[Finding]:
    """The same bits the second time and the third, with another case in between: nothing is remembered."""
    g, other = case.cotangent(130), case.with_reals([a * np.asarray(0.5, a.dtype) for a in case.reals])
    first = case.vjp(case.fun, g)
    for time in ("second", "third"):
        again = case.vjp(case.fun, g)
        yield from compare(case, again, first, 0.0, f"the {time} call gives other bits than the first")
        other.vjp(case.fun, g)


def oracle(case: Case) -> Iterator[Finding]:
    """The rule against automatic differentiation of the undecorated function, in the dtype given and in float64."""
    directions = 2 if case.fast else 6
    yield from disagreements(case, directions, "the rule differs from automatic differentiation of its function")
    if case.dtype != np.float64:
        yield from disagreements(case.in_float64, directions, "the rule differs from automatic differentiation")


def precision_of_dtypes(case: Case) -> Iterator[Finding]:
    """Float16, bfloat16, float32: no further from a float64 truth than automatic differentiation, but for a factor."""
    others = [d for d in case.dtypes if jnp.dtype(d) != case.dtype]
    refused = []
    for name in others:
        narrow = case.cast(jnp.dtype(name)).as_compiled()
        try:
            jax.eval_shape(narrow.oracle, *narrow.args)
        except Exception as e:
            refused.append(f"{name}: {first_line(e)}")
            continue
        types = list(cotangent_types(narrow))
        if types:
            yield from types
            return
        message = f"in {name} the rule is further from a float64 truth than automatic differentiation by far"
        yield from disagreements(narrow, 1 if case.fast else 3, message)
    if len(refused) == len(others):
        raise NotApplicable(f"the function takes no other dtype ({(refused or ['none is claimed'])[0]})")


def central_differences(case: Case, g: list, leaf: int, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Derivatives of `sum(g * outputs)` along `[k, *shape]` directions of a leaf, and an estimate of their errors.

    Each is extrapolated from three step sizes (Richardson), at three scales; the scale with the smallest estimated
    error is taken, so that a step over a kink gives way to one that stays on its side. Where all scales step over it,
    the slopes to the left and to the right differ however small the step, and that jump counts as error.
    """
    point = case.reals[leaf]

    def value(moved):
        reals = list(case.reals)
        reals[leaf] = moved
        outs = case.fun(*case.fill(reals))
        return sum(jnp.sum(out * weight) for out, weight in zip(outs, g, strict=True))

    count, best, error = len(directions), np.zeros(len(directions)), np.full(len(directions), np.inf)
    steps = np.array([scale / half for scale in (1e-2, 1e-3, 1e-4) for half in (1, 2, 4)])
    signed = np.concatenate([[0.0], steps, -steps]).reshape(-1, *[1] * directions.ndim)
    points = (point[None, None] + signed * directions[None]).reshape(-1, *point.shape)
    with x64_for(case.dtype):
        values = np.asarray(jax.jit(jax.vmap(value))(jnp.asarray(points))).reshape(-1, count)
    center, right, left = values[0], values[1:10].reshape(3, 3, count), values[10:].reshape(3, 3, count)
    size = np.abs(values).max(axis=0)
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
    found_by_rule, _, raised = both(case, lambda: wide.vjp(wide.fun, g), lambda: None, "the rule raises")
    if raised:
        yield raised
        return
    kept = 0
    for leaf, (path, gradient) in enumerate(zip(wide.paths, found_by_rule, strict=True)):
        if not gradient.size:
            continue
        directions, labels = directions_of(wide.rng(21 + leaf), gradient)
        try:
            slopes, errors = central_differences(wide, g, leaf, directions)
        except Exception as e:
            raise NotApplicable(f"the function cannot be vmapped over points: {first_line(e)}") from None
        along = np.tensordot(directions, gradient, axes=gradient.ndim)
        scale = np.abs(directions).reshape(len(directions), -1) @ np.abs(gradient).ravel()
        scale = np.maximum(scale, np.abs(slopes))
        # A difference across a kink is thrown away. The bound is of the size that a sum of random signs has, not of
        # the sum of magnitudes: in a large array that would let a few kinks pass.
        spread = np.sqrt((directions**2).reshape(len(directions), -1) @ (gradient**2).ravel())
        smooth = errors < 1e-6 * (spread + max_abs(gradient))
        if wide.has_reference:  # a surrogate's gradient is not that of its values, nor is the rule's
            by_reference = np.tensordot(directions, wide.vjp(wide.oracle, g)[leaf], axes=gradient.ndim)
            smooth = smooth & (np.abs(by_reference - slopes) <= 1e-6 * scale)
        kept += int(smooth.sum())
        wrong = smooth & ~(np.abs(along - slopes) <= 1e-7 * scale + 1e-9 * max_abs(gradient) + 20 * errors)
        if wrong.any():
            k = int(np.argmax(np.where(wrong, np.abs(along - slopes), -1)))
            message = f"the rule differs from central differences {labels[k]}"
            index = (
                tuple(int(i) for i in np.argwhere(directions[k])[0]) if np.count_nonzero(directions[k]) == 1 else None
            )
            yield finding(wide, message, path, index, float(along[k]), float(slopes[k]))
    if not kept:
        raise NotApplicable(
            "every difference stepped over a kink, there is no element, or the reference is a surrogate"
        )


def finite_differences(case: Case) -> Iterator[Finding]:
    """The rule against central differences of the function, element by element (64 of them, fewer of large arrays)."""

    def elements(rng, gradient):
        count = int(np.clip(2**18 // gradient.size, 4, 64))
        flat = rng.permutation(gradient.size)[:count]
        directions = np.zeros((len(flat), gradient.size))
        directions[np.arange(len(flat)), flat] = 1
        return directions.reshape(-1, *gradient.shape), ["by this element"] * len(flat)

    yield from against_differences(case, elements)


def projected_differences(case: Case) -> Iterator[Finding]:
    """The rule against central differences along random directions: all elements at once, for a large array too."""

    def signs(rng, gradient):
        return rng.choice([-1.0, 1.0], (3 if case.fast else 8, *gradient.shape)), ["along a random direction"] * 8

    yield from against_differences(case, signs)


def taylor(case: Case) -> Iterator[Finding]:
    """The remainder f(x + h v) - f(x) - h <gradient, v> falls as h squared: no step size to choose."""
    wide = case.in_float64
    g, rng = wide.cotangent(30), case.rng(31)
    v = [rng.standard_normal(a.shape) for a in wide.reals]

    def remainders(fun):
        slope = sum(float(np.sum(a * b)) for a, b in zip(wide.vjp(fun, g), v, strict=True))
        out = []
        for h in (0.0, *steps):
            moved = wide.fill([a + h * b for a, b in zip(wide.reals, v, strict=True)])
            with x64_for(np.float64):
                outs = to_numpy(_case.compiled_outputs(fun, moved))
            out.append(sum(float(np.sum(a * b)) for a, b in zip(outs, g, strict=True)) - h * slope)
        return np.abs(np.array(out[1:]) - out[0]), abs(slope) + abs(out[0])

    steps = (1e-3, 1e-4)
    by_rule, by_oracle, raised = both(
        case, lambda: remainders(wide.fun), lambda: remainders(wide.oracle), "the rule raises"
    )
    if raised:
        yield raised
        return

    def order(r, size):
        return 2.0 if r[1] <= 1e-12 * size else float(np.log10(r[0] / r[1]))

    if order(*by_oracle) < 1.6:
        raise NotApplicable("the oracle's own remainder does not fall as h squared: a kink, or a surrogate")
    if not order(*by_rule) > 1.4:
        message = (
            f"the Taylor remainder falls as h^{order(*by_rule):.2f}, not as h^2: the gradient is not the function's"
        )
        yield finding(wide, message)


def forward_mode(case: Case) -> Iterator[Finding]:
    """Forward mode against the oracle's, where the function has one."""
    rng = case.rng(40)
    v = [rng.standard_normal(a.shape).astype(a.dtype) for a in case.reals]

    def push(fun):
        with x64_for(case.dtype):
            return to_numpy(_case.compiled_tangents(fun, case.args, to_jax(v)))

    expected = push(case.oracle)
    try:
        got = push(case.fun)
    except TypeError as e:
        raise NotApplicable(f"a custom_vjp function has no forward mode ({first_line(e)[:60]}...)") from None
    yield from compare(case, got, expected, rounding(case, expected), "forward mode differs from the oracle's")


def adjoint(case: Case) -> Iterator[Finding]:
    """<u, J v> by forward mode of the oracle equals <J^T u, v> by the rule."""
    wide = case.in_float64
    for trial in range(2 if case.fast else 8):
        u, rng = wide.cotangent(50 + trial), case.rng(70 + trial)
        v = [rng.standard_normal(a.shape) for a in wide.reals]
        with x64_for(np.float64):
            push = _case.compiled_tangents(wide.oracle, wide.args, to_jax(v))
        forward = [np.asarray(a) * b for a, b in zip(push, u, strict=True)]
        back = [a * b for a, b in zip(wide.vjp(wide.fun, u), v, strict=True)]
        left, right = sum(map(np.sum, forward)), sum(map(np.sum, back))
        size = sum(np.abs(a).sum() for a in [*forward, *back])
        if not abs(left - right) <= 1e-11 * size + 1e-13 * sum(np.abs(a).sum() for a in u):
            message = "<J^T u, v> of the rule is not <u, J v>"
            yield finding(wide, message, EVERY_ARGUMENT, None, float(right), float(left))
            return


def watched_gradients(case: Case, fun: Callable):
    """The calls of rules while gradients are traced, the types of the gradients, and what was raised."""
    g, types = case.cotangent(0), []

    def pull(args, g):
        types.extend(jax.typeof(a) for a in _case.gradients(fun, args, g))

    with x64_for(case.dtype):
        calls, raised = _oracle.watch(pull, case.args, to_jax(g))
    return calls, types, raised


def cotangent_types(case: Case) -> Iterator[Finding]:
    """Each cotangent has its argument's dtype, shape and tree, as the backward pass itself returns it."""
    calls, types, raised = watched_gradients(case, case.fun)
    if raised is not None:
        yield finding(case, f"the rule raises: {first_line(raised)}")
    for path, primal, came in zip(case.paths, case.reals, types, strict=False):
        if came.dtype != primal.dtype or came.shape != primal.shape:
            message = f"{primal.dtype}{list(primal.shape)} expected, got {came.dtype}{list(came.shape)}"
            yield finding(case, message, path)
    for call in calls:
        for cotangents in call.cotangents:
            yield from _wrong_cotangents(case, call, cotangents)


def _wrong_cotangents(case: Case, call: _oracle.Call, cotangents) -> Iterator[Finding]:
    """What a backward pass returned for real arguments that differs from them in tree, shape or dtype."""
    where = f"the backward pass of {call.name}"
    if not isinstance(cotangents, tuple | list) or len(cotangents) != len(call.args):
        given = f"{len(cotangents)}" if isinstance(cotangents, tuple | list) else type(cotangents).__name__
        yield finding(case, f"{where} must return a tuple of {len(call.args)}, one for each argument, got {given}")
        return
    for i, (primal, cotangent) in enumerate(zip(call.args, cotangents, strict=True)):
        if cotangent is None:
            continue
        primals, given = jax.tree.leaves(primal), jax.tree.leaves(cotangent, is_leaf=lambda x: x is None)
        if len(primals) != len(given):
            yield finding(case, f"{where} returns {len(given)} arrays for argument {i}, which has {len(primals)}")
            continue
        for p, c in zip(map(jax.typeof, primals), given, strict=True):
            if (
                jnp.issubdtype(p.dtype, jnp.inexact)
                and hasattr(c, "dtype")
                and (c.dtype, c.shape) != (p.dtype, p.shape)
            ):
                expected = p.str_short()
                yield finding(case, f"{where} returns {c.dtype}{list(c.shape)} for argument {i}, {expected} expected")


def integer_arguments(case: Case) -> Iterator[Finding]:
    """Integer, boolean and key arguments get None or float0 from the backward pass, and nothing else."""
    calls, _, _ = watched_gradients(case, case.fun)
    whole = [
        a for call in calls for a in jax.tree.leaves(call.args) if not jnp.issubdtype(jax.typeof(a).dtype, jnp.inexact)
    ]
    if not whole:
        raise NotApplicable("no rule is given an integer, boolean or key argument")
    for call in calls:
        for cotangents in call.cotangents:
            for i, (primal, cotangent) in enumerate(zip(call.args, cotangents, strict=False)):
                for p, c in zip(map(jax.typeof, jax.tree.leaves(primal)), jax.tree.leaves(cotangent), strict=False):
                    if not jnp.issubdtype(p.dtype, jnp.inexact) and c.dtype != jax.dtypes.float0:
                        returned = f"the backward pass of {call.name} returns {c.dtype} for argument {i} of {p.dtype}"
                        yield finding(case, f"{returned}: None or float0 expected")


def rule_used(case: Case) -> Iterator[Finding]:
    """Every rule that is called has its backward pass run when the function is differentiated, under remat too."""
    ways = {"": case.fun, " under jax.checkpoint": jax.checkpoint(case.fun)}
    for way, fun in ways.items():
        calls, _, raised = watched_gradients(case, fun)
        if raised is not None:
            raise raised
        ran = {call.name for call in calls if call.cotangents}
        for name in sorted({call.name for call in calls} - ran):
            message = f"the backward pass of {name} never runs{way}: its gradient comes from elsewhere, or is lost"
            yield finding(case, message)


def zero_cotangent(case: Case) -> Iterator[Finding]:
    """A zero cotangent gives a zero gradient."""
    g = [np.zeros_like(a) for a in case.cotangent(0)]
    got = case.vjp(case.fun, g)
    zeros = [np.zeros_like(a) for a in case.reals]
    yield from compare(case, got, zeros, 0.0, "a zero cotangent must give a zero gradient")


def linear_in_cotangent(case: Case) -> Iterator[Finding]:
    """Exact under powers of two, from tiny to large, and additive."""
    case = case.as_compiled()
    g, h = case.cotangent(80), case.cotangent(81)
    base = case.vjp(case.fun, g)
    limits = jnp.finfo(case.dtype)
    powers = (-4, 4, 8) if limits.maxexp < 20 else (-100, -40, -8, 8, 20, 60, 100)
    for power in powers:
        factor = 2.0**power
        scaled = case.vjp(case.fun, [(a * np.asarray(factor, a.dtype)).astype(a.dtype) for a in g])
        expected = [a.astype(np.float64) * factor for a in base]
        floor = float(limits.tiny) * 2.0**24 + 1e-4 * case.eps * max(map(max_abs, expected), default=0.0)
        message = f"a cotangent times 2^{power} must give the gradient times 2^{power} exactly"
        found = list(compare(case, scaled, expected, floor, message))
        if found:
            yield from found
            return
    summed = case.vjp(case.fun, [a + b for a, b in zip(g, h, strict=True)])
    parts = [a.astype(np.float64) + b for a, b in zip(base, case.vjp(case.fun, h), strict=True)]
    _, allowed = truth_and_allowance(case, [np.abs(a) + np.abs(b) for a, b in zip(g, h, strict=True)])
    _, allowed_sum = truth_and_allowance(case, [a + b for a, b in zip(g, h, strict=True)])
    tolerance = [4 * (s + t) for s, t in zip(allowed, allowed_sum, strict=True)]
    yield from compare(case, summed, parts, tolerance, "the gradient is not additive in the cotangent")


def partial_cotangents(case: Case) -> Iterator[Finding]:
    """One output differentiated alone, one argument alone: absent and symbolically zero cotangents are right."""
    g = case.cotangent(90)
    if len(g) < 2 and len(case.reals) < 2:
        raise NotApplicable("there is one output and one argument")
    whole = case.vjp(case.fun, g)
    for leaf in range(len(case.reals) if len(case.reals) > 1 else 0):

        def alone(real, leaf=leaf):
            reals = list(case.reals)
            reals[leaf] = real
            return case.fun(*case.fill(reals))

        with x64_for(case.dtype):
            got = to_numpy(jax.vjp(alone, jnp.asarray(case.reals[leaf]))[1](to_jax(g)))
        message = "differentiated alone, this argument has another gradient than with the others"
        expected = whole[leaf : leaf + 1]
        for found in compare(case, got, expected, rounding(case, expected), message):
            yield dataclasses.replace(found, argument=case.paths[leaf])
    for i in range(len(g) if len(g) > 1 else 0):

        def pulled(fun, i=i):
            with x64_for(case.dtype):
                out, back = jax.vjp(lambda *args: fun(*args)[i], *case.args)
                return to_numpy(_case.only_real(back(jnp.asarray(g[i], out.dtype))))

        expected = pulled(case.oracle)
        message = f"with output {i} differentiated alone the gradient is wrong"
        yield from compare(
            case, pulled(case.fun), expected, rounding(case, expected, 64.0 if case.eps < 1e-10 else 4.0e3), message
        )


def forward_output(case: Case) -> Iterator[Finding]:
    """The forward pass of the rule returns what the function returns, in value, shape and dtype."""
    with x64_for(case.dtype):
        plain, ruled = case.fun(*case.args), jax.vjp(case.fun, *case.args)[0]
        given = case.oracle(*case.args) if case.has_reference else plain
    for i, (a, b) in enumerate(zip(plain, ruled, strict=True)):
        if a.dtype != b.dtype or a.shape != b.shape:
            message = f"output {i} is {a.dtype}{list(a.shape)}, under differentiation {b.dtype}{list(b.shape)}"
            yield finding(case, message)
            return
    plain, ruled = to_numpy(plain), to_numpy(ruled)
    message = "under differentiation the output is another"
    yield from compare(case, ruled, plain, rounding(case, plain, 16.0), message)
    message = "the function differs from the reference"
    yield from compare(case, plain, to_numpy(given), rounding(case, plain, 64.0), message)


def special_points(case: Case) -> Iterator[tuple[str, Case]]:
    """Points where functions have kinks: zeros, ones, ties; in every real leaf by turns."""
    for leaf, value in enumerate(case.reals):
        rng = case.rng(100 + leaf)
        some = rng.uniform(size=value.shape) < 0.3
        ties = np.broadcast_to(value[..., :1], value.shape) if value.ndim else value
        signs = rng.choice([-1.0, 1.0], value.shape)
        for name, moved in {
            "equal along its last axis": ties,
            "large in places": np.where(some, signs * rng.choice([3.0, 10, 30, 100, 1000], value.shape), value),
            "tiny in places": np.where(some, signs * rng.choice([0.0, 1e-20, 1e-8, 1e-4], value.shape), value),
            "zero everywhere": np.zeros_like(value),
            "zero in places": np.where(some, 0.0, value),
            "one in places": np.where(some, 1.0, value),
            "minus one in places": np.where(some, -1.0, value),
        }.items():
            yield f"{case.paths[leaf]} {name}", case.with_reals([*case.reals[:leaf], moved, *case.reals[leaf + 1 :]])


def kinks(case: Case) -> Iterator[Finding]:
    """At zeros, ones and ties the rule is the oracle's, or at a kink the subgradient of least norm, or as declared."""
    wide = case.in_float64.as_compiled()
    for point, slope in case.at_kink.items():
        at = wide.with_reals([np.full_like(wide.reals[0], point), *wide.reals[1:]])
        got = at.vjp(at.fun, [np.ones_like(a) for a in at.cotangent(0)])[:1]
        message = f"at {point:g} the derivative was declared to be {slope:g}"
        for found in compare(at, got, [np.full_like(got[0], slope)], 0.0, message):
            yield dataclasses.replace(found, argument=case.paths[0])
    ties = False
    for name, at in special_points(wide):
        g = at.cotangent(110)
        try:
            expected = at.vjp(at.oracle, g)
        except Exception:
            continue
        got = at.vjp(at.fun, g)
        for leaf, (a, b) in enumerate(zip(got, expected, strict=True)):
            off = np.isfinite(b) & ~(np.abs(a - b) <= 1e-9 * (max_abs(b) + 1))
            for index in np.argwhere(off)[:4]:
                found, kinked = _at_kink(at, g, leaf, tuple(int(i) for i in index), a, b, ties)
                # A maximum has its kinks where elements are equal, and may give all to any one of them.
                ties = ties or (kinked and name.endswith("last axis"))
                if found and not (ties and kinked and name.endswith("last axis")):
                    yield dataclasses.replace(found, message=f"{found.message} ({name})")
                    return


def _at_kink(case, g, leaf, index, got, expected, ties) -> tuple[Finding | None, bool]:
    """Whether a gradient that is not the oracle's is wrong, and whether there is a kink."""
    h, base = 1e-6, case.reals[leaf]

    def value(delta):
        moved = base.copy()
        moved[index] += delta
        with x64_for(np.float64):
            outs = to_numpy(case.fun(*case.fill([*case.reals[:leaf], moved, *case.reals[leaf + 1 :]])))
        return sum(float(np.sum(a * b)) for a, b in zip(outs, g, strict=True))

    center = value(0.0)
    left, right = (center - value(-h)) / h, (value(h) - center) / h
    if not np.isfinite(left + right):
        return None, False  # outside the function's domain
    size = max(abs(left), abs(right), 1.0) + abs(center)
    low, high = min(left, right), max(left, right)
    least = 0.0 if low <= 0 <= high else (low if low > 0 else high)
    a, b = float(got[index]), float(expected[index])
    near, path = 1e-4 * size, case.paths[leaf]
    if high - low < near:
        if abs(a - (left + right) / 2) < near:
            return None, False  # the oracle is the one that is wrong here
        return finding(case, "the function is smooth here, and the rule is wrong", path, index, a, b), False
    if abs(a - least) < near or (ties and low - near < a < high + near) or case.at_kink:
        return None, True
    message = f"at a kink (slopes {left:.4g} and {right:.4g}) neither the oracle's derivative nor the one of least norm"
    return finding(case, message, path, index, a, b), True


def extremes(case: Case) -> Iterator[Finding]:
    """±1e30, ±inf, NaN and denormals: the oracle's gradient where that is finite; a spoiled row spoils no other."""
    case, limits = case.as_compiled(), jnp.finfo(case.dtype)
    large = 1e30 if limits.maxexp > 100 else 1e4
    g = case.cotangent(120)
    clean, clean_oracle = case.vjp(case.fun, g), case.vjp(case.oracle, g)
    for leaf, value in enumerate(case.reals):
        if not value.size:
            continue
        at = tuple(int(i) for i in case.rng(121 + leaf).integers(0, value.shape))
        for extreme in (large, -large, np.inf, -np.inf, np.nan, float(limits.tiny) / 8):
            moved = value.copy()
            moved[at] = extreme
            spoiled = case.with_reals([*case.reals[:leaf], moved, *case.reals[leaf + 1 :]])
            got, expected = spoiled.vjp(spoiled.fun, g), spoiled.vjp(spoiled.oracle, g)
            with x64_for(case.dtype):
                undefined = any(not np.isfinite(out).all() for out in to_numpy(spoiled.fun(*spoiled.args)))
            where = f"{case.paths[leaf]}{list(at)} = {extreme:g}"
            for i, (a, b) in enumerate(zip(got, expected, strict=True)):
                a, b = a.astype(np.float64), b.astype(np.float64)
                scale = 64 * case.eps * (1 + max_abs(clean_oracle[i]) + max_abs(b))
                near = np.abs(a - b) <= 0.05 * np.abs(b) + scale
                wrong = np.isfinite(b) & ~near
                if undefined:  # no finite output and NaN in the gradient: right, whatever the oracle says
                    wrong = wrong & ~np.isnan(a) & ~np.isnan(extreme)
                if abs(extreme) < 1e-3:  # flushed to 0, where the oracle can be wrong itself; `kinks` looks there
                    wrong = wrong & ~np.isfinite(a)
                leaked = _same(expected[i], clean_oracle[i]) & ~_same(got[i], clean[i]) & ~near
                if i == leaf and value.ndim:
                    leaked[at[0]] = False  # its own row
                for mask, message in (
                    (wrong, f"{where}: the oracle's gradient is finite, and the rule's is another"),
                    (leaked, f"{where} reaches the gradient of another row"),
                ):
                    if mask.any():
                        index = tuple(int(j) for j in np.argwhere(mask)[0])
                        values = (float(a[index]), float(b[index]))
                        yield finding(case, message, case.paths[i], index, *values)
                        return


def _same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a == b) | (np.isnan(a) & np.isnan(b))


def interleaved(case: Case) -> Iterator[Finding]:
    """Two forward passes, then two backward passes, first in first out: nothing leaks from one to the other."""
    g = case.cotangent(140)
    rng = case.rng(141)
    other = case.with_reals(
        [rng.standard_normal(a.shape).astype(a.dtype) * np.asarray(0.1, a.dtype) + a for a in case.reals]
    )
    apart = [c.vjp(c.fun, g) for c in (case, other)]
    with x64_for(case.dtype):
        backs = [jax.vjp(c.fun, *c.args)[1] for c in (case, other)]
        together = [to_numpy(_case.only_real(back(to_jax(g)))) for back in backs]
    for got, expected in zip(together, apart, strict=True):
        yield from compare(case, got, expected, 0.0, "a second forward pass changes the first one's gradient")


def arguments_untouched(case: Case) -> Iterator[Finding]:
    """Neither pass writes into an argument or a cotangent, nor frees one."""
    g = case.cotangent(150)
    before = [a.copy() for a in (*case.reals, *g)]
    with x64_for(case.dtype):
        args = case.fill(to_jax(case.reals))
        _, back = jax.vjp(case.fun, *args)
        back(to_jax(g))
        freed = any(leaf.is_deleted() for leaf in jax.tree.leaves(args) if isinstance(leaf, jax.Array))
        case.fun(*case.args)
        jax.vjp(case.fun, *case.args)
    try:
        chex.assert_trees_all_equal(before, [*case.reals, *g])
    except AssertionError:
        freed = True
    if freed:
        yield finding(case, "an argument or a cotangent was freed or written into")
