"""Training as pure functions: a state goes in, a state comes out.

Everything here takes the loss as a function, `loss_fn(params, batch, key)`, and the optimiser as an optax
transformation; it knows neither the network nor the loss. `batch` and `data` are any tree of arrays that share their
first axis, the examples. `loss_fn` returns the loss, a scalar that is the mean over its batch, or `(loss, metrics)`
with a dict of further means. `key` is this step's own random key in training, and None in evaluation.

On a mesh nothing changes but where the arrays lie: the state's params by `fcfunc.sharding.shard`, the examples by
`fcfunc.sharding.global_batch`. Each batch lies as the data it is taken from, and a new state as the one before.

A network that carries something besides its parameters, such as the running statistics of batch normalisation, has it
in the state's `model_state`. Its loss is `loss_fn(params, batch, key, model_state) -> (loss, metrics, model_state)`.
"""

from fcfunc.train._epoch import TrainState
from fcfunc.train._failure import NonFiniteError
from fcfunc.train._fit import evaluate, fit, init_state, make_fit, make_train_epoch, make_train_step

__all__ = [
    "NonFiniteError",
    "TrainState",
    "evaluate",
    "fit",
    "init_state",
    "make_fit",
    "make_train_epoch",
    "make_train_step",
]
