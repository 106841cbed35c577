"""The checks of what JAX and its users rely on in any rule: types, purity, linearity, the forward pass."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import chex
import jax
import jax.numpy as jnp
import numpy as np

from fcfunc.testing import _case, _oracle
from fcfunc.testing._case import Case, NotApplicable, first_line, is_inexact, pull, to_jax, to_numpy, widened, x64_for
from fcfunc.testing._compare import (
    Finding,
    compare,
    finding,
    max_abs,
    raising,
    rounding,
    truth_and_allowance,
    underflow,
)


def repeatable(case: Case) -> Iterator[Finding]:
    """The same bits the second time and the third, with another case in between: nothing is remembered."""
    g, other = case.cotangent(130), case.with_reals([a * np.asarray(0.5, a.dtype) for a in case.reals])
    first = case.by_rule(g, eager=True)
    second = case.by_rule(g, eager=True)
    yield from compare(case, second, first, 0.0, "the second call gives other bits than the first")
    other.by_rule(g, eager=True)
    third = case.by_rule(g, eager=True)
    yield from compare(case, third, first, 0.0, "after another case, the third call gives other bits than the first")


def watched_gradients(case: Case, fun: Callable):
    """The calls of rules while gradients are traced, the types of the gradients, and what was raised."""
    g, types = case.cotangent(0), []

    def gradients(leaves, g):
        types.extend(jax.typeof(a) for a in pull(fun, case.where, leaves, g)[1])

    with x64_for(case.dtype):
        calls, raised = _oracle.watch(gradients, case.leaves, g)
    return calls, types, raised


def cotangent_types(case: Case) -> Iterator[Finding]:
    """Each cotangent has its argument's dtype, shape and tree, as the backward pass itself returns it."""
    calls, types, raised = watched_gradients(case, case.fun)
    if raised is not None:
        raise _case.RuleRaised(case, raised)
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
    if cotangents is None:
        return
    if not isinstance(cotangents, tuple | list) or len(cotangents) != len(call.args):
        given = f"{len(cotangents)}" if isinstance(cotangents, tuple | list) else type(cotangents).__name__
        yield finding(case, f"{where} must return a tuple of {len(call.args)}, one for each argument, got {given}")
        return
    for i, pair in enumerate(zip(call.args, cotangents, strict=True)):
        pairs = _leaf_by_leaf(*pair)
        if pairs is None:
            yield finding(case, f"{where} returns a tree for argument {i} that does not match the argument's")
            continue
        for p, c in pairs:
            if (
                jnp.issubdtype(p.dtype, jnp.inexact)
                and hasattr(c, "dtype")
                and c.dtype != jax.dtypes.float0
                and not (p.weak_type and not p.shape)  # a Python number, of no dtype of its own
                and (c.dtype, c.shape) != (p.dtype, p.shape)
            ):
                expected = p.str_short()
                yield finding(case, f"{where} returns {c.dtype}{list(c.shape)} for argument {i}, {expected} expected")


def _leaf_by_leaf(primal, cotangent) -> list[tuple] | None:
    """The types of an argument's leaves with their cotangents, None for an absent one; None if the trees differ."""
    leaves, treedef = jax.tree.flatten(primal)
    if cotangent is None or primal is None:  # JAX drops what is returned for an argument that is None
        return []
    try:
        given = treedef.flatten_up_to(cotangent)
    except ValueError:
        given = jax.tree.leaves(cotangent, is_leaf=lambda x: x is None)
        if len(given) != len(leaves):
            return None
    return list(zip(map(jax.typeof, leaves), given, strict=True))


def integer_arguments(case: Case) -> Iterator[Finding]:
    """Integer, boolean and key arguments get None or float0 from the backward pass, and nothing else."""
    calls, _, _ = watched_gradients(case, case.fun)
    whole = [a for call in calls for a in jax.tree.leaves(call.args) if not is_inexact(jax.typeof(a))]
    if not whole:
        raise NotApplicable("no rule is given an integer, boolean or key argument")
    for call in calls:
        for cotangents in call.cotangents:
            for i, pair in enumerate(zip(call.args, cotangents or (), strict=False)):
                for p, c in _leaf_by_leaf(*pair) or []:
                    if not is_inexact(p) and getattr(c, "dtype", jax.dtypes.float0) != jax.dtypes.float0:
                        returned = f"the backward pass of {call.name} returns {c.dtype} for argument {i} of {p.dtype}"
                        yield finding(case, f"{returned}: None or float0 expected")


def rule_used(case: Case) -> Iterator[Finding]:
    """Every rule that is called has its backward pass run when the function is differentiated, under remat too."""
    ways = {"": case.fun, " under jax.checkpoint": jax.checkpoint(case.fun)}
    for way, fun in ways.items():
        calls, _, raised = watched_gradients(case, fun)
        if raised is not None:
            raise _case.RuleRaised(case, raised, way.strip())
        if not calls:
            raise NotApplicable("no custom_vjp function is called")
        outer = {call.name for call in calls if not call.inner}
        for name in sorted(outer - {call.name for call in calls if call.cotangents}):
            message = f"the backward pass of {name} never runs{way}: its gradient comes from elsewhere, or is lost"
            yield finding(case, message)


def zero_cotangent(case: Case) -> Iterator[Finding]:
    """A zero cotangent gives a zero gradient."""
    g = [np.zeros_like(a) for a in case.cotangent(0)]
    zeros = [np.zeros_like(a) for a in case.reals]
    yield from compare(case, case.by_rule(g), zeros, 0.0, "a zero cotangent must give a zero gradient")


def linear_in_cotangent(case: Case) -> Iterator[Finding]:
    """Exact under powers of two, from tiny to large, and additive."""
    g, h = case.cotangent(80), case.cotangent(81)
    base = case.by_rule(g)
    narrowest = min(int(jnp.finfo(a.dtype).maxexp) for a in [*g, *base])
    powers = (-4, 4, 8) if narrowest < 20 else (-100, -40, -8, 8, 20, 60, 100)
    if case.rtol or case.atol:  # a solver squares its right-hand side
        powers = (-4, 4)
    for power in powers:
        factor = 2.0**power
        scaled = case.by_rule([(a * np.asarray(factor, a.dtype)).astype(a.dtype) for a in g])
        expected = [widened(a) * factor for a in base]
        floor = underflow(case) + 1e-4 * case.eps * max(map(max_abs, expected), default=0.0)
        allowed = [floor + (case.rtol * max_abs(a) + case.atol * factor) for a in expected]
        message = f"a cotangent times 2^{power} must give the gradient times 2^{power} exactly"
        found = list(compare(case, scaled, expected, allowed, message))
        if found:
            yield from found
            return
    parts = [widened(a) + widened(b) for a, b in zip(base, case.by_rule(h), strict=True)]
    summed = case.by_rule([a + b for a, b in zip(g, h, strict=True)])
    try:
        _, allowed = truth_and_allowance(case, [np.abs(a) + np.abs(b) for a, b in zip(g, h, strict=True)])
        _, allowed_sum = truth_and_allowance(case, [a + b for a, b in zip(g, h, strict=True)])
    except _case.Inconclusive:  # no oracle: the sizes of the gradients themselves
        allowed, allowed_sum = rounding(case, parts), rounding(case, base)
    tolerance = [4 * (s + t) for s, t in zip(allowed, allowed_sum, strict=True)]
    yield from compare(case, summed, parts, tolerance, "the gradient is not additive in the cotangent")


def partial_cotangents(case: Case) -> Iterator[Finding]:
    """One output differentiated alone, one argument alone: absent and symbolically zero cotangents are right."""
    g = case.cotangent(90)
    if len(g) < 2 and len(case.reals) < 2:
        raise NotApplicable("there is one output and one argument")
    whole = case.by_rule(g)
    for i, path in enumerate(case.paths if len(case.paths) > 1 else ()):
        alone = dataclasses.replace(case, where=(case.where[i],), paths=(path,), ranges=(case.ranges[i],))
        got = raising(alone, f"differentiated alone, {path}:", lambda alone=alone: alone.by_rule(g, eager=True))
        expected = whole[i : i + 1]
        message = "differentiated alone, this argument has another gradient than with the others"
        yield from compare(alone, got, expected, rounding(alone, expected, g=g), message)
    for i in range(len(g) if len(g) > 1 else 0):

        def pulled(fun, i=i):
            with x64_for(case.dtype):
                only = lambda *leaves: [fun(*leaves)[i]]  # noqa: E731
                return to_numpy(pull(only, case.where, case.leaves, g[i : i + 1])[1])

        got = raising(case, f"with output {i} differentiated alone", lambda pulled=pulled: pulled(case.fun))
        zeros = [a if j == i else np.zeros_like(a) for j, a in enumerate(g)]
        expected = case.by_oracle(zeros)
        message = f"with output {i} differentiated alone the gradient is wrong"
        yield from compare(case, got, expected, rounding(case, expected, 64.0 if case.eps < 1e-10 else 4.0e3), message)


def forward_output(case: Case) -> Iterator[Finding]:
    """The forward pass of the rule returns what the function returns, in value, shape and dtype."""

    def under_differentiation():
        with x64_for(case.dtype):
            return _case.compiled_pull(case.fun, case.where, case.leaves, case.cotangent(0))[0]

    ruled = raising(case, "", under_differentiation)
    for i, (a, b) in enumerate(zip(case.outs, ruled, strict=True)):
        if a.dtype != b.dtype or a.shape != b.shape:
            message = f"output {i} is {a.dtype}{list(a.shape)}, under differentiation {b.dtype}{list(b.shape)}"
            yield finding(case, message)
            return
    plain, ruled = case.outputs(), to_numpy(ruled)
    yield from different_outputs(case, ruled, plain, 16.0, "under differentiation the output is another")
    if case.has_reference:
        try:
            given = case.outputs(case.oracle)
        except Exception as e:
            raise _case.Inconclusive(f"the reference raises: {first_line(e)}") from None
        yield from different_outputs(case, plain, given, 64.0, "the function differs from the reference")


def different_outputs(case: Case, got: list, expected: list, factor: float, message: str) -> Iterator[Finding]:
    """A finding for each output that is not the expected one."""
    if [a.shape for a in got] != [a.shape for a in expected]:
        shapes = ", ".join(str(list(a.shape)) for a in got)
        yield finding(case, f"{message}: outputs of shapes {shapes}, expected {[list(a.shape) for a in expected]}")
        return
    outputs = dataclasses.replace(case, paths=tuple(f"output {i}" for i in range(len(got))))
    yield from compare(outputs, got, expected, rounding(case, expected, factor), message)


def interleaved(case: Case) -> Iterator[Finding]:
    """Two forward passes, then two backward passes, first in first out: nothing leaks from one to the other."""
    g, rng = case.cotangent(140), case.rng(141)
    other = case.with_reals(
        [a + _case.normal(rng, a.shape, a.dtype) * np.asarray(0.01, a.dtype) * np.abs(a) for a in case.reals]
    )
    apart = [c.by_rule(g, eager=True) for c in (case, other)]
    with x64_for(case.dtype):
        backs = [_vjp(c) for c in (case, other)]
        together = [to_numpy(back(to_jax(g))) for back in backs]
    for got, expected in zip(together, apart, strict=True):
        yield from compare(case, got, expected, 0.0, "a second forward pass changes the first one's gradient")


def _vjp(case: Case) -> Callable:
    leaves = to_jax(case.leaves)
    wrt = [leaves[i] for i in case.where]
    return jax.vjp(lambda *wrt: case.fun(*_case.replaced(leaves, case.where, wrt)), *wrt)[1]


def arguments_untouched(case: Case) -> Iterator[Finding]:
    """Neither pass writes into an argument or a cotangent, nor frees one."""
    g = case.cotangent(150)
    before = [a.copy() for a in (*case.reals, *g)]
    with x64_for(case.dtype):
        given = to_jax(case.leaves)
        pull(case.fun, case.where, given, g)
        freed = any(a.is_deleted() for a in given)
        with contextlib.suppress(Exception):  # NumPy arrays, which a function could write into
            case.fun(*case.leaves)
    try:
        chex.assert_trees_all_equal(before, [*case.reals, *g])
    except AssertionError:
        freed = True
    if freed:
        yield finding(case, "an argument or a cotangent was freed or written into")
