"""Checks that data fits into the free memory of a device before it is copied there."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

CGROUP = Path("/sys/fs/cgroup")


def check_memory(where: str, **trees: Any) -> None:
    """Raises MemoryError if the arrays on the host are larger than the free memory of the default device.

    Arrays that are already on a device do not count. If the system does not report free memory, nothing is checked.
    """
    sizes = {name: sum(map(_size, jax.tree.leaves(tree))) for name, tree in trees.items()}
    if not any(sizes.values()):
        return
    (device,) = jax.device_put(0.0).devices()  # where new arrays go
    free = _free(device)
    if free is not None and sum(sizes.values()) > free:
        parts = " and ".join(f"{name} ({size / 1e9:.2f} GB)" for name, size in sizes.items() if size)
        raise MemoryError(f"{where}: {parts} cannot be copied to {device}, which has {free / 1e9:.2f} GB free")


def _size(a) -> int:
    on_device = isinstance(a, jax.Array)
    return 0 if on_device else np.size(a) * jax.dtypes.canonicalize_dtype(np.asarray(a).dtype).itemsize


def _free(device: Any) -> int | None:
    """The bytes that are free on a device of this process."""
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else None
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None  # not Linux
    try:  # a container may have a lower limit than the machine; its file cache is reclaimable
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return min(free, limit - used + int(stat["inactive_file"]))
    except (OSError, KeyError, ValueError):
        return free
