"""What several test files share: a small classification problem, and counts of memory and compilations."""

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


def make_data(n, seed=0):
    """Examples of three classes that overlap a little."""
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


def temporaries(fun, *args):
    """The bytes of temporary memory of a compiled function; the arguments may be shapes."""
    analysis = jax.jit(fun).lower(*args).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def compiled_collectives(compiled) -> list[tuple[str, list[int]]]:
    """What the devices exchange in a compiled program: the kind, and the elements of each array on a device."""
    found = []
    for line in compiled.as_text().splitlines():
        kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
        if match := re.search(rf"= (.*?) ({kinds})(-start)?\(", line):
            shapes = re.findall(r"[a-z]+\d*\[([\d,]*)\]", match[1])
            found.append((match[2], [math.prod(int(n) for n in shape.split(",") if n) for shape in shapes]))
    return found


@contextlib.contextmanager
def compilations():
    """The programs that are compiled in the meantime, one entry for each."""
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
    """The lines of some files that are executed while `run()` runs."""
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
