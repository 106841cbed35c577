"""The estimators against those of scikit-learn, inside its tools, and under its estimator checks."""

import functools
import warnings

import jax.numpy as jnp
import joblib
import numpy as np
import optax
import pandas
import pytest
import scipy.sparse
import sklearn.neural_network as theirs
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_iris, make_multilabel_classification
from sklearn.exceptions import ConvergenceWarning
from sklearn.inspection import permutation_importance
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from fcfunc.sklearn import MLPClassifier, MLPRegressor
from tests.rules import slow

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def scaled(loaded):
    x, y = loaded(return_X_y=True)
    return StandardScaler().fit_transform(x), y


def problem(kind):
    """Returns inputs and targets of the given kind."""
    if kind == "multilabel":
        x, y = make_multilabel_classification(60, 5, n_classes=3, random_state=0)
        return x / 10, y
    if kind == "binary":
        return scaled(load_breast_cancer)
    if kind == "three classes":
        return scaled(load_iris)
    x, y = scaled(load_diabetes)
    if kind == "two outputs":
        return x, np.stack([y, y[::-1]], axis=1) / 100
    return (x, y / 100) if kind == "numbers" else (x, np.floor(y / 50))


REGRESSION = ("numbers", "two outputs", "counts")
KINDS = ("binary", "three classes", "multilabel", *REGRESSION)


def pair(kind, **options):
    """Returns our estimator and scikit-learn's."""
    if kind in REGRESSION:
        loss = "poisson" if kind == "counts" else "squared_error"
        return MLPRegressor(loss=loss, **options), theirs.MLPRegressor(loss=loss, **options)
    return MLPClassifier(**options), theirs.MLPClassifier(**options)


def outputs(model, x):
    return model.predict_proba(x) if hasattr(model, "predict_proba") else model.predict(x)


@parametrize_with_checks([MLPClassifier(), MLPRegressor()])
def test_the_estimators_pass_the_checks_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("solver", ["adam", "sgd", "lbfgs"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_options_train_the_network_of_scikit_learn(kind, solver, weighted):
    x, y = problem(kind)
    rates = {"adam": 1e-2, "sgd": 1e-3, "lbfgs": 1e-3}
    options = {"solver": solver, "max_iter": 7, "shuffle": False, "random_state": 3, "batch_size": 50, "alpha": 0.1}
    ours, sklearns = pair(kind, hidden_layer_sizes=(9, 6), learning_rate_init=rates[solver], **options)
    weights = {"sample_weight": np.random.default_rng(0).uniform(0.5, 2, len(x))} if weighted else {}
    ours.fit(x, y, **weights), sklearns.fit(x, y, **weights)
    # Optax adds epsilon at a different place in Adam's denominator.
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if solver == "adam" else {"rtol": 1e-5, "atol": 1e-8}
    np.testing.assert_allclose(outputs(ours, x), outputs(sklearns, x), **tolerance)
    if kind not in REGRESSION:
        np.testing.assert_array_equal(ours.predict(x), sklearns.predict(x))
    assert (ours.n_iter_, ours.out_activation_) == (sklearns.n_iter_, sklearns.out_activation_)
    if kind not in ("two outputs", "counts"):  # our loss sums over outputs, and omits a constant
        np.testing.assert_allclose(ours.loss_, sklearns.loss_, rtol=1e-4)


@pytest.mark.parametrize("activation", ["identity", "logistic", "tanh", "relu"])
@pytest.mark.parametrize("learning_rate", ["constant", "invscaling", "adaptive"])
def test_activations_and_schedules_are_those_of_scikit_learn(activation, learning_rate):
    x, y = problem("three classes")
    options = {"activation": activation, "learning_rate": learning_rate, "solver": "sgd", "learning_rate_init": 0.1}
    stops = {"max_iter": 60, "tol": 0.05, "n_iter_no_change": 2}
    ours, sklearns = pair("three classes", shuffle=False, random_state=1, **options, **stops)
    ours.fit(x, y), sklearns.fit(x, y)
    np.testing.assert_allclose(ours.predict_proba(x), sklearns.predict_proba(x), rtol=1e-6, atol=1e-8)
    assert ours.n_iter_ == sklearns.n_iter_
    np.testing.assert_allclose(ours.loss_curve_, sklearns.loss_curve_, rtol=1e-6)


@pytest.mark.parametrize("kind", ["binary", "numbers"])
def test_the_held_out_examples_are_those_of_scikit_learn(kind):
    x, y = problem(kind)
    options = {"early_stopping": True, "shuffle": False, "random_state": 1, "solver": "sgd", "max_iter": 5}
    ours, sklearns = pair(kind, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ConvergenceWarning
        ours.fit(x, y), sklearns.fit(x, y)
    np.testing.assert_allclose(ours.validation_scores_, sklearns.validation_scores_, rtol=1e-6)
    np.testing.assert_allclose(ours.coefs_[0], sklearns.coefs_[0], rtol=1e-6, atol=1e-8)


def test_several_columns_of_classes_are_refused():
    x, y = problem("three classes")
    with pytest.raises(ValueError, match="Multioutput target data is not supported"):
        MLPClassifier().fit(x, np.c_[y, y + 1])


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_batch_normalization_leaves_no_batch_of_one_example():
    x, y = np.random.default_rng(0).standard_normal((401, 3)), np.arange(401) % 2
    assert MLPClassifier((4,), norm="batch_norm", max_iter=1).fit(x, y).n_iter_ == 1


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_class_of_one_example_does_not_stop_early_stopping():
    x, y = problem("three classes")
    y = np.where(np.arange(len(y)) == 0, 3, np.searchsorted(np.unique(y), y))
    assert MLPClassifier((4,), early_stopping=True, max_iter=1).fit(x, y).n_iter_ == 1


@pytest.mark.parametrize("kind", ["binary", "three classes", "numbers"])
def test_training_stops_by_the_held_out_examples_with_the_best_epoch(kind):
    x, y = problem(kind)
    model, _ = pair(kind, early_stopping=True, learning_rate_init=0.01, n_iter_no_change=3, random_state=0)
    model.fit(x, y)
    assert model.n_iter_ < model.max_iter
    assert model.best_validation_score_ == max(model.validation_scores_)
    assert len(model.validation_scores_) == len(model.loss_curve_) == model.n_iter_
    assert model.score(x, y) > {"binary": 0.95, "three classes": 0.8, "numbers": 0.2}[kind]


def test_epochs_of_partial_fit_are_those_of_fit():
    x, y = problem("three classes")
    options = {"solver": "adam", "random_state": 0, "shuffle": False, "learning_rate_init": 0.01}
    whole = MLPClassifier(max_iter=20, **options).fit(x, y)
    part = MLPClassifier(**options)
    for _ in range(20):
        part.partial_fit(x, y, classes=[0, 1, 2])
    np.testing.assert_allclose(part.predict_proba(x), whole.predict_proba(x), rtol=1e-6)
    assert not hasattr(MLPClassifier(solver="lbfgs"), "partial_fit")


def test_classes_that_a_part_lacks_are_known_from_the_first_call():
    x, y = problem("three classes")
    names = np.array(["setosa", "versicolor", "virginica"])[y]
    model = MLPClassifier(random_state=0).partial_fit(x[:100], names[:100], classes=np.unique(names))
    assert model.predict_proba(x).shape == (150, 3)
    with pytest.raises(ValueError, match="is not the same as on last call"):
        model.partial_fit(x, names, classes=["a", "b"])
    with pytest.raises(ValueError, match="classes not in"):
        model.partial_fit(x, np.where(names == "setosa", "other", names))
    with pytest.raises(ValueError, match="classes must be passed on the first call"):
        MLPClassifier().partial_fit(x, names)


def test_sparse_input_and_data_frames_train_the_same_network():
    x, y = problem("binary")
    x = np.where(np.abs(x) < 0.5, 0, x)
    dense = MLPClassifier(max_iter=5, random_state=0).fit(x, y)
    for container in (scipy.sparse.csr_matrix, scipy.sparse.csc_array):
        sparse = MLPClassifier(max_iter=5, random_state=0).fit(container(x), y)
        np.testing.assert_array_equal(sparse.predict_proba(container(x)), dense.predict_proba(x))
    frame = pandas.DataFrame(x).rename(columns=lambda i: f"column {i}")
    named = MLPClassifier(max_iter=5, random_state=0).fit(frame, pandas.Series(y).map({0: "no", 1: "yes"}))
    np.testing.assert_array_equal(named.predict(frame), np.where(dense.predict(x) == 1, "yes", "no"))
    np.testing.assert_array_equal(named.feature_names_in_, frame.columns)
    with pytest.raises(ValueError, match="feature names"):
        named.predict(frame.rename(columns={"column 0": "other"}))


def test_the_estimators_work_in_pipelines_searches_and_calibration():
    x, y = load_breast_cancer(return_X_y=True)
    model = make_pipeline(StandardScaler(), MLPClassifier((16,), max_iter=20, random_state=0))
    grid = {"mlpclassifier__alpha": [1e-4, 1.0], "mlpclassifier__learning_rate_init": [1e-3, 1e-2]}
    search = GridSearchCV(model, grid, cv=3).fit(x, y)
    assert search.best_score_ > 0.95
    importance = permutation_importance(search, x[:100], y[:100], n_repeats=2, random_state=0)
    assert importance.importances_mean.shape == (30,)
    calibrated = CalibratedClassifierCV(model, cv=2).fit(x, y)
    np.testing.assert_allclose(calibrated.predict_proba(x).sum(axis=1), 1)


def test_two_processes_of_joblib_compute_what_one_does():
    x, y = problem("three classes")
    model = MLPClassifier((8,), max_iter=10, random_state=0, optimizer=functools.partial(optax.adamw, 1e-2))
    alone = cross_val_score(model, x, y, cv=2)
    with joblib.parallel_backend("loky", n_jobs=2):
        np.testing.assert_array_equal(cross_val_score(model, x, y, cv=2), alone)


@pytest.mark.parametrize("norm", [None, "layer_norm", "rms_norm", "batch_norm"])
def test_norms_dropout_and_residuals_train_and_predict(norm):
    x, y = problem("three classes")
    options = {"norm": norm, "dropout_rate": 0.1, "residual": True, "activation": "gelu", "learning_rate_init": 0.01}
    model = MLPClassifier((16, 16), random_state=0, max_iter=60, **options).fit(x, y)
    assert model.score(x, y) > 0.93
    np.testing.assert_allclose(model.predict_proba(x[:7]), model.predict_proba(x)[:7], rtol=1e-6)
    again = MLPClassifier((16, 16), random_state=0, max_iter=60, **options).fit(x, y)
    np.testing.assert_array_equal(again.predict_proba(x), model.predict_proba(x))


def test_weights_of_classes_are_weights_of_their_examples():
    x, y = problem("binary")
    weights = np.where(y == 1, 5.0, 1.0)
    of_class = MLPClassifier(max_iter=10, random_state=0, class_weight={0: 1.0, 1: 5.0}).fit(x, y)
    of_rows = MLPClassifier(max_iter=10, random_state=0).fit(x, y, sample_weight=weights)
    np.testing.assert_array_equal(of_class.predict_proba(x), of_rows.predict_proba(x))
    balanced = MLPClassifier(max_iter=10, random_state=0, class_weight="balanced")
    assert balanced.fit(x, y).predict(x).mean() < of_class.predict(x).mean()
    with pytest.raises(ValueError, match="class_weight='balanced' needs all examples"):
        balanced.partial_fit(x, y)


def test_an_optimizer_of_optax_takes_the_place_of_the_solver():
    x, y = problem("three classes")
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=1e-3))
    model = MLPClassifier(optimizer=optimizer, random_state=0, max_iter=50).fit(x, y)
    assert model.score(x, y) > 0.95
    as_adam = MLPClassifier(optimizer=optax.adam(1e-3), random_state=0, max_iter=5).fit(x, y)
    adam = MLPClassifier(random_state=0, max_iter=5).fit(x, y)
    np.testing.assert_allclose(as_adam.predict_proba(x), adam.predict_proba(x), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", [None, "batch_norm"])
def test_a_saved_estimator_predicts_the_same_and_trains_on(kind, norm, tmp_path):
    x, y = problem(kind)
    if kind == "three classes":
        y = np.array(["setosa", "versicolor", "virginica"])[y]
    model, _ = pair(kind, hidden_layer_sizes=(7, 5), max_iter=3, random_state=0)
    model.set_params(norm=norm).fit(x.astype(np.float32) if kind == "binary" else x, y)
    model.save(tmp_path / "model.safetensors")
    loaded = type(model).load(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(outputs(loaded, x), outputs(model, x))
    np.testing.assert_array_equal(loaded.predict(x), model.predict(x))
    assert loaded.get_params() == model.get_params()
    assert (loaded.n_iter_, loaded.loss_curve_, loaded.coefs_[0].dtype) == (3, model.loss_curve_, model.coefs_[0].dtype)
    loaded.set_params(warm_start=True).fit(x, y)
    assert loaded.loss_curve_[-1] < model.loss_curve_[0]


def test_parameters_of_numpy_are_saved_and_functions_refused(tmp_path):
    x, y = problem("three classes")
    options = {"alpha": np.float32(0.5), "random_state": np.random.RandomState(0), "optimizer": optax.sgd(0.1)}
    model = MLPClassifier(np.array([5, 4]), max_iter=2, **options).fit(x, y)
    model.save(tmp_path / "model.safetensors")
    loaded = MLPClassifier.load(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(loaded.predict_proba(x), model.predict_proba(x))
    assert (loaded.alpha, loaded.optimizer, loaded.hidden_layer_sizes) == (0.5, None, (5, 4))
    with pytest.raises(TypeError, match="is a function, which cannot be saved; use a name"):
        MLPClassifier(activation=jnp.sin, max_iter=2).fit(x, y).save(tmp_path / "model.safetensors")


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_class_weights_infinities_and_objects_come_back_from_a_file(tmp_path):
    x, y = problem("three classes")
    names = np.array(["a", "b", "c"], object)[np.searchsorted(np.unique(y), y)]
    weights = {"a": 1.0, "b": 2.0, "c": 0.5}
    model = MLPClassifier(range(4, 6), max_iter=2, class_weight=weights, n_iter_no_change=np.inf).fit(x, names)
    model.save(tmp_path / "net.safetensors")
    loaded = MLPClassifier.load(tmp_path / "net.safetensors")
    assert (loaded.class_weight, loaded.n_iter_no_change, loaded.hidden_layer_sizes) == (weights, np.inf, (4, 5))
    assert loaded.classes_.dtype == object
    loaded.partial_fit(x, names)


def test_a_file_of_another_kind_is_refused(tmp_path):
    x, y = problem("numbers")
    MLPRegressor(max_iter=1).fit(x, y).save(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="expected a fitted MLPClassifier, got MLPRegressor"):
        MLPClassifier.load(tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError):
        MLPClassifier.load(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adam"}, "optimizer must be an optax optimizer or a function that returns one, got 'adam'"),
        ({"hidden_layer_sizes": "abc"}, "hidden_layer_sizes must be integers, got 'abc'"),
        ({"solver": "newton"}, "solver must be one of lbfgs, sgd, adam, got 'newton'"),
        ({"alpha": -1}, "alpha must be a number of at least 0, got -1"),
        ({"learning_rate_init": 0}, "learning_rate_init must be a number above 0, got 0"),
        ({"momentum": 2}, r"momentum must be in \[0, 1\], got 2"),
        ({"validation_fraction": 1.0}, r"validation_fraction must be in \[0, 1\), got 1.0"),
        ({"max_iter": 0}, "max_iter must be an integer of at least 1, got 0"),
        ({"batch_size": "all"}, "batch_size must be an integer of at least 1 or 'auto', got 'all'"),
        ({"hidden_layer_sizes": (3, 0)}, "hidden_layer_sizes must be > 0"),
        ({"activation": "cube"}, "unknown activation 'cube'"),
        ({"norm": "group_norm"}, "unknown norm 'group_norm'"),
        ({"norm": "batch_norm", "batch_size": 149}, "at least 2 rows in each batch"),
        ({"norm": "batch_norm", "solver": "lbfgs"}, "solver='lbfgs' supports neither norm='batch_norm' nor"),
    ],
)
def test_parameters_out_of_range_are_refused(options, message):
    x, y = problem("three classes")
    with pytest.raises(ValueError, match=message):
        MLPClassifier(**options).fit(x, y)


def test_a_search_over_numbers_compiles_once():
    x, y = problem("three classes")
    from tests.helpers import compilations

    def fit(alpha, rate):
        MLPClassifier((11,), alpha=alpha, learning_rate_init=rate, max_iter=2, random_state=0).fit(x, y)

    fit(1e-4, 1e-3)
    with compilations() as compiled:
        fit(1e-2, 1e-2)
    assert not compiled


@slow
def test_the_networks_learn_the_digits_as_well_as_those_of_scikit_learn():
    x, y = load_digits(return_X_y=True)
    x = x / 16
    scores = []
    for estimator in (MLPClassifier, theirs.MLPClassifier):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            scores.append(
                [
                    estimator(random_state=i, max_iter=30).fit(x[:1000], y[:1000]).score(x[1000:], y[1000:])
                    for i in range(5)
                ]
            )
    assert abs(np.mean(scores[0]) - np.mean(scores[1])) < 2 * np.std(scores)
