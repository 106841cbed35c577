"""Helpers shared by several test files: a small classification problem, and counts of memory and compilations."""

import contextlib
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np

import fcfunc
from fcfunc import losses, train
from fcfunc.data import Dataset

DIMS = [4, 8, 3]
CHOICES = ("relu", "gelu", "gelu_exact", "silu", "tanh", "sigmoid", "softplus", ("leaky_relu", 0.2), ("elu", 0.7), None)


def make_data(n, seed=0):
    """Examples of three slightly overlapping classes."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, n, dtype=np.int32)
    return Dataset((rng.standard_normal((n, 4)) + 2 * y[:, None]).astype(np.float32), y)


def loss_fn(params, batch, key):
    """The mean cross-entropy and the accuracy of a plain network."""
    del key
    logits = fcfunc.apply(params, batch.x)
    loss = jnp.mean(losses.softmax_cross_entropy_with_integer_labels(logits, batch.y))
    return loss, {"accuracy": jnp.mean(jnp.argmax(logits, axis=-1) == batch.y, dtype=jnp.float32)}


def make_state(optimizer, seed=0):
    return train.init_state(fcfunc.init(jax.random.key(seed), DIMS), optimizer, jax.random.key(seed))


def drawn_network(rng, *, residual=False):
    """A random network with random parameters and running statistics, and inputs to try it on."""
    dims = [int(w) for w in rng.integers(1, 9, rng.integers(2, 6))]
    hidden = len(dims) - 2
    norm = rng.choice([None, "layer_norm", "rms_norm", "batch_norm"]) if hidden else None
    # Where two features are nearly alike, their layer norm multiplies their rounding errors by up to 1 / sqrt(eps).
    least_eps = 1e-2 if norm == "layer_norm" and 2 in dims[1:-1] else 0.0
    net = fcfunc.mlp(
        dims,
        activation=[CHOICES[rng.integers(len(CHOICES))] for _ in range(hidden)],
        final_activation=[None, None, "softmax", "sigmoid", "log_softmax"][rng.integers(5)],
        norm=norm,
        norm_eps=max(least_eps, float(10.0 ** rng.integers(-6, -2))) if norm else None,
        dropout_rate=float(rng.choice([0.0, 0.25])) if hidden else 0.0,
        use_bias=bool(rng.integers(2)),
        residual=residual,
    )
    params = net.init(jax.random.key(int(rng.integers(2**31))))
    params = jax.tree.map(lambda a: a + jnp.asarray(0.3 * rng.standard_normal(a.shape), jnp.float32), params)
    state = []
    if norm == "batch_norm":
        drawn = [{"mean": rng.standard_normal(w), "var": rng.uniform(0.3, 3, w)} for w in dims[1:-1]]
        state = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), drawn)
    return net, params, state, rng.standard_normal((6, dims[0])).astype(np.float32)


def predicted(net, params, state, x):
    """The outputs of a network without dropout, with or without batch normalization."""
    if net.norm == "batch_norm":
        return net.apply_batch_norm(params, state, x, training=False, key=None)[0]
    return net.apply(params, x, key=None)


def temporaries(fun, *args):
    """The temporary memory of a compiled function in bytes; the arguments may be shapes."""
    analysis = jax.jit(fun).lower(*args).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def compiled_collectives(compiled) -> list[tuple[str, list[int]]]:
    """The collectives of a compiled program: the kind of each, and the size of each of its arrays on one device."""
    found = []
    for line in compiled.as_text().splitlines():
        kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
        if match := re.search(rf"= (.*?) ({kinds})(-start)?\(", line):
            shapes = re.findall(r"[a-z]+\d*\[([\d,]*)\]", match[1])
            found.append((match[2], [math.prod(int(n) for n in shape.split(",") if n) for shape in shapes]))
    return found


@contextlib.contextmanager
def compilations():
    """Yields a list that gets one entry for each program compiled inside the context."""
    compiled = []

    def listen(event, duration, **_):
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def lines_run(run, files) -> set[tuple[str, int]]:
    """The lines of `files` that are executed while `run()` runs."""
    lines: set[tuple[str, int]] = set()

    def trace(frame, event, arg):
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            lines.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)
    return lines
