"""Saving while a run trains: a thread writes what the run hands over."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from fcfunc import _arguments, _files
from fcfunc.checkpoint._manifest import is_of_saver, read_manifest
from fcfunc.checkpoint._save import import_orbax, local, naming_previous, restore, steps, write


@dataclasses.dataclass(frozen=True)
class Saver:
    """Where and how often `train.fit` saves a run. A run whose folder holds a checkpoint continues from it.

    A checkpoint holds the state, the best model and the count of `patience`, the history, and the sums of the metrics
    of the current epoch. It is written by a thread while training continues. At the end, also after an exception, the
    last checkpoint that is due is written. If several processes share a mesh, a save is a collective operation, and
    training waits for it.

    Attributes:
      folder: the folder for the checkpoints of one run, as for `save`.
      config: the configuration of the run, as for `save`. A folder with another configuration is an error.
      keep: the number of most recent checkpoints to keep.
      share: the largest part of the time that the thread writes, above 0 and at most 1. If checkpoints become due
        faster, a newer one replaces the one that is waiting. Ignored if several processes share a mesh.

    Example:
      >>> import fcfunc, optax, tempfile
      >>> import jax.numpy as jnp
      >>> optimizer, saver = optax.sgd(0.4), Saver(tempfile.mkdtemp(), config={"rate": 0.4})
      >>> state = fcfunc.train.init_state(jnp.float32(0), optimizer, jax.random.key(0))
      >>> loss_fn = lambda params, batch, key: jnp.mean((batch - params) ** 2)
      >>> options = {"epochs": 3, "batch_size": 4, "saver": saver}
      >>> first, _ = fcfunc.train.fit(loss_fn, optimizer, state, jnp.ones(8), **options)
      >>> again, history = fcfunc.train.fit(loss_fn, optimizer, state, jnp.ones(8), **options)  # nothing left to do
      >>> int(again.step), history["loss"].shape, bool(again.params == first.params)
      (6, (3,), True)
    """

    folder: Any
    config: Any = None
    keep: int = 3
    share: float = 0.02

    def __post_init__(self):
        object.__setattr__(self, "folder", local(self.folder))  # absolute, whatever the working directory becomes
        _files.plain(self.config, "Saver: config")
        _arguments.positive("Saver", keep=self.keep)
        if not 0 < _arguments.number("Saver", share=self.share) <= 1:
            raise ValueError(f"Saver: share must be above 0 and at most 1, got {self.share}")
        import_orbax()  # here and not in the thread, so that a missing library is an error at once

    def restore(self, like: Any, options: dict[str, Any]) -> tuple[Any, Any] | None:
        """The last checkpoint in the folder, as `(state, notes)`; None if there is none.

        `like` is as for `restore`, and `options` must be those that the run was saved with.
        """
        folder, found = self.folder, steps(self.folder)
        if not found:
            return None
        with naming_previous(found[:-1]):
            saved = read_manifest(folder / str(found[-1]))["config"]
        if not is_of_saver(saved):
            raise ValueError(f"Saver: {folder} has checkpoints of checkpoint.save; use another folder")
        config = _files.plain(self.config, "Saver: config")
        different = _different(saved["config"], config, "config") + _different(saved["options"], options, "")
        if different:
            shown = ", ".join(f"{name} {found!r:.80}, not {given!r:.80}" for name, found, given in different[:3])
            raise ValueError(f"Saver: the run in {folder} has {shown}; use another folder for another run")
        return restore(folder, like, step=found[-1]).state, saved["notes"]

    @contextlib.contextmanager
    def writing(self, options: dict[str, Any]) -> Iterator[Callable[[Callable], None]]:
        """A context with a function `save(content)`; at its end, everything that is due has been written.

        `content()` is called in the thread and returns `(state, notes)`: a pytree of arrays with a `step`, whose
        buffers nobody donates, and plain data. An error while writing is raised by the next call or at the end.
        """
        plain = _files.plain(self.config, "Saver: config")

        def save(content):
            state, notes = content()
            write(self.folder, state, {"config": plain, "options": options, "notes": notes}, self.keep)

        if jax.process_count() > 1:
            yield save
            return
        thread = _Thread(save, self.share)
        try:
            yield thread.hand_over
        except BaseException as e:
            thread.close()
            if thread.error not in (None, e):
                e.add_note(f"In addition, saving failed: {thread.error}")
            raise
        thread.close()
        thread.raise_error()


def _different(found: Any, given: Any, name: str) -> list[tuple[str, Any, Any]]:
    """The names and values of the entries in which plain data differs."""
    if not isinstance(found, dict) or not isinstance(given, dict):
        return [] if found == given else [(name, found, given)]
    pairs = {key: (found.get(key, "missing"), given.get(key, "missing")) for key in found | given}
    return [(f"{name}[{key!r}]" if name else key, a, b) for key, (a, b) in pairs.items() if a != b]


class _Thread:
    """A thread that calls `save`, and the content that waits for it."""

    def __init__(self, save: Callable, share: float):
        self.save, self.share = save, share
        self.waiting: Callable | None = None
        self.closed, self.error, self.earliest = False, None, time.monotonic()
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._work, name="fcfunc-saver")
        self.thread.start()

    def hand_over(self, content: Callable) -> None:
        """Lets a content wait for the thread, in place of the one that waits."""
        self.raise_error()
        with self.changed:
            if self.waiting is None:  # otherwise the thread already knows when it is due
                self.changed.notify()
            self.waiting = content

    def raise_error(self) -> None:
        """Raises the error that ended the thread."""
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        """Waits until everything is saved."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join()

    def _work(self):
        try:
            self._save_until_closed()
        except BaseException as e:
            self.error = e

    def _save_until_closed(self):
        while True:
            with self.changed:
                while not self.closed and (self.waiting is None or time.monotonic() < self.earliest):
                    rest = min(self.earliest - time.monotonic(), threading.TIMEOUT_MAX)
                    self.changed.wait(None if self.waiting is None else rest)
                content, self.waiting = self.waiting, None
            if content is None:
                return
            start = time.monotonic()
            self.save(content)
            end = time.monotonic()
            self.earliest = end + (end - start) * (1 / self.share - 1)
