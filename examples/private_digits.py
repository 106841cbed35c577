"""Trains on digits with differential privacy, compared with the same network without it.

    python -m examples.private_digits

The private run clips each example's gradient, adds noise to the sum, and draws each batch at random, so that its
parameters are (ε, δ)-private with respect to adding or removing one image. The accuracy on the test images is printed
for both runs. The accuracy on the training images is not private and is never computed.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fcfunc
from examples.pictures import picture
from fcfunc import data, losses, privacy, train

NET = fcfunc.mlp([64, 32, 10], activation="tanh")
OPTIMIZER = optax.sgd(0.1, momentum=0.9)
"""It may only depend on the data through the gradient of each step."""

DELTA = 1e-4
"""δ, well below 1/1438 for the 1438 training images."""


def example_loss(params, batch, key):
    """The per-example losses and gradients of a random batch."""
    del key
    images = batch.examples

    def loss_fn(logits):
        return losses.softmax_cross_entropy_with_integer_labels(logits, images.y)

    return NET.example_gradients(params, images.x, loss_fn)


def plain_loss(params, batch, key):
    """The mean loss over the included examples, without clipping and noise."""
    del key
    images = batch.examples
    values = losses.softmax_cross_entropy_with_integer_labels(NET.apply(params, images.x), images.y)
    return losses.mean(values, over=batch.included)


def accuracies(step, training, test, *, rate, steps, seed=0):
    """The test accuracy after every tenth of the steps."""
    init_key, run_key, batch_key = jax.random.split(jax.random.key(seed), 3)
    state = train.init_state(NET.init(init_key), OPTIMIZER, run_key)
    draw = jax.jit(lambda key: privacy.poisson_batch(key, training, rate=rate))
    tested = []
    for i in range(steps):
        state, _ = step(state, draw(jax.random.fold_in(batch_key, i)))
        if (i + 1) % (steps // 10) == 0:
            hits = jnp.argmax(NET.apply(state.params, test.x), axis=-1) == test.y
            tested.append(float(jnp.mean(hits)))
    return tested


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Trains both networks, prints and draws their accuracies with ε, and returns the numbers."""
    parser = argparse.ArgumentParser(prog="private_digits", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--epsilon", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=300, help="a multiple of 10")
    parser.add_argument("--rate", type=float, default=0.1, help="the probability that an image is in a batch")
    parser.add_argument("--out", default="runs/private_digits", help="folder for the plot")
    args = parser.parse_args(argv)

    training, test = jax.tree.map(jnp.asarray, data.split(data.digits(), (0.8, 0.2), seed=0))
    count = len(training.x)
    sampling = {"rate": args.rate, "delta": DELTA}
    sigma = privacy.noise_multiplier(epsilon=args.epsilon, steps=args.steps, **sampling)
    aggregate = privacy.private_mean(max_norm=1.0, noise_multiplier=sigma, expected_batch_size=args.rate * count)
    steps = {
        "private": train.make_train_step(example_loss, OPTIMIZER, aggregate=aggregate),
        "not private": train.make_train_step(plain_loss, OPTIMIZER),
    }
    curves = {name: accuracies(step, training, test, rate=args.rate, steps=args.steps) for name, step in steps.items()}
    taken = np.arange(1, 11) * (args.steps // 10)
    spent = [privacy.epsilon(noise_multiplier=sigma, steps=int(n), **sampling) for n in taken]
    print(f"{count} images, each in a batch with probability {args.rate}; noise multiplier {sigma:.3f}, δ = {DELTA:g}")
    print(f"{'steps':>6}{'ε':>8}{'private':>10}{'not private':>13}")
    for n, eps, private, plain in zip(taken, spent, curves["private"], curves["not private"], strict=True):
        print(f"{n:6d}{eps:8.2f}{private:10.4f}{plain:13.4f}")
    with picture(Path(args.out) / "private_digits.png", figsize=(6, 3.6)) as panel:
        for name, curve in curves.items():
            panel.plot(taken, curve, "o-", label=name)
        for n, eps, private in list(zip(taken, spent, curves["private"], strict=True))[::3]:
            panel.annotate(
                f"ε = {eps:.1f}", (n, private), xytext=(0, 8), textcoords="offset points", ha="center", fontsize=8
            )
        panel.set(xlabel="steps", ylabel="test accuracy", title=f"digits, ε = {args.epsilon:g}, δ = {DELTA:g}")
        panel.grid(alpha=0.3)
        panel.legend(loc="lower right")
    return {"epsilon": spent[-1], "private": curves["private"][-1], "plain": curves["not private"][-1]}


if __name__ == "__main__":
    main()
