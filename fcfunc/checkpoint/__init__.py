"""Saving and restoring a run: the whole `TrainState`, and the configuration that made it.

The arrays are written and read by orbax-checkpoint (the extra `checkpoint`). This package adds a manifest, which is
written last: the name, shape, dtype and SHA-256 of every array, the size and SHA-256 of every file, and a SHA-256 of
itself. All are verified when a checkpoint is restored. A folder without a manifest is not a checkpoint.

`train.fit(..., saver=Saver(folder))` saves a whole run in the background and resumes it; `save` and `restore` are for
other loops.
"""

from fcfunc.checkpoint._save import Checkpoint, restore, save, steps
from fcfunc.checkpoint._saver import Saver

__all__ = ["Checkpoint", "Saver", "restore", "save", "steps"]
