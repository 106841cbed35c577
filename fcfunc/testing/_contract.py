"""Checks of what JAX and its users expect from every rule: types, purity, linearity, and the forward pass."""

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator

import chex
import jax
import jax.numpy as jnp
import numpy as np

from fcfunc.testing import _case, _oracle
from fcfunc.testing._case import (
    Case,
    Inconclusive,
    NotApplicable,
    first_line,
    is_inexact,
    pull,
    to_jax,
    to_numpy,
    widened,
    x64_for,
)
from fcfunc.testing._compare import (
    Finding,
    compare,
    disagreements,
    finding,
    max_abs,
    raising,
    rounding,
    truth_and_allowance,
    underflow,
)


def repeatable(case: Case) -> Iterator[Finding]:
    """Checks that the second and third call are bitwise identical to the first: the rule has no hidden state.

    If every call is traced to the same program, nothing has to run.
    """
    g = case.cotangent(130)

    def gradients():
        with x64_for(case.dtype):
            return to_numpy(pull(case.fun, case.where, case.leaves, g)[1])

    try:
        first, *later = [_program(case, g) for _ in range(3)]
    except Exception as e:
        raise NotApplicable(f"the rule raises: {first_line(e)}") from None
    if all(_same_program(first, program) for program in later):
        return
    expected = raising(case, "", gradients)
    for time in ("second", "third"):
        message = f"the gradient of the {time} call is not bitwise identical to that of the first"
        yield from compare(case, gradients(), expected, 0.0, message)


def _program(case: Case, g: list) -> tuple[str, list]:
    """The jaxpr of the gradients as text, and the arrays in it."""
    with x64_for(case.dtype):
        closed = jax.make_jaxpr(lambda leaves, g: pull(case.fun, case.where, leaves, g)[1])(case.leaves, g)
    return re.sub(r"0x[0-9a-f]+", "", str(closed)), list(_oracle.constants(closed))


def _same_program(first: tuple[str, list], second: tuple[str, list]) -> bool:
    """Whether two programs give identical results; a callback may return something different each time."""
    (text, consts), (other, others) = first, second
    return "callback" not in text and text == other and all(map(_same_array, consts, others))


def _same_array(a, b) -> bool:
    a, b = (jax.random.key_data(x) if _case.is_key(x) else x for x in (a, b))
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


def cotangent_types(case: Case) -> Iterator[Finding]:
    """Checks that the backward pass returns each cotangent with the dtype, shape and tree structure of its argument."""
    calls, types, raised = case.watched
    if raised is not None:
        raise _case.RuleRaised(case, raised)
    for path, primal, came in zip(case.paths, case.reals, types, strict=False):
        if came.dtype != primal.dtype or came.shape != primal.shape:
            given = f"{came.dtype}{list(came.shape)}"
            message = f"the argument is {primal.dtype}{list(primal.shape)}, but its gradient is {given}"
            yield finding(case, message, path)
    for call in calls:
        for cotangents in call.cotangents:
            yield from _wrong_cotangents(case, call, cotangents)


def _wrong_cotangents(case: Case, call: _oracle.Call, cotangents) -> Iterator[Finding]:
    """Yields a finding for each cotangent that differs from its argument in tree structure, shape or dtype."""
    where = f"the backward pass of {call.name}"
    if cotangents is None:
        return
    if not isinstance(cotangents, tuple | list) or len(cotangents) != len(call.args):
        given = f"{len(cotangents)}" if isinstance(cotangents, tuple | list) else type(cotangents).__name__
        expected = f"a tuple of {len(call.args)} cotangents, one per argument"
        yield finding(case, f"{where} must return {expected}, got {given}")
        return
    for i, pair in enumerate(zip(call.args, cotangents, strict=True)):
        pairs = _leaf_by_leaf(*pair)
        if pairs is None:
            yield finding(case, f"{where} returns a cotangent for argument {i} with a different tree structure")
            continue
        for p, c in pairs:
            if (
                jnp.issubdtype(p.dtype, jnp.inexact)
                and hasattr(c, "dtype")
                and c.dtype != jax.dtypes.float0
                and not (p.weak_type and not p.shape)  # a Python number, of no dtype of its own
                and (c.dtype, c.shape) != (p.dtype, p.shape)
            ):
                given = f"{c.dtype}{list(c.shape)}"
                yield finding(case, f"{where} returns {given} for argument {i}, which is {p.str_short()}")


def _leaf_by_leaf(primal, cotangent) -> list[tuple] | None:
    """Pairs the types of an argument's leaves with their cotangents; None if the tree structures differ."""
    leaves, treedef = jax.tree.flatten(primal)
    if cotangent is None or primal is None:  # JAX drops the cotangent of an argument that is None
        return []
    try:
        given = treedef.flatten_up_to(cotangent)
    except ValueError:
        given = jax.tree.leaves(cotangent, is_leaf=lambda x: x is None)
        if len(given) != len(leaves):
            return None
    return list(zip(map(_type, leaves), given, strict=True))


def _type(a):
    """The type of a recorded argument, which is a type already unless it is a Python number."""
    return a if hasattr(a, "str_short") else jax.typeof(a)


def integer_arguments(case: Case) -> Iterator[Finding]:
    """Checks that the cotangents of integer, boolean and key arguments are None or float0."""
    calls, _, _ = case.watched
    whole = [a for call in calls for a in jax.tree.leaves(call.args) if not is_inexact(_type(a))]
    if not whole:
        raise NotApplicable("no rule has an integer, boolean or key argument")
    for call in calls:
        for cotangents in call.cotangents:
            for i, pair in enumerate(zip(call.args, cotangents or (), strict=False)):
                for p, c in _leaf_by_leaf(*pair) or []:
                    if not is_inexact(p) and getattr(c, "dtype", jax.dtypes.float0) != jax.dtypes.float0:
                        returned = f"the backward pass of {call.name} returns {c.dtype} for argument {i}"
                        yield finding(case, f"{returned}, which is {p.dtype}; return None or float0 zeros")


def rule_used(case: Case) -> Iterator[Finding]:
    """Checks that differentiation runs the backward pass of every rule that is called, also under remat."""
    ways = {"": case, " under jax.checkpoint": dataclasses.replace(case, fun=jax.checkpoint(case.fun))}
    for way, made in ways.items():
        calls, _, raised = case.watched if made is case else case.watch(remat=True)
        if raised is not None:
            raise _case.RuleRaised(case, raised, way.strip())
        if not calls:
            raise NotApplicable("no custom_vjp function is called")
        outer = {call.name for call in calls if not call.inner}
        for name in sorted(outer - {call.name for call in calls if call.cotangents}):
            message = f"the backward pass of {name} never runs{way}"
            if not list(disagreements(made, 1, "")):  # the function may need no gradient of it
                raise Inconclusive(f"{message}, and automatic differentiation gives the same gradient")
            yield finding(case, f"{message}, so its gradient comes from elsewhere or is lost")


def zero_cotangent(case: Case) -> Iterator[Finding]:
    """Checks that a zero cotangent gives a zero gradient."""
    g = [np.zeros_like(a) for a in case.cotangent(0)]
    zeros = [np.zeros_like(a) for a in case.reals]
    yield from compare(case, case.by_rule(g), zeros, 0.0, "a zero cotangent must give a zero gradient")


def linear_in_cotangent(case: Case) -> Iterator[Finding]:
    """Checks that the gradient scales exactly with powers of two and is additive in the cotangent."""
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
        message = f"scaling the cotangent by 2^{power} must scale the gradient by exactly 2^{power}"
        found = list(compare(case, scaled, expected, allowed, message))
        if found:
            yield from found
            return
    ones = [np.ones_like(a) for a in g]
    negative, opposite = case.by_rule([-a for a in ones]), [-widened(a) for a in case.by_rule(ones)]
    allowed = [underflow(case) + case.rtol * max_abs(a) + case.atol for a in opposite]
    yield from compare(case, negative, opposite, allowed, "negating a cotangent of ones must negate the gradient")
    parts = [widened(a) + widened(b) for a, b in zip(base, case.by_rule(h), strict=True)]
    summed = case.by_rule([a + b for a, b in zip(g, h, strict=True)])
    try:
        _, allowed = truth_and_allowance(case, [np.abs(a) + np.abs(b) for a, b in zip(g, h, strict=True)])
        _, allowed_sum = truth_and_allowance(case, [a + b for a, b in zip(g, h, strict=True)])
    except _case.Inconclusive:  # without an oracle, the gradients themselves set the scale
        allowed, allowed_sum = rounding(case, parts), rounding(case, base)
    tolerance = [4 * (s + t) for s, t in zip(allowed, allowed_sum, strict=True)]
    yield from compare(case, summed, parts, tolerance, "the gradient must be additive in the cotangent")


def partial_cotangents(case: Case) -> Iterator[Finding]:
    """Checks the gradients of single outputs and single arguments: absent and symbolically zero cotangents."""
    g = case.cotangent(90)
    if len(g) < 2 and len(case.reals) < 2:
        raise NotApplicable("there is only one output and one differentiated argument")
    every, count = range(len(case.reals)), len(case.reals)
    some = [*itertools.combinations(every, 1)] if count > 1 else []
    some += [*itertools.combinations(every, count - 1)] if count > 2 else []
    alone: list[tuple] = [(arguments, None) for arguments in some]
    alone += [(None, k) for k in range(len(g)) if len(g) > 1]

    def run(chosen):
        with x64_for(case.dtype):
            return list(map(to_numpy, _alone(case.fun, case.where, tuple(chosen), to_jax(case.leaves), to_jax(g))))

    def way(arguments, k):
        if arguments is None:
            return f"with only output {k} differentiated,"
        return f"with only {', '.join(case.paths[i] for i in arguments)} differentiated,"

    try:
        gradients = run(alone)
    except Exception:  # run them one by one to name the one that raises
        gradients = [raising(case, way(*one), lambda one=one: run([one])[0]) for one in alone]
    whole = case.by_rule(g)
    for (arguments, k), got in zip(alone, gradients, strict=True):
        if arguments is not None:
            parts = ([of[i] for i in arguments] for of in (case.where, case.paths, case.ranges))
            where, paths, ranges = map(tuple, parts)
            at = dataclasses.replace(case, where=where, paths=paths, ranges=ranges)
            expected = [whole[i] for i in arguments]
            message = "the gradient of this argument changes if some other argument is not differentiated"
            yield from compare(at, got, expected, rounding(at, expected, g=g), message)
        else:
            expected = case.by_oracle([a if j == k else np.zeros_like(a) for j, a in enumerate(g)])
            allowed = rounding(case, expected, 64.0 if case.eps < 1e-10 else 4.0e3)
            message = f"{way(None, k)} the rule's gradient differs from the oracle's"
            yield from compare(case, got, expected, allowed, message)


@_case.compiled(0, 1, 2)
def _alone(fun: Callable, where: tuple, alone: tuple, leaves: list, g: list) -> list[list]:
    """The gradients of the given arguments for each `(arguments, None)`, and those of output `k` for `(None, k)`."""

    def of_output(k):
        return pull(lambda *leaves: [fun(*leaves)[k]], where, leaves, [g[k]])[1]

    def of_arguments(arguments):
        return pull(fun, tuple(where[i] for i in arguments), leaves, g)[1]

    return [of_output(k) if arguments is None else of_arguments(arguments) for arguments, k in alone]


def forward_output(case: Case) -> Iterator[Finding]:
    """Checks that the rule's forward pass and the function agree in value, shape and dtype."""
    yield from same_forward_pass(case)
    if case.has_reference:
        try:
            given = case.outputs(case.oracle)
        except Exception as e:
            raise _case.Inconclusive(f"the reference raises: {first_line(e)}") from None
        message = (
            "the function and its reference return different values; a reference needs the function's values and the "
            "intended gradient: for a straight-through estimator, x + stop_gradient(f(x) - x)"
        )
        yield from different_outputs(case, case.outputs(), given, 64.0, message)


def same_forward_pass(case: Case) -> Iterator[Finding]:
    """Compares the outputs with and without differentiation, including integers and booleans."""

    def under_differentiation():
        with x64_for(case.dtype):
            return _case.compiled_pull(case.fun, case.where, case.leaves, case.cotangent(0))[0]

    ruled = raising(case, "", under_differentiation)
    for i, (a, b) in enumerate(zip(case.outs, ruled, strict=True)):
        if a.dtype != b.dtype or a.shape != b.shape:
            message = f"output {i} is {a.dtype}{list(a.shape)}, but {b.dtype}{list(b.shape)} under differentiation"
            yield finding(case, message)
            return
    plain, ruled = case.outputs(), to_numpy(ruled)
    message = "the rule's forward pass and the function return different values"
    yield from different_outputs(case, ruled, plain, 16.0, message)
    with_integers = getattr(case.fun, "with_integers", None)
    with x64_for(case.dtype):
        if with_integers is None or not jax.eval_shape(with_integers, *case.leaves)[1]:
            return
        plain, ruled = map(to_numpy, _case.compiled_integers(with_integers, case.where, _case.to_jax(case.leaves)))
    for i, (a, b) in enumerate(zip(plain, ruled, strict=True)):
        if a.shape != b.shape or (a != b).any():
            yield finding(case, f"{message}: integer output {i} changes under differentiation")
            return


def different_outputs(case: Case, got: list, expected: list, factor: float, message: str) -> Iterator[Finding]:
    """Yields a finding for each output that differs from the expected one."""
    if [a.shape for a in got] != [a.shape for a in expected]:
        shapes, given = ([list(a.shape) for a in arrays] for arrays in (expected, got))
        yield finding(case, f"{message}: expected outputs of shapes {shapes}, got {given}")
        return
    outputs = dataclasses.replace(case, paths=tuple(f"output {i}" for i in range(len(got))))
    yield from compare(outputs, got, expected, rounding(case, expected, factor), message)


def interleaved(case: Case) -> Iterator[Finding]:
    """Checks that two forward passes followed by two backward passes do not affect each other."""
    g = case.cotangent(140)
    eager = raising(case, "run eagerly,", lambda: case.eager)
    if not eager.freed:
        message = "running the backward pass a second time gives a different gradient"
        yield from compare(case, eager.again, eager.gradients, 0.0, message)

    def run():
        with x64_for(case.dtype):
            given = map(to_jax, (case.leaves, case.nearby.reals, g))
            return list(map(to_numpy, _twice(case.fun, case.where, *given)))

    message = "a second forward pass, run before the backward pass, changes the gradient of the first"
    *together, first, second = raising(case, "with two forward passes before the backward pass,", run)
    for got, expected in zip(together, (first, second), strict=True):
        yield from compare(case, got, expected, rounding(case, expected, 16.0, g), message)

    expected = case.by_rule(eager.g)
    found = list(compare(case, eager.gradients, expected, rounding(case, expected, 256.0, eager.g), message))
    if found:  # compare with a single eager pass, which may differ from the compiled program as well
        with x64_for(case.dtype):
            alone = to_numpy(pull(case.fun, case.where, case.leaves, eager.g)[1])
        yield from compare(case, eager.gradients, alone, 0.0, message)


@_case.compiled(0, 1)
def _twice(fun: Callable, where: tuple, leaves: list, others: list, g: list) -> list[list]:
    """The gradients at two points: with both forward passes first, and then separately."""

    def forward(wrt):
        outs, back = jax.vjp(lambda *wrt: fun(*_case.replaced(leaves, where, wrt)), *wrt)
        return lambda: list(back([jnp.asarray(a, out.dtype) for a, out in zip(g, outs, strict=True)]))

    points = ([leaves[i] for i in where], others)
    backward = [forward(wrt) for wrt in points]
    return [*(back() for back in backward), *(forward(wrt)() for wrt in points)]


def arguments_untouched(case: Case) -> Iterator[Finding]:
    """Checks that no argument or cotangent is overwritten, and that no array is freed."""
    before = [a.copy() for a in (*case.reals, *case.cotangent(150))]
    eager = raising(case, "run eagerly,", lambda: case.eager)
    with x64_for(case.dtype), contextlib.suppress(Exception):  # call it with NumPy arrays, which are writable
        case.fun(*case.leaves)
    try:
        chex.assert_trees_all_equal(before, [*case.reals, *eager.g])
    except AssertionError:
        yield finding(case, "an argument or a cotangent was overwritten")
    for name in eager.freed:
        yield finding(case, f"{name} was freed by the backward pass")
