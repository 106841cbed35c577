"""Times `import fcfunc` and `import jax, optax` in alternating processes; prints medians and ranges.

python -m benchmarks.import_time
"""

import statistics
import subprocess
import sys
import time

RUNS = 20
STATEMENTS = ("import jax, optax", "import fcfunc")


def seconds(statement: str) -> float:
    """The time of a process that runs only this statement."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def main() -> float:
    """Prints the times and their ratio, which is the median over back-to-back pairs."""
    for statement in STATEMENTS:
        seconds(statement)  # brings the files into the system's cache
    pairs = [[seconds(statement) for statement in STATEMENTS] for _ in range(RUNS)]
    for statement, times in zip(STATEMENTS, zip(*pairs, strict=True), strict=True):
        print(f"{statement:20s} {statistics.median(times):.3f} s ({min(times):.3f} to {max(times):.3f})")
    ratio = statistics.median(ours / theirs for theirs, ours in pairs)
    print(f"ratio                {ratio:.3f}, the median of {RUNS} pairs")
    return ratio


if __name__ == "__main__":
    main()
