"""Trains a fully-connected network on digits, Fashion-MNIST or your own data.

    python -m examples.train_classifier --data fashion-mnist --dims 784,512,512,10 --epochs 15

Writes params.safetensors, history.jsonl and learning_curve.png to --out; also preprocessing.skops if a CSV file has
text or missing values, and net.onnx or net.stablehlo with --export. docs/guides/saving.md shows how to load them.
"""

import argparse
import functools
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fcfunc
from fcfunc import data, export, losses, ops, params_file, reference, train

ACTIVATIONS = ("elu", "gelu", "gelu_exact", "leaky_relu", "linear", "relu", "sigmoid", "silu", "softplus", "tanh")
OPTIMIZERS = {
    "sgd": (optax.identity, 0.2, 0.0),
    "momentum": (lambda: optax.trace(0.9), 0.05, 0.0),
    "adam": (optax.scale_by_adam, 1e-3, 0.0),
    "adamw": (optax.scale_by_adam, 1e-3, 1e-4),
}
"""For each optimizer: the direction of a step, the default learning rate and the default weight decay."""


class Task(NamedTuple):
    """The learning task: the parts of the data, the classes, and the scaling of inputs and targets."""

    parts: tuple[data.Dataset, ...]
    classes: int | None
    scaling: dict[str, data.Standardizer]
    names: list[str] | None = None
    preprocessing: Any = None  # a fitted scikit-learn transformer, for a table with text or missing values


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Trains with the given options and returns the metrics on the test set."""
    args = parse(argv)
    select_device(args.device)
    task = load(args.data, args.task, args.target, args.seed)
    training, validation, test = task.parts
    dims = check_dims(args.dims, training.x.shape[1], task.classes)
    net = fcfunc.mlp(
        dims,
        activation=args.activation,
        norm=args.norm,
        residual=args.residual,
        dropout_rate=args.dropout,
        compute_dtype=args.compute_dtype,
    )
    init_key, run_key = jax.random.split(jax.random.key(args.seed))
    out = Path(args.out) if args.out else Path("runs") / Path(args.data).stem
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: a file is in the way")

    device = jax.devices()[0]
    print(f"fcfunc {fcfunc.__version__}, jax {jax.__version__}, optax {optax.__version__} on {device.device_kind}")
    kind = f"classification into {task.classes}" if task.classes else "regression"
    counts = ", ".join(
        f"{len(part.y)} {name}" for part, name in zip(task.parts, ("training", "validation", "test"), strict=True)
    )
    print(f"{args.data}: {kind}, {counts} examples")
    print(net)
    compare_rules(net, task.classes, args.l2, args.seed)

    batch_size = min(args.batch_size, len(training.y))
    if batch_size < args.batch_size:
        print(f"--batch-size {args.batch_size}: the {batch_size} training examples form one batch")
    if args.norm == "batch_norm" and len(training.y) % batch_size == 1:
        raise ValueError(f"--batch-size {batch_size}: leaves a last batch of 1, which batch_norm cannot normalize")
    steps = train.num_steps(len(training.y), epochs=args.epochs, batch_size=batch_size)
    name = args.optimizer or ("sgd" if task.classes else "adam")
    optimizer = make_optimizer(name, args.learning_rate, args.weight_decay, steps)
    loss_fn, eval_fn = (make_loss_fn(net, task.classes, l2) for l2 in (args.l2, 0.0))
    params = net.init(init_key)
    statistics = net.init_batch_norm_state(params) if net.norm == "batch_norm" else ()
    state = train.init_state(params, optimizer, run_key, model_state=statistics)
    score = "accuracy" if task.classes else "loss"
    data.check_values(test, num_classes=task.classes, name="test data")
    state, history = train.fit(
        loss_fn,
        optimizer,
        state,
        training,
        epochs=args.epochs,
        batch_size=batch_size,
        validation_data=validation,
        eval_fn=eval_fn,
        monitor=score,
        mode="max" if task.classes else "min",
        patience=args.patience or args.epochs,
        num_classes=task.classes,
        progress=True,
    )
    metrics = train.evaluate(eval_fn, state.params, test, model_state=state.model_state)
    figures = {name: float(value) for name, value in metrics.items()}
    epochs = f"{history['epochs']} epochs, of which epoch {history['kept_epoch']} was kept"
    if task.classes:
        largest = np.max(np.bincount(test.y)) / len(test.y)
        print(f"test accuracy {figures['accuracy']:.4f} (largest class {largest:.4f}) after {epochs}")
    else:
        unit = float(task.scaling["target"].scale)
        figures |= {"rmse": figures["loss"] ** 0.5 * unit, "std": float(np.std(test.y)) * unit}
        figures["r2"] = 1 - (figures["rmse"] / figures["std"]) ** 2 if figures["std"] else math.nan
        print(f"test RMSE {figures['rmse']:.4g} in the target's unit, standard deviation {figures['std']:.4g}, "
              f"R² {figures['r2']:.3f} after {epochs}")  # fmt: skip
    config = {"network": net.to_dict(), "class_names": task.names}
    files = write(out, net, state, history, score, config, task, args.export)
    print(f"wrote {', '.join(files[:-1])} and {files[-1]} to {out}/")
    return figures


def make_optimizer(name: str, rate: float | None, decay: float | None, steps: int) -> optax.GradientTransformation:
    """An optimizer with a cosine decay of the learning rate to 0 and weight decay on the weights only."""
    direction, default_rate, default_decay = OPTIMIZERS[name]
    decay = default_decay if decay is None else decay

    def weights(params):
        return jax.tree.map_with_path(lambda path, _: path[-1].key == "w", params)

    schedule = optax.cosine_decay_schedule(rate or default_rate, steps)
    decayed = [optax.add_decayed_weights(decay, mask=weights)] if decay else []
    return optax.chain(direction(), *decayed, optax.scale_by_learning_rate(schedule))


def make_loss_fn(net: fcfunc.Network, classes: int | None, l2: float):
    """The mean loss over a batch, and the accuracy if there are classes."""

    def loss_of(outputs, params, batch):
        penalty = l2 * losses.l2_penalty(params) if l2 else 0.0
        if classes is None:
            return jnp.mean(losses.squared_error(outputs[:, 0], batch.y)) + penalty, {}
        loss = jnp.mean(losses.softmax_cross_entropy_with_integer_labels(outputs, batch.y))
        hits = jnp.argmax(outputs, axis=-1) == batch.y
        return loss + penalty, {"accuracy": jnp.mean(hits, dtype=jnp.float32)}

    def loss_fn(params, batch, key):  # in evaluation the key is None, which turns off dropout
        return loss_of(net.apply(params, batch.x, key=key), params, batch)

    def loss_fn_with_state(params, batch, key, statistics):
        options = {"training": key is not None, "key": key}
        outputs, statistics = net.apply_batch_norm(params, statistics, batch.x, **options)
        return *loss_of(outputs, params, batch), statistics

    return loss_fn_with_state if net.norm == "batch_norm" else loss_fn


def compare_rules(net: fcfunc.Network, classes: int | None, l2: float, seed: int) -> None:
    """Compares each rule that the run uses with `jax.grad` of its reference implementation, on random inputs."""
    keys = iter(jax.random.split(jax.random.key(seed), 16))
    x = jax.random.normal(next(keys), (32, net.dims[0]))
    w = jax.random.normal(next(keys), net.dims[:2]) / net.dims[0] ** 0.5
    b = jax.random.normal(next(keys), net.dims[1:2])
    outputs = jax.random.normal(next(keys), (32, net.dims[-1]))
    rules: list[tuple] = [("affine", ops, (x, w, b), {})]
    if net.norm:
        leaves = (1 + b,) if net.norm == "rms_norm" else (1 + b, b)
        rules.append((net.norm, ops, (ops.affine(x, w, b), *leaves), {}))
    if net.activation is not None:
        name = str(net.activation).removesuffix("_exact")
        options = {"approximate": False} if net.activation == "gelu_exact" else {}
        if net.norm:
            rules.append((name, ops, (ops.affine(x, w, b),), options))
        else:
            rules.append(("layer", ops, (x, w, b), {"activation": name, **options}))
    if classes is None:
        rules.append(("squared_error", losses, (outputs, jax.random.normal(next(keys), outputs.shape)), {}))
    else:
        labels = jax.random.randint(next(keys), (32,), 0, classes)
        rules.append(("softmax_cross_entropy_with_integer_labels", losses, (outputs, labels), {}))
    if l2:
        rules.append(("l2_penalty", losses, ([{"w": w, "b": b}],), {}))
    print(f"{'hand-written rule':<45}worst relative error against jax.grad of its reference implementation")
    for name, module, args, options in rules:
        rule, plain = (functools.partial(getattr(m, name), **options) for m in (module, reference))
        if name == "batch_norm":
            rule, plain = map(of_batch, (rule, plain))
        error = worst_relative_error(rule, plain, args, next(keys))
        print(f"{f'layer: affine and {net.activation}' if name == 'layer' else name:<45}{error:.1e}")
        if not error < 1e-5:
            raise ValueError(f"the rule of {name} has a relative error of {error:.1e} on this device; not training")


def of_batch(batch_norm):
    """Batch normalization as in a training step, without the returned running statistics."""
    return lambda x, scale, offset: batch_norm(
        x, scale, offset, {"mean": jnp.zeros_like(scale), "var": jnp.ones_like(scale)}, training=True
    )[0]


def worst_relative_error(rule, plain, args: tuple, key: jax.Array) -> float:
    """The largest difference between the gradients of two functions, relative to the largest gradient of the second."""
    out, pull = jax.vjp(rule, *args)
    g = jax.random.normal(key, out.shape, out.dtype)
    errors = [
        jnp.max(jnp.abs(ours - theirs)) / jnp.max(jnp.abs(theirs))
        for ours, theirs in zip(jax.tree.leaves(pull(g)), jax.tree.leaves(jax.vjp(plain, *args)[1](g)), strict=True)
        if theirs.dtype != jax.dtypes.float0  # integer labels have no gradient
    ]
    return float(max(errors))


def load(source: str, task: str, target: str | None, seed: int) -> Task:
    """Reads the data and splits it; the scaling is computed from the training part only."""
    name, folder = source.partition(":")[::2]
    if target is not None and not source.endswith(".csv"):
        raise ValueError("--target names a column, which needs a CSV file")
    if task == "regression" and name in ("digits", "fashion-mnist"):
        raise ValueError(f"--task regression: the targets of {name} are classes")
    if source == "digits":
        parts = data.split(data.digits(), (0.7, 0.15, 0.15), seed=seed)
        return Task(parts, 10, {})
    if name == "fashion-mnist":
        training, test = data.fashion_mnist(*[folder] if folder else [])
        parts = (*data.split(training, (0.9, 0.1), seed=seed), test)
        return Task(tuple(data.Dataset(p.x.reshape(len(p.x), -1) / np.float32(255), p.y) for p in parts), 10, {})
    parts, names, preprocessing = read_parts(Path(source), target, seed)
    data.check_values(parts, name=source)
    if any(np.abs(p.x).max() > np.finfo(np.float32).max for p in parts):
        raise ValueError(f"{source}: x contains numbers too large for float32")
    parts = tuple(data.Dataset(p.x.reshape(len(p.x), -1).astype(np.float32), p.y) for p in parts)
    scaling = {}
    if preprocessing is None:
        scaling["input"] = data.standardizer(parts[0].x)
        parts = tuple(p._replace(x=scaling["input"](p.x)) for p in parts)
    whole = np.issubdtype(parts[0].y.dtype, np.integer)
    if task == "classification" and not whole:
        raise ValueError(f"{source}: --task classification needs integer labels, got {parts[0].y.dtype}")
    if task == "regression" and names is not None:
        raise ValueError(f"{source}: --task regression needs a numeric target, got text ({', '.join(names[:3])}, ...)")
    if task == "regression" or not whole:
        targets = data.standardizer(parts[0].y)
        scaling |= {"target": targets}
        return Task(tuple(p._replace(y=targets(p.y)) for p in parts), None, scaling, preprocessing=preprocessing)
    classes = int(max(p.y.max() for p in parts[:2])) + 1  # a larger label in the test part is an error
    if classes > 10_000:
        raise ValueError(f"{source}: labels go up to {classes - 1}; if y is a quantity, use --task regression")
    return Task(parts, max(classes, 2), scaling, names, preprocessing)


def read_parts(path: Path, target: str | None, seed: int) -> tuple[tuple[data.Dataset, ...], list[str] | None, Any]:
    """The training, validation and test parts of a user's file, the names of its classes, and its preprocessing."""
    fractions = (0.7, 0.15, 0.15)
    if path.suffix == ".csv":
        try:
            table = data.read_csv(path, target=target)
        except ValueError:
            from examples import tables

            mixed = tables.read(path, target)
            if mixed is None:
                raise
            print_columns(mixed.features)
            halves = data.split((np.arange(len(mixed.y)), mixed.y), fractions, seed=seed)
            preprocessing = tables.preprocessing(mixed.features).fit(mixed.features.iloc[halves[0][0]])
            parts = tuple(data.Dataset(preprocessing.transform(mixed.features.iloc[rows]), y) for rows, y in halves)
            return parts, mixed.classes, preprocessing
        return data.split(data.Dataset(table.x, table.y), fractions, seed=seed), table.classes, None
    if path.suffix != ".npz":
        raise ValueError(f"--data {path}: expected digits, fashion-mnist, fashion-mnist:FOLDER, a .npz or a .csv file")
    arrays = {name.lower(): array for name, array in data.read_npz(path).items()}
    if {"x_train", "y_train", "x_test", "y_test"} <= arrays.keys():
        training, test = (checked(path, arrays, f"x_{part}", f"y_{part}") for part in ("train", "test"))
        if training.x.shape[1:] != test.x.shape[1:] or training.y.dtype.kind != test.y.dtype.kind:
            raise ValueError(f"{path}: the examples of the two parts must have equal shapes in x and equal kinds in y")
        return (*data.split(training, (0.85, 0.15), seed=seed), test), None, None
    if {"x", "y"} <= arrays.keys():
        return data.split(checked(path, arrays, "x", "y"), fractions, seed=seed), None, None
    raise ValueError(f"{path}: expected arrays x and y (or x_train, y_train, x_test, y_test), got {', '.join(arrays)}")


def print_columns(features) -> None:
    """Prints which columns of a table are treated as text and which have missing values."""
    text = [name for name in features if features[name].dtype.kind not in "iuf"]
    missing = [name for name in features if features[name].isna().any()]
    print(f"text columns: {', '.join(text) or 'none'}; with missing values: {', '.join(missing) or 'none'}")


def checked(path: Path, arrays: dict[str, np.ndarray], x_name: str, y_name: str) -> data.Dataset:
    """The inputs and targets with these names, checked; booleans become 0 and 1."""
    x, y = arrays[x_name], arrays[y_name]
    if x.ndim < 2 or y.shape != x.shape[:1] or not x.size:
        came = f"{x_name} {list(x.shape)} and {y_name} {list(y.shape)}"
        raise ValueError(f"{path}: expected {x_name} [n, ...] and {y_name} [n], got {came}")
    if "c" in x.dtype.kind + y.dtype.kind:
        raise ValueError(f"{path}: expected real numbers, got {x_name} {x.dtype} and {y_name} {y.dtype}")
    return data.Dataset(x, y.astype(np.int32) if y.dtype.kind == "b" else y)


def check_dims(dims: list[int] | None, features: int, classes: int | None) -> list[int]:
    """The widths, by default with one hidden layer of 256."""
    outputs = classes or 1
    dims = dims or [features, 256, outputs]
    if dims[0] != features or dims[-1] != outputs:
        raise ValueError(f"--dims {','.join(map(str, dims))}: the data has {features} features and {outputs} outputs")
    return dims


def select_device(device: str | None) -> None:
    """Makes JAX use the requested device; raises ValueError if there is none."""
    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    elif device == "gpu":
        try:
            jax.config.update("jax_default_device", jax.devices("gpu")[0])
        except RuntimeError:
            raise ValueError("--device gpu: JAX finds no GPU (install jax[cuda13] or jax[cuda12])") from None


def write(
    out: Path, net: fcfunc.Network, state: train.TrainState, history, score: str, config: dict, task: Task,
    exported: list[str],
) -> list[str]:  # fmt: skip
    """Writes to a temporary folder and then moves the complete files, so that none is left half-written."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    out.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: values for name, values in history.items() if isinstance(values, np.ndarray)}
    records = [{name: values[i].item() for name, values in columns.items()} for i in range(history["epochs"])]
    figure, panels = plt.subplots(1, 2 if score != "loss" else 1, figsize=(9, 3.4), squeeze=False, layout="constrained")
    for panel, metric in zip(panels[0], dict.fromkeys(["loss", score]), strict=True):
        panel.plot(history["epoch"], history[metric], label="training")
        panel.plot(history["epoch"], history[f"validation_{metric}"], label="validation")
        panel.axvline(history["kept_epoch"], color="gray", linestyle=":", label="kept epoch")
        panel.set(xlabel="epoch", ylabel=metric, yscale="log" if metric == "loss" else "linear")
        panel.grid(alpha=0.3)
        panel.legend()
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as staging:
        figure.savefig(Path(staging) / "learning_curve.png", dpi=120)
        plt.close(figure)
        arrays = {"layers": state.params} | ({"statistics": state.model_state} if state.model_state else {})
        params_file.save(Path(staging) / "params.safetensors", arrays | task.scaling, config=config)
        if task.preprocessing is not None:
            import skops.io

            skops.io.dump(task.preprocessing, Path(staging) / "preprocessing.skops")
        numbers = "target" in task.scaling
        predicting = in_unit(state.params, task.scaling["target"]) if numbers else state.params
        options = {"standardizer": task.scaling.get("input"), "final_activation": None if numbers else "softmax"}
        for kind in exported:
            getattr(export, kind)(Path(staging) / f"net.{kind}", net, predicting, state=state.model_state, **options)
        (Path(staging) / "history.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        for name in os.listdir(staging):
            if (out / name).is_dir():
                raise ValueError(f"{out / name}: a folder is in the way")
        out.mkdir(exist_ok=True)
        names = sorted(os.listdir(staging), key=lambda name: (not name.startswith("params"), name))
        for name in names:
            os.replace(Path(staging) / name, out / name)
    return names


def in_unit(params, target: data.Standardizer):
    """Params whose last layer undoes the standardization, so that outputs are in the target's unit."""
    *hidden, last = jax.device_get(params)
    mean, scale = np.float32(target.mean), np.float32(target.scale)
    return [*hidden, {"w": last["w"] * scale, "b": last["b"] * scale + mean}]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="train_classifier", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add(
        "--data",
        default="digits",
        help="digits (default), fashion-mnist, fashion-mnist:FOLDER, FILE.npz or FILE.csv",
    )
    add("--task", choices=("auto", "classification", "regression"), default="auto",
        help="task for your own data; auto: classification if the targets are integers")  # fmt: skip
    add("--target", metavar="COLUMN", help="target column of a CSV file (default: the last)")
    add(
        "--dims",
        type=integers,
        metavar="N,N,...",
        help="widths, inputs to outputs (default: one hidden layer of 256)",
    )
    add("--activation", choices=ACTIVATIONS, default="relu", help="activation of the hidden layers (default: relu)")
    add("--norm", choices=("batch_norm", "layer_norm", "rms_norm"), help="norm of the hidden layers (default: none)")
    add("--residual", action="store_true", help="add a hidden layer's input to its output if the widths are equal")
    add("--dropout", type=positive(float, zero=True, below=1), default=0.0, metavar="RATE",
        help="probability of dropping an output of a hidden layer (default: 0)")  # fmt: skip
    add(
        "--compute-dtype",
        choices=("bfloat16", "float32"),
        help="dtype of the operands of all matmuls (default: that of the params)",
    )
    add("--optimizer", choices=tuple(OPTIMIZERS), help="default: sgd for classification, adam for regression")
    add("--learning-rate", type=positive(float), metavar="RATE", help="initial value; it decays to 0 along a cosine "
        f"(default: {', '.join(f'{name} {rate}' for name, (_, rate, _) in OPTIMIZERS.items())})")  # fmt: skip
    add("--l2", type=positive(float, zero=True), default=0.0, metavar="WEIGHT", help="factor of half the sum of "
        "squared weights in the loss (default: 0)")  # fmt: skip
    add("--weight-decay", type=positive(float, zero=True), metavar="RATE", help="decay of the weights only, times the "
        "learning rate (default: 0, adamw 0.0001)")  # fmt: skip
    add("--export", nargs="+", choices=("onnx", "stablehlo"), default=[], help="export the trained network: its "
        "inputs are as in your file, its outputs probabilities or values in the target's unit")  # fmt: skip
    add("--batch-size", type=positive(int), default=32, metavar="N", help="examples per step (default: 32)")
    add("--epochs", type=positive(int), default=60, metavar="N", help="passes over the training data (default: 60)")
    add(
        "--patience",
        type=positive(int),
        metavar="N",
        help="stop after N epochs without a better validation score",
    )
    add("--seed", type=positive(int, zero=True, below=2**31), default=0, metavar="N", 
        help="seed of the split, the initial weights and the order of the examples (default: 0)")  # fmt: skip
    add("--device", choices=("cpu", "gpu"), help="default: a GPU if JAX finds one, otherwise the CPU")
    add("--out", metavar="FOLDER", help="output folder (default: runs/NAME-OF-DATA)")
    parser.error = usage_error
    return parser.parse_args(argv)


def usage_error(message: str):
    """Raises the error for one line, instead of argparse's full usage."""
    raise ValueError(f"{message} (see --help)")


def positive(kind, *, zero: bool = False, below: float = 1e38):
    """An argument type: a number above 0, or at least 0 with `zero`, and below `below`."""

    def convert(text):
        number = kind(text)
        if not (0 < number < below or (zero and number == 0)):
            raise argparse.ArgumentTypeError(
                f"must be {'at least 0' if zero else 'above 0'} and below {below:g}, got {text}"
            )
        return number

    convert.__name__ = "number" if kind is float else "integer"
    return convert


def integers(text: str) -> list[int]:
    """An argument type: comma-separated widths."""
    return [positive(int, below=2**20)(part) for part in text.split(",")]


def run() -> int:
    """`main` for a shell: an error is one line and exit status 2."""
    try:
        main()
    except (
        ValueError,
        TypeError,
        OSError,
        ImportError,
        FloatingPointError,
        MemoryError,
        jax.errors.JaxRuntimeError,
    ) as e:
        print(f"error: {' '.join(str(e).split()) or type(e).__name__}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run())
