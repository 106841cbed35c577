"""A short run of the fuzzer for the readers, and a test that it detects a reader that lets something through."""

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from proofs import fuzz, fuzz_coverage


def test_malformed_files_are_refused_within_the_limits_of_memory_and_time():
    """Runs in a separate process with limited memory."""
    command = [sys.executable, "-m", "proofs.fuzz", "--files", "1500", "--seed", "7"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert result.returncode == 0, result.stdout + result.stderr
    counts = [line.split() for line in result.stdout.splitlines()]
    assert [words[0] for words in counts] == ["idx:", "gzip:", "npz:", "csv:", "safetensors:"]
    assert all(int(words[1]) > 10 and int(words[3]) > 900 and words[5] == "0" for words in counts), result.stdout


def too_large(path):
    return np.zeros(fuzz.LIMIT)


def unnamed(path):
    raise ValueError("something is wrong")


def other_error(path):
    raise KeyError("descr")


def no_memory(path):
    raise MemoryError


@pytest.mark.parametrize(
    ("reader", "found"),
    [
        (too_large, "returned"),
        (unnamed, "names no file"),
        (other_error, "KeyError"),
        (no_memory, "MemoryError"),
        (lambda path: [], "read"),
    ],
)
def test_the_fuzzer_tells_each_kind_of_failure(reader, found, tmp_path):
    assert found in fuzz.outcome(reader, tmp_path / "file")


def test_the_malformed_files_are_of_many_kinds():

    rng, made = random.Random(0), Counter()
    for _ in range(300):
        made.update({make(rng)[:4] for make, _ in fuzz.READERS.values()})
    assert len(made) > 100


@pytest.mark.slow
def test_the_guided_fuzzer_finds_no_file_that_is_misread():
    pytest.importorskip("atheris")
    command = [sys.executable, "-m", "proofs.fuzz_coverage", "--minutes", "0.08"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("none misread") == len(fuzz_coverage.kinds())


def test_the_guided_fuzzer_tells_a_file_that_is_misread(tmp_path):
    """A reader that ignores one bit of a file without a checksum, and one that returns half of the elements."""
    kind = fuzz_coverage.kinds()["idx"]
    content = bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9])
    path = tmp_path / "file"
    assert fuzz_coverage.outcome("idx", kind, content, path) == "read"
    for wrong in (lambda a: a & 0xFE, lambda a: a[:1], lambda a: a.reshape(1, -1)):
        bad = kind._replace(read=lambda path, wrong=wrong: {"": wrong(kind.read(path)[""])})
        with pytest.raises(AssertionError, match="instead of"):
            fuzz_coverage.outcome("idx", bad, content, path)
