"""The operations of the soak test run, and figures that grow are told from figures that do not."""

import random

import pytest

from proofs import soak


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted({operation.__name__ for operation in soak.OPERATIONS}))
def test_each_operation_runs(name, tmp_path):
    getattr(soak, name)(random.Random(0), str(tmp_path))


def test_growth_after_the_first_tenth_is_found():
    hours = [i / 100 for i in range(101)]
    rows = [{"constant": 5, "early": min(i, 9), "late": i} for i in range(101)]
    assert soak.growth(hours, rows) == {"constant": (5, 5), "early": (9, 9), "late": (20, 100)}
