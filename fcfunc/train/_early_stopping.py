"""Early stopping, for a loop on the host or inside a compiled program."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fcfunc import _arguments
from fcfunc.train._state import TrainState, copy_arrays


class EarlyStopping(NamedTuple):
    """Which entry of an epoch's record decides whether it is the best, and how many epochs to wait for a better one."""

    monitor: str
    mode: str
    patience: int | None
    tol: float

    def start(self, state: TrainState) -> "Best":
        """The value before the first epoch: no score, and the initial model."""
        score = jnp.asarray(jnp.nan, jnp.result_type(float))
        model = () if self.patience is None else copy_arrays((state.params, state.model_state))
        return Best(score, jnp.int32(0), jnp.int32(0), model)

    def judge(self, best: "Best", epoch: Any, record: dict, state: TrainState) -> "Best":
        """The best epoch so far, given the `record` of one more; without patience, the last epoch."""
        if self.patience is None:
            return best._replace(epoch=jnp.int32(epoch))
        score = jnp.asarray(record[self.monitor], best.score.dtype)
        model = (state.params, state.model_state)
        new = Best(score if self.mode == "min" else -score, jnp.int32(epoch), jnp.int32(0), model)
        return _better_of(best, new, self.tol)

    def stops(self, best: "Best") -> Any:
        """Whether `patience` epochs have passed without a better one."""
        return np.bool_(False) if self.patience is None else best.waited >= self.patience

    def restore(self, best: "Best", state: TrainState) -> TrainState:
        """The state with the model of the best epoch."""
        if self.patience is None:
            return state
        params, model_state = best.model
        return state._replace(params=params, model_state=model_state)


class Best(NamedTuple):
    """The best epoch so far: its score, negated if higher is better, its number, counted from 1, and its model."""

    score: jax.Array
    epoch: jax.Array
    waited: jax.Array  # the number of epochs since the last improvement by more than the tolerance
    model: Any  # parameters and model state


@jax.jit
def _better_of(best: Best, new: Best, tol: float) -> Best:
    none_yet = jnp.isnan(best.score)
    first = none_yet & ~jnp.isnan(new.score)
    better = (new.score < best.score) | first
    waited = jnp.where((new.score < best.score - tol) | first, 0, best.waited + 1)
    return optax.tree.where(better | none_yet, new, best)._replace(waited=waited)


def checked_early_stopping(
    where: str, monitor: str, mode: str, patience: int | None, tol: float, validation: bool
) -> EarlyStopping:
    """Checks the options and returns them as one value; `validation` says whether there is validation data."""
    if patience is not None:
        _arguments.positive(where, patience=patience)
    tol = _arguments.number(where, tol=tol)
    if not 0 <= tol < math.inf or (tol and patience is None):
        needs = "finite and at least 0, and tol above 0 needs patience"
        raise ValueError(f"{where}: tol must be {needs}, got tol {tol} with patience {patience}")
    if mode not in ("min", "max"):
        raise ValueError(f'{where}: mode must be "min" or "max", got {mode!r}')
    if not isinstance(monitor, str):
        raise TypeError(f"{where}: monitor must be the name of a metric, got {monitor!r:.80}")
    if monitor.startswith("validation_") and not validation:
        raise ValueError(f"{where}: monitor {monitor!r} needs validation_data, got None")
    if monitor.startswith("training_"):
        monitor = monitor.removeprefix("training_")
    elif validation:
        monitor = f"validation_{monitor.removeprefix('validation_')}"
    return EarlyStopping(monitor, mode, patience, tol)
