"""Runs scikit-learn's own tests of its multilayer perceptrons on ours."""

import unittest.mock

import pytest
import sklearn.neural_network

import fcfunc.sklearn

OURS = {"MLPClassifier": fcfunc.sklearn.MLPClassifier, "MLPRegressor": fcfunc.sklearn.MLPRegressor}

PRIVATE = {
    "test_gradient": "calls _loss_grad_lbfgs",
    "test_learning_rate_warmstart": "reads _optimizer.learning_rate",
    "test_adaptive_learning_rate": "reads _optimizer.learning_rate",
}
"""Tests that use private attributes, and which ones. tests/test_sklearn.py covers the same behavior."""

with unittest.mock.patch.multiple(sklearn.neural_network, **OURS):
    from sklearn.neural_network.tests import test_mlp

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def global_random_seed():
    return 42


globals().update({n: f for n, f in vars(test_mlp).items() if n.startswith("test_") and n not in PRIVATE})


def test_only_tests_of_private_attributes_are_left_out():
    assert all(name in vars(test_mlp) for name in PRIVATE)
