"""Real processes over loopback: they give the numbers of one device, and a run with a killed process resumes."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from fcfunc import checkpoint
from proofs import kill_and_resume, lost_processes

EXAMPLE = [sys.executable, "-m", "examples.train_distributed", "--data", "digits", "--batch-size", "64"]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow
def test_two_processes_of_four_devices_take_the_steps_of_one_device_in_every_mode(tmp_path):
    command = [sys.executable, "-m", "tests.two_processes", f"127.0.0.1:{free_port()}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen([*command, str(i), str(tmp_path)], **pipes) for i in range(2)]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    for output in outputs:
        assert len(re.findall("as on one device", output)) == 6, output
        assert "the same error in both processes" in output, output
        assert "an interrupted run: as the uninterrupted one" in output, output


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the processes in /proc")
def test_a_run_of_which_a_process_was_killed_resumes_on_other_devices(tmp_path):
    run = [*EXAMPLE, "--epochs", "30", "--out", str(tmp_path)]
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    launcher = subprocess.Popen([*run, "--processes", "2"], **pipes)
    assert launcher.stdout is not None
    assert launcher.stderr is not None
    try:
        while not (line := launcher.stdout.readline()).startswith("epoch 2/"):
            assert line, launcher.stderr.read()
        os.kill(lost_processes.workers(launcher)[1], signal.SIGKILL)
        killed = time.monotonic()
        _, errors = launcher.communicate(timeout=60)
        took = time.monotonic() - killed
    finally:
        launcher.kill()
    assert launcher.returncode == 3
    assert errors.strip().splitlines()[-1] == "error: lost process 1 (SIGKILL); continue with --resume"
    assert took < 30  # as docs/guides/multiple-devices.md promises; an idle machine takes a second
    env.pop("XLA_FLAGS")
    resumed = subprocess.run([*run, "--resume"], capture_output=True, text=True, env=env, timeout=240)
    assert resumed.returncode == 0, resumed.stderr
    assert re.search(r"resumes from step \d+", resumed.stdout)
    assert float(resumed.stdout.rpartition("test accuracy ")[2]) > 0.95
    again = subprocess.run(run, capture_output=True, text=True, env=env, timeout=240)
    assert again.returncode == 2
    assert re.fullmatch(r"error: --out .*: holds checkpoints; use --resume, or choose .*\n", again.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_saves_within_the_epoch_and_ends_with_a_status_of_its_own(tmp_path, processes):
    run = [*EXAMPLE, "--epochs", "2000", "--save-every", "3", "--out", str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*run, "--processes", str(processes)], **pipes)
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        while not (line := process.stdout.readline()).startswith("epoch 1/"):
            assert line, process.stderr.read()
        process.terminate()
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 4, errors
    said = re.search(r"^terminated; saved at step (\d+), resume with --resume$", errors, re.MULTILINE)
    assert said, errors
    assert int(said[1]) == checkpoint.steps(tmp_path)[-1]


@pytest.mark.slow
def test_runs_killed_at_random_moments_resume_to_the_same_bits(capfd):
    assert kill_and_resume.main(["--kills", "2", "--at-once", "2"]) == 0
    assert "2 of 2 resumed runs end bit-for-bit identical to the uninterrupted run" in capfd.readouterr().out
