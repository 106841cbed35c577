"""Removes the hand-written rules from a function, and records which rules a function calls."""

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from fcfunc._jax_releases import ClosedJaxpr, is_jaxpr, jaxpr_and_consts

INLINED = ("custom_vjp_call", "jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2")
RULES = ("custom_vjp_call", "custom_jvp_call", "call_hi_primitive")


@functools.lru_cache(maxsize=256)
def without_rules(fun: Callable, *, forward_rules: bool = False) -> Callable:
    """Returns `fun` without its `custom_vjp` rules: the same outputs, with gradients by automatic differentiation.

    `fun` is traced to a jaxpr, which contains the undecorated function of each rule, and that function is evaluated
    instead. Rules inside loops and conditionals are removed too. `custom_jvp` rules are kept unless `forward_rules`.
    """
    inlined = (*INLINED, *(("custom_jvp_call",) if forward_rules else ()))

    def undone(*args):
        closed, shape = jax.make_jaxpr(fun, return_shape=True)(*args)
        outs = _evaluate(inlined, closed.jaxpr, closed.consts, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), outs)

    return undone


def _evaluate(inlined, jaxpr, consts, args):
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(atom):
        return atom.val if isinstance(atom, jex.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        name, params, values = eqn.primitive.name, eqn.params, [read(atom) for atom in eqn.invars]
        if name in inlined:
            inner = next(p for p in params.values() if is_jaxpr(p))
            outs = _evaluate(inlined, *jaxpr_and_consts(inner), values)
        elif name == "call_hi_primitive":
            primitive = params["_prim"]
            outs = jax.tree.leaves(primitive.expand(*jax.tree.unflatten(primitive.in_tree, values)))
        elif name == "shard_map":
            inner = params["jaxpr"]
            local = lambda *args, inner=inner: tuple(_evaluate(inlined, inner, (), list(args)))  # noqa: E731
            options = {k: params[k] for k in ("mesh", "in_specs", "out_specs", "check_vma")}
            axes = params.get("newly_manual_axes", params.get("manual_axes"))
            outs = jax.shard_map(local, axis_names=axes, **options)(*values)
        else:
            undone = {k: _undone(inlined, p) for k, p in params.items()}
            outs = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(undone))
            outs = outs if eqn.primitive.multiple_results else [outs]
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _undone(inlined: tuple, param: Any) -> Any:
    """A parameter of an equation, with the rules removed from its jaxprs, such as the body of a loop."""
    if isinstance(param, tuple) and any(isinstance(p, ClosedJaxpr) for p in param):
        undone = [_undone(inlined, p) for p in param]
        return type(param)(*undone) if hasattr(param, "_fields") else tuple(undone)
    closed: Any = param if isinstance(param, ClosedJaxpr) else None
    if closed is not None and any(rule in str(closed) for rule in RULES):
        avals = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in closed.in_avals]
        return jax.make_jaxpr(lambda *args: _evaluate(inlined, closed.jaxpr, closed.consts, list(args)))(*avals)
    return param


@functools.lru_cache(maxsize=1024)
def narrowest(fun: Callable, args: tuple) -> Any:
    """The least precise real or complex dtype to which `fun` casts an array or which it returns; None if there is none.

    Args:
      fun: a function of arrays.
      args: their shapes and dtypes, `jax.ShapeDtypeStruct`.
    """

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "convert_element_type":
                old, new = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
                if jnp.issubdtype(old, jnp.inexact) and jnp.issubdtype(new, jnp.inexact):
                    yield new
            for inner in _inner(eqn):
                yield from walk(inner)

    try:
        closed, outputs = jax.make_jaxpr(fun, return_shape=True)(*args)
    except Exception:
        return None  # reported elsewhere
    returned = [out.dtype for out in jax.tree.leaves(outputs) if jnp.issubdtype(out.dtype, jnp.inexact)]
    return max([*returned, *walk(closed.jaxpr)], key=lambda dtype: jnp.finfo(dtype).eps, default=None)


def contains(fun: Callable, primitive: str, *args) -> bool:
    """Whether the jaxpr of `fun` contains a primitive; False if `fun` cannot be traced."""

    def walk(jaxpr):
        return any(eqn.primitive.name == primitive or any(map(walk, _inner(eqn))) for eqn in jaxpr.eqns)

    try:
        return walk(jax.make_jaxpr(fun)(*args).jaxpr)
    except Exception:
        return False  # reported elsewhere


def _inner(eqn) -> list:
    """The jaxprs among the parameters of an equation."""
    params = jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr)
    return [jaxpr_and_consts(p)[0] for p in params if is_jaxpr(p)]


def constants(closed: Any) -> Iterator[Any]:
    """The constant arrays in a jaxpr and its inner jaxprs."""
    jaxpr, consts = jaxpr_and_consts(closed)
    yield from consts
    for eqn in jaxpr.eqns:
        for param in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(param):
                yield from constants(param)


def other_rules(fun: Callable, *args) -> tuple[list[str], bool]:
    """The names of the `custom_jvp` functions and `HiPrim` primitives in `fun`, and whether any is a `custom_jvp`."""
    names, forward = [], []

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            inner = _inner(eqn)
            if eqn.primitive.name == "custom_jvp_call":
                names.append(inner[0].debug_info.func_name)
                forward.append(True)
            elif eqn.primitive.name == "call_hi_primitive":
                names.append(type(eqn.params["_prim"]).__name__)
            for jaxpr in inner:
                walk(jaxpr)

    walk(jax.make_jaxpr(fun)(*args).jaxpr)
    return list(dict.fromkeys(names)), bool(forward)


class Call(NamedTuple):
    """One call of a rule.

    Attributes:
      name: the name of the rule.
      args: the types of its differentiable arguments.
      cotangents: one entry for each run of its backward pass, with the type of each returned array and other leaves
        unchanged; None for a backward pass that adds to accumulators.
      inner: whether it was called by the function or the forward pass of another rule, whose backward pass replaces
        its own.
      passes: its forward and backward pass, which may be redefined.
    """

    name: str
    args: tuple
    cotangents: list[Any]
    inner: bool
    passes: tuple


def watch(fun: Callable, part: str, function: Callable, *args) -> tuple[list[Call], BaseException | None]:
    """Traces `function(*args)` and records every call of a `custom_vjp` function and every backward pass.

    Nothing is computed. Functions that were compiled before are traced again, because a cached program hides its rules.

    Args:
      fun: the function that is checked, which remembers how it was traced.
      part: the name of what is traced of it.
      function: what is traced.
      *args: its arguments.

    Returns:
      The calls, and the exception that was raised, or None.
    """
    # JAX keeps what it traces in a context, so a new one for each call would let memory grow with every check. That of
    # the last call is used again, unless a rule is hidden by what was cached there, as in a compiled function.
    contexts = vars(fun).setdefault("contexts", {})
    key = part, *((np.shape(a), a.dtype) for a in jax.tree.leaves(args))
    context, found = contexts.get(key) or (next(_count), None)
    calls, raised = _watch(context, function, *args)
    if found is not None and (not calls or _summary(calls) != found):
        context = next(_count)
        calls, raised = _watch(context, function, *args)
    contexts[key] = context, _summary(calls)
    return calls, raised


def _summary(calls: list[Call]) -> list[tuple]:
    """What is missing in the calls if a cached program hides a rule."""
    return [(call.name, call.inner, len(call.cotangents)) for call in calls]


def _watch(context: int, function: Callable, *args) -> tuple[list[Call], BaseException | None]:
    """`watch` in a context.

    `jax.custom_vjp.__call__` is replaced during the call, so this must not run in several threads at once.
    """
    calls: list[Call] = []
    original = jax.custom_vjp.__call__
    depth = [0]

    def counted(part):
        @functools.wraps(part)
        def run(*args, **kwargs):
            depth[0] += 1
            try:
                return part(*args, **kwargs)
            finally:
                depth[0] -= 1

        return run

    def call(self, *args, **kwargs):
        fixed = set(self.nondiff_argnums)
        given = _positional(self.fun, args, kwargs)
        wrt = tuple(_types(a) for i, a in enumerate(given) if i not in fixed)
        record = Call(self.__name__, wrt, [], depth[0] > 0, (self.fwd, self.bwd))
        calls.append(record)

        @functools.wraps(self.bwd)
        def bwd(*args):
            returned = self.bwd(*args)
            cotangents = returned[0] if getattr(self, "with_logs", False) else returned
            record.cotangents.append(None if getattr(self, "with_accums", False) else _types(cotangents))
            return returned

        double = object.__new__(type(self))  # copies all options, including those of other JAX releases
        vars(double).update(vars(self), fun=counted(self.fun), fwd=counted(self.fwd), bwd=bwd)
        return original(double, *given)

    jax.custom_vjp.__call__ = call
    try:
        with _watched(context):
            jax.eval_shape(lambda *args: function(*args), *args)
    except Exception as e:
        return calls, e
    finally:
        jax.custom_vjp.__call__ = original
    return calls, None


def _types(tree: Any) -> Any:
    """Replaces each array in a pytree by its type, since a tracer must not outlive its trace."""
    return jax.tree.map(lambda a: jax.typeof(a) if isinstance(a, jax.Array) else a, tree)


def _positional(fun: Callable, args: tuple, kwargs: dict) -> tuple:
    """The arguments in the order of the signature, defaults included."""
    try:
        bound = inspect.signature(fun).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return args  # there is no signature, or JAX itself reports the error
    bound.apply_defaults()
    return bound.args if not bound.kwargs else args


_watched, _count = jax.make_user_context(0), itertools.count(1)  # a new value makes JAX trace again
