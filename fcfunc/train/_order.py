"""The order of an epoch's examples, and the sizes of its batches."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fcfunc._compiler_options import quick_options
from fcfunc.train._mesh import on_mesh_of
from fcfunc.train._permutation import permutation
from fcfunc.train._state import TrainState, epoch_start


def order_from(state: TrainState, n: int, limit: int, shuffle: bool, *, used: Any = 0, salt: Any = None) -> jax.Array:
    """The indices of the next `limit` examples of the state's epoch over n examples.

    In a chunk of a stream, n is the number of its examples, `used` that of the epoch's examples before it, and `salt`
    distinguishes its order from those of other chunks.
    """
    with jax.named_scope("order"):
        places = state.epoch_position - used + jnp.arange(limit, dtype=jnp.int32)
        salts = (epoch_start(state),) if salt is None else (epoch_start(state), salt)
        return permutation(state.key, n, places, salts) if shuffle else places


@functools.lru_cache(maxsize=32)
def order_program(n: int, limit: int, shuffle: bool):
    """`order_from` as a separate program, compiled once for all losses and, if it is small, with quick options."""
    options = quick_options() if limit < 10**5 else {}
    program = jax.jit(
        lambda state, used, salt: order_from(state, n, limit, shuffle, used=used, salt=salt), compiler_options=options
    )

    def order(state: TrainState, used: Any, salt: int | None) -> jax.Array:
        with on_mesh_of(state.step):
            light = state._replace(params=(), opt_state=(), model_state=())
            return program(light, np.int32(used), salt if salt is None else np.int32(salt))

    return order


def even_size(n: int, size: int) -> int:
    """`size`, or a number down to half of it that divides n: all parts of n are then equal, and compiled once."""
    return next((s for s in range(size, size // 2, -1) if n % s == 0), size)


def batch_sizes(n: int, batch_size: int) -> np.ndarray:
    """The number of examples of each step of an epoch."""
    full, rest = divmod(n, int(batch_size))
    return np.array([batch_size] * full + [rest] * (rest > 0))
