"""Uses most of the library in one process for hours, and plots what the process holds.

    python -m proofs.soak --hours 4 --plot docs/background/soak.png

Each turn is one of the operations below, at random, with one of a fixed set of shapes. Memory, threads, file
descriptors, live arrays and compiled programs must not grow after the first tenth of the time, in which every shape is
compiled. Allocated memory is what the C library has handed out; the memory of the process also holds what it keeps for
later, in pieces that may be too small. Prints a row of figures every minute, and at the end whether each of them stayed
flat.
"""

import argparse
import contextlib
import ctypes
import gc
import os
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fcfunc
from fcfunc import checkpoint, data, export, losses, params_file, per_example, stream, testing, train
from fcfunc.sklearn import MLPClassifier

WIDTHS = ([4, 3], [4, 8, 3], [4, 16, 16, 3], [4, 5, 6, 7, 3])
SIZES = (10, 33, 64)
ADAM, SGD = optax.adam(1e-2), optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
TOLERANCE = 1.03
"""By how much the largest figure of the last tenth may exceed that of the second tenth."""


def examples(rng: random.Random) -> data.Dataset:
    """Points of three classes, of one of the sizes."""
    n = rng.choice(SIZES)
    of = np.random.default_rng(rng.randrange(2**32))
    return data.Dataset(of.standard_normal((n, 4), np.float32), of.integers(0, 3, n, dtype=np.int32))


def loss_fn(params, batch, key):
    """The mean cross-entropy."""
    return jnp.mean(losses.softmax_cross_entropy_with_integer_labels(fcfunc.apply(params, batch.x), batch.y))


def new_state(rng: random.Random, optimizer=ADAM) -> train.TrainState:
    """The state of a run of one of the networks."""
    params = fcfunc.init(jax.random.key(rng.randrange(2**31)), rng.choice(WIDTHS))
    return train.init_state(params, optimizer, jax.random.key(rng.randrange(2**31)))


def fits(rng, folder):
    """A run with early stopping, whose loss function is new each time."""
    function = lambda *arguments: loss_fn(*arguments)  # noqa: E731
    held_out = data.Dataset(np.ones((7, 4), np.float32), np.ones(7, np.int32))
    train.fit(
        function, ADAM, new_state(rng), examples(rng), epochs=3, batch_size=8, patience=2, validation_data=held_out
    )


def fails(rng, folder):
    """A run that diverges, which raises an error with the last good state."""
    state = new_state(rng, SGD)
    state.opt_state.hyperparams["learning_rate"] = jnp.float32(1e38)
    with contextlib.suppress(train.NonFiniteError):
        train.fit(loss_fn, SGD, state, examples(rng), epochs=3, batch_size=8)


def interrupts_and_resumes(rng, folder):
    """A run that is saved, interrupted and resumed."""
    run, state, points = Path(tempfile.mkdtemp(dir=folder)), new_state(rng), examples(rng)
    options = {"epochs": 3, "batch_size": 4, "every": 2, "saver": checkpoint.Saver(run, share=1.0)}

    def interrupt(state):
        if int(state.step) > 3:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        train.fit(loss_fn, ADAM, state, points, on_steps=interrupt, **options)
    train.fit(loss_fn, ADAM, state, points, **options)


def streams(rng, folder):
    """A run on memory-mapped files."""
    points = examples(rng)
    for name, a in points._asdict().items():
        np.save(f"{folder}/{name}.npy", a)
    mapped = data.Dataset(*(np.load(f"{folder}/{name}.npy", mmap_mode="r") for name in points._fields))
    train.fit(loss_fn, ADAM, new_state(rng), stream.from_arrays(mapped, chunk_size=16), epochs=2, batch_size=8)


def sweeps(rng, folder):
    """Eight networks in one program."""
    fit = sweep_of(len(points := examples(rng)))
    jax.block_until_ready(fit(jax.random.split(jax.random.key(rng.randrange(2**31)), 8), tuple(points)))


def sweep_of(n: int, made: dict = {}) -> Callable:  # noqa: B006
    """The compiled sweep over `n` examples."""
    if n not in made:
        run = train.make_fit(
            lambda params, batch, key: loss_fn(params, data.Dataset(*batch), key),
            ADAM,
            epochs=2,
            batch_size=8,
            members_at_once=4,
        )
        make = lambda key: train.init_state(fcfunc.init(key, [4, 8, 3]), ADAM, key)  # noqa: E731
        made[n] = jax.jit(lambda keys, points: run(jax.vmap(make)(keys), points))
    return made[n]


def checks(rng, folder):
    """The check of a rule, with new arguments."""
    x = np.random.default_rng(rng.randrange(2**32)).standard_normal((3, 4)).astype(np.float32)
    testing.assert_vjp(rng.choice([fcfunc.ops.relu, fcfunc.ops.softmax]), (x,))


def files(rng, folder):
    """Parameters that are saved and loaded, and a damaged file that is rejected."""
    path = f"{folder}/params.safetensors"
    params_file.save(path, fcfunc.init(jax.random.key(0), rng.choice(WIDTHS)))
    params_file.load(path)
    content = bytearray(Path(path).read_bytes())
    content[-1] ^= 1
    Path(path).write_bytes(content)
    try:
        params_file.load(path)
    except ValueError:
        return
    raise AssertionError("a damaged file was read")


def exports(rng, folder):
    """An ONNX file and a StableHLO program."""
    net = fcfunc.mlp(rng.choice(WIDTHS))
    params = net.init(jax.random.key(0))
    export.onnx(f"{folder}/net.onnx", net, params)
    export.stablehlo(f"{folder}/net.stablehlo", net, params)


def estimates(rng, folder):
    """A scikit-learn estimator."""
    x, y = examples(rng)
    estimator = MLPClassifier(hidden_layer_sizes=(8,), max_iter=3, random_state=rng.randrange(2**31))
    estimator.fit(x, y).predict_proba(x)


def clips(rng, folder):
    """The sum of gradients that are clipped example by example."""
    net = fcfunc.mlp(rng.choice(WIDTHS))
    x, y = examples(rng)
    params = net.init(jax.random.key(0))
    _, gradients = net.example_gradients(
        params, x, lambda logits: losses.softmax_cross_entropy_with_integer_labels(logits, y)
    )
    jax.block_until_ready(per_example.clipped_sum(gradients, 1.0))


OPERATIONS = (
    fits,
    fits,
    fits,
    fails,
    interrupts_and_resumes,
    streams,
    sweeps,
    checks,
    files,
    exports,
    estimates,
    clips,
)


class MallInfo(ctypes.Structure):
    """`struct mallinfo2` of the GNU C library, with names for the two sizes that are read."""

    _fields_ = (
        ("before", ctypes.c_size_t * 4),
        ("hblkhd", ctypes.c_size_t),
        ("between", ctypes.c_size_t * 2),
        ("uordblks", ctypes.c_size_t),
        ("after", ctypes.c_size_t * 2),
    )


def allocated() -> int:
    """The bytes that `malloc` has handed out and that are not freed, in all its arenas and in blocks of their own."""
    mallinfo2 = ctypes.CDLL("libc.so.6").mallinfo2
    mallinfo2.restype = MallInfo
    info = mallinfo2()
    return info.uordblks + info.hblkhd


def figures() -> dict[str, float]:
    """What the process holds."""
    gc.collect()
    return {
        "memory, MB": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6,
        "allocated, MB": allocated() / 1e6,
        "threads": len(os.listdir("/proc/self/task")),
        "file descriptors": len(os.listdir("/proc/self/fd")),
        "live arrays": len(jax.live_arrays()),
        "compiled programs": len(jax.devices()[0].client.live_executables()),
    }


def growth(hours: list[float], rows: list[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """The largest value of each figure in the second and in the last tenth of the time."""
    parts = []
    for start in (0.1, 0.9):
        part = [row for t, row in zip(hours, rows, strict=True) if start <= t / hours[-1] <= start + 0.1]
        parts.append({name: max(row[name] for row in part) for name in rows[0]})
    return {name: (parts[0][name], parts[1][name]) for name in rows[0]}


def plot(path: str, hours: list[float], rows: list[dict[str, float]]) -> None:
    """One panel for each figure, against time; the first tenth is shaded."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 3, figsize=(9, 4.5), sharex=True, layout="constrained")
    for panel, name in zip(panels.flat, rows[0], strict=True):
        panel.plot(hours, [row[name] for row in rows], linewidth=1)
        panel.axvspan(0, hours[-1] / 10, color="0.9")
        panel.set_ylim(bottom=0)
        panel.set_title(name, fontsize=10)
    for panel in panels[-1]:
        panel.set_xlabel("hours")
    figure.savefig(path, dpi=80, metadata={"Software": None})


def main() -> int:
    """Returns 1 if a figure grew."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--hours", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", help="a PNG file for the figures over time")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # scikit-learn's ConvergenceWarning
    rng, counts, hours, rows = random.Random(args.seed), Counter(), [], []
    start = time.monotonic()
    end, step = args.hours * 3600, min(60.0, args.hours * 36)
    with tempfile.TemporaryDirectory() as folder:
        while (now := time.monotonic() - start) < end or not rows:
            operation = rng.choice(OPERATIONS)
            with tempfile.TemporaryDirectory(dir=folder) as own:
                operation(rng, own)
            counts[operation.__name__] += 1
            if now >= len(rows) * step:
                hours.append(now / 3600)
                rows.append(figures())
                print(f"{now / 60:.0f} min, {counts.total()} operations:", rows[-1], flush=True)
                if args.plot:
                    plot(args.plot, hours, rows)
    print(dict(counts))
    grew = growth(hours, rows)
    for name, (early, late) in grew.items():
        verdict = "flat" if late <= TOLERANCE * early else "GREW"
        print(f"{name}: {early:.6g} in the second tenth, {late:.6g} in the last: {verdict}")
    return int(any(late > TOLERANCE * early for early, late in grew.values()))


if __name__ == "__main__":
    sys.exit(main())
