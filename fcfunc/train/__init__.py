"""Training as pure functions: each takes a state and returns a new one.

You pass the loss as a function, `loss_fn(params, batch, key)`, and the optimizer as an optax transformation; nothing
here depends on the network or on the kind of loss. `batch` and `data` are pytrees of arrays with a common leading axis,
the examples. `loss_fn` returns the loss, a scalar that is the mean over the batch, or `(loss, metrics)` with a dict of
further means. `key` is a random key that is different in each training step, and None in evaluation.

On a mesh only the sharding of the arrays changes: place the params with `fcfunc.sharding.shard` and the examples with
`fcfunc.sharding.global_batch`. Each batch is sharded like the data, and each new state like the previous one.

If a network has state besides its parameters, such as the running statistics of batch normalization, it is kept in the
state's `model_state`. The loss is then `loss_fn(params, batch, key, model_state) -> (loss, metrics, model_state)`.
"""

from fcfunc.train._epoch import evaluate, make_train_epoch, num_steps
from fcfunc.train._failure import NonFiniteError
from fcfunc.train._fit import fit, make_fit
from fcfunc.train._state import TrainState, init_state
from fcfunc.train._step import make_train_step

__all__ = [
    "NonFiniteError", "TrainState", "evaluate", "fit", "init_state", "make_fit", "make_train_epoch", "make_train_step",
    "num_steps",
]  # fmt: skip
