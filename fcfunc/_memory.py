"""Whether arrays fit into the memory of a device before any of them is copied there."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

CGROUP = Path("/sys/fs/cgroup")


def check_fits(where: str, **trees: Any) -> None:
    """MemoryError where the arrays of the host are larger than what is free on the default device.

    What lies on a device already is not copied. Where the system does not tell what is free, nothing is checked.
    """
    sizes = {
        name: sum(np.asarray(a).nbytes for a in jax.tree.leaves(tree) if not isinstance(a, jax.Array))
        for name, tree in trees.items()
    }
    free = _free()
    if free is not None and sum(sizes.values()) > free:
        parts = " and ".join(f"{name} of {size / 1e9:.2f} GB" for name, size in sizes.items() if size)
        raise MemoryError(f"{where}: {parts} to copy, and {free / 1e9:.2f} GB are free on {jax.devices()[0]}")


def _free() -> int | None:
    """The bytes that are free on the default device."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else None
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None  # not Linux
    try:  # a container may be allowed less than the machine has
        limit, used = ((CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        return min(free, int(limit) - int(used))
    except (OSError, ValueError):
        return free
