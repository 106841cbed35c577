"""Times `check_vjp` on this library's rules, next to `jax.test_util.check_grads` on the same functions.

    python -m benchmarks.checker

"cold" is the first call after clearing JAX's caches, and "warm" is the second call. check_grads runs in reverse mode to
order 1, eagerly, as its users call it. It compares one random direction in one dtype.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.test_util import check_grads

from fcfunc import losses, ops
from fcfunc.testing import check_vjp

cross_entropy = losses.softmax_cross_entropy_with_integer_labels
linear_cross_entropy = partial(losses.linear_softmax_cross_entropy, chunk_size=3)

RULES: dict[str, tuple[Callable, str]] = {
    "affine": (ops.affine, "n d, d m, m"),
    **{
        name: (getattr(ops, name), "n d")
        for name in (
            "relu",
            "leaky_relu",
            "elu",
            "sigmoid",
            "tanh",
            "softplus",
            "silu",
            "gelu",
            "softmax",
            "log_softmax",
        )
    },
    **{
        f"layer, {name}": (partial(ops.layer, activation=name), "n d, d m, m")
        for name in ("relu", "gelu", "tanh", "elu")
    },
    "dropout": (lambda x, key: ops.dropout(x, rate=0.3, key=key), "n d, :key"),
    "layer_norm": (ops.layer_norm, "n d, d, d"),
    "rms_norm": (ops.rms_norm, "n d, d"),
    "cross-entropy, labels": (cross_entropy, "n c, n:int<c"),
    "cross-entropy, labels, weighted": (
        lambda z, y, where, w, u: cross_entropy(z, y, where=where, weights=w, class_weights=u, label_smoothing=0.2),
        "n c, n:int<c, n:bool, n:positive, c:positive",
    ),
    "cross-entropy, distributions": (losses.softmax_cross_entropy, "n c, n c:positive"),
    "binary cross-entropy": (losses.sigmoid_binary_cross_entropy, "n c, n c:0..1"),
    "linear and cross-entropy": (linear_cross_entropy, "n d, d c, c, n:int<c"),
    "squared_error": (losses.squared_error, "n d, n d"),
    "negative_log_likelihood": (losses.negative_log_likelihood, "n c:0..1, n:int<c"),
    "multiclass_svm": (losses.multiclass_svm, "n c, n:int<c"),
}
SIZES = {"n": 5, "d": 3, "m": 7, "c": 4}


def by_check_grads(fun: Callable, shapes: str) -> None:
    """Calls `check_grads` on the real arguments, with the others held fixed."""
    rng, args = np.random.default_rng(0), []
    for part in shapes.split(","):
        dims, _, kind = part.strip().partition(":")
        shape = [SIZES[d] for d in dims.split()]
        if kind == "key":
            args.append(jax.random.key(0))
        elif kind == "bool":
            args.append(jnp.ones(shape, bool))
        elif kind.startswith("int"):
            args.append(jnp.asarray(rng.integers(0, SIZES["c"], shape)))
        else:
            args.append(jnp.asarray(rng.uniform(0.1, 0.9, shape), jnp.float32))
    real = [i for i, a in enumerate(args) if jnp.issubdtype(a.dtype, jnp.floating)]

    def of_reals(*reals):
        given = list(args)
        for i, a in zip(real, reals, strict=True):
            given[i] = a
        return fun(*given)

    check_grads(of_reals, [args[i] for i in real], order=1, modes=("rev",), atol=0.1, rtol=0.1)


def seconds(run: Callable, *args) -> float:
    """The time of one call."""
    start = time.perf_counter()
    run(*args)
    return time.perf_counter() - start


def main() -> None:
    """Prints the table in Markdown."""
    print("| rule | cold (s) | warm (s) | check_grads, cold (s) | ratio, cold |\n|---|---|---|---|---|")
    table = []
    for name, (fun, shapes) in RULES.items():
        jax.clear_caches()
        by_grads = seconds(by_check_grads, fun, shapes)
        jax.clear_caches()
        cold, warm = (seconds(check_vjp, fun, shapes) for _ in range(2))
        table.append((cold, warm, by_grads, cold / by_grads))
        print(f"| {name} | {cold:.2f} | {warm:.2f} | {by_grads:.2f} | {cold / by_grads:.1f} |", flush=True)
    for name, of in {"median": statistics.median, "largest": max}.items():
        print("| **{}** | {:.2f} | {:.2f} | {:.2f} | {:.1f} |".format(name, *map(of, zip(*table, strict=True))))


if __name__ == "__main__":
    main()
