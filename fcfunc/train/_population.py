"""Training a population: many networks of the same shapes in one program, some of them at a time."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from fcfunc._layout import example_axes, shardings
from fcfunc.train._state import TrainState


def population_of(fit: Callable, members_at_once: int) -> Callable:
    """`fit`, for states whose arrays have a leading axis of members; all of them train on the same data.

    Members that are trained together share each matmul kernel's call and must fit into the processor's cache together.
    If the states are sharded along the members' axis, each device trains its own members.
    """

    def fit_population(states: TrainState, data: Any, validation_data: Any = None):
        _check_members(states)

        def of_device(states, data, validation_data):
            return _map_members(lambda state: fit(state, data, validation_data), states, members_at_once)

        over = example_axes(shardings(states.step))
        if over is None:
            return of_device(states, data, validation_data)
        each, all_ = PartitionSpec(over.axes), PartitionSpec()
        # No collective: the types that shard_map would check are those of the loops inside `fit`.
        sharded = jax.shard_map(of_device, mesh=over.mesh, in_specs=(each, all_, all_), out_specs=each, check_vma=False)
        return sharded(states, data, validation_data)

    return fit_population


def _map_members(fun: Callable, states: TrainState, at_once: int) -> Any:
    """`jax.lax.map` in chunks, of equal size if a number from half of `at_once` divides that of the members."""
    members = len(states.step)
    size = next((s for s in range(at_once, at_once // 2, -1) if members % s == 0), at_once)
    return jax.vmap(fun)(states) if members <= size else jax.lax.map(fun, states, batch_size=size)


def _check_members(states: Any) -> None:
    if not isinstance(states, TrainState):
        raise TypeError(f"make_fit: state must be a TrainState, as from init_state, got {type(states).__name__}")
    lengths = {getattr(leaf, "shape", ())[:1] for leaf in jax.tree.leaves(states)}
    if len(lengths) != 1 or lengths == {()} or states.step.ndim != 1:
        raise ValueError(
            "make_fit: with members_at_once, every array of the state must have a leading axis of members, as from "
            f"jax.vmap of init_state, got a step of shape {list(states.step.shape)}"
        )
