"""Compares a rule's gradient with differences of its function in 200-digit arithmetic; needs mpmath.

`_interpreter` evaluates the jaxprs of both; nothing is compiled. Central differences at a step of 1e-50 have a relative
error of about 1e-100, cross no kink, and do not depend on automatic differentiation.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np

from fcfunc.testing._case import Case, Inconclusive, NotApplicable, normal, pull, replaced, to_jax, x64_for
from fcfunc.testing._compare import Finding, finding, raising
from fcfunc.testing._interpreter import Program, Unknown, exact
from fcfunc.testing._numbers import STOPS, stops_gradients
from fcfunc.testing._oracle import contains
from fcfunc.testing._points import inside

DIGITS = 200
STEP = "1e-50"
"""With 100 digits and a step of 1e-35, gradients of 1e-39 in the tail of a softmax would agree to only 45 digits."""

LARGE = "1e10"
"""The assumed size of terms that cancel inside a function; their rounding error limits every difference."""

EQUAL = "1e-60"
"""The relative error up to which two gradients count as equal."""

NEARLY = {True: "1e-12", False: "1e-5"}
"""The same if the code contains rounded constants, by whether the function computes in float64."""

SIDES = (-20.5, -6.000001, -5.999999, -1e-6, 1e-6, 5.999999, 6.000001, 20.5)
"""Tails, and both sides of the usual kinks of activations; at a kink itself, a difference is not a derivative."""

MOST_ELEMENTS = 2000


def first_derivative(case: Case) -> Iterator[Finding]:
    """Compares the gradient with central differences at ordinary points, in tails and at an offset."""
    message = "the rule's gradient differs from central differences in 200-digit arithmetic"
    return (yield from _at_points(case, _gradient, message))


def second_derivative(case: Case) -> Iterator[Finding]:
    """Compares the derivative of the rule's gradient with central differences of that gradient."""
    message = "the rule's second derivative differs from central differences of its gradient in 200-digit arithmetic"
    return (yield from _at_points(case, _second, message))


def _at_points(case: Case, programs_of: Callable, message: str) -> Any:
    if case.is_complex:
        raise NotApplicable("complex numbers are not supported")
    if case.redraw is not None and case.letters:
        case = case.at(dict(zip(case.letters, (3, 2, 4, *[3] * len(case.letters)), strict=False)))
    wide = case.cast(np.float64)
    wide.outs  # noqa: B018  (NotApplicable if the function does not take float64)
    strict = case.rtol == case.atol == 0
    nearly = NEARLY[strict]
    try:
        case.in_float64  # noqa: B018  (NotApplicable if the function does not compute in float64)
    except NotApplicable:
        strict, nearly = False, str(max(float(NEARLY[False]), 8 * float(jnp.finfo(wide.computes_in).eps)))
    if not any(a.size for a in case.reals):
        raise NotApplicable("the arguments are empty")
    if sum(np.size(a) for a in wide.leaves) > MOST_ELEMENTS:
        raise NotApplicable(f"the arguments have more than {MOST_ELEMENTS} elements")
    digits, constants = [], []
    # A loop may stop before it has 200 digits.
    loops = any(contains(case.oracle, loop, *case.leaves) for loop in ("scan", "while"))
    with x64_for(np.float64), mpmath.workdps(DIGITS):
        try:
            value, derivative, directions = programs_of(wide)
            for where, at in _points(wide):
                slopes = _slopes(at, value, derivative, directions)
                if not any(expected for _, expected, _ in slopes) and any(abs(got) > 1e-6 for got, _, _ in slopes):
                    why = "the function is locally constant, as one that searches or rounds is"
                    raise NotApplicable(f"{why}; the checks with larger differences decide, or pass reference=")
                for leaf, (got, expected, noise) in enumerate(slopes):
                    if not mpmath.isfinite(expected):
                        continue
                    off, scale = abs(got - expected), abs(expected) + noise / mpmath.mpf(EQUAL)
                    if not off <= mpmath.mpf(nearly) * scale + case.rtol * abs(expected) + case.atol:
                        if stops_gradients(case):
                            raise NotApplicable(STOPS)
                        yield from _located(at, leaf, value, derivative, f"{message}, {where}")
                        return None
                    digits.append(DIGITS // 2 if not off else int(-mpmath.log10(off / scale)))
                    if off > mpmath.mpf(EQUAL) * scale:
                        constants = [*value.constants, *derivative.constants]
                        if strict and not constants and not loops:
                            text = f"{message} by a relative error of {float(off / scale):.1e}, {where}"
                            yield finding(at, text, at.paths[leaf], None, float(got), float(expected))
                            return None
        except Unknown as e:
            raise NotApplicable(f"the primitive {e} is not supported") from None
    if not digits:
        raise Inconclusive("the function is not finite at any of the points")
    if min(digits) >= -int(mpmath.log10(mpmath.mpf(EQUAL))):
        return f"equal to {min(digits)} digits"
    named = ", ".join(f"{c!r}" for c in dict.fromkeys(constants))
    why = f"these constants are rounded: {named:.200}" if named else "a loop of the function may end early"
    return f"equal to {min(digits)} digits; {why}"


def nearer_than_autodiff(case: Case) -> bool:
    """Whether every element of the rule's float64 gradient is at least as accurate as that of autodiff."""
    wide = case.cast(np.float64)
    with x64_for(np.float64), mpmath.workdps(DIGITS):
        _, derivative, _ = _gradient(wide)
        exactly = [a.astype(np.float64) for a in derivative(*map(exact, wide.reals))]
    g = wide.cotangent(301)
    return all(
        (np.abs(a - t) <= np.maximum(np.abs(b - t), 64 * np.finfo(np.float64).eps * np.abs(t))).all()
        for a, b, t in zip(wide.by_rule(g), wide.by_oracle(g), exactly, strict=True)
    )


def _points(case: Case) -> Iterator[tuple[str, Case]]:
    """Ordinary numbers, tails on both sides of 0, and a common offset, all inside the declared ranges."""
    yield "at ordinary points", case
    rng = case.rng(300)
    beside = [k + d for k in case.at_kink for d in (-1e-6, 1e-6)]
    tails = {"in tails": [*SIDES, *beside], "far out": [-90.5, 90.5]}
    for where, values in tails.items():
        moved = []
        for a in case.reals:
            # All of different sizes: a sum of products that cancels could hit the kink of the function after it.
            apart = rng.choice(values, a.shape) * (1 + 1e-8 * rng.uniform(size=a.shape))
            moved.append(np.where(rng.uniform(size=a.shape) < 0.6, apart, a))
        yield where, _inside(case, moved)
    yield "at a common offset", _inside(case, [a + 1e6 for a in case.reals])


def _inside(case: Case, moved: list) -> Case:
    pairs = enumerate(zip(case.reals, moved, strict=True))
    return case.with_reals([np.where(inside(case, leaf, b), b, a) for leaf, (a, b) in pairs])


def _gradient(case: Case) -> tuple[Program, Program, list]:
    """The programs of `sum(g * f)` and of its gradient by the rule."""
    g, leaves = to_jax(case.cotangent(301)), to_jax(case.leaves)

    def value(*reals):
        outs = case.oracle(*replaced(leaves, case.where, reals))
        return sum(jnp.sum(a.astype(jnp.float64) * b.astype(jnp.float64)) for a, b in zip(g, outs, strict=True))

    def gradient(*reals):
        return pull(case.fun, case.where, replaced(leaves, case.where, reals), g)[1]

    programs = _programs(case, value, gradient, [*g, *leaves])
    if case.has_reference:
        by_reference = Program(jax.grad(value, argnums=tuple(range(len(case.reals)))), *to_jax(case.reals))
        slopes = _slopes(case, programs[0], by_reference, programs[2])
        if any(not abs(a - b) <= mpmath.mpf(NEARLY[False]) * (abs(b) + 1) for a, b, _ in slopes):
            raise NotApplicable("the reference is a surrogate: its gradient is not the derivative of its values")
    return programs


def _second(case: Case) -> tuple[Program, Program, list]:
    """The programs of `sum(v * gradient)` and of its gradient, both by the rule."""
    rng, g, leaves = case.rng(302), to_jax(case.cotangent(301)), to_jax(case.leaves)
    v = to_jax([normal(rng, a.shape, np.float64) for a in case.reals])

    def value(*reals):
        gradients = pull(case.fun, case.where, replaced(leaves, case.where, reals), g)[1]
        return sum(jnp.sum(a * b) for a, b in zip(gradients, v, strict=True))

    return _programs(case, value, jax.grad(value, argnums=tuple(range(len(v)))), [*g, *leaves, *v])


def _programs(case: Case, value: Callable, gradient: Callable, data: list) -> tuple[Program, Program, list]:
    reals, rng = to_jax(case.reals), case.rng(303)
    programs = [raising(case, "when traced,", lambda f=f: Program(f, *reals, data=data)) for f in (value, gradient)]
    return programs[0], programs[1], [normal(rng, a.shape, np.float64) for a in case.reals]


def _slopes(case: Case, value: Program, derivative: Program, directions: list) -> list[tuple]:
    """The derivative along a direction, the central difference, and the rounding error of that difference.

    One result for all leaves together if the two agree, otherwise one for each leaf.
    """
    reals, v, h = [exact(a) for a in case.reals], [exact(a) for a in directions], mpmath.mpf(STEP)
    along = [mpmath.fsum(np.asarray(a * b, object).ravel()) for a, b in zip(derivative(*reals), v, strict=True)]

    def difference(leaves, h):
        moved = ([a + s * h * v[i] if i in leaves else a for i, a in enumerate(reals)] for s in (1, -1))
        right, left = (value(*arrays)[()] for arrays in moved)
        noise = 1000 * (abs(right) + abs(left) + mpmath.mpf(LARGE)) * mpmath.mpf(10) ** -DIGITS / h
        return (right - left) / (2 * h), noise

    def slope(leaves):
        got, (expected, noise) = mpmath.fsum(along[i] for i in leaves), difference(leaves, h)
        if not abs(got - expected) <= mpmath.mpf(EQUAL) * abs(expected) + noise:  # a steep function needs shorter steps
            shorter = difference(leaves, h / 1024)[0]
            noise, expected = 1024 * noise + 2 * abs(shorter - expected), shorter
        return got, expected, noise

    every = range(len(reals))
    got, expected, noise = together = slope(every)
    if abs(got - expected) <= mpmath.mpf(EQUAL) * abs(expected) + noise:
        return [together]
    return [slope([i]) for i in every]


def _located(case: Case, leaf: int, value: Program, derivative: Program, message: str) -> Iterator[Finding]:
    """The finding at the element with the largest error."""
    reals, h = [exact(a) for a in case.reals], mpmath.mpf(STEP)
    gradient, worst = derivative(*reals)[leaf], None
    for index in np.ndindex(gradient.shape):
        sides = []
        for s in (1, -1):
            moved = reals[leaf].copy()
            moved[index] += s * h
            sides.append(value(*reals[:leaf], moved, *reals[leaf + 1 :])[()])
        slope = (sides[0] - sides[1]) / (2 * h)
        off = abs(gradient[index] - slope)
        if worst is None or not off <= worst[0]:
            worst = (off, index, float(gradient[index]), float(slope))
    if worst is not None:
        yield finding(case, message, case.paths[leaf], *worst[1:])
