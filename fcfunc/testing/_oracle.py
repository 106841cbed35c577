"""A function without its hand-written rules, and what the rules did while a function ran."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex

from fcfunc._jax_releases import ClosedJaxpr, is_jaxpr, jaxpr_and_consts

INLINED = ("custom_vjp_call", "jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2")


@functools.lru_cache(maxsize=256)
def without_rules(fun: Callable) -> Callable:
    """`fun` with every `custom_vjp` in it undone: the same outputs, gradients by automatic differentiation.

    `fun` is traced to a jaxpr, which holds the undecorated function of each rule, and that is evaluated in its place.
    Rules inside loops and conditionals are undone too; `custom_jvp` functions stay as they are.
    """

    def undone(*args):
        closed, shape = jax.make_jaxpr(fun, return_shape=True)(*args)
        outs = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), outs)

    return undone


def _evaluate(jaxpr, consts, args):
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(atom):
        return atom.val if isinstance(atom, jex.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        if eqn.primitive.name in INLINED:
            inner = next(p for p in eqn.params.values() if is_jaxpr(p))
            outs = _evaluate(*jaxpr_and_consts(inner), values)
        elif eqn.primitive.name == "shard_map":
            inner, options = (
                eqn.params["jaxpr"],
                {k: eqn.params[k] for k in ("mesh", "in_specs", "out_specs", "check_vma")},
            )
            local = lambda *args, inner=inner: tuple(_evaluate(inner, (), list(args)))  # noqa: E731
            outs = jax.shard_map(local, axis_names=eqn.params["manual_axes"], **options)(*values)
        else:
            params = eqn.primitive.get_bind_params({k: _undone(p) for k, p in eqn.params.items()})
            outs = eqn.primitive.bind(*values, **params)
            outs = outs if eqn.primitive.multiple_results else [outs]
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _undone(param: Any) -> Any:
    """A parameter of an equation, with the rules undone in any jaxpr that it holds (the body of a loop, a branch)."""
    if isinstance(param, tuple) and any(isinstance(p, ClosedJaxpr) for p in param):
        return tuple(map(_undone, param))
    closed: Any = param if isinstance(param, ClosedJaxpr) else None
    if closed is not None and "custom_vjp_call" in str(closed):
        avals = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in closed.in_avals]
        return jax.make_jaxpr(lambda *args: _evaluate(closed.jaxpr, closed.consts, list(args)))(*avals)
    return param


class Call(NamedTuple):
    """One call of a rule: the differentiable arguments it was given, and what its backward pass returned, if it ran."""

    name: str
    args: tuple
    cotangents: list[Any]


def watch(function: Callable, *args) -> tuple[list[Call], BaseException | None]:
    """Traces `function(*args)` and records every `custom_vjp` function that it calls, and every backward pass.

    Nothing is computed. Functions that were compiled before are traced again: their programs would hide their rules.
    While it runs, `jax.custom_vjp.__call__` is replaced: not for use from several threads at once.

    Returns:
      The calls, and what was raised, or None.
    """
    calls: list[Call] = []
    original = jax.custom_vjp.__call__

    def call(self, *args, **kwargs):
        fixed = set(self.nondiff_argnums)
        record = Call(self.__name__, tuple(a for i, a in enumerate(args) if i not in fixed), [])
        calls.append(record)

        @functools.wraps(self.bwd)
        def bwd(*args):
            cotangents = self.bwd(*args)
            record.cotangents.append(cotangents)
            return cotangents

        double: Any = jax.custom_vjp(self.fun, nondiff_argnums=self.nondiff_argnums)
        double.defvjp(self.fwd, bwd, symbolic_zeros=self.symbolic_zeros)
        return original(double, *args, **kwargs)

    jax.custom_vjp.__call__ = call
    try:
        with _watched(next(_count)):
            jax.eval_shape(lambda *args: function(*args), *args)
    except Exception as e:
        return calls, e
    finally:
        jax.custom_vjp.__call__ = original
    return calls, None


_watched, _count = jax.make_user_context(0), itertools.count(1)  # a value never seen before makes JAX trace again
