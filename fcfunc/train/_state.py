"""The state of a run, and the random keys of its steps and epochs."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fcfunc import _arguments, _layout
from fcfunc.train._mesh import on_mesh_of, replicate_unplaced


class TrainState(NamedTuple):
    """Everything that a run carries from step to step.

    Attributes:
      params: the parameters, any pytree of arrays.
      opt_state: the optimizer's state.
      step: the number of steps taken, an int32 scalar.
      key: the run's random key. It never changes: the key of each step and the order of each epoch are derived from it
        and the step, so a run that resumes from a saved state continues exactly as it would have.
      model_state: other state that the loss carries from step to step; an empty pytree if there is none.
      epoch_position: the number of examples used so far in the current epoch, an int32 scalar; 0 between epochs. A step
        of `make_train_step` does not belong to an epoch and abandons the current one.
      epoch_start: the step at which the current epoch began, an int32 scalar; it determines the epoch's order.
    """

    params: Any
    opt_state: Any
    step: jax.Array
    key: jax.Array
    model_state: Any = ()
    epoch_position: Any = np.zeros((), np.int32)
    epoch_start: Any = np.zeros((), np.int32)


def init_state(
    params: Any, optimizer: optax.GradientTransformation, key: jax.Array, *, model_state: Any = ()
) -> TrainState:
    """The state of a run before its first step.

    Args:
      params: the initial parameters. They are copied, because steps donate the buffers of the state.
      optimizer: any optax optimizer, e.g. `optax.sgd(0.1)`.
      key: a random key. The order of the examples and the keys passed to `loss_fn` are derived from it.
      model_state: state of the loss besides the parameters, e.g. `net.init_batch_norm_state(params)`.

    Returns:
      A `TrainState` at step 0. If the params are on a mesh, optimizer arrays that are made from a parameter are sharded
      like it, and the others are replicated.

    Raises:
      TypeError: `key` is not a random key, or `optimizer` is not an optax optimizer.
      ValueError: `params` contains no array.

    Example:
      >>> import optax
      >>> state = init_state({"w": jnp.ones(3)}, optax.sgd(0.1), jax.random.key(0))
      >>> int(state.step), state.params["w"].shape
      (0, (3,))
    """
    _arguments.optimizer("init_state", optimizer)
    _arguments.key("init_state", key)
    if not jax.tree.leaves(params):
        raise ValueError(f"init_state: params must contain at least one array, got {params!r:.80}")
    for path, leaf in jax.tree.leaves_with_path(params):
        _arguments.array("init_state", **{f"params{jax.tree_util.keystr(path)}": leaf})
    with on_mesh_of(params):
        opt_state = optimizer.init(params)
    zero = jax.device_put(np.int32(0))
    state = TrainState(params, opt_state, zero, key, model_state, zero, zero)
    return replicate_unplaced(copy_arrays(state), state.params)


def copy_arrays(tree: Any) -> Any:
    """A copy of a pytree in new buffers, which no step from another state donates."""

    def copy(a):
        # `jnp.copy` compiles a program for each shape, which takes longer than importing fcfunc. An array that is
        # committed to its devices must stay so, and one that is not must remain free to follow the data.
        uncommitted = isinstance(a, jax.Array) and not _layout.is_tracer(a) and not a.committed
        return jax.device_put(a, may_alias=False) if uncommitted else jnp.copy(a)

    return jax.tree.map(copy, tree)


def step_key(state: TrainState) -> jax.Array:
    """The key that the loss receives in the next step."""
    return jax.random.fold_in(jax.random.split(state.key)[0], state.step)


def epoch_start(state: TrainState) -> jax.Array:
    """The first step of the epoch that the next step belongs to."""
    return jnp.where(state.epoch_position == 0, state.step, state.epoch_start)
