"""Figures of the examples, drawn without a display."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def picture(path: Path, **subplots: Any) -> Iterator[Any]:
    """The axes of `matplotlib.pyplot.subplots(**subplots)`; the figure is saved to `path` when the block ends."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(layout="constrained", **subplots)
    yield panels
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"wrote {path}")
