"""scikit-learn estimators: `MLPClassifier` and `MLPRegressor`, built on `fcfunc.mlp`, `train.fit` and the losses.

They accept the parameters of scikit-learn's estimators of the same names, start from the same weights, and minimize the
same loss. They add norms, dropout, residual connections, class weights and any optax optimizer. As in scikit-learn,
float64 input is trained in float64; float32 input is faster. Numerical hyperparameters are arguments of the compiled
program, so a search over them compiles once.
"""

import contextlib
import dataclasses
import functools
import math
import numbers
import os
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
import scipy.sparse
from jax.flatten_util import ravel_pytree
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import accuracy_score, r2_score
from sklearn.model_selection import train_test_split
from sklearn.utils import check_random_state, column_or_1d
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets, type_of_target, unique_labels
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from fcfunc import _arguments, losses, network, ops, params_file, train
from fcfunc.network import NORMS, Network

__all__ = ["MLPClassifier", "MLPRegressor"]

ACTIVATIONS = {"identity": "linear", "logistic": "sigmoid"}
"""scikit-learn's names of activations that have a different name in this library."""

SMALLEST_RATE = 1e-6
"""The adaptive learning rate at which training stops instead of reducing it further."""

ROWS = 4096
"""The maximum number of rows per call of the network in predictions."""

OF_ROWS = {
    "softmax": losses.softmax_cross_entropy_with_integer_labels,
    "logistic": lambda outputs, y: jnp.sum(losses.sigmoid_binary_cross_entropy(outputs, y), axis=-1),
    "identity": lambda outputs, y: 0.5 * jnp.sum(losses.squared_error(outputs, y), axis=-1),
    "exp": lambda outputs, y: jnp.sum(jnp.exp(outputs) - y * outputs, axis=-1),
}
"""The loss of each row by the output activation; `exp` is Poisson regression, up to a constant."""

OUTPUTS = {"softmax": ops.softmax, "logistic": ops.sigmoid, "identity": lambda z: z, "exp": jnp.exp}


class _MLP(BaseEstimator):
    """The code shared by the two estimators."""

    # Defaults for an estimator whose coefs_ and intercepts_ were set by hand.
    _norm_params: Any = ()
    _norm_state: Any = ()
    _opt_state: Any = None
    _steps = 0
    _no_improvement_count = 0
    _multilabel = False

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def fit(self, X, y, sample_weight=None):
        """Trains the network, from new weights unless `warm_start`.

        Args:
          X: the inputs, `[n, features]`: an array, a DataFrame or a sparse matrix, which is converted to a dense array.
          y: the targets, `[n]` or `[n, outputs]`.
          sample_weight: the weight of each example, `[n]`; None means 1.

        Returns:
          The estimator.

        Raises:
          ValueError: a parameter is out of range, X and y do not match, or training diverges.
        """
        return self._fit(X, y, sample_weight, incremental=False)

    def save(self, path: str | os.PathLike) -> None:
        """Saves a fitted estimator to a safetensors file without pickle; `load` reads it.

        The optimizer state, and parameters that are not plain data, such as an optax optimizer or a function, are not
        saved. Further training starts with a new optimizer state.

        Args:
          path: the file to write, by convention `*.safetensors`.

        Raises:
          NotFittedError: the estimator is not fitted.
          TypeError: the activation is a function, or the classes are not strings, numbers or booleans.
          ImportError: safetensors is not installed.
          OSError: the file cannot be written.
        """
        check_is_fitted(self)
        given = {name: _plain(value) for name, value in self.get_params().items()}
        options = {name: value for name, value in given.items() if value is not NotImplemented}
        if "activation" not in options:
            raise TypeError(
                f"save: the activation {self.activation!r:.60} is a function, which cannot be saved; use a name"
            )
        fitted = {name: getattr(self, name) for name in FITTED if hasattr(self, name)}
        config = {"estimator": type(self).__name__, "options": options, "fitted": fitted}
        arrays: dict[str, Any] = {"params": self._params()}
        named = {"norm_state": self._norm_state, "loss_curve": self.loss_curve_, "scores": self.validation_scores_}
        arrays |= {name: np.asarray(a) if name != "norm_state" else a for name, a in named.items() if a}
        classes = getattr(self, "classes_", None)
        if classes is not None and classes.dtype.kind in "OU":
            if not all(isinstance(name, str) for name in classes):
                raise TypeError(f"save: classes must be strings, numbers or booleans, got {classes!s:.80}")
            config |= {"classes": classes.tolist(), "classes_are_objects": classes.dtype == object}
        elif classes is not None:
            arrays["classes"] = classes
        if hasattr(self, "feature_names_in_"):
            config["feature_names"] = self.feature_names_in_.tolist()
        params_file.save(path, arrays, config=config)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Any":
        """Loads an estimator that `save` wrote.

        Args:
          path: the file to read.

        Returns:
          The fitted estimator.

        Raises:
          ImportError: safetensors is not installed.
          FileNotFoundError: the file does not exist.
          ValueError: the file is damaged, or was not written by this class's `save`.
        """
        with jax.enable_x64(True):  # keep float64
            arrays, config = params_file.load(path)
        if not isinstance(config, dict) or config.get("estimator") != cls.__name__:
            found = config.get("estimator") if isinstance(config, dict) else None
            raise ValueError(f"{path}: expected a fitted {cls.__name__}, got {found or 'a different kind of file'}")
        options = config["options"].items()
        estimator = cls(**{name: _given(value) for name, value in options})
        for name, value in config["fitted"].items():
            setattr(estimator, name, value)
        arrays = jax.device_get(arrays)
        estimator._store(arrays["params"], arrays.get("norm_state", []))
        losses_, scores = (list(map(float, arrays.get(name, ()))) for name in ("loss_curve", "scores"))
        estimator.loss_curve_, estimator.validation_scores_ = losses_, scores if estimator.early_stopping else None
        estimator.best_loss_ = None if estimator.early_stopping else min(losses_, default=math.inf)
        estimator.best_validation_score_ = max(scores, default=-math.inf) if estimator.early_stopping else None
        if "classes" in config or "classes" in arrays:
            dtype = object if config.get("classes_are_objects") else None
            estimator.classes_ = np.asarray(config.get("classes", arrays.get("classes")), dtype)
        if "feature_names" in config:
            estimator.feature_names_in_ = np.asarray(config["feature_names"], object)
        return estimator

    def to_network(self) -> tuple[Network, list, Any]:
        """Returns the fitted network for use with the rest of fcfunc.

        Returns:
          `(net, params, state)`, as `fcfunc.convert.from_sklearn` returns it. The outputs of the network are those of
          `predict_proba` (for two classes, the probability of the second) or of a regressor's `predict`.

        Raises:
          NotFittedError: the estimator is not fitted.
        """
        check_is_fitted(self)
        final = {"softmax": "softmax", "logistic": "sigmoid", "identity": None, "exp": jnp.exp}[self.out_activation_]
        net = dataclasses.replace(self._network(self.n_features_in_), final_activation=final)
        with _precision(self.coefs_[0].dtype):
            return net, *jax.tree.map(jnp.asarray, (self._params(), self._norm_state or ()))

    def _fit(self, X, y, sample_weight, *, incremental):
        self._check_parameters()
        first = not hasattr(self, "coefs_") or not (self.warm_start or incremental)
        X, y, weights = self._validated(X, y, sample_weight, incremental, first)
        if not first:
            X = X.astype(self.coefs_[0].dtype)
        rng = check_random_state(self.random_state)
        with _precision(X.dtype):
            if first:
                self._initialize(X, y, rng)
            data = {"x": _dense(X), "y": y} | ({} if weights is None else {"weights": weights.astype(X.dtype)})
            if self._by_lbfgs():
                self._minimize(data)
            else:
                self._train(data, rng, incremental)
        leaves = jax.tree.leaves(self._params())
        if not all(np.isfinite(leaf).all() for leaf in leaves):
            raise ValueError(NOT_FINITE)
        return self

    def _initialize(self, X, y, rng):
        """Draws the same weights as scikit-learn and resets the training record."""
        self.out_activation_ = self._out_activation()
        self.n_outputs_ = len(self.classes_) if self.out_activation_ == "softmax" else y.shape[1]
        self.coefs_, self.intercepts_, self._norm_params, self._norm_state = [], [], [], []
        net = self._network(X.shape[1])
        self.n_layers_, self.n_iter_, self.t_ = len(net.dims), 0, 0
        for fan_in, fan_out in zip(net.dims, net.dims[1:], strict=False):
            bound = math.sqrt((2 if self.activation == "logistic" else 6) / (fan_in + fan_out))
            self.coefs_.append(rng.uniform(-bound, bound, (fan_in, fan_out)).astype(X.dtype))
            self.intercepts_.append(rng.uniform(-bound, bound, fan_out).astype(X.dtype))
        if net.norm is not None:
            fills = {"scale": np.ones, "offset": np.zeros}
            names = NORMS[net.norm]
            self._norm_params = [{name: fills[name](width, X.dtype) for name in names} for width in net.dims[1:-1]]
        if net.norm == "batch_norm":
            self._norm_state = jax.device_get(net.init_batch_norm_state(self._params()))
        self._opt_state, self._steps = None, 0
        self.loss_curve_, self._no_improvement_count = [], 0
        self.validation_scores_ = [] if self.early_stopping else None
        self.best_validation_score_ = -math.inf if self.early_stopping else None
        self.best_loss_ = None if self.early_stopping else math.inf

    def _train(self, data, rng, incremental):
        """Runs epochs of an optimizer, with scikit-learn's stopping rules."""
        if incremental and self.early_stopping:
            raise ValueError("partial_fit does not support early_stopping=True")
        net = self._network(data["x"].shape[1])
        held_out = None
        if self.early_stopping:
            data, held_out = self._split(data, rng)
        # Drawn after the split, so that the split is the same as scikit-learn's.
        key = jax.random.key(int(rng.randint(2**31)))
        n = len(data["x"])
        batch_size = min(200, n) if self.batch_size == "auto" else self.batch_size
        if self.norm == "batch_norm" and self.batch_size == "auto":  # a batch of 1 example has no variance
            batch_size = next((size for size in range(batch_size, 1, -1) if n % size != 1), batch_size)
        batch_size = _arguments.fitting_batch_size(type(self).__name__, batch_size, n)
        if self.norm == "batch_norm" and (n % batch_size == 1 or n == 1):
            raise ValueError(
                f"batch normalization needs at least 2 rows in each batch, but with {n} examples the last batch has 1"
            )
        epochs = 1 if incremental else self.max_iter
        steps = train.num_steps(n, epochs=1, batch_size=batch_size)
        optimizer, hyperparams = self._make_optimizer(n, steps, incremental)
        carried = {"alpha": np.asarray(self.alpha, data["x"].dtype), "norm": self._norm_state}
        state = _initial_state(optimizer)(self._params(), key, carried)
        if incremental and self._opt_state is not None:
            state = state._replace(opt_state=self._opt_state, step=jnp.int32(self._steps))
            if self._adapts():
                del hyperparams["learning_rate"]
        for name, value in hyperparams.items():
            old = state.opt_state.hyperparams
            old[name] = jnp.asarray(value, old[name].dtype)
        best, done, slower = None, False, False
        if not incremental:
            self.n_iter_ = 0

        def on_epoch(state, record):
            nonlocal best, done, slower
            self.n_iter_ += 1
            self.t_ += n
            self.loss_ = record["loss"]
            self.loss_curve_.append(self.loss_)
            if self.verbose:
                print(f"Iteration {self.n_iter_}, loss = {self.loss_:.8f}")
            if held_out is None:
                worse = self.loss_ > self.best_loss_ - self.tol
                self.best_loss_ = min(self.best_loss_, self.loss_)
            else:
                score = self._held_out_score(net, state, held_out)
                worse = score < self.best_validation_score_ + self.tol
                if score > self.best_validation_score_:
                    self.best_validation_score_, best = score, (state.params, state.model_state)
            self._no_improvement_count = self._no_improvement_count + 1 if worse else 0
            if self._no_improvement_count > self.n_iter_no_change:
                slower = self._adapts() and float(state.opt_state.hyperparams["learning_rate"]) > SMALLEST_RATE
                done = not slower
                if done and self.verbose:
                    what = "Training loss" if held_out is None else "Validation score"
                    print(
                        f"{what} did not improve more than tol={self.tol} for {self.n_iter_no_change} epochs. Stopping."
                    )
                return True
            return None

        objective = _objective(net, self.out_activation_)
        options = {"batch_size": batch_size, "shuffle": self.shuffle, "on_epoch": on_epoch}
        diverged, first_epoch = None, self.n_iter_
        while not done and self.n_iter_ - first_epoch < epochs:
            left = epochs - (self.n_iter_ - first_epoch)
            try:
                state, _ = train.fit(objective, optimizer, state, data, epochs=left, **options)
            except train.NonFiniteError as error:
                diverged = error
                break
            if slower:
                hyperparams = state.opt_state.hyperparams  # type: ignore[attr-defined]
                hyperparams["learning_rate"] = hyperparams["learning_rate"] / 5
                slower, self._no_improvement_count = False, 0
        if diverged is not None:
            if best is None:
                raise ValueError(f"{NOT_FINITE} ({diverged!s:.200})") from None
            warnings.warn(
                f"Training diverged; keeping the best epoch. ({diverged!s:.200})", ConvergenceWarning, stacklevel=4
            )
            self.validation_scores_.append(math.nan)
        elif not done and not incremental:
            reached = f"Maximum iterations ({self.max_iter}) reached and the optimization hasn't converged yet."
            warnings.warn(f"Stochastic Optimizer: {reached}", ConvergenceWarning, stacklevel=4)
        params, carried = (state.params, state.model_state) if best is None else best
        self._opt_state, self._steps = jax.device_get(state.opt_state), int(state.step)
        self._store(*jax.device_get((params, carried["norm"])))

    def _split(self, data, rng):
        """Splits the data into training and validation examples, stratified by class."""
        n = len(data["x"])
        options = {"test_size": self.validation_fraction, "random_state": rng}
        if isinstance(self, ClassifierMixin) and not self._multilabel:
            labels = data["y"].ravel()
            # Of two classes, both must be in both parts, as in scikit-learn, which does not stratify more than two.
            if len(self.classes_) <= 2 or np.min(np.unique(labels, return_counts=True)[1]) > 1:
                options["stratify"] = data["y"]
        kept, held = train_test_split(np.arange(n), **options)
        if len(held) < 2:
            raise ValueError(
                f"The validation set is too small, {len(held)} of {n} examples. Increase 'validation_fraction' or the "
                "size of your dataset."
            )
        return tuple({name: a[rows] for name, a in data.items()} for rows in (kept, held))

    def _held_out_score(self, net, state, held_out):
        """The score of the held-out examples, which is appended to the record; NaN for non-finite outputs."""
        outputs = _outputs(net, self.out_activation_, state.params, state.model_state["norm"], held_out["x"])
        outputs = np.asarray(outputs)
        score = math.nan
        if np.isfinite(outputs).all():
            score = self._score(held_out["y"], outputs, held_out.get("weights"))
        self.validation_scores_.append(float(score))
        if self.verbose:
            print(f"Validation score: {score:f}")
        return float(score)

    def _minimize(self, data):
        """Runs SciPy's L-BFGS-B on all examples."""
        if self.norm == "batch_norm" or self.dropout_rate:
            raise ValueError("solver='lbfgs' supports neither norm='batch_norm' nor a dropout_rate")
        net, params = self._network(data["x"].shape[1]), self._params()
        value_and_grad = _value_and_grad(net, self.out_activation_)
        data = jax.tree.map(jnp.asarray, data)
        carried = {"alpha": np.asarray(self.alpha, data["x"].dtype), "norm": []}
        _, unravel = ravel_pytree(params)
        dtype = data["x"].dtype

        def objective(theta):
            value, gradient = value_and_grad(unravel(jnp.asarray(theta, dtype)), data, carried)
            return float(value), np.asarray(ravel_pytree(gradient)[0], np.float64)

        start = np.asarray(ravel_pytree(params)[0], np.float64)
        options = {"maxfun": self.max_fun, "maxiter": self.max_iter, "gtol": self.tol}
        found = scipy.optimize.minimize(objective, start, method="L-BFGS-B", jac=True, options=options)
        if found.status != 0:
            message = f"lbfgs failed to converge after {found.nit} iterations (status={found.status}): {found.message}"
            warnings.warn(message, ConvergenceWarning, stacklevel=4)
        self.n_iter_, self.loss_ = min(int(found.nit), self.max_iter), float(found.fun)
        self._store(jax.device_get(unravel(jnp.asarray(found.x, dtype))), [])

    def _forward(self, X) -> np.ndarray:
        """The activated outputs of rows, in the dtype of the weights."""
        check_is_fitted(self)
        X = validate_data(self, X, accept_sparse="csr", dtype=(np.float64, np.float32), reset=False)
        dtype = self.coefs_[0].dtype
        net, params = self._network(X.shape[1]), self._params()
        # Pad to a power of two, so that few programs are compiled for many numbers of rows.
        size, parts = min(ROWS, 1 << (X.shape[0] - 1).bit_length()), []
        with _precision(dtype):
            for first in range(0, X.shape[0], size):
                rows = _dense(X[first : first + size]).astype(dtype)
                padded = np.zeros((size, X.shape[1]), dtype)
                padded[: len(rows)] = rows
                outputs = _outputs(net, self.out_activation_, params, self._norm_state, padded)
                parts.append(np.asarray(outputs)[: len(rows)])
        return np.concatenate(parts)

    def _network(self, features: int) -> Network:
        hidden, activation = self.hidden_layer_sizes, self.activation
        widths = [int(w) for w in (hidden if np.iterable(hidden) else [hidden])]
        return network.mlp(
            [features, *widths, self.n_outputs_],
            activation=ACTIVATIONS.get(activation, activation) if isinstance(activation, str) else activation,
            norm=self.norm if widths else None,
            dropout_rate=self.dropout_rate,
            residual=self.residual,
        )

    def _params(self) -> list[dict[str, np.ndarray]]:
        norms = [*self._norm_params, {}] if self._norm_params else [{}] * len(self.coefs_)
        return [{"w": w, "b": b, **p} for w, b, p in zip(self.coefs_, self.intercepts_, norms, strict=True)]

    def _store(self, params, norm_state):
        self.coefs_, self.intercepts_ = [p["w"] for p in params], [p["b"] for p in params]
        self._norm_params = [{k: a for k, a in p.items() if k not in "wb"} for p in params[:-1]] if self.norm else []
        self._norm_state = norm_state

    def _by_lbfgs(self) -> bool:
        return self.solver == "lbfgs" and self.optimizer is None

    def _adapts(self) -> bool:
        return self.solver == "sgd" and self.learning_rate == "adaptive" and self.optimizer is None

    def _make_optimizer(self, n: int, steps: int, incremental: bool) -> tuple[optax.GradientTransformation, dict]:
        """The optimizer and the hyperparameters that its state contains."""
        given = self.optimizer
        if given is not None:
            return (given if isinstance(given, tuple) else given()), {}
        rate = {"learning_rate": self.learning_rate_init}
        if self.solver == "adam":
            return _adam(), rate | {"b1": self.beta_1, "b2": self.beta_2, "eps": self.epsilon}
        rate["momentum"] = self.momentum
        nesterov = bool(self.nesterovs_momentum and self.momentum > 0)
        if self.learning_rate != "invscaling":
            return _sgd(nesterov), rate
        falling = {"power": self.power_t, "seen": self.t_, "examples": 0 if incremental else n, "steps": steps}
        return _falling_sgd(nesterov), rate | falling

    def _check_parameters(self):
        """Raises ValueError if a parameter is out of range; `fcfunc.mlp` checks those of the network."""
        positive = ("learning_rate_init", "epsilon")
        for name in ("alpha", "power_t", "tol", *positive):
            value = getattr(self, name)
            if not isinstance(value, numbers.Real) or not 0 <= value < math.inf or (name in positive and value == 0):
                raise ValueError(
                    f"{name} must be a number {'above' if name in positive else 'of at least'} 0, got {value!r}"
                )
        for name in ("momentum", "validation_fraction", "beta_1", "beta_2"):
            value = getattr(self, name)
            closed = name == "momentum"
            if not isinstance(value, numbers.Real) or not (0 <= value < 1 or (closed and value == 1)):
                raise ValueError(f"{name} must be in [0, 1{']' if closed else ')'}, got {value!r}")
        counts = {name: getattr(self, name) for name in ("max_iter", "max_fun", "n_iter_no_change", "batch_size")}
        for name, value in counts.items():
            free = {"n_iter_no_change": math.inf, "batch_size": "auto"}.get(name)
            if not (isinstance(value, numbers.Integral) and value >= 1) and not (free is not None and value == free):
                raise ValueError(
                    f"{name} must be an integer of at least 1{f' or {free!r}' if free else ''}, got {value!r}"
                )
        if self.optimizer is not None and not (callable(self.optimizer) or hasattr(self.optimizer, "update")):
            raise ValueError(
                f"optimizer must be an optax optimizer or a function that returns one, got {self.optimizer!r:.60}"
            )
        hidden = self.hidden_layer_sizes
        if isinstance(hidden, str) or not all(isinstance(w, numbers.Integral) for w in np.ravel(np.asarray(hidden))):
            raise ValueError(f"hidden_layer_sizes must be integers, got {hidden!r:.60}")
        if min(hidden if np.iterable(hidden) else [hidden], default=1) <= 0:
            raise ValueError(f"hidden_layer_sizes must be > 0, got {hidden!r}")
        known = {"solver": ("lbfgs", "sgd", "adam"), "learning_rate": ("constant", "invscaling", "adaptive")}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {', '.join(values)}, got {getattr(self, name)!r}")


class MLPClassifier(ClassifierMixin, _MLP):
    """A multilayer perceptron classifier, trained by cross-entropy on two or more classes or on multilabel targets.

    It has the parameters, defaults and initial weights of scikit-learn's `MLPClassifier`, and the following parameters
    in addition.

    Args:
      activation: a name from scikit-learn, or any activation of `fcfunc.mlp`: "gelu", ("leaky_relu", 0.2), a function.
      optimizer: an optax optimizer that replaces `solver`, or a function without arguments that returns one, such as
        `functools.partial(optax.adamw, 1e-3)`, which can be pickled.
      norm, dropout_rate, residual: the norm, dropout rate and residual connections, as in `fcfunc.mlp`.
      class_weight: a dict of weights by class, or "balanced" for weights inversely proportional to class frequencies.

    Fitted attributes, as in scikit-learn: `classes_`, `coefs_`, `intercepts_`, `loss_`, `loss_curve_`,
    `best_loss_`, `validation_scores_`, `best_validation_score_`, `n_iter_`, `t_`, `n_layers_`, `n_outputs_`,
    `out_activation_`, `n_features_in_`, `feature_names_in_`.

    Example:
      >>> from sklearn.datasets import load_iris
      >>> X, y = load_iris(return_X_y=True)
      >>> model = MLPClassifier(solver="lbfgs", tol=1e-2, random_state=0).fit(X, y)
      >>> float(model.score(X, y)) > 0.95
      True
    """

    def __init__(
        self,
        hidden_layer_sizes=(100,),
        activation="relu",
        *,
        solver="adam",
        alpha=0.0001,
        batch_size="auto",
        learning_rate="constant",
        learning_rate_init=0.001,
        power_t=0.5,
        max_iter=200,
        shuffle=True,
        random_state=None,
        tol=1e-4,
        verbose=False,
        warm_start=False,
        momentum=0.9,
        nesterovs_momentum=True,
        early_stopping=False,
        validation_fraction=0.1,
        beta_1=0.9,
        beta_2=0.999,
        epsilon=1e-8,
        n_iter_no_change=10,
        max_fun=15000,
        optimizer=None,
        norm=None,
        dropout_rate=0.0,
        residual=False,
        class_weight=None,
    ):
        _keep(self, locals())

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags

    @available_if(lambda self: not self._by_lbfgs())
    def partial_fit(self, X, y, sample_weight=None, classes=None):
        """Trains for one epoch on these examples, continuing with the optimizer state of the previous call.

        Args:
          X, y, sample_weight: the inputs, targets and weights, as in `fit`.
          classes: all classes, required in the first call.

        Returns:
          The estimator.

        Raises:
          ValueError: `classes` is missing in the first call or differs from it in a later one, or for the same reasons
            as `fit`.
        """
        if not hasattr(self, "classes_"):
            if classes is None:
                raise ValueError("classes must be passed on the first call to partial_fit.")
            self._multilabel = type_of_target(y).startswith("multilabel")
            self.classes_ = unique_labels(classes)
        elif classes is not None and not np.array_equal(self.classes_, unique_labels(classes)):
            raise ValueError(
                f"`classes={classes!r}` is not the same as on last call to partial_fit, was: {self.classes_!r}"
            )
        if isinstance(self.class_weight, str):
            raise ValueError("class_weight='balanced' needs all examples, which partial_fit does not have; pass a dict")
        return self._fit(X, y, sample_weight, incremental=True)

    def predict(self, X) -> np.ndarray:
        """Predicts the classes, `[n]`, or the label indicators of a multilabel problem, `[n, labels]`."""
        outputs = self._forward(X)
        if self._multilabel:
            return (outputs > 0.5).astype(int)
        chosen = np.argmax(outputs, axis=1) if self.out_activation_ == "softmax" else (outputs[:, 0] > 0.5).astype(int)
        return self.classes_[np.minimum(chosen, len(self.classes_) - 1)]

    def predict_proba(self, X) -> np.ndarray:
        """Predicts the class probabilities, `[n, classes]`, in the order of `classes_`."""
        outputs = self._forward(X)
        if self.out_activation_ == "softmax" or self._multilabel:
            return outputs
        return np.concatenate([1 - outputs, outputs], axis=1) if len(self.classes_) == 2 else np.ones_like(outputs)

    def predict_log_proba(self, X) -> np.ndarray:
        """Returns the logarithm of `predict_proba`."""
        with np.errstate(divide="ignore"):
            return np.log(self.predict_proba(X))

    def _score(self, y, outputs, weights):
        """The accuracy with respect to encoded classes."""
        if self.out_activation_ == "softmax":
            return accuracy_score(y, np.argmax(outputs, axis=1), sample_weight=weights)
        return accuracy_score(y, outputs > 0.5, sample_weight=weights)

    def _out_activation(self) -> str:
        return "softmax" if len(self.classes_) > 2 and not self._multilabel else "logistic"

    def _validated(self, X, y, sample_weight, incremental, first):
        X, y = validate_data(
            self, X, y, accept_sparse=("csr", "csc"), multi_output=True, dtype=(np.float64, np.float32), reset=first
        )
        check_classification_targets(y)
        if type_of_target(y) == "multiclass-multioutput":
            raise ValueError("Multioutput target data is not supported: y must be [n], or [n, labels] with 0 and 1")
        y = y.toarray() if scipy.sparse.issparse(y) else y
        if y.ndim == 2 and y.shape[1] == 1:
            y = column_or_1d(y, warn=True)
        weights = None if sample_weight is None else _check_sample_weight(sample_weight, X)
        if self.class_weight is not None:
            of_class = compute_sample_weight(self.class_weight, y)
            weights = of_class if weights is None else weights * of_class
        classes = np.arange(y.shape[1]) if y.ndim == 2 else np.unique(y)
        if not hasattr(self, "classes_") or not (self.warm_start or incremental):
            self._multilabel, self.classes_ = y.ndim == 2, classes
        elif self.warm_start and not incremental and not np.array_equal(classes, self.classes_):
            raise ValueError(
                "warm_start can only be used where `y` has the same classes as in the previous call to fit. "
                f"Previously got {self.classes_}, `y` has {classes}"
            )
        elif not np.isin(classes, self.classes_).all():
            raise ValueError(
                f"`y` has classes not in `self.classes_`. `self.classes_` has {self.classes_}. 'y' has {classes}."
            )
        if self._multilabel:
            return X, y.astype(bool), weights
        labels = np.searchsorted(self.classes_, y).astype(np.int32)
        return X, labels if len(self.classes_) > 2 else labels[:, None].astype(bool), weights


class MLPRegressor(RegressorMixin, _MLP):
    """A multilayer perceptron regressor with one or several outputs, trained by squared error or Poisson deviance.

    It has the parameters, defaults and initial weights of scikit-learn's `MLPRegressor`, and the following parameters
    in addition. With several outputs, the losses in `loss_curve_` are sums over the outputs.

    Args:
      activation, optimizer, norm, dropout_rate, residual: the additional parameters of `MLPClassifier`.

    Fitted attributes, as in scikit-learn: `coefs_`, `intercepts_`, `loss_`, `loss_curve_`, `best_loss_`,
    `validation_scores_`, `best_validation_score_`, `n_iter_`, `t_`, `n_layers_`, `n_outputs_`, `out_activation_`,
    `n_features_in_`, `feature_names_in_`.

    Example:
      >>> from sklearn.datasets import load_diabetes
      >>> X, y = load_diabetes(return_X_y=True)
      >>> model = MLPRegressor(alpha=10, learning_rate_init=0.1, random_state=0).fit(X, y)
      >>> float(model.score(X, y)) > 0.4
      True
    """

    def __init__(
        self,
        loss="squared_error",
        hidden_layer_sizes=(100,),
        activation="relu",
        *,
        solver="adam",
        alpha=0.0001,
        batch_size="auto",
        learning_rate="constant",
        learning_rate_init=0.001,
        power_t=0.5,
        max_iter=200,
        shuffle=True,
        random_state=None,
        tol=1e-4,
        verbose=False,
        warm_start=False,
        momentum=0.9,
        nesterovs_momentum=True,
        early_stopping=False,
        validation_fraction=0.1,
        beta_1=0.9,
        beta_2=0.999,
        epsilon=1e-8,
        n_iter_no_change=10,
        max_fun=15000,
        optimizer=None,
        norm=None,
        dropout_rate=0.0,
        residual=False,
    ):
        _keep(self, locals())

    @available_if(lambda self: not self._by_lbfgs())
    def partial_fit(self, X, y, sample_weight=None):
        """Trains for one epoch on these examples, continuing with the optimizer state of the previous call.

        Args:
          X, y, sample_weight: the inputs, targets and weights, as in `fit`.

        Returns:
          The estimator.

        Raises:
          ValueError: for the same reasons as `fit`.
        """
        return self._fit(X, y, sample_weight, incremental=True)

    def predict(self, X) -> np.ndarray:
        """Predicts the targets, `[n]`, or `[n, outputs]` for several outputs."""
        outputs = self._forward(X)
        return outputs[:, 0] if outputs.shape[1] == 1 else outputs

    def _score(self, y, outputs, weights):
        return r2_score(y, outputs, sample_weight=weights)

    def _out_activation(self) -> str:
        if self.loss not in ("squared_error", "poisson"):
            raise ValueError(f"loss must be squared_error or poisson, got {self.loss!r}")
        return "exp" if self.loss == "poisson" else "identity"

    def _validated(self, X, y, sample_weight, incremental, first):
        X, y = validate_data(
            self, X, y, accept_sparse=("csr", "csc"), multi_output=True, y_numeric=True,
            dtype=(np.float64, np.float32), reset=first,
        )  # fmt: skip
        if y.ndim == 2 and y.shape[1] == 1:
            y = column_or_1d(y, warn=True)
        if self.loss == "poisson" and np.min(y) < 0:
            raise ValueError(f"loss='poisson' needs y of at least 0, got {np.min(y):g}")
        weights = None if sample_weight is None else _check_sample_weight(sample_weight, X)
        return X, y.reshape(len(y), -1).astype(X.dtype), weights


FITTED = ("n_iter_", "t_", "n_layers_", "n_outputs_", "n_features_in_", "out_activation_", "_multilabel", "loss_")
"""The attributes of a fitted estimator that are plain data."""

NOT_FINITE = (
    "Solver produced non-finite parameter weights. The input data may contain large values and need to be preprocessed."
)


@functools.lru_cache(maxsize=64)
def _initial_state(optimizer: optax.GradientTransformation):
    """`train.init_state` as one program, which compiles faster than its separate operations."""
    return jax.jit(lambda params, key, carried: train.init_state(params, optimizer, key, model_state=carried))


@functools.cache
def _adam() -> optax.GradientTransformation:
    return optax.inject_hyperparams(lambda learning_rate, b1, b2, eps: optax.adam(learning_rate, b1, b2, eps))(
        *[0.0] * 4
    )


@functools.cache
def _sgd(nesterov: bool) -> optax.GradientTransformation:
    """SGD with momentum over steps rather than gradients, as in scikit-learn; they differ if the rate changes."""

    def make(learning_rate, momentum):
        return optax.chain(optax.scale(-1.0 * learning_rate), optax.trace(momentum, nesterov))

    return optax.inject_hyperparams(make)(0.0, 0.0)


@functools.cache
def _falling_sgd(nesterov: bool) -> optax.GradientTransformation:
    """SGD with scikit-learn's "invscaling" rate, which falls after each epoch with a power of the examples seen."""

    def make(learning_rate, momentum, power, seen, examples, steps):
        def rate(count):
            return -learning_rate / (1 + seen + count // steps * examples) ** power

        return optax.chain(optax.scale_by_schedule(rate), optax.trace(momentum, nesterov))

    return optax.inject_hyperparams(make)(*[1.0] * 6)


@functools.lru_cache(maxsize=64)
def _objective(net: Network, out_activation: str):
    """A loss function for `fcfunc.train`: the mean loss of a batch plus the L2 penalty."""

    def loss_fn(params, batch, key, carried):
        if net.norm == "batch_norm":
            options = {"training": key is not None, "key": key}
            outputs, norm_state = net.apply_batch_norm(params, carried["norm"], batch["x"], **options)
        else:
            outputs, norm_state = net.apply(params, batch["x"], key=key), carried["norm"]
        of_rows = OF_ROWS[out_activation](outputs, batch["y"])
        weights = batch.get("weights", jnp.ones_like(of_rows))
        count = jnp.sum(weights)
        penalty = carried["alpha"] * losses.l2_penalty(params) / jnp.where(count > 0, count, 1)
        return losses.mean(weights * of_rows, over=weights) + penalty, {}, carried | {"norm": norm_state}

    return loss_fn


@functools.lru_cache(maxsize=64)
def _value_and_grad(net: Network, out_activation: str):
    objective = _objective(net, out_activation)
    return jax.jit(jax.value_and_grad(lambda params, data, carried: objective(params, data, None, carried)[0]))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _outputs(net: Network, out_activation: str, params, norm_state, x):
    if net.norm == "batch_norm":
        outputs, _ = net.apply_batch_norm(params, norm_state, x, training=False, key=None)
    else:
        outputs = net.apply(params, x, key=None)
    return OUTPUTS[out_activation](outputs)


def _keep(estimator: BaseEstimator, given: dict[str, Any]) -> None:
    """Stores the parameters of an estimator as scikit-learn requires: unchanged, under their names."""
    for name, value in given.items():
        if name != "self":
            setattr(estimator, name, value)


def _precision(dtype):
    """Enables float64 in JAX for the block if the data is float64."""
    return jax.enable_x64(True) if dtype == np.float64 else contextlib.nullcontext()


def _dense(X) -> np.ndarray:
    return X.toarray() if scipy.sparse.issparse(X) else X


def _plain(value: Any) -> Any:
    """Converts a parameter of an estimator to JSON data; NotImplemented if that is not possible."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple | range):
        parts = [_plain(part) for part in value]
        return NotImplemented if NotImplemented in parts else parts
    if isinstance(value, dict):
        pairs = _plain(list(value.items()))
        return NotImplemented if pairs is NotImplemented else {"dict": pairs}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return value if value is None or isinstance(value, bool | int | float | str) else NotImplemented


def _given(value: Any) -> Any:
    """The inverse of `_plain`; lists become tuples."""
    if isinstance(value, list):
        return tuple(map(_given, value))
    if isinstance(value, dict):
        return float(value["float"]) if "float" in value else dict(map(_given, value["dict"]))
    return value
