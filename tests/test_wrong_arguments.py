"""Calls every public function with each kind of wrong argument and checks the error class and message."""

import inspect
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fcfunc
from fcfunc import (
    checkpoint,
    curvature,
    data,
    laplace,
    losses,
    ops,
    params_file,
    per_example,
    privacy,
    sharding,
    stream,
    testing,
    train,
)

FAST = {f"testing.{name}": {"only": ("oracle",)} for name in ("check_vjp", "assert_vjp")}
UNCHECKED = {"digits"}
"""Public functions without arguments. `_fwd` and `_bwd` are excluded too: the full rule checks their arguments."""

X, W, B = np.ones((4, 3), np.float32), np.ones((3, 5), np.float32), np.ones(5, np.float32)
LABELS, MASK, ROWS = np.array([0, 1, 2, 0]), np.ones(4, bool), np.ones(4, np.float32)
KEY = jax.random.key(0)
PARAMS = fcfunc.init(KEY, [3, 8, 8, 5])
NET = fcfunc.mlp([3, 8, 8, 5])
NORMED_NET = fcfunc.mlp([3, 8, 5], norm="batch_norm")
NORMED = NORMED_NET.init(KEY)
STATE = NORMED_NET.init_batch_norm_state(NORMED)
ZEROS = jax.nn.initializers.zeros
OPTIMIZER = optax.sgd(0.1)
TRAIN_STATE = train.init_state(PARAMS, OPTIMIZER, KEY)
DATA = (X, LABELS.astype(np.int32))
MESH = sharding.make_mesh(model=2)
STREAM = stream.from_arrays(DATA)


def first_output(outputs):
    return outputs[:, 0]


_, FACTORS = NET.example_gradients(PARAMS, X, first_output)
OF_NET = {"net": NET, "params": PARAMS, "x": X, "loss_fn": first_output}
POSTERIOR = laplace.last_layer(**OF_NET, prior_precision=1.0)


def loss_fn(params, batch, key):
    return jnp.mean(losses.softmax_cross_entropy_with_integer_labels(fcfunc.apply(params, batch[0]), batch[1]))


def text(_):
    return "abc", TypeError


def nothing(_):
    return None, TypeError


def empty(_):
    return None, ValueError


def integers(a):
    return a.astype(np.int32), TypeError


def complex_numbers(a):
    return a.astype(np.complex64), TypeError


def other_dtype(a):
    return a.astype(np.float16), TypeError


def wider(a):
    return np.concatenate([a, a[..., :1]], -1), ValueError


def floats(a):
    return a.astype(np.float32), TypeError


def column(a):
    return a[:, None], ValueError


def nought(_):
    return 0, ValueError


def fraction(_):
    return 1.5, ValueError


def unknown(_):
    return "no such name", ValueError


def above(_):
    return 1.5, ValueError


def below(_):
    return -0.5, ValueError


def word(_):
    return "abc", (TypeError, ValueError)


def seven(_):
    return 7, (TypeError, ValueError)


ALONE = [text, nothing, integers, complex_numbers]
TOGETHER = [*ALONE, other_dtype, wider]
BIASES = [kind for kind in TOGETHER if kind is not nothing]  # None means no bias
LABELED = [text, floats, column]
MASKED = [text, integers, wider]
WEIGHED = [text, integers, wider]
COUNT = [nought, fraction, word]
NUMBER = [word]
KEYED = [text, nothing, seven]


def true(_):
    return True, TypeError


def twice(_):
    return (0, 0), ValueError


AXIS = [word, seven, twice]

CALLS = {
    **{f"ops.{name}": ({"x": X}, {"x": ALONE}) for name in ("relu", "silu", "sigmoid", "softplus", "tanh")},
    "ops.elu": ({"x": X, "alpha": 1.0}, {"x": ALONE, "alpha": NUMBER}),
    "ops.gelu": ({"x": X, "approximate": True}, {"x": ALONE}),
    "ops.leaky_relu": ({"x": X, "negative_slope": 0.1}, {"x": ALONE, "negative_slope": NUMBER}),
    "ops.affine": (
        {"x": X, "w": W, "b": B, "compute_dtype": None, "out_dtype": None},
        {"x": TOGETHER, "w": TOGETHER, "b": BIASES, "compute_dtype": [word, seven], "out_dtype": [word, seven]},
    ),
    "ops.layer": (
        {"x": X, "w": W, "b": B, "activation": "relu"},
        {"x": TOGETHER, "w": TOGETHER, "b": BIASES, "activation": [unknown, seven]},
    ),
    "ops.softmax": ({"x": X, "axis": -1, "where": X > 0}, {"x": ALONE, "axis": AXIS, "where": MASKED}),
    "ops.log_softmax": ({"x": X, "axis": -1, "where": X > 0}, {"x": ALONE, "axis": AXIS, "where": MASKED}),
    "ops.dropout": ({"x": X, "rate": 0.5, "key": KEY}, {"x": ALONE, "rate": [above, below, word], "key": KEYED}),
    "ops.layer_norm": (
        {"x": X, "scale": X[0], "offset": X[0], "eps": 1e-5},
        {"x": [*ALONE, wider], "scale": TOGETHER, "offset": TOGETHER, "eps": [below, word]},
    ),
    "ops.rms_norm": (
        {"x": X, "scale": X[0], "eps": 1e-5},
        {"x": [*ALONE, wider], "scale": [*ALONE, wider], "eps": [below, word]},
    ),
    "ops.batch_norm": (
        {"x": X, "scale": X[0], "offset": X[0], "state": {"mean": X[0], "var": X[0]}, "training": True, "decay": 0.9},
        {
            "x": [*ALONE, wider],
            "scale": TOGETHER,
            "offset": TOGETHER,
            "state": [text, nothing],
            "decay": [above, below, word],
        },
    ),
    **{
        f"losses.{name}": (
            {arg: X, "labels": LABELS},
            {arg: [*ALONE], "labels": LABELED},
        )
        for name, arg in (("negative_log_likelihood", "probs"), ("multiclass_svm", "scores"))
    },
    "losses.softmax_cross_entropy_with_integer_labels": (
        {
            "logits": X,
            "labels": LABELS,
            "axis": -1,
            "where": MASK,
            "weights": ROWS,
            "class_weights": X[0],
            "label_smoothing": 0.1,
            "ignore_index": -1,
        },
        {
            "logits": ALONE,
            "labels": LABELED,
            "axis": AXIS,
            "where": MASKED,
            "weights": WEIGHED,
            "class_weights": WEIGHED,
            "label_smoothing": [above, below, word],
            "ignore_index": [word, true, lambda _: (2**40, ValueError)],
        },
    ),
    "losses.softmax_cross_entropy": (
        {"logits": X, "labels": X, "axis": -1, "where": MASK, "weights": ROWS, "class_weights": X[0]}
        | {"label_smoothing": 0.1},
        {
            "logits": [*ALONE, wider],
            "labels": [text, nothing, complex_numbers, wider],
            "axis": AXIS,
            "where": MASKED,
            "weights": WEIGHED,
            "class_weights": WEIGHED,
            "label_smoothing": [above, below, word],
        },
    ),
    "losses.sigmoid_binary_cross_entropy": (
        {"logits": X, "labels": X, "label_smoothing": 0.1},
        {
            "logits": [*ALONE, wider],
            "labels": [text, nothing, complex_numbers, wider],
            "label_smoothing": [above, below, word],
        },
    ),
    "losses.linear_softmax_cross_entropy": (
        {"x": X, "w": W, "b": B, "labels": LABELS, "chunk_size": 2, "where": MASK, "weights": ROWS}
        | {"class_weights": B, "label_smoothing": 0.1, "ignore_index": -1},
        {
            "x": TOGETHER,
            "w": TOGETHER,
            "b": BIASES,
            "labels": LABELED,
            "chunk_size": COUNT,
            "where": MASKED,
            "weights": WEIGHED,
            "class_weights": WEIGHED,
            "label_smoothing": [above, below, word],
            "ignore_index": [word, true, lambda _: (2**40, ValueError)],
        },
    ),
    "losses.squared_error": (
        {"predictions": X, "targets": X},
        {"predictions": [*ALONE, wider], "targets": [text, complex_numbers, wider]},
    ),
    "losses.l2_penalty": ({"params": PARAMS}, {"params": [word, empty, seven]}),
    "losses.mean": ({"loss": ROWS, "over": MASK}, {"loss": [text, nothing, wider], "over": [text, nothing, wider]}),
    "fcfunc.mlp": (
        {
            "dims": [3, 4],
            "activation": "relu",
            "final_activation": None,
            "norm": "rms_norm",
            "norm_eps": 1e-3,
            "residual": False,
            "dropout_rate": 0.0,
            "use_bias": True,
            "compute_dtype": None,
            "ops": ops,
        },
        {
            "dims": [text, nothing, seven],
            "activation": [unknown, seven],
            "final_activation": [unknown, seven],
            "norm": [unknown, seven],
            "norm_eps": [below, word],
            "residual": [seven],
            "dropout_rate": [above, below, word],
            "use_bias": [word],
            "compute_dtype": [word, seven],
            "ops": [unknown, nothing],
        },
    ),
    "fcfunc.init": ({"key": KEY, "dims": [3, 4]}, {"key": KEYED, "dims": [text, nothing, seven]}),
    "fcfunc.apply": (
        {"params": PARAMS, "x": X, "activation": "relu"},
        {"params": [text, nothing, seven], "x": TOGETHER, "activation": [unknown, seven]},
    ),
    "fcfunc.stack": ({"params": PARAMS}, {"params": [text, nothing, seven]}),
    "fcfunc.unstack": ({"params": PARAMS}, {"params": [text, nothing, seven]}),
    "net.init": (
        {
            "key": KEY,
            "w_init": jax.nn.initializers.zeros,
            "b_init": jax.nn.initializers.zeros,
            "param_dtype": "float32",
        },
        {"key": KEYED, "w_init": [text], "b_init": [text], "param_dtype": [word, seven]},
    ),
    "net.apply": ({"params": PARAMS, "x": X}, {"params": [text, nothing, seven], "x": TOGETHER}),
    "net.example_gradients": (
        {"params": PARAMS, "x": X, "loss_fn": first_output},
        {"params": [text, nothing, seven], "x": TOGETHER, "loss_fn": [text, nothing]},
    ),
    **{
        f"per_example.{name}": ({"gradients": FACTORS}, {"gradients": KEYED})
        for name in ("squared_norms", "leaf_squared_norms", "noise_scale", "materialized")
    },
    "per_example.weighted_sum": (
        {"gradients": FACTORS, "weights": ROWS},
        {"gradients": KEYED, "weights": [text, nothing, integers, wider]},
    ),
    "per_example.clipped_sum": (
        {"gradients": FACTORS, "max_norm": 1.0},
        {"gradients": KEYED, "max_norm": [word, nought]},
    ),
    "per_example.dot_products": ({"gradients": FACTORS, "others": FACTORS}, {"gradients": KEYED, "others": KEYED}),
    "per_example.along": (
        {"gradients": FACTORS, "direction": PARAMS},
        {"gradients": KEYED, "direction": [word, seven]},
    ),
    "per_example.mean_with_noise_scale": (
        {"losses": ROWS, "gradients": FACTORS, "batch": None, "key": None},
        {"gradients": KEYED},
    ),
    "net.example_vjp": ({"params": PARAMS, "x": X}, {"params": [text, nothing, seven], "x": TOGETHER}),
    **{
        f"{module}.{name}": (
            OF_NET | more,
            {"net": [text, nothing], "params": [text, nothing, seven], "x": TOGETHER, "loss_fn": [text, nothing]}
            | wrong,
        )
        for module, names, more, wrong in (
            ("curvature", ("ggn_diagonal", "kronecker_factors"), {}, {}),
            (
                "curvature",
                ("ggn_vector_product", "hessian_vector_product"),
                {"direction": PARAMS},
                {"direction": [word, seven]},
            ),
            ("laplace", ("last_layer", "kronecker"), {"prior_precision": 1.0}, {"prior_precision": [word, nought]}),
        )
        for name in names
    },
    "laplace.predict": ({"net": NET, "posterior": POSTERIOR, "x": X}, {"posterior": [text, nothing], "x": TOGETHER}),
    "laplace.log_marginal_likelihood": (
        {"posterior": POSTERIOR, "prior_precision": 1.0},
        {"posterior": [text, nothing], "prior_precision": [word, nought]},
    ),
    "laplace.sample": ({"key": KEY, "posterior": POSTERIOR}, {"key": KEYED, "posterior": [text, nothing]}),
    "laplace.probabilities": (
        {"outputs": X, "covariance": np.ones((4, 3, 3), np.float32)},
        {"outputs": [text, nothing, integers], "covariance": [text, nothing, integers]},
    ),
    "privacy.batch_capacity": ({"count": 10, "rate": 0.5}, {"count": [below], "rate": [word, nought, above]}),
    "privacy.poisson_batch": (
        {"key": KEY, "data": DATA, "rate": 0.5},
        {"key": KEYED, "data": [seven], "rate": [word, nought, above]},
    ),
    "privacy.private_mean": (
        {"max_norm": 1.0, "noise_multiplier": 1.0, "expected_batch_size": 4},
        {"max_norm": [word, nought], "expected_batch_size": [word, nought], "noise_multiplier": [word, below]},
    ),
    "privacy.epsilon": (
        {"rate": 1.0, "noise_multiplier": 4.0, "steps": 1, "delta": 1e-5},
        {"rate": [word, nought, above], "noise_multiplier": [word, nought], "steps": [below], "delta": [word, nought]},
    ),
    "privacy.noise_multiplier": (
        {"epsilon": 1.0, "rate": 1.0, "steps": 1, "delta": 1e-5},
        {"epsilon": [word, nought], "rate": [word, nought, above], "steps": [below], "delta": [word, nought]},
    ),
    "net.features": ({"params": PARAMS, "x": X}, {"params": [text, nothing, seven], "x": TOGETHER}),
    "normed_net.apply_batch_norm": (
        {"params": NORMED, "state": STATE, "x": X, "training": True, "decay": 0.9},
        {
            "params": [text, nothing, seven],
            "state": [text, nothing, seven],
            "x": TOGETHER,
            "decay": [above, below, word],
        },
    ),
    "normed_net.init_batch_norm_state": ({"params": NORMED}, {"params": [text, nothing, seven]}),
    "train.init_state": (
        {"params": PARAMS, "optimizer": OPTIMIZER, "key": KEY},
        {"params": [text, empty], "optimizer": [text, nothing], "key": KEYED},
    ),
    "train.make_train_step": (
        {"loss_fn": loss_fn, "optimizer": OPTIMIZER, "accumulate": 1},
        {"loss_fn": [text, nothing], "optimizer": [text, nothing], "accumulate": COUNT},
    ),
    "train.make_train_epoch": (
        {"loss_fn": loss_fn, "optimizer": OPTIMIZER, "batch_size": 2, "accumulate": 1},
        {"loss_fn": [text, nothing], "optimizer": [text, nothing], "batch_size": COUNT, "accumulate": COUNT},
    ),
    "train.make_fit": (
        {
            "loss_fn": loss_fn,
            "optimizer": OPTIMIZER,
            "epochs": 1,
            "batch_size": 2,
            "accumulate": 1,
            "mode": "min",
            "patience": 1,
            "tol": 0.1,
            "shuffle": False,
        },
        {
            "loss_fn": [text, nothing],
            "optimizer": [text, nothing],
            "epochs": COUNT,
            "batch_size": COUNT,
            "accumulate": COUNT,
            "mode": [unknown],
            "patience": COUNT,
            "tol": [below, word],
            "shuffle": [word, seven],
        },
    ),
    "train.fit": (
        {
            "loss_fn": loss_fn,
            "optimizer": OPTIMIZER,
            "state": TRAIN_STATE,
            "data": DATA,
            "epochs": 1,
            "batch_size": 2,
            "validation_data": DATA,
            "monitor": "loss",
            "mode": "min",
            "patience": 1,
            "tol": 0.1,
            "shuffle": False,
            "num_classes": 5,
            "every": 1,
            "on_steps": lambda state: None,
            "on_epoch": None,
            "eval_fn": None,
        },
        {
            "loss_fn": [text, nothing],
            "optimizer": [text, nothing],
            "state": [text, nothing, seven],
            "data": [word, empty, seven],
            "epochs": COUNT,
            "batch_size": COUNT,
            "validation_data": [word, seven],
            "monitor": [unknown],
            "mode": [unknown],
            "patience": COUNT,
            "tol": [below, word],
            "shuffle": [word, seven],
            "num_classes": COUNT,
            "every": COUNT,
            "on_steps": [text, seven],
            "on_epoch": [text, seven],
            "eval_fn": [text, seven],
        },
    ),
    "train.num_steps": (
        {"examples": 50, "epochs": 1, "batch_size": 16},
        {"examples": COUNT, "epochs": COUNT, "batch_size": COUNT},
    ),
    "train.evaluate": (
        {"loss_fn": loss_fn, "params": PARAMS, "data": DATA, "batch_size": 2},
        {"loss_fn": [text, nothing], "data": [word, empty, seven], "batch_size": COUNT},
    ),
    "data.check_values": (
        {"data": DATA, "num_classes": 3},
        {"data": [lambda _: ((X * np.nan, LABELS), ValueError)], "num_classes": COUNT},
    ),
    "data.fashion_mnist": ({"folder": None}, {"folder": [lambda _: ("/nowhere", FileNotFoundError), seven]}),
    **{
        f"data.{name}": (
            {"path": None, "max_bytes": 10},
            {"path": [lambda _: ("/nowhere", FileNotFoundError), nothing, seven], "max_bytes": COUNT},
        )
        for name in ("read_idx", "read_npz", "read_csv")
    },
    "params_file.load": (
        {"path": None, "max_bytes": 10},
        {"path": [lambda _: ("/nowhere", FileNotFoundError), nothing, seven], "max_bytes": COUNT},
    ),
    "params_file.save": (
        {"path": None, "params": PARAMS, "config": None},
        {"path": [nothing, seven], "params": [text, nothing, seven], "config": [lambda _: (print, TypeError)]},
    ),
    "data.split": (
        {"data": X, "fractions": [0.5, 0.5], "seed": 0},
        {"data": [word, empty, seven], "fractions": [word, seven, nothing], "seed": [word, lambda _: (1.5, TypeError)]},
    ),
    "stream.from_arrays": (
        {"arrays": DATA, "chunk_size": 2},
        {"arrays": [text, empty, lambda _: ((X, LABELS[:2]), ValueError)], "chunk_size": COUNT},
    ),
    "stream.from_source": ({"source": [1.0, 2.0], "chunk_size": 2}, {"source": [nothing, seven], "chunk_size": COUNT}),
    **{
        f"stream.{name}": (
            {"path": None, "chunk_size": 10, **more},
            {"path": [lambda _: ("/nowhere", FileNotFoundError), nothing, seven], "chunk_size": COUNT},
        )
        for name, more in {"from_safetensors": {}, "from_table": {"target": "y"}}.items()
    },
    "stream.sharded": (
        {"stream": STREAM, "sharding": jax.NamedSharding(MESH, jax.P("data"))},
        {"stream": [text, nothing], "sharding": [text, nothing]},
    ),
    "data.standardizer": ({"x": X}, {"x": [text, nothing]}),
    "checkpoint.save": (
        {"folder": None, "state": TRAIN_STATE, "keep": 3, "score": 0.5},
        {"folder": [nothing, seven], "state": [text, nothing, seven], "keep": COUNT, "score": [word]},
    ),
    "checkpoint.Saver": (
        {"folder": None, "config": None, "keep": 3, "share": 0.5},
        {
            "folder": [nothing, seven],
            "config": [lambda _: (print, TypeError)],
            "keep": COUNT,
            "share": [word, lambda _: (0.0, ValueError), lambda _: (1.5, ValueError)],
        },
    ),
    "checkpoint.restore": (
        {"folder": None, "like": TRAIN_STATE, "step": None},
        {"folder": [lambda _: ("/nowhere", FileNotFoundError), nothing, seven], "step": [word]},
    ),
    "checkpoint.steps": ({"folder": None}, {"folder": [nothing, seven]}),
    "sharding.make_mesh": (
        {"data": 2, "model": 2, "devices": jax.devices()[:4]},
        {"data": [*COUNT], "model": [*COUNT]},
    ),
    "sharding.param_specs": (
        {"params": PARAMS, "mesh": MESH, "mode": "fsdp", "replicate": ("classes",)},
        {"params": [text, nothing], "mesh": [text, nothing], "mode": [unknown, nothing, seven], "replicate": [seven]},
    ),
    "sharding.logical_specs": (
        {
            "axes": [jax.P("embed", "mlp")],
            "tree": [np.ones((8, 8))],
            "mesh": MESH,
            "rules": [("embed", "data"), ("mlp", "model")],
        },
        {"axes": [empty, seven], "tree": [empty], "mesh": [text, nothing], "rules": [seven, word]},
    ),
    "sharding.shard": (
        {"tree": PARAMS, "specs": sharding.param_specs(PARAMS, MESH, "data"), "mesh": MESH},
        {"specs": [text, nothing, seven], "mesh": [text, nothing]},
    ),
    "sharding.global_batch": (
        {"local": X, "mesh": MESH, "axis": "data"},
        {"local": [word, empty, seven], "mesh": [text, nothing], "axis": [unknown, seven]},
    ),
    "testing.check_vjp": (
        {"fun": ops.relu, "args": (X,), "seed": 0, "dtype": "float32"},
        {"fun": [text, nothing], "args": [seven, nothing], "dtype": [word, seven], "seed": [word]},
    ),
    "testing.assert_vjp": ({"fun": ops.relu, "args": (X,)}, {"fun": [text, nothing], "args": [seven]}),
}
"""For each public function: valid arguments by name, and the ways in which each argument is made invalid."""

MODULES = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        fcfunc,
        checkpoint,
        curvature,
        data,
        laplace,
        losses,
        ops,
        params_file,
        per_example,
        privacy,
        sharding,
        stream,
        testing,
        train,
    )
}
HOLDERS = MODULES | {"net": NET, "normed_net": NORMED_NET}
"""Modules and networks that hold the functions in the table."""


def public_functions():
    """Maps each public function to its name in the first module that exports it."""
    found = {}
    for name, module in MODULES.items():
        for attribute in module.__all__:
            function = getattr(module, attribute)
            if inspect.isfunction(function) and not attribute.endswith(("_fwd", "_bwd")):
                found.setdefault(function, f"{name}.{attribute}")
    return found


def test_every_public_function_is_in_the_table():
    called = {getattr(HOLDERS[name.split(".")[0]], name.split(".")[1]) for name in CALLS}
    missing = [name for function, name in public_functions().items() if function not in called]
    assert [name for name in missing if name.split(".")[1] not in UNCHECKED] == []
    modules = {name for name in fcfunc.__all__ if isinstance(getattr(fcfunc, name), types.ModuleType)}
    assert modules - MODULES.keys() == {
        "convert",
        "export",
        "reference",
        "sklearn",
    }  # `reference` checks nothing; scikit-learn's checks cover `sklearn`


def test_every_method_of_a_network_is_in_the_table():
    methods = {name for name, _ in inspect.getmembers(fcfunc.Network, inspect.isfunction) if not name.startswith("_")}
    assert methods - {"to_dict"} == {name.split(".")[1] for name in CALLS if "net." in name}


def cases():
    for name, (right, wrong) in CALLS.items():
        for argument, ways in wrong.items():
            for way in ways:
                value, error = way(right[argument])
                kind = way.__name__.strip("<>")
                yield pytest.param(name, right, argument, value, error, id=f"{name}-{argument}-{kind}")


def call(name, arguments, tmp_path):
    module, function = name.split(".")
    given = {k: tmp_path / "file" if k in ("path", "folder") and v is None else v for k, v in arguments.items()}
    function = getattr(HOLDERS[module], function)
    parameters = inspect.signature(function).parameters.values()
    required = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
    keywords = {k: v for k, v in given.items() if k not in required}
    return function(*[given[p] for p in required], **keywords)


@pytest.mark.parametrize(("name", "right", "argument", "value", "error"), list(cases()))
def test_a_wrong_argument_is_an_error_that_names_it(name, right, argument, value, error, tmp_path):
    arguments = {**right, argument: value}
    if argument in ("path", "folder") and value is None:
        arguments[argument] = 3.5  # `call` replaces None with a temporary path
    with pytest.raises(error) as caught:
        call(name, arguments, tmp_path)
    assert type(caught.value) in (TypeError, ValueError, FileNotFoundError)
    said = str(caught.value)
    assert re.search(rf"\b{argument}\b", said) or isinstance(caught.value, FileNotFoundError), said


@pytest.mark.parametrize("name", [n for n, (right, _) in CALLS.items() if not {"path", "folder"} & right.keys()])
def test_the_right_arguments_are_none(name, tmp_path):
    call(
        name, CALLS[name][0] if name.split(".")[0] != "testing" else {**CALLS[name][0], **FAST.get(name, {})}, tmp_path
    )
