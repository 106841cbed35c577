"""Training beside its peers, in turns, as ratios of medians; writes docs/benchmarks.md.

    make bench                                           # everything, and the page
    python -m benchmarks.training --only small,digits    # some of it, printed alone

A turn runs every peer once, each time beginning with another one, so that a drift of the machine meets all alike.
"""

import argparse
import functools
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fcfunc
from benchmarks import kernels
from benchmarks.memory import ratio
from benchmarks.peers import PEERS, Task, classifier_loss, with_fcfunc, with_torch
from benchmarks.process import PROCESSES
from fcfunc import data, train

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"

INTRODUCTION = """# Benchmarks

Written by `make bench` on {cores} CPU cores ({machine}), Python {python}: {versions}.

Times are ratios: how many times as long as fcfunc a peer takes, the median of ratios of turns side by side, with the
lowest and the highest. Same data, same batches, same optimizer and learning rate, same initial parameters (but for
scikit-learn, which draws its own); the accuracy is that after all turns, over as many epochs each. The peers are in
`benchmarks/peers.py`, each with the fastest loop that its users write. "bare scan" is plain JAX without a shuffle, and
"products" are the matrix products of the step alone, at the same shapes in the same run: bounds, not peers.
"""

NOTES = """
## Where the time goes

- The table by kernels is JAX's profile of fcfunc's epochs, each kernel named by its operation in the compiled program:
  "products" forward and backward, "order" the shuffle, "gather" the batch, "update" optax's, "others" the activations,
  the loss and the sums of the bias gradients, and "between" what runs while no kernel has begun: the runtime's own work
  from one kernel to the next. In the wide network that last share is still a product: the runtime cuts the gradient of
  the first weights into parts for its pool of threads, and the profile shows the time before its update with no event.
- What is left to the limit: at the smallest network three fifths of the step are kernels that are no products and the
  way between them; only fewer or larger kernels would help, which is XLA's fusion, not this library's code. From the
  digits on, the products are the larger part, and what could still be saved here is the shuffle and the gather, 1 to
  12 %.
- What "products" takes no program can save. Between it and "bare scan" are the rest of the arithmetic, the update, and
  what XLA's CPU runtime spends between the kernels of a step; between "bare scan" and fcfunc are the shuffle and the
  gathering of each batch. These two rows bound what can be gained here over a loop that dispatches one compiled step at
  a time: it runs the same kernels, and its dispatch overlaps with them.
- The order of an epoch is computed element by element by a keyed bijection (`train/_permutation.py`). As a sort it
  cost 18.4 ms for 54,000 examples and 478 ms for a million, and now 0.4 and 1.5 ms, measured side by side.
- The mask of a ReLU layer is packed into bits only where its output is not kept anyway, under a scan over layers:
  packing took 7 to 9 % of the step of the digits' network.
- Whole process, measured apart: importing JAX 0.3 s, fcfunc and optax 0.1, reading and unpacking the images 0.2, the
  first parameters 0.25 (they were 0.85 as single operations; now one program, compiled at XLA's lower level), tracing
  and compiling the epoch 0.55, five epochs 0.5, evaluation 0.2. With JAX's persistent compilation cache
  (`JAX_COMPILATION_CACHE_DIR=folder JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
  JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1`) a second process took 1.77 s where it took 2.47 without.
- No GPU was at hand for these pages: nothing here was measured on one. `python -m benchmarks.accelerator` measures
  bfloat16 networks there as shares of the card's own products, rules beside autodiff, scan beside loop, the two output
  layers, the dtypes of the products in the compiled program, and what repeating to the bit costs; `pytest -m gpu -n 0`
  runs the tests that only a GPU can answer.
- Images stay bytes on the device until a step uses them: `batch.x.astype(jnp.float32) / 255` in the loss function.
"""


def small() -> Task:
    """Two classes of points in four dimensions."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5120, 4)).astype(np.float32)
    y = (x[:, 0] * x[:, 1] + np.sin(3 * x[:, 2]) > 0).astype(np.int32)
    return Task([4, 32, 32, 2], 32, True, 1e-3, x[:4096], y[:4096], x[4096:], y[4096:])


def digits() -> Task:
    """The handwritten digits that scikit-learn brings; 44 batches of 32."""
    training, test = data.split(data.digits(), (0.8, 0.2), seed=0)
    x, y = training.x[:1408], training.y[:1408]
    return Task([64, 128, 10], 32, False, 0.1, x, y, *test)


def fashion(dims=(784, 128, 10), batch_size=128, count=59_904) -> Task:
    """Fashion-MNIST, as many whole batches as there are."""
    training, test = data.fashion_mnist()
    x, x_test = (part.x.reshape(len(part.x), -1) / np.float32(255) for part in (training, test))
    return Task(list(dims), batch_size, False, 0.1, x[:count], training.y[:count], x_test, test.y)


def wide() -> Task:
    """A network whose time is its matrix products; ten batches."""
    return fashion((784, 2048, 2048, 10), 512, 5120)


def with_products(task: Task):
    """The matrix products of a step alone: forward, by the weights, and by the inputs of all layers but the first."""
    whole = len(task.x) - len(task.x) % task.batch_size
    batches = jnp.asarray(task.x[:whole]).reshape(-1, task.batch_size, task.dims[0])

    def step(weights, x):
        inputs = [x]
        for w in weights:
            inputs.append(inputs[-1] @ w)
        g, products = inputs.pop(), []
        for layer, w in reversed(list(enumerate(weights))):
            products.insert(0, inputs[layer].T @ g)
            g = g @ w.T if layer else g
        return products, None  # in the place of the weights: nothing is left out, and nothing else is done

    run, weights = jax.jit(lambda ws, xs: jax.lax.scan(step, ws, xs)[0]), [p["w"] for p in task.params]

    def epochs(k):
        for _ in range(k):
            jax.block_until_ready(run(weights, batches))

    return epochs, lambda: float("nan")


ROWS: dict[str, tuple[str, Callable, int, int, list[str]]] = {
    "small": ("4-32-32-2, batch 32, Adam", small, 10, 9, [*PEERS, "products"]),
    "digits": ("digits 64-128-10, batch 32, SGD", digits, 20, 9, [*PEERS, "products"]),
    "fashion": ("Fashion-MNIST 784-128-10, batch 128, SGD, an epoch", fashion, 1, 7, [*PEERS, "products"]),
    "wide": ("784-2048-2048-10, batch 512, SGD, ten steps", wide, 1, 7, [*PEERS, "products"]),
}
"""What is trained, by which task, epochs in a turn, turns, and beside whom."""


def in_turns(runs: dict[str, Callable], turns: int, before: dict[str, Callable]) -> dict[str, list[float]]:
    """Seconds of each, `turns` times, each after an untimed one of its own.

    Whoever came after scikit-learn took up to twice its time; that its threads were still spinning was not looked into.
    After a pause instead, everything took longer and scattered more.
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
    """One network beside all peers."""
    title, make, epochs, turns, peers = ROWS[name]
    task = make()
    made = {peer: with_products(task) if peer == "products" else PEERS[peer](task) for peer in peers}
    for run, _ in made.values():
        run(1)
    timed = {peer: functools.partial(run, epochs) for peer, (run, _) in made.items()}
    seconds = in_turns(timed, turns, {peer: functools.partial(run, 1) for peer, (run, _) in made.items()})
    lines = ["", f"## {title}", "", "| | time over fcfunc's | test accuracy |", "|---|---|---|"]
    for peer, (_, accuracy) in made.items():
        score = "" if peer == "products" else f"{float(accuracy()):.4f}"
        lines.append(f"| {peer} | {ratio(seconds[peer], seconds['fcfunc'])} | {score} |")
    return lines


def table_of_processes() -> list[str]:
    """Whole processes: import, data, five epochs, accuracy printed."""
    accuracies: dict[str, str] = {}

    def run(peer):
        command = [sys.executable, "-m", "benchmarks.process", peer]
        accuracies[peer] = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]

    seconds = in_turns({peer: functools.partial(run, peer) for peer in PROCESSES}, 5, dict.fromkeys(PROCESSES, int))
    lines = ["", "## Whole process: import, data, 5 epochs of Fashion-MNIST, accuracy printed", ""]
    lines += ["| | time over fcfunc's | test accuracy |", "|---|---|---|"]
    lines += [f"| {p} | {ratio(seconds[p], seconds['fcfunc'])} | {accuracies[p]} |" for p in PROCESSES]
    return lines


def table_of_sweeps() -> list[str]:
    """64 networks in one program, beside PyTorch one after the other."""
    task, rates, seeds, epochs = digits(), np.logspace(-2.0, -0.5, 8), 8, 20
    arrays = jnp.asarray(task.x), jnp.asarray(task.y)
    make = lambda rate: optax.inject_hyperparams(optax.sgd)(learning_rate=rate)  # noqa: E731

    fit, traces = train.make_fit(classifier_loss, make(0.1), epochs=epochs, batch_size=32), []

    def member(key, rate):
        traces.append(None)
        return fit(train.init_state(fcfunc.init(key, task.dims), make(rate), key), arrays)[0].params

    sweep = jax.jit(jax.vmap(jax.vmap(member, in_axes=(None, 0)), in_axes=(0, None)))
    keys = jax.random.split(jax.random.key(0), seeds)
    alone = with_fcfunc(task)[0]
    runs = {
        "fcfunc": lambda: jax.block_until_ready(sweep(keys, jnp.asarray(rates, jnp.float32))),
        "fcfunc, one after the other": lambda: [alone(epochs) for _ in range(64)],
        "torch, one after the other": lambda: [
            with_torch(task._replace(rate=float(rate)))[0](epochs) for _ in range(seeds) for rate in rates
        ],
    }
    runs["fcfunc"]()
    alone(1)
    seconds = in_turns(runs, 3, {name: lambda: alone(1) for name in runs})
    lines = ["", "## 64 networks 64-128-10 (8 seeds x 8 learning rates), 20 epochs of digits", ""]
    lines += [f"One program, traced {len(traces)} time, compiled once.", ""]
    lines += ["| | time over fcfunc's |", "|---|---|"]
    return lines + [f"| {name} | {ratio(seconds[name], seconds['fcfunc'])} |" for name in runs]


TABLES = {name: functools.partial(table_of_training, name) for name in ROWS}
TABLES |= {"kernels": lambda: kernels.table({title: (make(), epochs) for title, make, epochs, *_ in ROWS.values()})}
TABLES |= {"process": table_of_processes, "sweep": table_of_sweeps}


def versions() -> str:
    """Of all that is compared."""
    from importlib.metadata import version

    names = ("fcfunc", "jax", "optax", "flax", "equinox", "torch", "scikit-learn", "numpy")
    return ", ".join(f"{name} {version(name)}" for name in names)


def main():
    """Prints the tables; writes the page where all were asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", help=f"some of {','.join(TABLES)}; the page is then not written")
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
