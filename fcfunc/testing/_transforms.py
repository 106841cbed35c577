"""Checks of a rule under JAX's transformations: vmap, jit, scan, remat, and second derivatives."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from fcfunc.testing._case import (
    Case,
    Inconclusive,
    NotApplicable,
    RuleRaised,
    compiled,
    first_line,
    in_float64_if_taken,
    is_key,
    normal,
    pull,
    replaced,
    to_jax,
    to_numpy,
    x64_for,
)
from fcfunc.testing._compare import Finding, compare, finding, raising, rounding


@compiled(0, 1, 2)
def _batched(fun: Callable, where: tuple, axes: tuple, leaves: list, g: list) -> list:
    """The gradients under `vmap` over the leaves and cotangents that have a batch axis."""

    def gradients(leaves, g):
        return pull(fun, where, leaves, g)[1]

    return jax.vmap(gradients, in_axes=(list(axes[: len(leaves)]), list(axes[len(leaves) :])))(leaves, g)


def vmap_equals_loop(case: Case) -> Iterator[Finding]:
    """Checks that `vmap` over everything, and over one argument at a time, gives the gradients of a loop."""
    at, count = in_float64_if_taken(case), len(case.leaves)
    paths = dict(zip(case.where, case.paths, strict=True))
    rng, g = at.rng(200), at.cotangent(201)
    stacks: list = []
    for i, a in enumerate([*at.leaves, *g]):
        if is_key(a):
            stacks.append([a])
        elif i < count and i not in paths:  # integers and fixed arrays are permuted
            stacks.append(np.stack([a, np.roll(a, 1), np.roll(a, 2)]))
        else:
            # Steps of a few percent stay inside a declared range.
            steps = [normal(rng, a.shape, a.dtype) * np.asarray(0.02 if i < count else 1, a.dtype) for _ in range(3)]
            stacks.append(np.stack([a, *(a + s * (np.abs(a) if i < count else 1) for s in steps[1:])]).astype(a.dtype))
    for over in ("everything", *case.paths, "the cotangent"):
        names = [paths.get(i, "") if i < count else "the cotangent" for i in range(len(stacks))]
        chosen = [len(s) > 1 and over in ("everything", name) for s, name in zip(stacks, names, strict=True)]
        axes = tuple(0 if batched else None for batched in chosen)
        given = [s if batched else s[0] for s, batched in zip(stacks, chosen, strict=True)]

        def run(axes=axes, given=given, fun=at.fun):
            with x64_for(at.dtype):
                return to_numpy(_batched(fun, at.where, axes, to_jax(given[:count]), to_jax(given[count:])))

        loop = []
        for k in range(3):
            row = [leaf[k] if axis == 0 else leaf for leaf, axis in zip(given, axes, strict=True)]
            loop.append(dataclasses.replace(at, leaves=tuple(row[:count])).by_rule(row[count:]))
        expected = [np.stack(leaf) for leaf in zip(*loop, strict=True)]
        try:
            got = raising(at, f"under vmap over {over},", run)
        except RuleRaised:
            try:
                run(fun=at.oracle)
            except Exception as e:
                raise NotApplicable(f"the function itself cannot be batched: {first_line(e)}") from None
            raise
        message = f"under vmap over {over}, the gradient differs from that of a loop"
        found = list(compare(at, got, expected, rounding(at, expected, g=g), message))
        yield from found
        if found:
            return


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compiled_forward(fun: Callable, where: tuple, leaves: list):
    return jax.vjp(lambda *wrt: fun(*replaced(leaves, where, wrt)), *(leaves[i] for i in where))


_compiled_backward = jax.jit(lambda back, g: list(back(g)))
_compiled_whole = jax.jit(pull, static_argnums=(0, 1))


def compiled_equals_eager(case: Case) -> Iterator[Finding]:
    """Checks that jit, of the whole or of the forward and backward pass separately, gives the eager gradients."""
    g, eager, *_ = raising(case, "run eagerly,", lambda: case.eager)
    allowed = rounding(case, eager, 256.0, g)

    def whole():
        with x64_for(case.dtype):
            return to_numpy(_compiled_whole(case.fun, case.where, to_jax(case.leaves), to_jax(g))[1])

    def apart():
        with x64_for(case.dtype):
            _, back = _compiled_forward(case.fun, case.where, to_jax(case.leaves))
            return to_numpy(_compiled_backward(back, to_jax(g)))

    for way, run in (("under jax.jit,", whole), ("with forward and backward pass jitted separately,", apart)):
        message = f"{way} the gradient differs from the eager one"
        found = list(compare(case, raising(case, way, run), eager, allowed, message))
        if found:
            yield from found
            return


@compiled(0, 1, 2, 3)
def _looped(fun: Callable, where: tuple, scan: bool, remat: bool, leaves: list, g: list) -> list:
    """The gradients inside a scan of two steps, under remat, or with both."""
    step = jax.checkpoint(fun) if remat else fun

    def twice(*leaves):
        outs = jax.eval_shape(fun, *leaves)
        zeros = [jnp.zeros(out.shape, out.dtype) for out in outs]

        def add(sums, _):
            return [a + b for a, b in zip(sums, step(*leaves), strict=True)], None

        return jax.lax.scan(add, zeros, length=2)[0]

    return pull(twice if scan else step, where, leaves, g)[1]


def scan_and_checkpoint(case: Case) -> Iterator[Finding]:
    """Checks that gradients inside `lax.scan` and `jax.checkpoint` equal those outside, times the number of steps."""
    g = case.cotangent(220)
    once = case.by_rule(g)

    def found(way, scan, remat):
        def run():
            with x64_for(case.dtype):
                return to_numpy(_looped(case.fun, case.where, scan, remat, to_jax(case.leaves), to_jax(g)))

        expected = [a * np.asarray(2, a.dtype) for a in once] if scan else once
        message = f"{way} the gradient differs from the one outside"
        return compare(case, raising(case, way, run), expected, rounding(case, expected, g=g), message)

    try:  # one program suffices unless something is wrong
        together = list(found("inside lax.scan and jax.checkpoint,", True, True))
    except Exception:
        together = [finding(case, "")]
    if together:
        yield from found("inside lax.scan,", True, False)
        yield from found("under jax.checkpoint,", False, True)
        yield from found("inside lax.scan and jax.checkpoint,", True, True)


def _reverse(first: Callable, reals: list, g: list, directions: list, tangents: list) -> list:
    _, back = jax.vjp(first, reals, g)
    return jax.tree.leaves(back([*directions, *map(jnp.zeros_like, tangents)]))


def _forward(first: Callable, reals: list, g: list, directions: list, tangents: list) -> list:
    return jax.jvp(first, (reals, g), (directions, tangents))[1]  # the outputs too, or XLA would drop what raises


@compiled(0, 1, 2)
def _second(transform: Callable, fun: Callable, where: tuple, leaves: list, g: list, directions, tangents) -> list:
    def first(reals, g):
        outs, gradients = pull(fun, where, replaced(leaves, where, reals), g)
        return [*gradients, *outs]

    return transform(first, [leaves[i] for i in where], g, directions, tangents)


def _second_derivatives(case: Case, transform: Callable, name: str) -> Iterator[Finding]:
    wide = case.in_float64
    g, rng = wide.cotangent(230), case.rng(231)
    directions = [normal(rng, a.shape, a.dtype) for a in wide.reals]
    tangents = [normal(rng, a.shape, a.dtype) for a in g]
    wide = dataclasses.replace(wide, paths=(*wide.paths, *["the cotangent"] * len(g)))

    def run(fun):
        with x64_for(np.float64):
            given = map(to_jax, (wide.leaves, g, directions, tangents))
            return to_numpy(_second(transform, fun, wide.where, *given))

    try:
        expected = run(wide.oracle)
    except Exception as e:
        raise Inconclusive(f"the oracle itself raises: {first_line(e)}") from None
    got = raising(wide, f"under {name},", lambda: run(wide.fun))
    if wide.has_reference and transform is _forward:  # in forward mode, the tangents of the outputs come last
        got, expected = got[: len(wide.reals)], expected[: len(wide.reals)]
    largest_of_all = max((float(np.abs(a).max(initial=0.0)) for a in expected), default=0.0)
    allowed = [t + 1e-11 * largest_of_all + 1e-12 for t in rounding(wide, expected, 4096.0)]
    yield from compare(wide, got, expected, allowed, f"the second derivative by {name} differs from the oracle's")


def reverse_over_reverse(case: Case) -> Iterator[Finding]:
    """Compares the gradient of the gradient, with respect to arguments and cotangent, with the oracle's."""
    yield from _second_derivatives(case, _reverse, "reverse over reverse")


def forward_over_reverse(case: Case) -> Iterator[Finding]:
    """Compares the directional derivative of the gradient, which `jax.hessian` needs, with the oracle's."""
    try:
        yield from _second_derivatives(case, _forward, "forward over reverse")
    except Exception as e:
        if "custom_vjp" not in str(e):
            raise
        message = "jax.hessian raises: the forward pass calls the decorated function; call the undecorated one"
        yield finding(case, message)
