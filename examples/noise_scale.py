"""Estimates the gradient noise scale during a run, and the batch size that it suggests.

    python -m examples.noise_scale

If the batch size is below the noise scale, a step's gradient is mostly noise, and a larger batch reduces the number of
steps almost in proportion; above it, a larger batch saves little (McCandlish et al. 2018). The noise scale is small at
first, when all examples agree on the direction, and grows as the network fits them. Each step estimates it from its own
batch. If the noise scale is far above the batch size, that estimate has no correct digits.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fcfunc
from examples.pictures import picture
from fcfunc import data, losses, per_example, train

NET = fcfunc.mlp([64, 64, 10])
BATCH, WINDOW = 128, 50


def example_loss(params, batch, key):
    """The per-example losses and gradients."""
    del key

    def loss_fn(logits):
        return losses.softmax_cross_entropy_with_integer_labels(logits, batch.y)

    return NET.example_gradients(params, batch.x, loss_fn)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Trains, draws the noise scale over the steps, and returns its first and last values."""
    parser = argparse.ArgumentParser(prog="noise_scale", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=300, help=f"a multiple of {WINDOW}")
    parser.add_argument("--out", default="runs/noise_scale", help="folder for the plot")
    args = parser.parse_args(argv)

    training, test = jax.tree.map(jnp.asarray, data.split(data.digits(), (0.8, 0.2), seed=0))
    optimizer = optax.sgd(0.05)
    step = train.make_train_step(example_loss, optimizer, aggregate=per_example.mean_with_noise_scale)
    init_key, run_key, batch_key = jax.random.split(jax.random.key(0), 3)
    state = train.init_state(NET.init(init_key), optimizer, run_key)

    @jax.jit
    def of_all(params):
        return per_example.noise_scale(example_loss(params, training, None)[1])

    @jax.jit
    def draw(key):
        return jax.tree.map(lambda a: a[jax.random.choice(key, len(training.x), (BATCH,), replace=False)], training)

    steps, estimated, exact, variance, signal = [], [], [], [], []
    for i in range(args.steps):
        state, metrics = step(state, draw(jax.random.fold_in(batch_key, i)))
        variance.append(metrics["variance"])
        signal.append(metrics["squared_gradient"])
        if (i + 1) % WINDOW == 0:  # a ratio of means, because the noisiest steps would dominate a mean of ratios
            estimated.append(float(np.mean(variance[-WINDOW:]) / np.mean(signal[-WINDOW:])))
            steps.append(i + 1 - WINDOW / 2)
        if i % WINDOW == WINDOW // 2:
            exact.append(float(of_all(state.params).noise_scale))
    accuracy = float(jnp.mean(jnp.argmax(NET.apply(state.params, test.x), axis=-1) == test.y))
    print(f"{NET.dims}, batches of {BATCH}, {args.steps} steps of SGD; test accuracy {accuracy:.4f}")
    print(f"{'steps':>12}{'from the batches':>18}{'from all examples':>19}")
    for n, a, b in zip(steps, estimated, exact, strict=True):
        print(f"{n - WINDOW / 2:5.0f} to {n + WINDOW / 2:3.0f}{a:18.0f}{b:19.0f}")
    print(f"suggested batch size: about {estimated[0]:.0f} for the first steps and {estimated[-1]:.0f} for the last")
    with picture(Path(args.out) / "noise_scale.png", figsize=(6, 3.6)) as panel:
        panel.plot(steps, exact, label="from all training examples")
        panel.plot(steps, estimated, "o", label=f"from {WINDOW} batches of {BATCH}", ms=4)
        panel.axhline(BATCH, color="gray", lw=1, ls="--", label="the batch size")
        panel.set(yscale="log", xlabel="step", ylabel="tr Σ / |G|², examples", title="gradient noise scale, digits")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    return {"first": estimated[0], "last": estimated[-1], "first_exact": exact[0], "last_exact": exact[-1]}


if __name__ == "__main__":
    main()
