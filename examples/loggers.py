"""Logs a run to JSON lines, TensorBoard, MLflow or Weights & Biases, each with a callback of `train.fit`.

    python -m examples.loggers --logger tensorboard --out runs/logged

A callback is a function of the state and the epoch's record, a dict of numbers. Each logger is a context manager around
the run and closes its files at the end.
"""

import argparse
import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

import fcfunc
from fcfunc import data, losses, train

NET = fcfunc.mlp([64, 64, 10])
OPTIONS = {"epochs": 5, "batch_size": 64}


@contextlib.contextmanager
def json_lines(out: Path) -> Iterator[Callable]:
    """Writes one line of JSON per epoch to history.jsonl."""
    with open(out / "history.jsonl", "w") as file:

        def on_epoch(state, record):
            print(json.dumps(record), file=file, flush=True)

        yield on_epoch


@contextlib.contextmanager
def tensorboard(out: Path) -> Iterator[Callable]:
    """Writes TensorBoard event files; needs tensorboardX. View them with `tensorboard --logdir OUT`."""
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(out)) as writer:

        def on_epoch(state, record):
            for name, value in record.items():
                writer.add_scalar(name, value, record["step"])
            for i, layer in enumerate(state.params):
                writer.add_histogram(f"layer {i}/w", jax.device_get(layer["w"]), record["step"])

        yield on_epoch


@contextlib.contextmanager
def mlflow(out: Path) -> Iterator[Callable]:
    """Writes to MLflow's local SQLite store; needs mlflow. View with `mlflow ui --backend-store-uri sqlite:///OUT/mlflow.db`."""
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{out.resolve()}/mlflow.db")
    if mlflow.get_experiment_by_name("fcfunc") is None:
        mlflow.create_experiment("fcfunc", artifact_location=(out / "artifacts").resolve().as_uri())
    mlflow.set_experiment("fcfunc")
    with mlflow.start_run():
        mlflow.log_params({"network": str(NET.dims), **OPTIONS})

        def on_epoch(state, record):
            mlflow.log_metrics({name: float(value) for name, value in record.items()}, step=record["epoch"])

        yield on_epoch


@contextlib.contextmanager
def wandb(out: Path) -> Iterator[Callable]:
    """Logs to Weights & Biases offline; needs wandb. Upload later with `wandb sync OUT/wandb/offline-run-*`."""
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    with wandb.init(mode="offline", project="fcfunc", dir=str(out), config={"dims": NET.dims, **OPTIONS}) as run:

        def on_epoch(state, record):
            run.log(record, step=record["step"])

        yield on_epoch


LOGGERS = {made.__name__: made for made in (json_lines, tensorboard, mlflow, wandb)}


def main(argv: list[str] | None = None) -> dict:
    """Trains on the digits with one logger and returns the history."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--logger", choices=tuple(LOGGERS), default="json_lines")
    parser.add_argument("--out", default="runs/logged", help="folder for the logs")
    options = parser.parse_args(argv)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)

    def loss_fn(params, batch, key):
        logits = NET.apply(params, batch.x)
        loss = jnp.mean(losses.softmax_cross_entropy_with_integer_labels(logits, batch.y))
        return loss, {"accuracy": jnp.mean(jnp.argmax(logits, axis=-1) == batch.y, dtype=jnp.float32)}

    training, validation = data.split(data.digits(), (0.8, 0.2), seed=0)
    optimizer = optax.adam(3e-3)
    state = train.init_state(NET.init(jax.random.key(0)), optimizer, jax.random.key(1))
    with LOGGERS[options.logger](out) as on_epoch:
        _, history = train.fit(
            loss_fn, optimizer, state, training, validation_data=validation, on_epoch=on_epoch, **OPTIONS
        )
    print(f"validation accuracy {history['validation_accuracy'][-1]:.3f}, logged to {out}/")
    return history


if __name__ == "__main__":
    main()
