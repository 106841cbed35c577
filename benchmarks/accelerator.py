"""Measures wide bfloat16 networks on the default device, relative to its matmul rate; prints Markdown.

    python -m benchmarks.accelerator               # on a GPU
    python -m benchmarks.accelerator --divide 32   # every size divided, to try the script on a CPU

The cost of bit-for-bit reproducibility is the time with XLA_FLAGS=--xla_gpu_deterministic_ops=true relative to the time
without it: `--deterministic` runs the step of the widest network both ways, each in a separate process.
"""

import argparse
import collections
import itertools
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

import fcfunc
from benchmarks.memory import in_turns, ratio
from fcfunc import losses, ops, reference, train

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


def table_of_output_layers(divide: int) -> list[str]:
    """The dense and the chunked output layer, in time and temporaries."""
    lines = ["| rows | classes | time chunked over dense | temporaries chunked over dense |", "|---" * 4 + "|"]
    width, classes = 4096 // divide, 131_072 // divide
    for rows in (4096 // divide, 32_768 // divide):
        keys = jax.random.split(jax.random.key(0), 3)
        x = jax.random.normal(keys[0], (rows, width), jnp.bfloat16)
        w = jax.random.normal(keys[1], (width, classes), jnp.bfloat16)
        labels = jax.random.randint(keys[2], (rows,), 0, classes)
        programs, memory = {}, {}
        for name, chunk_size in (("dense", classes), ("chunked", max(classes // 16, 1))):

            def loss(x, w, b, chunk_size=chunk_size):
                return jnp.mean(losses.linear_softmax_cross_entropy(x, w, b, labels, chunk_size=chunk_size))  # noqa: B023

            args = (x, w, jnp.zeros(classes, jnp.bfloat16))
            programs[name] = (jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*args).compile(), args)
            memory[name] = programs[name][0].memory_analysis().temp_size_in_bytes
        seconds = in_turns(programs)
        cost = ratio(seconds["chunked"], seconds["dense"])
        lines.append(f"| {rows} | {classes} | {cost} | {memory['chunked'] / memory['dense']:.2f} |")
    return lines


def cost_of_determinism(divide: int) -> str:
    """Runs the widest network both ways, in alternation."""
    found: dict[str, list[float]] = {"": [], "--xla_gpu_deterministic_ops=true": []}
    command = [sys.executable, "-m", "benchmarks.accelerator", "--once", "--divide", str(divide)]
    for _ in range(5):
        for flag, seconds in found.items():
            env = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()}
            folder = Path(__file__).parents[1]
            answer = subprocess.run(command, check=True, capture_output=True, text=True, env=env, cwd=folder)
            seconds.append(float(answer.stdout.split()[-1]))
    plain, repeating = found.values()
    return f"Time of a step with deterministic operations, relative to without: {ratio(repeating, plain)}."


def main() -> None:
    """Prints the tables, with the device and the versions."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--divide", type=int, default=1, help="divide every size by this")
    parser.add_argument("--deterministic", action="store_true", help="measure only the cost of determinism")
    parser.add_argument("--once", action="store_true", help="print the seconds of ten steps of the widest network")
    args = parser.parse_args()
    if args.once:
        program, _ = training([4096 // args.divide] * 5 + [10], 8192 // args.divide)
        return print(statistics.median(in_turns({"": program})[""]))
    if args.deterministic:
        return print(cost_of_determinism(args.divide))
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, optax {optax.__version__}\n")
    print("\n".join([*table_of_networks(args.divide), "", *table_of_output_layers(args.divide)]))


if __name__ == "__main__":
    main()
