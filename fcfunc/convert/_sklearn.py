"""scikit-learn: `MLPClassifier` and `MLPRegressor`."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from fcfunc._arguments import library
from fcfunc.convert._layers import Activation, Affine, layers_of, network_of
from fcfunc.network import Network

ACTIVATIONS = {
    "identity": None,
    "logistic": "sigmoid",
    "relu": "relu",
    "softmax": "softmax",
    "tanh": "tanh",
    "exp": jnp.exp,
}
"""scikit-learn's activations, including those of the outputs, and their names in this library."""


def from_sklearn(estimator: Any) -> tuple[Network, list, Any]:
    """Converts a fitted `MLPClassifier` or `MLPRegressor` to a network.

    Args:
      estimator: an estimator of scikit-learn or of `fcfunc.sklearn`.

    Returns:
      `(net, params, state)`; the state is empty for scikit-learn's estimators. The outputs are those of `predict_proba`
      (for two classes, the probability of the second) or of a regressor's `predict`. For losses of logits, remove the
      last activation with `dataclasses.replace(net, final_activation=None)`.

    Raises:
      TypeError: `estimator` is not such an estimator, or is not fitted.
      ImportError: scikit-learn is not installed.

    Example:
      >>> from sklearn.datasets import load_iris
      >>> from sklearn.neural_network import MLPClassifier
      >>> X, y = load_iris(return_X_y=True)
      >>> net, params, state = from_sklearn(MLPClassifier((4,), solver="lbfgs", tol=0.1, random_state=0).fit(X, y))
      >>> net.dims, net.final_activation
      ((4, 4, 3), 'softmax')
    """
    networks = library("from_sklearn", "scikit-learn", "sklearn.neural_network").neural_network
    known = isinstance(estimator, networks.MLPClassifier | networks.MLPRegressor) or hasattr(estimator, "to_network")
    if not known or not hasattr(estimator, "coefs_"):
        kind = type(estimator).__name__
        raise TypeError(f"from_sklearn: estimator must be a fitted MLPClassifier or MLPRegressor, got {kind}")
    if hasattr(estimator, "to_network"):
        return estimator.to_network()
    layers: list[Any] = []
    activations = [estimator.activation] * (len(estimator.coefs_) - 1) + [estimator.out_activation_]
    for i, (w, b, name) in enumerate(zip(estimator.coefs_, estimator.intercepts_, activations, strict=True)):
        layers += [Affine(f"layer {i}", w, b), Activation(f"layer {i}", ACTIVATIONS[name])]
    return network_of("from_sklearn", layers)


def to_sklearn(net: Network, params: list, *, classes: Any = None) -> Any:
    """Converts a network to a fitted scikit-learn estimator.

    Args:
      net, params: a network without norms and dropout, and its parameters, stacked or not. Its outputs are logits (a
        single one for two classes) or the numbers of a regression.
      classes: the class labels in ascending order, one per output, or two for a single output; None makes a regressor.

    Returns:
      A `sklearn.neural_network.MLPClassifier` or `MLPRegressor`.

    Raises:
      ValueError: scikit-learn cannot represent the network, or `classes` does not match its outputs.
      ImportError: scikit-learn is not installed.

    Example:
      >>> import fcfunc, jax
      >>> net = fcfunc.mlp([4, 8, 3])
      >>> model = to_sklearn(net, net.init(jax.random.key(0)), classes=["a", "b", "c"])
      >>> model.predict_proba(np.ones((5, 4))).shape
      (5, 3)
    """
    where = "to_sklearn"
    sklearn = library(where, "scikit-learn", "sklearn.neural_network", "sklearn.preprocessing")
    networks = sklearn.neural_network
    blocks = layers_of(where, net, params, ())
    if net.norm is not None or net.dropout_rate:
        raise ValueError(f"{where}: scikit-learn has neither norms nor dropout, got {net.norm or net.dropout_rate}")
    names = {value: name for name, value in ACTIVATIONS.items() if name not in ("softmax", "exp")}
    used = {block.activation for block in blocks[:-1]} or {None}
    if len(used) > 1 or not used <= names.keys():
        raise ValueError(f"{where}: all hidden layers must use one of {', '.join(names.values())}, got {used!s:.60}")
    outputs, final = net.dims[-1], net.final_activation
    if classes is None:
        expected, out = (None,), "identity"
    else:
        expected, out = ((None, "softmax"), "softmax") if outputs > 1 else ((None, "sigmoid"), "logistic")
        if len(classes) != max(outputs, 2):
            raise ValueError(f"{where}: classes must have {max(outputs, 2)} entries, got {len(classes)}")
    if final not in expected:
        raise ValueError(f"{where}: final_activation must be {' or '.join(map(str, expected))}, got {final!r:.60}")
    kind = networks.MLPRegressor if classes is None else networks.MLPClassifier
    model = kind(net.dims[1:-1], activation=names[used.pop()])
    model.coefs_ = [np.array(block.affine.w) for block in blocks]  # writable
    zeros = [np.zeros(block.affine.w.shape[1], block.affine.w.dtype) for block in blocks]
    model.intercepts_ = [
        z if block.affine.b is None else np.array(block.affine.b) for block, z in zip(blocks, zeros, strict=True)
    ]
    model.n_layers_, model.n_outputs_, model.out_activation_ = len(net.dims), outputs, out
    model.n_features_in_, model.n_iter_, model.t_ = net.dims[0], 0, 0
    model.loss_curve_, model.best_loss_, model._no_improvement_count = [], np.inf, 0  # for partial_fit
    if classes is not None:
        model._label_binarizer = sklearn.preprocessing.LabelBinarizer().fit(np.asarray(classes))
        model.classes_ = model._label_binarizer.classes_
        if list(model.classes_) != list(classes):
            raise ValueError(f"{where}: classes must be in ascending order, got {classes!s:.80}")
    return model
