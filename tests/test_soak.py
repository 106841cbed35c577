"""The operations of the soak test run, and figures that grow are told from figures that do not."""

import ctypes
import random
import sys

import pytest

from proofs import soak


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted({operation.__name__ for operation in soak.OPERATIONS}))
def test_each_operation_runs(name, tmp_path):
    getattr(soak, name)(random.Random(0), str(tmp_path))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks the GNU C library")
def test_allocated_memory_is_what_was_asked_for_and_not_freed():
    before = soak.allocated()
    for size, count in ((2_000, 5_000), (10_000_000, 1)):
        held = [ctypes.create_string_buffer(size) for _ in range(count)]
        assert soak.allocated() - before == pytest.approx(size * count, rel=0.2)
        del held
        assert soak.allocated() - before < 0.2 * size * count


def test_growth_after_the_first_tenth_is_found():
    hours = [i / 100 for i in range(101)]
    rows = [{"constant": 5, "early": min(i, 9), "late": i} for i in range(101)]
    assert soak.growth(hours, rows) == {"constant": (5, 5), "early": (9, 9), "late": (20, 100)}
