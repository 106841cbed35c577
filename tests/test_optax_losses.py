"""Runs the loss tests of the installed Optax package on the losses of fcfunc."""

import functools
import re
import unittest
from typing import Any

import jax
import pytest

from fcfunc import losses
from tests.rules import slow

classification = pytest.importorskip("optax.losses._classification_test", reason="this optax comes without its tests")
regression = pytest.importorskip("optax.losses._regression_test")

CLASSES = [
    classification.SoftmaxCrossEntropyTest,
    classification.SafeSoftmaxCrossEntropyTest,
    classification.SoftmaxCrossEntropyWithIntegerLabelsTest,
    classification.SigmoidCrossEntropyTest,
    classification.SigmoidFocalLossTest,
    classification.PolyLossTest,
    regression.SquaredErrorTest,
    regression.L2LossTest,
]
CASES: list[Any] = [case for cls in CLASSES for case in unittest.defaultTestLoader.loadTestsFromTestCase(cls)]
REPLACED = {
    classification._classification: {
        "softmax_cross_entropy": losses.softmax_cross_entropy,
        "safe_softmax_cross_entropy": losses.softmax_cross_entropy,
        "softmax_cross_entropy_with_integer_labels": losses.softmax_cross_entropy_with_integer_labels,
        "sigmoid_binary_cross_entropy": losses.sigmoid_binary_cross_entropy,
    },
    regression._regression: {"squared_error": losses.squared_error},
}


@pytest.mark.parametrize(
    "case",
    [slow(case) if re.search("PolyLoss|Focal|test_axes", case.id()) else case for case in CASES],
    ids=[case.id().removeprefix("optax.losses.") for case in CASES],
)
@pytest.mark.filterwarnings("default")  # Optax's tests pass float64 arrays to JAX, which warns
def test_it_passes_with_the_losses_of_fcfunc(case, monkeypatch):
    for module, functions in REPLACED.items():
        for name, function in functions.items():
            monkeypatch.setattr(module, name, function)
    # check_grads also tests forward mode by default, which custom_vjp functions do not support.
    check_grads = functools.partial(classification.jaxtest.check_grads, modes=["rev"])
    monkeypatch.setattr(classification.jaxtest, "check_grads", check_grads)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        result = case.run()
    assert not result.skipped
    assert result.wasSuccessful(), "".join(text for _, text in result.errors + result.failures)


def test_they_are_the_78_tests_of_the_losses_that_fcfunc_has():
    assert len(CASES) >= 78
