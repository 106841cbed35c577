"""Training a population: many networks of the same shapes in one program, some of them at a time."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from fcfunc._arguments import examples
from fcfunc._layout import ExampleAxes, example_axes, mesh_axes, shardings
from fcfunc.train._order import even_size
from fcfunc.train._state import TrainState


def population_of(fit: Callable, members_at_once: int) -> Callable:
    """`fit`, for states whose arrays have a leading axis of members; all of them train on the same data.

    Members that are trained together share each matmul kernel's call and must fit into the processor's cache together.
    If the states are sharded along the members' axis, each device trains its own members.
    """

    def fit_population(state: TrainState, data: Any, validation_data: Any = None):
        _check_members(state)
        data = examples("make_fit", data)
        if validation_data is not None:
            validation_data = examples("make_fit", validation_data, "validation_data")

        def of_device(states, data, validation_data):
            return _map_members(lambda state: fit(state, data, validation_data), states, members_at_once)

        over = example_axes(shardings(state.step))
        if over is None:
            return of_device(state, data, validation_data)
        _check_shardings(state, (data, validation_data), over)
        each, all_ = PartitionSpec(over.axes), PartitionSpec()
        sharded = jax.shard_map(of_device, mesh=over.mesh, in_specs=(each, all_, all_), out_specs=each)
        return sharded(state, data, validation_data)

    return fit_population


def _map_members(fun: Callable, states: TrainState, at_once: int) -> Any:
    """`jax.lax.map` in chunks, of equal size if a number from half of `at_once` divides that of the members."""
    members = len(states.step)
    if members <= at_once:
        return jax.vmap(fun)(states)
    return jax.lax.map(fun, states, batch_size=even_size(members, at_once))


def _check_members(states: Any) -> None:
    if not isinstance(states, TrainState):
        raise TypeError(f"make_fit: state must be a TrainState, as from init_state, got {type(states).__name__}")
    members = np.shape(states.step)[:1]
    for path, leaf in jax.tree.leaves_with_path(states):
        if not members or np.shape(leaf)[:1] != members or members == (0,):
            expected = f"{members[0]} members, as step has" if members and members[0] else "at least one member"
            raise ValueError(
                f"make_fit: with members_at_once, state{jax.tree_util.keystr(path)} must have a leading axis of "
                f"{expected}, got {list(np.shape(leaf))}; jax.vmap of init_state makes such states"
            )


def _check_shardings(states: TrainState, data: Any, over: ExampleAxes) -> None:
    for (path, _), sharding in zip(jax.tree.leaves_with_path(states), shardings(states), strict=True):
        first, *rest = (*sharding.spec, None) if sharding else (None,)
        if mesh_axes(first) != over.axes or any(rest):
            raise ValueError(
                f"make_fit: state{jax.tree_util.keystr(path)} must be sharded along the axis of members alone, like "
                f"step, over {', '.join(over.axes)}; got {sharding.spec if sharding else 'no sharding'}"
            )
    if example_axes(shardings(data)):
        raise ValueError("make_fit: with sharded members, the data must be replicated; got data that is sharded")
