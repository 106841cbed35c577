"""Compares bfloat16 with float32 compute on Fashion-MNIST: test accuracy over seeds, and gradient errors.

python -m benchmarks.bfloat16 --epochs 15 --seeds 3
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import fcfunc
from fcfunc import data, losses, ops, reference, train

DIMS = [784, 512, 512, 10]


def loss_fn(params, batch, key, *, ops=ops, losses=losses, **options):
    """The cross-entropy and the accuracy."""
    x, y = batch
    x = x.reshape(len(x), -1).astype(params[0]["w"].dtype) / 255
    logits = fcfunc.mlp(DIMS, ops=ops, **options).apply(params, x)
    loss = jnp.mean(losses.softmax_cross_entropy_with_integer_labels(logits, y))
    return loss, {"accuracy": jnp.mean((jnp.argmax(logits, axis=-1) == y).astype(jnp.float32))}


def accuracy(seed: int, epochs: int, training, test, **options) -> float:
    """The test accuracy of a network trained from scratch."""
    loss = functools.partial(loss_fn, **options)
    steps = epochs * -(-len(training.y) // 128)
    optimizer = optax.sgd(
        optax.cosine_decay_schedule(0.05, steps), momentum=0.9
    )  # decays to zero, so that late steps add no noise
    state = train.init_state(fcfunc.init(jax.random.key(seed), DIMS), optimizer, jax.random.key(seed + 1000))
    state, _ = train.fit(loss, optimizer, state, training, epochs=epochs, batch_size=128)
    return float(train.evaluate(loss, state.params, test)["accuracy"])


def gradient_errors(batch) -> dict[str, float]:
    """The relative distance of gradients from the float64 gradient, by rules and by autodiff."""
    with jax.enable_x64(True):
        params = fcfunc.init(jax.random.key(0), DIMS)
        wide = jax.tree.map(lambda a: a.astype(jnp.float64), params)

        def flat(params, x, **options):
            grads = jax.grad(lambda p: loss_fn(p, (x, batch[1]), None, **options)[0])(params)
            return np.asarray(ravel_pytree(grads)[0], np.float64)

        reference_options = {"ops": reference, "losses": reference}
        x = jnp.asarray(batch[0])
        truth = flat(wide, x, **reference_options)
        runs = {
            "float32, rules": {},
            "bfloat16, rules": {"compute_dtype": "bfloat16"},
            "bfloat16, autodiff": {"compute_dtype": "bfloat16", **reference_options},
        }
        norm = np.linalg.norm(truth)
        return {name: float(np.linalg.norm(flat(params, x, **o) - truth) / norm) for name, o in runs.items()}


def main() -> None:
    """Prints the gradient errors and the accuracies."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    training, test = data.fashion_mnist()
    for name, error in gradient_errors((training.x[:128], training.y[:128])).items():
        print(f"relative error of a gradient, {name}: {error:.2e}")
    found: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    for seed in range(args.seeds):
        for name, options in {"float32": {}, "bfloat16": {"compute_dtype": "bfloat16"}}.items():
            start = time.perf_counter()
            found[name].append(accuracy(seed, args.epochs, training, test, **options))
            print(f"seed {seed}, {name}: {found[name][-1]:.4f}, {time.perf_counter() - start:.0f} s", flush=True)
    means = {name: statistics.mean(values) for name, values in found.items()}
    print(f"means: {means}; bfloat16 minus float32: {100 * (means['bfloat16'] - means['float32']):+.2f} points")


if __name__ == "__main__":
    main()
