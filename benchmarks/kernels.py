"""Where the time of a compiled epoch goes, by kernel: JAX's profile, matched to the compiled program's text."""

import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.peers import Task, classifier_loss
from fcfunc import train

KINDS = {
    "matmuls": r"/dot_general",
    "order": r"/order/",
    "gather": r"/gather/",
    "update": r"/update/",
    "others": r"",
}
"""The kinds of kernels. The first pattern that matches a kernel's operation name in the program's text applies.

`order`, `gather` and `update` are named scopes in `fcfunc.train`. A fusion is classified by its last operation.
`others` includes the activations, the loss, the sums of the bias gradients, and the loop counters.
"""


def kinds_of_kernels(text: str) -> dict[str, str]:
    """`{kernel: kind}` for a compiled program, without the operations that only call other kernels."""
    kinds = {}
    for line in text.splitlines():
        named = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = .*? ([\w\-]+)\(", line)
        if named and named[2] not in ("while", "call", "conditional"):
            name = re.search(r'op_name="([^"]*)"', line)
            kinds[named[1]] = next(kind for kind, seen in KINDS.items() if re.search(seen, name[1] if name else ""))
    return kinds


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """The total time covered by at least one interval."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def shares(task: Task, epochs: int) -> dict[str, float]:
    """The share of each kind of kernel in the time of some epochs, and of the time between kernels."""
    epoch = train.make_train_epoch(classifier_loss, task.optimizer, task.batch_size)
    data = jnp.asarray(task.x), jnp.asarray(task.y)
    state = train.init_state(task.params, task.optimizer, jax.random.key(1))
    kinds = kinds_of_kernels(epoch.lower(state, data).compile().as_text())
    state, _ = epoch(state, data)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(epochs):
                state, metrics = epoch(state, data)
                jax.block_until_ready(metrics)
        (file,) = Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
        events = [event for plane in planes for line in plane.lines for event in line.events]
    # A matmul may be split into parts that run on both cores. Each part is a separate event with the kernel's name.
    running = {kind: [] for kind in KINDS}
    for event in events:
        if event.name in kinds:
            running[kinds[event.name]].append((event.start_ns, event.start_ns + event.duration_ns))
    executions = [e for e in events if e.name.startswith("ThunkExecutor::Execute")]
    first, last = min(e.start_ns for e in executions), max(e.start_ns + e.duration_ns for e in executions)
    before, seen, result = 0.0, [], {}
    for kind, intervals in running.items():  # overlapping time counts toward the first kind
        seen += intervals
        result[kind] = (covered(seen) - before) / (last - first)
        before = covered(seen)
    return result | {"between": 1 - before / (last - first)}


def table(tasks: dict[str, tuple[Task, int]]) -> list[str]:
    """The shares of several tasks."""
    names = [*KINDS, "between"]
    lines = ["", "## Time of a step by kernel", "", f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for title, (task, epochs) in tasks.items():
        found = shares(task, epochs)
        lines.append(f"| {title} | " + " | ".join(f"{100 * found[name]:.0f}%" for name in names) + " |")
    return lines
