"""Hostile inputs give the right result, NaN in loss and gradient, or an error: docs/background/hostile-inputs.md."""

from pathlib import Path

import numpy as np
import pytest

from proofs import hostile_inputs as hostile
from tests.rules import slow

PAGE = (Path(__file__).parents[1] / "docs" / "background" / "hostile-inputs.md").read_text()


@pytest.mark.parametrize(
    "row",
    [row if row.operation == "cross-entropy" else slow(row) for row in hostile.ROWS],
    ids=[f"{row.operation}: {row.title}" for row in hostile.ROWS],
)
def test_a_hostile_input_gives_what_the_page_says(row):
    found = hostile.ours(row)
    assert found in ("right", "NaN and NaN", "TypeError", "ValueError")
    assert f"| {row.title} | {row.operation} | {found} |" in PAGE


def test_the_judge_sees_a_finite_wrong_gradient_and_a_nan_that_stands_in_another_row():
    row = hostile.Row("", "cross-entropy", (hostile.LOGITS, hostile.LABELS))
    loss, grad = map(np.asarray, hostile.cross_entropy_truth(*row.args))
    judge = lambda loss, grad, row=row: hostile.outcome(lambda *_: (np.float32(loss), np.float32(grad)), row)
    assert judge(loss, grad) == "right"
    assert judge(loss, grad * 1.001) == "wrong: loss 2.083, gradient finite"
    assert judge(loss * [1, 1.001, 1], grad) == "wrong: loss 1.228, gradient finite"
    nan_loss, nan_grad = loss.copy(), grad.copy()
    nan_loss[1], nan_grad[1] = np.nan, np.nan
    assert judge(nan_loss, nan_grad) == "wrong: loss nan, gradient not finite"
    impossible = row._replace(args=(hostile.LOGITS, hostile._labels(-1)))
    assert judge(nan_loss, nan_grad, impossible) == "NaN and NaN"
    assert judge(nan_loss, grad, impossible) == "wrong: loss nan, gradient finite"
    assert judge(nan_loss, nan_grad[[1, 0, 2]], impossible).startswith("wrong")
    assert judge(nan_loss * [7, 1, 1], nan_grad, impossible).startswith("wrong: loss 14")
    assert judge(loss, grad, row._replace(truth=hostile.UNDEFINED)) == "wrong: no error, loss [3]"
