"""A short run of the readers' fuzzer, and that it sees a reader that lets something through."""

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from proofs import fuzz


def test_no_reader_lets_a_malformed_file_through_hangs_or_takes_more_memory_than_its_limit():
    """In a process of its own, whose memory it limits."""
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
