"""The sharding of a state and its data around a compiled step; on an Auto mesh the arrays' types do not show it."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fcfunc import _layout
from fcfunc._arguments import examples
from fcfunc._layout import ExampleAxes, constrain, example_axes, explicit_sharding, shardings, without_axes


class Layouts(NamedTuple):
    """The sharding of each array of a state and its data. The empty value leaves every array unchanged."""

    state: tuple[NamedSharding | None, ...] = ()
    data: tuple[NamedSharding | None, ...] = ()

    @property
    def examples(self) -> ExampleAxes | None:
        """How the leading axis of the data, the examples, is sharded; None if it is not."""
        return example_axes(self.data)

    def constrain_state(self, state: Any) -> Any:
        """Shards a new state, or its first arrays, like the previous one."""
        return _map(constrain, state, self.state)

    def gather_params(self, params: Any) -> Any:
        """Gathers params that are sharded over the devices that hold the examples."""
        return _map(lambda a, s: constrain(a, without_axes(s, self.examples)), params, self.state)

    def gather_rows(self, data: Any, indices: jax.Array) -> Any:
        """The examples at some indices, sharded like the data. The indices must be distinct and within bounds."""
        with jax.named_scope("gather"):
            return _map(functools.partial(_layout.gather_rows, indices=indices), data, self.data)

    def check_divides(self, what: str, n: int, parts: int) -> None:
        """Raises ValueError if n examples cannot be divided evenly over the devices that hold them and into parts."""
        devices = self.examples.devices if self.examples else 1
        if n % (parts * devices):
            shares = f"{devices} devices that hold the examples, times {parts} microbatches"
            raise ValueError(f"{what} of {n} examples cannot be divided evenly over {shares}")


def jit_on_mesh(where: str, fun: Callable, *, donate: bool = True) -> Callable:
    """`fun(state, data, layouts)`, compiled for the sharding of its arguments."""
    program = jax.jit(fun, donate_argnums=0 if donate else (), static_argnames="layouts")

    def with_layouts(run):
        def call(state, data, **more):
            if not hasattr(state, "epoch_start"):
                raise TypeError(f"{where}: state must be a TrainState, as from init_state, got {type(state).__name__}")
            data = examples(where, data)
            of_data = shardings(data)
            # On one device a step may take less time than inspecting all its arrays.
            if not any(of_data) and not any(shardings(state.step)):
                return run(state, data, **more, layouts=Layouts())
            if _layout.is_tracer(state.step):
                return run(state, data, **more, layouts=Layouts(shardings(state), of_data))
            state = replicate_unplaced(state, data)
            with on_mesh_of((state, data)):
                return run(state, data, **more, layouts=Layouts(shardings(state), of_data))

        return call

    call = functools.wraps(fun)(with_layouts(program))
    call.lower, call.trace = with_layouts(program.lower), with_layouts(program.trace)  # type: ignore[attr-defined]
    return call


def on_mesh_of(tree: Any) -> contextlib.AbstractContextManager:
    """A context in which new arrays, such as those that optimizers make, can be combined with those of the pytree."""
    mesh = _mesh_of(tree)
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def replicate_unplaced(state: Any, tree: Any) -> Any:
    """`state`, with every array that is not on a mesh replicated over the mesh of `tree`."""
    mesh = _mesh_of(tree)
    if mesh is None:
        return state
    replicated = NamedSharding(mesh, PartitionSpec())
    return _map(lambda a, s: _layout.put(a, replicated) if s is None else a, state, shardings(state))


def shard_examples(a: jax.Array, over: ExampleAxes | None) -> jax.Array:
    """`a` with its leading axis sharded like the examples; its other axes keep their sharding."""
    if over is None:
        return a
    explicit = explicit_sharding(a)
    if AxisType.Explicit in over.mesh.axis_types:
        rest = (None,) * (a.ndim - 1) if explicit is None else explicit.spec[1:]
    else:
        rest = (PartitionSpec.UNCONSTRAINED,) * (a.ndim - 1)
    return constrain(a, NamedSharding(over.mesh, PartitionSpec(over.axes, *rest)))


def split_examples(a: jax.Array, shape: tuple[int, ...], over: ExampleAxes | None) -> jax.Array:
    """`a` with its leading axis reshaped to `shape`, whose first axis is sharded like the examples; no data moves."""
    a, shape = shard_examples(a, over), (*shape, *a.shape[1:])
    sharding = explicit_sharding(a)
    if sharding is None:
        return shard_examples(a.reshape(shape), over)
    spec = PartitionSpec(sharding.spec[0], *[None] * (len(shape) - a.ndim), *sharding.spec[1:])
    return jax.lax.reshape(a, shape, out_sharding=NamedSharding(sharding.mesh, spec))


def first_device(a: jax.Array) -> jax.Array:
    """`a[0]`, even if the leading axis is sharded."""
    sharding = explicit_sharding(a)
    if sharding is not None:
        a = jax.sharding.reshard(a, NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec[1:])))
    return a[0]


def type_of_part(a: jax.Array) -> jax.ShapeDtypeStruct:
    """The shape, dtype and sharding of `a[i]`.

    `a[0]` does not show the sharding: JAX 0.12 drops that of axes of size 1.
    """
    sharding = explicit_sharding(a)
    if sharding is not None:
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return jax.ShapeDtypeStruct(a.shape[1:], a.dtype, sharding=sharding)


def zeros_like_sharded(a: jax.ShapeDtypeStruct, dtype, over: ExampleAxes | None) -> jax.Array:
    """Zeros for accumulating arrays like `a`, with the leading axis sharded like the examples."""
    zeros = jnp.zeros(a.shape, dtype)
    if over is not None and AxisType.Explicit in over.mesh.axis_types:
        # An array without a sharding is a constant that depends on nothing on the mesh.
        return zeros if a.sharding is None else jax.sharding.reshard(zeros, a.sharding)
    return shard_examples(zeros, over)


def _map(fun: Callable, tree: Any, shardings: tuple) -> Any:
    """Maps `fun(leaf, sharding)` over the leaves, with None for leaves that have no entry in `shardings`."""
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(treedef, map(fun, leaves, (*shardings, *[None] * len(leaves))))


def _mesh_of(tree: Any) -> Any:
    return next((s.mesh for s in shardings(tree) if s is not None), None)
