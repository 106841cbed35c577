"""Kills real training runs with SIGKILL at random moments, resumes each to its end, and compares the last checkpoints.

python -m proofs.kill_and_resume --kills 100

The run is `examples.train_distributed` on the digits. It saves every few steps, so that many kills hit a save. The
SHA-256 of every array of the last checkpoint is compared with that of an uninterrupted run.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fcfunc import checkpoint
from fcfunc.checkpoint import _manifest

ROOT = Path(__file__).parents[1]
RUN = [
    "--data",
    "digits",
    "--dims",
    "64,128,10",
    "--batch-size",
    "32",
    "--epochs",
    "5",
    "--save-every",
    "7",
    "--save-share",
    "1",
]


def start(out: Path, *more: str) -> subprocess.Popen:
    """Starts the training process."""
    command = [sys.executable, "-m", "examples.train_distributed", *RUN, "--out", str(out), *more]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen) -> str:
    """The output of a process, which must exit with status 0."""
    printed, errors = process.communicate(timeout=300)
    if process.returncode:
        raise RuntimeError(f"status {process.returncode}: {errors.strip()}")
    return printed


def digest(out: Path) -> dict[str, str]:
    """The SHA-256 of each array of the last checkpoint."""
    path = out / str(checkpoint.steps(out)[-1]) / _manifest.MANIFEST
    arrays = json.loads(path.read_text().partition("\n")[2])["arrays"]
    return {name: array["sha256"] for name, array in arrays.items()}


def killed_and_resumed(folder: Path, moment: float) -> tuple[int, bool, dict[str, str]]:
    """Kills a run between its first checkpoint (0) and its end (1), or before the checkpoint (below 0), and resumes it.

    Returns the step it resumed from, whether a save was in progress, and the `digest` of the last checkpoint.
    """
    process = start(folder)
    while not checkpoint.steps(folder) and process.poll() is None and moment >= 0:
        time.sleep(0.005)
    time.sleep(moment * SECONDS["training"] if moment >= 0 else (1 + moment) * SECONDS["start"])
    process.kill()
    process.communicate()
    steps = checkpoint.steps(folder)
    saving = any(folder.glob(".*.unfinished"))
    finished(start(folder, *(["--resume"] if steps else [])))
    return steps[-1] if steps else 0, saving, digest(folder)


SECONDS = {"start": 2.0, "training": 2.0}
"""The time of a run up to its first checkpoint, and from there to its end; `main` measures both."""


def main(argv: list[str] | None = None) -> int:
    """Prints a line for each kill; returns 1 if any resumed run ended differently."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--at-once", type=int, default=1, help="number of runs at a time")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as root:
        begun, whole = time.monotonic(), Path(root) / "whole"
        process = start(whole)
        while not checkpoint.steps(whole) and process.poll() is None:
            time.sleep(0.005)
        SECONDS["start"] = time.monotonic() - begun
        finished(process)
        SECONDS["training"] = time.monotonic() - begun - SECONDS["start"]
        expected, alike, saves, went_on = digest(whole), 0, 0, []
        moments = [rng.uniform(-0.1, 0.9) for _ in range(args.kills)]
        with ThreadPoolExecutor(args.at_once) as pool:
            folders = (Path(root) / str(i) for i in range(args.kills))
            for i, (step, saving, got) in enumerate(pool.map(killed_and_resumed, folders, moments)):
                alike, saves = alike + (got == expected), saves + saving
                went_on.append(step)
                print(f"kill {i + 1}: {'during a save' if saving else 'between saves'}, resumed from step {step}: "
                      f"{'identical' if got == expected else 'DIFFERENT'}", flush=True)  # fmt: skip
    print(f"{alike} of {args.kills} resumed runs end bit-for-bit identical to the uninterrupted run; "
          f"{saves} were killed during a save; they resumed from {len(set(went_on))} different steps")  # fmt: skip
    return int(alike != args.kills)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main())
