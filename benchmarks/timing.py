"""Times programs in turns, and compares the times of pairs of runs."""

import statistics
import time

import jax


def in_turns(programs: dict, rounds: int = 7) -> dict[str, list[float]]:
    """Seconds of each program, run in turns so that a drift of the machine affects all of them."""
    seconds = {name: [] for name in programs}
    for _ in range(rounds + 1):
        for name, (compiled, args) in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(compiled(*args))
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def ratio(a: list[float], b: list[float]) -> str:
    """The median ratio of paired runs, with the lowest and the highest."""
    ratios = sorted(x / y for x, y in zip(a, b, strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
