"""A run of `fit` between two steps, and its form in a checkpoint."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from fcfunc import _arguments
from fcfunc.train._early_stopping import Best
from fcfunc.train._mesh import replicate_unplaced
from fcfunc.train._state import TrainState


class Run(NamedTuple):
    """A run between two steps.

    Attributes:
      state: its state.
      best: the best epoch so far.
      records: the history's entries of each completed epoch.
      sums: of the metrics of the current epoch.
      seconds: the time that the current epoch has taken.
      ended: whether `on_epoch` ended the run.
    """

    state: TrainState
    best: Best
    records: list[dict[str, Any]]
    sums: "Sums"
    seconds: float
    ended: bool

    @property
    def history(self) -> dict[str, Any]:
        """The records of epochs, merged into one dict of arrays."""
        names = self.records[0] if self.records else ()
        columns = {name: np.array([record[name] for record in self.records]) for name in names}
        return columns | {"epochs": len(self.records), "kept_epoch": int(self.best.epoch)}


class Sums(NamedTuple):
    """The sum of each metric over examples, without those of steps that a guard skipped, and their number."""

    metrics: dict[str, float]
    examples: int

    def plus(self, metrics: dict, skipped: np.ndarray, sizes: np.ndarray) -> "Sums":
        """The sums with more steps, whose metrics are means over batches of the given sizes."""
        taken = ~skipped
        more = {name: float(np.dot(np.float64(m[taken]), sizes[taken])) for name, m in metrics.items()}
        totals = {name: self.metrics.get(name, 0.0) + value for name, value in more.items()}
        return Sums(totals, self.examples + int(sizes[taken].sum()))

    def means(self) -> dict[str, float]:
        """The means of the metrics; NaN if all steps were skipped."""
        return {name: total / self.examples if self.examples else math.nan for name, total in self.metrics.items()}


NO_SUMS = Sums({}, 0)
"""The sums before the first step of an epoch."""


class SavedArrays(NamedTuple):
    """The arrays of a run in a checkpoint. The rest is plain data, in its notes."""

    state: TrainState
    best: Best

    @property
    def step(self) -> Any:
        """The number of the checkpoint."""
        return self.state.step


def content_of(run: Run) -> tuple[SavedArrays, dict[str, Any]]:
    """What a checkpoint holds: arrays, and plain data."""
    return _arrays_of(run), _notes_of(run)


def _arrays_of(run: Run) -> SavedArrays:
    """Those of a run on a mesh are all on the mesh."""
    return SavedArrays(run.state, replicate_unplaced(run.best, run.state.params))


def _notes_of(run: Run) -> dict[str, Any]:
    """Metrics are saved as text, which keeps every bit, NaN and infinities."""
    names = list(run.records[0]) if run.records else []
    records = [[repr(record[name]) for name in names] for record in run.records]
    sums = {"metrics": {name: repr(value) for name, value in run.sums.metrics.items()}, "examples": run.sums.examples}
    return {"names": names, "records": records, "sums": sums, "seconds": run.seconds, "ended": run.ended}


def restored(where: str, saver: Any, run: Run, options: dict[str, Any], epochs: int) -> Run:
    """The run that the saver's folder holds, or `run` if there is none; `options` must be those of the saved run."""
    saved = saver.restore(_arrays_of(run), options)
    if saved is None:
        return run
    (state, best), notes = saved
    found, given = (jax.random.key_data(key).tolist() for key in (state.key, run.state.key))
    if found != given:
        raise ValueError(
            f"{where}: the run in {saver.folder} has the random key {found}, the state {given}; use another folder"
        )
    records = [dict(zip(notes["names"], map(_number, record), strict=True)) for record in notes["records"]]
    begun = len(records) + bool(int(state.epoch_position))
    if begun > epochs:
        raise ValueError(
            f"{where}: the run in {saver.folder} is in epoch {begun}; epochs must not be lower, got {epochs}"
        )
    metrics = {name: float(text) for name, text in notes["sums"]["metrics"].items()}
    return Run(state, best, records, Sums(metrics, notes["sums"]["examples"]), notes["seconds"], notes["ended"])


def _number(text: str) -> int | float:
    return int(text) if text.lstrip("-").isdigit() else float(text)


def numbers(where: str, record: dict[str, Any]) -> dict[str, int | float]:
    """A copy of an epoch's record, which `on_epoch` may have added to, as Python numbers."""
    found = {}
    for name, value in record.items():
        try:
            found[name] = np.asarray(value).item() + 0  # True becomes 1
            float(found[name])  # raises an error for a complex number
        except (TypeError, ValueError):
            shown = f"{value!r:.80}"
            raise TypeError(f"{where}: a saved record must hold numbers, but on_epoch made {name!r} {shown}") from None
    return found


def check_saver(where: str, saver: Any) -> None:
    """Raises TypeError unless this can save a run."""
    if isinstance(saver, type) or not hasattr(saver, "restore") or not hasattr(saver, "writing"):
        raise TypeError(f"{where}: saver must be a checkpoint.Saver, got {_arguments.describe(saver)}")
