"""A sweep over seeds and learning rates on handwritten digits, as one compiled program, with a table and a plot.

    python -m examples.sweep

Each run has its own initial parameters and order of the examples, stops independently, and keeps its best epoch.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fcfunc
from examples.pictures import picture
from fcfunc import data, losses, train

DIMS = [64, 128, 10]


def loss_fn(params, batch, key):
    """The mean cross-entropy and the accuracy."""
    del key
    logits = fcfunc.apply(params, batch.x)
    loss = jnp.mean(losses.softmax_cross_entropy_with_integer_labels(logits, batch.y))
    return loss, {"accuracy": jnp.mean(jnp.argmax(logits, axis=-1) == batch.y, dtype=jnp.float32)}


def optimizer(rate) -> optax.GradientTransformation:
    """SGD with its learning rate in the state, so that the runs of one program can have different rates."""
    return optax.inject_hyperparams(optax.sgd)(learning_rate=rate)


def make_sweep(epochs: int, patience: int):
    """`sweep(keys, rates, training, validation) -> (states, histories)`, with axes `[keys, rates]`."""
    fit = train.make_fit(
        loss_fn, optimizer(0.1), epochs=epochs, batch_size=32, monitor="accuracy", mode="max", patience=patience
    )

    def member(key, rate, training, validation):
        init_key, run_key = jax.random.split(key)
        state = train.init_state(fcfunc.init(init_key, DIMS), optimizer(rate), run_key)
        return fit(state, training, validation)

    over_rates = jax.vmap(member, in_axes=(None, 0, None, None))
    return jax.jit(jax.vmap(over_rates, in_axes=(0, None, None, None)))


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Runs the sweep, prints and draws the results, and returns those of the best learning rate."""
    parser = argparse.ArgumentParser(prog="sweep", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--rates", type=int, default=8, help="number of learning rates, log-spaced")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--patience", type=int, default=5)
    parser.add_argument("--out", default="runs/sweep", help="folder for the plot")
    args = parser.parse_args(argv)

    training, validation, test = jax.tree.map(jnp.asarray, data.split(data.digits(), (0.7, 0.15, 0.15), seed=0))
    keys, rates = jax.random.split(jax.random.key(0), args.seeds), jnp.logspace(-2.5, 0.5, args.rates)
    states, histories = make_sweep(args.epochs, args.patience)(keys, rates, training, validation)

    def on_test(params):
        return train.evaluate(loss_fn, params, test)["accuracy"]

    tested = np.asarray(jax.vmap(jax.vmap(on_test))(states.params))
    epochs, curves = np.asarray(histories["epochs"]), np.asarray(histories["validation_accuracy"])
    best = np.nanmax(np.where(np.isnan(curves), 0.0, curves), axis=-1)

    print(f"{args.seeds} seeds x {args.rates} learning rates, {DIMS}, at most {args.epochs} epochs")
    print(f"{'rate':>8}{'epochs run':>12}{'validation':>12}{'test accuracy over the seeds':>34}")
    for j, rate in enumerate(np.asarray(rates)):
        spread = f"{tested[:, j].mean():.4f} ({tested[:, j].min():.4f} to {tested[:, j].max():.4f})"
        print(f"{rate:8.4f}{epochs[:, j].mean():12.1f}{best[:, j].mean():12.4f}{spread:>34}")
    chosen = int(np.argmax(best.mean(axis=0)))  # chosen on the validation examples, never on the test examples
    print(f"best by validation: learning rate {rates[chosen]:.4f}, test accuracy {tested[:, chosen].mean():.4f}")
    draw(Path(args.out), np.asarray(rates), best, tested)
    return {"rate": float(rates[chosen]), "accuracy": float(tested[:, chosen].mean())}


def draw(out: Path, rates, best, tested) -> None:
    """Draws the best validation accuracy and the test accuracy by learning rate, with one point per seed."""
    with picture(out / "sweep.png", figsize=(6, 3.6)) as panel:
        for values, name, marker in ((best, "validation, best epoch", "o"), (tested, "test, at that epoch", "x")):
            (line,) = panel.plot(rates, values.mean(axis=0), label=name)
            panel.plot(np.broadcast_to(rates, values.shape), values, marker, color=line.get_color(), alpha=0.4, ms=4)
        panel.set(xscale="log", xlabel="learning rate", ylabel="accuracy", title=f"{len(best)} seeds, digits")
        panel.grid(alpha=0.3)
        panel.legend()


if __name__ == "__main__":
    main()
