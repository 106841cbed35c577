"""Compares the chunked output layer with the dense one in temporaries and time, up to a million classes.

python -m benchmarks.large_output              # the table
python -m benchmarks.large_output --million    # trains with 1,048,576 classes and prints the peak memory
"""

import argparse
import functools
import resource
import time

import jax
import jax.numpy as jnp
import optax

import fcfunc
from benchmarks.timing import in_turns, ratio
from fcfunc import losses, train

D = 512


def plain(x, w, b, labels):
    """The loss in plain JAX."""
    logits = x @ w + b
    return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]


def gradient(loss, n: int, classes: int):
    """The compiled gradient, its arguments, and its temporaries in bytes."""
    keys = jax.random.split(jax.random.key(0), 3)
    args = (
        jax.random.normal(keys[0], (n, D)),
        jax.random.normal(keys[1], (D, classes)) / D**0.5,
        jnp.zeros(classes),
        jax.random.randint(keys[2], (n,), 0, classes),
    )
    compiled = jax.jit(jax.value_and_grad(lambda *a: jnp.mean(loss(*a)), argnums=(0, 1, 2))).lower(*args).compile()
    return compiled, args, compiled.memory_analysis().temp_size_in_bytes


def compare(n: int, classes: int) -> None:
    """Prints one row: dense in plain JAX, chunked, and the default choice."""
    chunk = {"chunk_size": max(2**21 // n, 256)}
    ways = {
        "dense": plain,
        "chunked": functools.partial(losses.linear_softmax_cross_entropy, **chunk),
        "chosen": losses.linear_softmax_cross_entropy,
    }
    programs, temporaries = {}, {}
    for name, loss in ways.items():
        compiled, args, temporaries[name] = gradient(loss, n, classes)
        programs[name] = (compiled, args)
    seconds = in_turns(programs, rounds=5 if n * classes > 2**24 else 15)
    print(
        f"| {n} | {classes} | {temporaries['dense'] / 1e6:.1f} | {temporaries['chunked'] / 1e6:.1f} "
        f"| {temporaries['chosen'] / 1e6:.1f} | {ratio(seconds['chunked'], seconds['dense'])} "
        f"| {ratio(seconds['chosen'], seconds['dense'])} |",
        flush=True,
    )


def million(n: int, steps: int) -> None:
    """Trains a network with 2**20 classes by SGD; prints the loss and the peak memory of the process.

    The last layer starts at zero, so the first loss is log(2**20) = 13.8629. JAX's normal sampler alone would need four
    arrays of its size.
    """
    (hidden,) = fcfunc.init(jax.random.key(0), [64, D])
    params = [hidden, {"w": jnp.zeros((D, 2**20)), "b": jnp.zeros(2**20)}]
    optimizer = optax.sgd(1.0)
    state = train.TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), jax.random.key(1))
    del params

    def loss_fn(params, batch, key):
        x, labels = batch
        features = fcfunc.mlp([64, D, 2**20]).features(params, x)
        return jnp.mean(losses.linear_softmax_cross_entropy(features, **params[-1], labels=labels))

    batch = (jax.random.normal(jax.random.key(2), (n, 64)), jax.random.randint(jax.random.key(3), (n,), 0, 2**20))
    step = train.make_train_step(loss_fn, optimizer)
    for i in range(steps):
        start = time.perf_counter()
        state, metrics = step(state, batch)
        print(f"step {i}: loss {float(metrics['loss']):.4f}, {time.perf_counter() - start:.1f} s", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"peak memory of the process {peak / 1e9:.2f} GB")
    shapes = [jax.ShapeDtypeStruct(s, "float32") for s in ((n, D), (D, 2**20), (2**20,))]
    labels = jax.ShapeDtypeStruct((n,), "int32")
    dense = jax.jit(jax.grad(lambda *a: jnp.mean(plain(*a)), argnums=(0, 1, 2))).lower(*shapes, labels).compile()
    print(f"temporaries of the dense loss alone {dense.memory_analysis().temp_size_in_bytes / 1e9:.2f} GB")


def main() -> None:
    """Prints the table, or trains with a million classes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--million", action="store_true")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    if args.million:
        return million(args.rows, args.steps)
    print("| rows | classes | dense, MB | chunked | chosen | time chunked / dense | time chosen / dense |")
    print("|---|---|---|---|---|---|---|")
    for n, classes in [
        (32, 1000),
        (128, 10_000),
        (256, 16_384),
        (512, 16_384),
        (1024, 8192),
        (1024, 32_768),
        (2048, 65_536),
    ]:
        compare(n, classes)


if __name__ == "__main__":
    main()
