"""Measures fcfunc on a GPU, relative to its matmul rate; writes docs/background/benchmarks-gpu.md.

    make bench-gpu                                # checks the environment, runs the tests marked gpu, then this script
    python -m benchmarks.accelerator              # without a GPU, every size is divided by 64
    python -m benchmarks.accelerator --divide 8   # other sizes, only printed

The cost of bit-for-bit reproducibility is the time with XLA_FLAGS=--xla_gpu_deterministic_ops=true relative to the time
without it, each in a separate process.
"""

import argparse
import collections
import itertools
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import optax

import fcfunc
from benchmarks.populations import TASKS, epochs_for, speeds, updates_of, with_fcfunc
from benchmarks.timing import in_turns, ratio
from fcfunc import losses, ops, reference, train

FOLDER = Path(__file__).parents[1]
PAGE = FOLDER / "docs" / "background" / "benchmarks-gpu.md"

WAYS = {
    "rules": {},
    "rules, scan over layers": {"scanned": True},
    "autodiff": {"ops": reference, "losses": reference},
}


def rate(seconds: list[float], flops: float) -> float:
    """Floating-point operations per second, from the median time."""
    return flops / statistics.median(seconds)


def product(n: int):
    """Ten bfloat16 matmuls `[n, n] @ [n, n]` in sequence, and their operation count."""
    a = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16) / n**0.5
    program = jax.jit(lambda x, w: jax.lax.fori_loop(0, 10, lambda _, x: x @ w, x)).lower(a, a).compile()
    return (program, (a, a)), 20 * n**3


def training(dims: list[int], rows: int, *, scanned=False, ops=ops, losses=losses):
    """Ten compiled SGD steps of a network with bfloat16 compute, and the operation count of their matmuls."""
    net = fcfunc.mlp(dims, compute_dtype="bfloat16", ops=ops)

    def loss_fn(params, batch, key):
        x, y = batch
        logits = net.apply(params, x)
        return jnp.mean(losses.softmax_cross_entropy_with_integer_labels(logits, y))

    params, optimizer = net.init(jax.random.key(0)), optax.sgd(0.01)
    state = train.init_state(fcfunc.stack(params) if scanned else params, optimizer, jax.random.key(1))
    x = jax.random.normal(jax.random.key(2), (10 * rows, dims[0]), jnp.bfloat16)
    y = jax.random.randint(jax.random.key(3), (10 * rows,), 0, dims[-1])
    epoch = train.make_train_epoch(loss_fn, optimizer, rows)
    # Not donated, so that the program can be run again on the same arguments.
    program = jax.jit(lambda state, data: epoch(state, data)).lower(state, (x, y)).compile()
    sizes = [a * b for a, b in itertools.pairwise(dims)]
    return (program, (state, (x, y))), 10 * 2 * rows * (3 * sum(sizes) - sizes[0])


def dtypes_of_products(program) -> str:
    """Counts the matmuls of a compiled program by the dtypes of their operands and results."""
    dtype = dict(re.findall(r"%?([\w.\-]+) = \(?(\w+)\[", program.as_text()))
    found = collections.Counter()
    for result, operands in re.findall(r"= \(?(\w+)\[.*?(?: dot|gemm\S*\"?|custom-call)\(([^)]*)\)", program.as_text()):
        names = [dtype.get(name.strip().split(" ")[-1].lstrip("%"), "?") for name in operands.split(",")[:2]]
        if len(names) == 2 and result in ("f32", "bf16", "f16"):
            found[f"{' x '.join(names)} -> {result}"] += 1
    return ", ".join(f"{count} of {kind}" for kind, count in found.most_common())


def table_of_networks(divide: int) -> list[str]:
    """Each way of training each network, relative to the rate of plain matmuls in alternating runs."""
    gpu = jax.default_backend() == "gpu"
    lines = ["| network, rows | way | share of the matmul rate | time over rules | TFLOP/s |", "|---" * 5 + "|"]
    hlo = []
    for dims, rows in (([784, 2048, 2048, 10], 512), ([4096] * 5 + [10], 8192)):
        dims, rows = [max(d // divide, 2) for d in dims], max(rows // divide, 2)
        made = {way: training(dims, rows, **options) for way, options in WAYS.items()}
        made["products"] = product(max(8192 // divide, 2))
        seconds = in_turns({name: program for name, (program, _) in made.items()})
        limit = rate(seconds["products"], made["products"][1])
        for name, (_, flops) in made.items():
            reached = rate(seconds[name], flops)
            relative = "" if name == "products" else ratio(seconds[name], seconds["rules"])
            speed = f"{reached / 1e12:.0f}" if gpu else "not on a CPU"
            title = f"{'-'.join(map(str, dims))}, {rows}"
            lines.append(f"| {title} | {name} | {reached / limit:.2f} | {relative} | {speed} |")
        hlo.append(f"- Matmuls of {title}: {dtypes_of_products(made['rules'][0][0])}.")
    return [*lines, "", *hlo]


def table_of_loops(divide: int) -> list[str]:
    """An epoch as one program, relative to a loop over its steps."""
    lines = ["| network, rows | time of a loop over steps / one program |", "|---|---|"]
    optimizer = optax.sgd(0.01)

    def loss_fn(params, batch, key):
        x, y = batch
        return jnp.mean(losses.softmax_cross_entropy_with_integer_labels(fcfunc.apply(params, x), y))

    for dims, rows in (([4, 32, 32, 2], 32), ([784, 128, 10], 128), ([784, 2048, 2048, 10], 512)):
        dims, rows = [dims[0], *(max(d // divide, 2) for d in dims[1:-1]), dims[-1]], max(rows // divide, 2)
        x = jax.random.normal(jax.random.key(0), (100 * rows, dims[0]))
        y = jax.random.randint(jax.random.key(1), (100 * rows,), 0, dims[-1])
        state = train.init_state(fcfunc.init(jax.random.key(2), dims), optimizer, jax.random.key(3))
        epoch = train.make_train_epoch(loss_fn, optimizer, rows, donate=False)
        step = train.make_train_step(loss_fn, optimizer, donate=False)

        def loop(state, batches, step=step):
            for batch in batches:
                state, metrics = step(state, batch)
            return metrics

        batches = [(x[i : i + rows], y[i : i + rows]) for i in range(0, len(x), rows)]
        seconds = in_turns({"loop": (loop, (state, batches)), "epoch": (epoch, (state, (x, y)))})
        lines.append(f"| {'-'.join(map(str, dims))}, {rows} | {ratio(seconds['loop'], seconds['epoch'])} |")
    return lines


def table_of_output_layers(divide: int) -> list[str]:
    """The dense and the chunked output layer, in time and temporaries."""
    lines = ["| rows | classes | time chunked / dense | temporaries chunked / dense |", "|---" * 4 + "|"]
    width, classes = 4096 // divide, 131_072 // divide
    for rows in (2048 // divide, 8192 // divide):
        keys = jax.random.split(jax.random.key(0), 3)
        x = jax.random.normal(keys[0], (rows, width), jnp.bfloat16)
        w = jax.random.normal(keys[1], (width, classes), jnp.bfloat16)
        labels = jax.random.randint(keys[2], (rows,), 0, classes)
        programs, memory = {}, {}
        for name, chunk_size in (("dense", classes), ("chunked", None)):

            def loss(x, w, b, chunk_size=chunk_size):
                return jnp.mean(losses.linear_softmax_cross_entropy(x, w, b, labels, chunk_size=chunk_size))  # noqa: B023

            args = (x, w, jnp.zeros(classes, jnp.bfloat16))
            programs[name] = (jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*args).compile(), args)
            memory[name] = programs[name][0].memory_analysis().temp_size_in_bytes
        seconds = in_turns(programs)
        cost = ratio(seconds["chunked"], seconds["dense"])
        lines.append(f"| {rows} | {classes} | {cost} | {memory['chunked'] / memory['dense']:.2f} |")
    return lines


def table_of_populations(divide: int) -> list[str]:
    """Updates per second of populations, all members at once, relative to one network alone."""
    lines = ["| network | members | updates per second | relative to one network |", "|---" * 4 + "|"]
    for title, (make, _) in TASKS.items():
        task, alone = make(), 0.0
        for members in (1, 8, 64, 512, 8192):
            if members > 1 and members > 8192 // divide:
                continue
            epochs = epochs_for(task, members, 40_000 // divide)
            run = with_fcfunc(task, members, None, epochs), updates_of(task, members, epochs)
            found = statistics.median(speeds({"": run}, 3)[""])
            alone = alone or found
            lines.append(f"| {title} | {members} | {found:,.0f} | {found / alone:.2f} |")
    return lines


def cost_of_determinism(divide: int) -> str:
    """Runs the widest network both ways, in alternation."""
    found: dict[str, list[float]] = {"": [], "--xla_gpu_deterministic_ops=true": []}
    command = [sys.executable, "-m", "benchmarks.accelerator", "--once", "--divide", str(divide)]
    for _ in range(5):
        for flag, seconds in found.items():
            env = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()}
            answer = subprocess.run(command, check=True, capture_output=True, text=True, env=env, cwd=FOLDER)
            seconds.append(float(answer.stdout.split()[-1]))
    plain, repeating = found.values()
    return f"Time of a step with deterministic operations, relative to without: {ratio(repeating, plain)}."


def cuda_extra() -> str:
    """The extra of fcfunc whose JAX supports this GPU's driver; empty without a GPU, or if JAX sees it already."""
    if jax.default_backend() == "gpu" or not shutil.which("nvidia-smi"):
        return ""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True)
    return ("cuda13" if int(answer.stdout.split(".")[0]) >= 580 else "cuda12") if answer.returncode == 0 else ""


def environment() -> list[str]:
    """The device, the versions, and the settings that affect the figures."""
    (device, *others) = jax.devices()
    memory = (device.memory_stats() or {}).get("bytes_limit", 0)
    settings = {name: os.environ[name] for name in ("XLA_FLAGS", "XLA_PYTHON_CLIENT_PREALLOCATE") if name in os.environ}
    return [
        f"- Device: {device.device_kind}{f', the first of {1 + len(others)}' if others else ''}"
        + (f", {memory / 2**30:.0f} GiB for JAX" if memory else ""),
        f"- Python {platform.python_version()}, jax {jax.__version__}, jaxlib {jaxlib.__version__}, "
        f"optax {optax.__version__}, fcfunc {fcfunc.__version__}",
        f"- Settings: {settings or 'none'}",
    ]


def result_of_tests() -> str:
    """The last line of `pytest -m gpu`."""
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-m", "gpu", "tests/test_gpu.py"]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER)
    print(answer.stdout if answer.returncode else "", end="")
    return (answer.stdout.strip().splitlines() or ["no output"])[-1].strip("= ")


INTRODUCTION = """# Benchmarks on a GPU

Written by `make bench-gpu`. {measured}

{environment}
- Tests marked `gpu`: {tests}

Times are medians of alternating runs, with the lowest and the highest ratio. The matmul rate is that of ten bfloat16
matmuls of 8192 x 8192 in sequence, in the same run.
"""

NO_GPU = """**No GPU was available.** Every size was divided by {divide}, and the figures
below show only that the command works; they say nothing about a GPU."""


def main() -> None:
    """Prints the tables; writes the page unless the sizes were chosen."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--divide", type=int, help="divide every size by this; without a GPU, 64")
    parser.add_argument("--extra", action="store_true", help="print the extra to install for this machine's GPU")
    parser.add_argument("--once", action="store_true", help="print the seconds of ten steps of the widest network")
    args = parser.parse_args()
    gpu = jax.default_backend() == "gpu"
    divide = args.divide or (1 if gpu else 64)
    if args.extra:
        return print(cuda_extra())
    if args.once:
        program, _ = training([4096 // divide] * 5 + [10], 8192 // divide)
        return print(statistics.median(in_turns({"": program})[""]))
    if not gpu:
        print(f"JAX sees no GPU; every size is divided by {divide}.", file=sys.stderr)
    page = INTRODUCTION.format(
        measured="" if gpu else NO_GPU.format(divide=divide),
        environment="\n".join(environment()),
        tests=result_of_tests(),
    )
    print(page)
    for title, rows in {
        "bfloat16 networks": table_of_networks,
        "An epoch as one program": table_of_loops,
        "Large output layers": table_of_output_layers,
        "Populations": table_of_populations,
        "Deterministic operations": lambda divide: [cost_of_determinism(divide)],
    }.items():
        section = "\n".join([f"## {title}", "", *rows(divide), ""])
        print(section, flush=True)
        page += f"\n{section}"
    if args.divide is None:
        PAGE.write_text(page)


if __name__ == "__main__":
    main()
