"""Compares the training time of fcfunc and other libraries in alternating runs; writes docs/background/benchmarks.md.

    make bench                                           # all tables, and the page
    python -m benchmarks.training --only small,digits    # some tables, only printed

A turn runs every peer once. Each turn begins with a different peer, so that a drift of the machine affects all of them.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fcfunc
from benchmarks import kernels
from benchmarks.peers import PEERS, Task, classifier_loss, with_fcfunc, with_torch
from benchmarks.process import PROCESSES
from benchmarks.timing import ratio
from fcfunc import data, train

PAGE = Path(__file__).parents[1] / "docs" / "background" / "benchmarks.md"

INTRODUCTION = """# Benchmarks

This page compares the training time of fcfunc with that of other libraries. Written by `make bench` on {cores} CPU
cores ({machine}), Python {python}: {versions}. Nothing here was measured on a GPU.

Times are ratios: the time of a peer divided by the time of fcfunc. Each is the median over alternating runs, with
the lowest and the highest. The data, batches, optimizer, learning rate and initial parameters are the same for all,
except that scikit-learn draws its own initial parameters. The accuracy is measured after all turns, when each peer
has trained for the same number of epochs. The peers are in `benchmarks/peers.py`. A "loop" compiles one step, as the
documentation of most libraries shows; a "scan" compiles an epoch with its shuffle. Keras runs up to 128 steps per
execution, "PyTorch, compiled" compiles the loss with its gradient and the update, and scikit-learn runs its own `fit`.

Two rows are bounds, not peers. "bare scan" is plain JAX without a shuffle. "matmuls" are the matmuls of the steps
alone, at the same shapes and in the same run.
"""

NOTES = """
## Where the time goes

- **Kernels.** The table of kernels is JAX's profile of fcfunc's epochs. Each kernel is classified by its operation
  in the compiled program: "matmuls" are those of the forward and the backward pass, "order" is the shuffle, "gather"
  collects the batch, "update" is Optax's update, and "others" are the activations, the loss and the sums of the bias
  gradients. "between" is the time when no kernel runs: the runtime's own work from one kernel to the next. In the
  wide network, this time still belongs to a matmul: the runtime splits the gradient of the first weights into parts
  for its thread pool, and the profile shows no event for the time before its update.
- **Bounds.** No program can be faster than the "matmuls" row. The difference between it and "bare scan" is the rest
  of the arithmetic, the update, and the time that XLA's CPU runtime spends between the kernels of a step. The
  difference between "bare scan" and fcfunc is the shuffle and the gather of each batch.
- **Wide network.** Here every library spends its time in the same matmuls, and the scans and compiled loops differ
  from fcfunc by no more than the spread of the runs.
- **Smallest network.** Half of a step is spent outside matmul kernels. Two steps per iteration of the loop save 3 to
  9% in networks of up to 65,536 parameters; three or more take longer than one. One update for all leaves
  (`optax.flatten`) saves another 5% here and nothing in the digits network, so it is left to the user. XLA's options
  for the scheduler, fusions and copies made no difference outside the noise.
- **Fashion-MNIST.** The gap to "bare scan" is the gather: batches of random rows from 188 MB. Per epoch it took 35 ms
  for random rows and 12 ms for rows in sequence. Collecting the next batch during a step took 1.07 to 1.29 times as
  long, collecting all batches at once 1.3 to 1.4 times; indices without a sign and huge pages made no difference.
- **Shuffle.** The order of an epoch is computed element by element by a keyed bijection (`train/_permutation.py`).
  It takes 0.4 ms for 54,000 examples and 1.5 ms for a million. Sorting took 18.4 and 478 ms, measured side by side.
  Its keys are hashed from the words of the run's key: JAX's generator, which XLA compiles as a loop on a CPU, took a
  tenth of an epoch of the digits network.
- **ReLU masks.** The mask of a ReLU layer is packed into bits only where the output of the layer is not kept anyway,
  such as under a scan over layers. Packing took 7 to 9% of a step of the digits network.
- **Start-up.** Of the whole process, importing JAX, reading the images and the matmuls of five epochs cannot be
  shortened here. Compiling the epoch takes half a second on both cores, a third of it for the shorter last batch;
  compiling that batch in a second thread saved nothing. Making the initial parameters was shortened from 0.45 to 0.3 s
  by leaving out XLA's fusion emitters, and the copy of the state from 0.11 s to 0.002 s by a transfer that compiles
  nothing (2026-11-27).
- **Compilation cache.** The last row of the whole process uses JAX's persistent compilation cache
  (`JAX_COMPILATION_CACHE_DIR=folder JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
  JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1`).
- **Images** stay bytes on the device until a step converts them, with `batch.x.astype(jnp.float32) / 255` in the
  loss function. This takes no longer than training on float32.
- **Other sizes** are on the pages [Scaling](scaling.md) and [Populations](populations.md), and `make bench-gpu`
  measures a GPU: [Benchmarks on a GPU](benchmarks-gpu.md).
"""


def small() -> Task:
    """Two classes of points in four dimensions."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5120, 4)).astype(np.float32)
    y = (x[:, 0] * x[:, 1] + np.sin(3 * x[:, 2]) > 0).astype(np.int32)
    return Task([4, 32, 32, 2], 32, True, 1e-3, x[:4096], y[:4096], x[4096:], y[4096:])


def digits() -> Task:
    """The handwritten digits from scikit-learn, in 44 batches of 32."""
    training, test = data.split(data.digits(), (0.8, 0.2), seed=0)
    x, y = training.x[:1408], training.y[:1408]
    return Task([64, 128, 10], 32, False, 0.1, x, y, *test)


def fashion(dims=(784, 128, 10), batch_size=128, count=59_904) -> Task:
    """Fashion-MNIST, cut to whole batches."""
    training, test = data.fashion_mnist()
    x, x_test = (part.x.reshape(len(part.x), -1) / np.float32(255) for part in (training, test))
    return Task(list(dims), batch_size, False, 0.1, x[:count], training.y[:count], x_test, test.y)


def wide() -> Task:
    """A network that spends its time in matmuls; ten batches."""
    return fashion((784, 2048, 2048, 10), 512, 5120)


def with_matmuls(task: Task):
    """The matmuls of a step alone: forward, weight gradients, and input gradients of all layers but the first."""
    whole = len(task.x) - len(task.x) % task.batch_size
    batches = jnp.asarray(task.x[:whole]).reshape(-1, task.batch_size, task.dims[0])

    def step(weights, x):
        inputs = [x]
        for w in weights:
            inputs.append(inputs[-1] @ w)
        g, results = inputs.pop(), []
        for layer, w in reversed(list(enumerate(weights))):
            results.insert(0, inputs[layer].T @ g)
            g = g @ w.T if layer else g
        return results, None  # instead of the weights: nothing is optimized away, and nothing is added

    run, weights = jax.jit(lambda ws, xs: jax.lax.scan(step, ws, xs)[0]), [p["w"] for p in task.params]

    def epochs(k):
        for _ in range(k):
            jax.block_until_ready(run(weights, batches))

    return epochs, lambda: float("nan")


ROWS: dict[str, tuple[str, Callable, int, int, list[str]]] = {
    "small": ("4-32-32-2, batch 32, Adam", small, 10, 9, [*PEERS, "matmuls"]),
    "digits": ("digits 64-128-10, batch 32, SGD", digits, 20, 9, [*PEERS, "matmuls"]),
    "fashion": ("Fashion-MNIST 784-128-10, batch 128, SGD, one epoch", fashion, 1, 7, [*PEERS, "matmuls"]),
    "wide": ("784-2048-2048-10, batch 512, SGD, ten steps", wide, 1, 7, [*PEERS, "matmuls"]),
}
"""Title, task, epochs per turn, turns, and peers."""


def in_turns(runs: dict[str, Callable], turns: int, before: dict[str, Callable]) -> dict[str, list[float]]:
    """Times each run `turns` times, each time after an untimed run of the same peer.

    Without the untimed run, the peer after scikit-learn took up to twice as long, perhaps because the threads of
    scikit-learn were still spinning (not investigated). With a pause instead, all times were longer and more scattered.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(turns):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            before[name]()
            start = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def table_of_training(name: str) -> list[str]:
    """The table for one network in all libraries."""
    title, make, epochs, turns, peers = ROWS[name]
    task = make()
    made = {peer: with_matmuls(task) if peer == "matmuls" else PEERS[peer](task) for peer in peers}
    for run, _ in made.values():
        run(1)
    timed = {peer: functools.partial(run, epochs) for peer, (run, _) in made.items()}
    seconds = in_turns(timed, turns, {peer: functools.partial(run, 1) for peer, (run, _) in made.items()})
    lines = ["", f"## {title}", "", "| | time relative to fcfunc | test accuracy |", "|---|---|---|"]
    for peer, (_, accuracy) in made.items():
        score = "" if peer == "matmuls" else f"{float(accuracy()):.4f}"
        lines.append(f"| {peer} | {ratio(seconds[peer], seconds['fcfunc'])} | {score} |")
    return lines


def answer_of(peer: str, env: dict[str, str]) -> str:
    """What `python -m benchmarks.process` prints for a peer."""
    command = [sys.executable, "-m", "benchmarks.process", peer]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | env).stdout


def table_of_processes() -> list[str]:
    """Whole processes: import, read data, train five epochs, print the accuracy; and the stages of fcfunc's."""
    accuracies: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        cache = {
            "JAX_COMPILATION_CACHE_DIR": folder,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        answer_of("fcfunc", cache)
        ways = {peer: (peer, {}) for peer in PROCESSES} | {CACHED: ("fcfunc", cache)}

        def run(way):
            accuracies[way] = answer_of(*ways[way]).split()[-1]

        seconds = in_turns({way: functools.partial(run, way) for way in ways}, 7, dict.fromkeys(ways, int))
    lines = ["", "## Whole process: import, read data, train 5 epochs on Fashion-MNIST, print the accuracy", ""]
    lines += ["| | time relative to fcfunc | fcfunc relative to it | test accuracy |", "|---|---|---|---|"]
    for way in ways:
        forth, back = (ratio(seconds[way], seconds["fcfunc"]), ratio(seconds["fcfunc"], seconds[way]))
        lines.append(f"| {way} | {forth} | {back} | {accuracies[way]} |")
    for peer in ("scikit-learn", "PyTorch"):
        cached = ratio(seconds[CACHED], seconds[peer])
        lines += ["", f"With the cache, fcfunc relative to {peer}: {cached}."]
    found = [json.loads(answer_of("stages", {})) for _ in range(5)]
    lines += [
        "",
        "Seconds of each stage of fcfunc's process, the median of five:",
        "",
        "| stage | seconds |",
        "|---|---|",
    ]
    return lines + [f"| {name} | {statistics.median(f[name] for f in found):.2f} |" for name in found[0]]


def table_of_sweeps() -> list[str]:
    """64 networks in one program, compared with training them one after the other."""
    task, rates, seeds, epochs = digits(), np.logspace(-2.0, -0.5, 8), 8, 20
    arrays = jnp.asarray(task.x), jnp.asarray(task.y)
    make = lambda rate: optax.inject_hyperparams(optax.sgd)(learning_rate=rate)  # noqa: E731

    fit, traces = train.make_fit(classifier_loss, make(0.1), epochs=epochs, batch_size=32, members_at_once=4), []

    @jax.jit
    def sweep(keys, rates):
        traces.append(None)
        states = jax.vmap(lambda key, rate: train.init_state(fcfunc.init(key, task.dims), make(rate), key))(keys, rates)
        return fit(states, arrays)[0].params

    keys = jnp.repeat(jax.random.split(jax.random.key(0), seeds), len(rates))
    rates_of = jnp.tile(jnp.asarray(rates, jnp.float32), seeds)
    alone = with_fcfunc(task)[0]
    runs = {
        "fcfunc": lambda: jax.block_until_ready(sweep(keys, rates_of)),
        "fcfunc, one after the other": lambda: [alone(epochs) for _ in range(64)],
        "PyTorch, one after the other": lambda: [
            with_torch(task._replace(rate=float(rate)))[0](epochs) for _ in range(seeds) for rate in rates
        ],
    }
    runs["fcfunc"]()
    alone(1)
    seconds = in_turns(runs, 3, {name: lambda: alone(1) for name in runs})
    lines = ["", "## Sweep: 64 networks 64-128-10 (8 seeds x 8 learning rates), 20 epochs of digits", ""]
    lines += [
        f'The row "fcfunc" is a single program ({len(traces)} trace, 1 compilation), which trains 4 networks at once.',
        "",
    ]
    lines += ["| | time relative to fcfunc |", "|---|---|"]
    return lines + [f"| {name} | {ratio(seconds[name], seconds['fcfunc'])} |" for name in runs]


CACHED = "fcfunc, with JAX's compilation cache from an earlier run"
TABLES = {name: functools.partial(table_of_training, name) for name in ROWS}
TABLES |= {"kernels": lambda: kernels.table({title: (make(), epochs) for title, make, epochs, *_ in ROWS.values()})}
TABLES |= {"process": table_of_processes, "sweep": table_of_sweeps}


def versions() -> str:
    """The versions of all libraries that are compared."""
    from importlib.metadata import version

    names = ("fcfunc", "jax", "optax", "flax", "equinox", "keras", "torch", "scikit-learn", "numpy")
    return ", ".join(f"{name} {version(name)}" for name in names)


def main():
    """Prints the tables; writes the page if all of them were requested."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", help=f"some of {','.join(TABLES)}, without writing the page")
    args = parser.parse_args()
    page = INTRODUCTION.format(
        cores=os.cpu_count(), machine=platform.machine(), python=platform.python_version(), versions=versions()
    )
    for name in args.only.split(",") if args.only else TABLES:
        table = "\n".join(TABLES[name]())
        print(table, flush=True)
        page += table + "\n"
    if not args.only:
        PAGE.write_text(page + NOTES)


if __name__ == "__main__":
    main()
