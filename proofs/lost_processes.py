"""Breaks runs of two processes of four devices each at random moments, and resumes them.

    python -m proofs.lost_processes --kills 100
    python -m proofs.lost_processes --faults

The run is `examples.train_distributed` on the digits, which saves every few steps. Each time, all processes must end
within LIMIT seconds, and the last line on standard error must say what to do. The run is then resumed on the same
devices, where every array and the history of the last checkpoint must be those of an uninterrupted run to the last bit,
or on fewer or more devices, where the loss of each epoch must be the same to one part in a thousand.

`--faults` tries the other faults once each: a process that is stopped, a disk that is full for one process, and a wall
clock of one process that jumps by an hour, after which the run may also go on to its end.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from fcfunc import checkpoint
from fcfunc.checkpoint import _manifest

ROOT = Path(__file__).parents[1]
RUN = ["--data", "digits", "--dims", "64,128,10", "--batch-size", "64", "--epochs", "4", "--save-every", "7",
       "--mode", "fsdp", "--lost-after", "20"]  # fmt: skip
LIMIT = {"killed": 30, "stopped": 60, "full disk": 60, "clock jump": 60}
"""The seconds that the processes have to end after each fault. `--lost-after` is 20."""

PLACES = {"the same devices": (2, 4), "fewer devices": (1, 2), "more devices": (2, 8)}
"""The processes, and the devices of each, on which a run is resumed."""


def start(out: Path, place: str, *more: str, **environment: str) -> subprocess.Popen:
    """Starts a run."""
    processes, devices = PLACES[place]
    command = [sys.executable, "-m", "examples.train_distributed", *RUN, "--processes", str(processes)]
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [*command, "--out", str(out), *more], cwd=ROOT, env=os.environ | flags | environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip


def workers(launcher: subprocess.Popen) -> list[int]:
    """The ids of the processes that a launcher started, by process number."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if int(parent) == launcher.pid and "--process-id" in words:
            found[int(words[words.index("--process-id") + 1])] = int(pid)
    return [found[i] for i in sorted(found)]


def last_checkpoint(out: Path) -> tuple[dict[str, str], dict[str, list[float]]]:
    """The SHA-256 of each array of the last checkpoint, and its history without the times."""
    path = out / str(checkpoint.steps(out)[-1]) / _manifest.MANIFEST
    manifest = json.loads(path.read_text().partition("\n")[2])
    notes = manifest["config"]["notes"]
    columns = dict(zip(notes["names"], zip(*notes["records"], strict=True), strict=True))
    history = {name: list(map(float, column)) for name, column in columns.items() if name != "seconds"}
    return {name: array["sha256"] for name, array in manifest["arrays"].items()}, history


def broken(out: Path, rng: random.Random, inflict, **environment: str) -> tuple[float, str, int, bool]:
    """Starts a run and breaks it between its first checkpoint and its end.

    Returns the seconds until every process has ended, the last line of errors, the status, and whether a save was in
    progress.
    """
    process = start(out, "the same devices", **environment)
    while not checkpoint.steps(out) and process.poll() is None:
        time.sleep(0.005)
    time.sleep(rng.uniform(0, TRAINING["seconds"]))
    pids = workers(process)
    if len(pids) < 2:  # the run ended before
        process.communicate()
        return 0.0, "", 0, False
    saving = any(out.glob(".*.unfinished"))
    inflict(pids)
    begun = time.monotonic()
    _, errors = process.communicate(timeout=300)
    took = time.monotonic() - begun
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    return took, (errors.strip().splitlines() or [""])[-1], process.returncode, saving


TRAINING = {"seconds": 2.0}
"""The time of a run from its first checkpoint to its end; `main` measures it."""


def resumed(out: Path, place: str, expected) -> str:
    """Resumes a run to its end and compares it with the uninterrupted one: "identical", "close" or what differs."""
    process = start(out, place, *(["--resume"] if checkpoint.steps(out) else []))
    _, errors = process.communicate(timeout=300)
    if process.returncode:
        return f"FAILED: {errors.strip()[-500:]}"
    if place == "the same devices":
        return ended_as(expected, out)
    history = last_checkpoint(out)[1]
    close = all(np.allclose(history[name], values, rtol=1e-3, atol=2e-3) for name, values in expected[1].items())
    return "close" if close else "DIFFERENT"


def ended_as(expected, out: Path) -> str:
    """Whether the last checkpoint is that of the uninterrupted run."""
    return "identical" if last_checkpoint(out) == expected else "DIFFERENT"


def kill(pids: list[int], which: int) -> None:
    """SIGKILL."""
    os.kill(pids[which], signal.SIGKILL)


def stop(pids: list[int]) -> None:
    """SIGSTOP: the process keeps its connections and says nothing."""
    os.kill(pids[1], signal.SIGSTOP)


def fill_disk(pids: list[int]) -> None:
    """From now on, the second process cannot write to any file."""
    resource.prlimit(pids[1], resource.RLIMIT_FSIZE, (0, 0))


def try_kills(root: Path, kills: int, rng: random.Random, expected) -> int:
    """Kills one process, again and again; returns the number of failures."""
    failures, took_all, saves, places = 0, [], 0, list(PLACES)
    for i in range(kills):
        out, which, place = root / str(i), rng.randrange(2), places[i % 2 and 1 + i // 2 % 2]
        took, line, status, saving = 0.0, "", 0, False
        while status == 0:  # again if the run had ended before the signal
            shutil.rmtree(out, ignore_errors=True)
            took, line, status, saving = broken(out, rng, lambda pids, which=which: kill(pids, which))
        ended = took <= LIMIT["killed"] and status == 3 and line.startswith("error") and "resume" in line
        step = checkpoint.steps(out)[-1]
        how = resumed(out, place, expected)
        failures += not ended or how not in ("identical", "close")
        took_all.append(took)
        saves += saving
        moment = "during a save" if saving else "between saves"
        print(f"kill {i + 1}: process {which} {moment}, ended after {took:.1f} s "
              f"with {line!r:.90} ({status}); resumed from step {step} on {place}: {how}", flush=True)  # fmt: skip
    print(f"{kills - failures} of {kills} as required; {saves} during a save; the processes ended after "
          f"{statistics.median(took_all):.1f} s, at most {max(took_all):.1f} s")  # fmt: skip
    return failures


def try_faults(root: Path, rng: random.Random, expected) -> int:
    """The other faults, once each; returns the number of failures."""
    failures = 0
    for name, inflict in (("stopped", stop), ("full disk", fill_disk)):
        took, line, status, _ = broken(root / name, rng, inflict)
        how = resumed(root / name, "the same devices", expected)
        good = took <= LIMIT[name] and status in (2, 3) and line.startswith("error") and how == "identical"
        failures += not good
        print(f"{name}: ended after {took:.1f} s with {line!r} ({status}); resumed: {how}", flush=True)
    return failures + try_clock_jumps(root, rng, expected)


def try_clock_jumps(root: Path, rng: random.Random, expected) -> int:
    """Moves the wall clock of each process in turn, in both directions; returns the number of failures."""
    library, clocks, failures = root / "clock_jump.so", root / "clocks", 0
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, Path(__file__).with_name("clock_jump.c")], check=True)
    clocks.mkdir()
    for which, hours in ((0, 1), (0, -1), (1, 1), (1, -1)):
        out, jumped = root / f"clock{which}{hours}", []

        def jump(pids, which=which, hours=hours, jumped=jumped, out=out):
            jumped.append(checkpoint.steps(out)[-1])
            with open(clocks / str(pids[which]), "r+b") as clock:  # which the process has mapped: never truncated
                clock.write(struct.pack("q", 3600 * hours))

        took, line, status, _ = broken(out, rng, jump, LD_PRELOAD=str(library), CLOCK_JUMP_FOLDER=str(clocks))
        said = status == 3 and line.startswith("error") and "resume" in line
        how = resumed(out, "the same devices", expected) if status else ended_as(expected, out)
        saved_later = bool(jumped) and checkpoint.steps(out)[-1] > jumped[0]  # the run had not just ended
        failures += not (saved_later and took <= LIMIT["clock jump"] and (said or status == 0) and how == "identical")
        ending = f"ended after {took:.1f} s with {line!r} ({status}); resumed: {how}" if status else f"went on: {how}"
        print(f"clock of process {which} moved by {hours:+} h: {ending}", flush=True)
    return failures


def main(argv: list[str] | None = None) -> int:
    """Prints a line for each fault; returns 1 if any ended otherwise than required."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--faults", action="store_true", help="try the other faults instead of kills")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        root, whole = Path(name), Path(name) / "whole"
        process = start(whole, "the same devices")
        while not checkpoint.steps(whole) and process.poll() is None:
            time.sleep(0.005)
        begun = time.monotonic()
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        TRAINING["seconds"] = time.monotonic() - begun
        expected = last_checkpoint(whole)
        failures = try_faults(root, rng, expected) if args.faults else try_kills(root, args.kills, rng, expected)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
