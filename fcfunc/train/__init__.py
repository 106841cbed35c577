"""Training as pure functions: a state goes in, a state comes out.

Everything here takes the loss as a function, `loss_fn(params, batch, key)`, and the optimizer as an optax
transformation; it knows neither the network nor the loss. `batch` and `data` are pytrees of arrays with a common
leading axis, the examples. `loss_fn` returns the loss, a scalar that is the mean over its batch, or `(loss, metrics)`
with a dict of further means. `key` is this step's own random key in training, and None in evaluation.

On a mesh only the sharding of the arrays changes: place the params by `fcfunc.sharding.shard` and the examples by
`fcfunc.sharding.global_batch`. Each batch is sharded like the data, and each new state like the one before.

A network that carries something besides its parameters, such as the running statistics of batch normalization, keeps
it in the state's `model_state`. Its loss is `loss_fn(params, batch, key, model_state) -> (loss, metrics, model_state)`.
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
