"""The memory that rules save for the backward pass and that a gradient needs; writes docs/background/memory.md.

    python -m benchmarks.memory

Memory is that of the compiled programs (`memory_analysis`) and of the residuals between the forward and the backward
pass. Times are median ratios of alternating runs.
"""

import functools
import os
import platform
import time
from pathlib import Path

import jax
import jax.numpy as jnp

import fcfunc
from benchmarks.timing import in_turns, ratio
from fcfunc import losses, ops, reference

N, D = 2048, 512
UNIT = 4 * N * D
PAGE = Path(__file__).parents[1] / "docs" / "background" / "memory.md"

x, w, b = jax.ShapeDtypeStruct((N, D), "float32"), jnp.zeros((D, D)), jnp.zeros(D)
LABELS = jnp.zeros(N, jnp.int32)
STATE = {"mean": jnp.zeros(D), "var": jnp.ones(D)}
KEY = jax.random.key(0)

# Each rule with JAX's own function or, where JAX has none, with the reference implementation.
SAVED = {
    "relu": (ops.relu, jax.nn.relu),
    "leaky_relu": (ops.leaky_relu, jax.nn.leaky_relu),
    "elu": (ops.elu, jax.nn.elu),
    "sigmoid": (ops.sigmoid, jax.nn.sigmoid),
    "tanh": (ops.tanh, jnp.tanh),
    "softplus": (ops.softplus, jax.nn.softplus),
    "silu": (ops.silu, jax.nn.silu),
    "gelu, tanh form": (ops.gelu, jax.nn.gelu),
    "gelu, exact": tuple(functools.partial(f, approximate=False) for f in (ops.gelu, jax.nn.gelu)),
    "softmax": (ops.softmax, jax.nn.softmax),
    "log_softmax": (ops.log_softmax, jax.nn.log_softmax),
    "dropout": tuple(functools.partial(m.dropout, rate=0.5, key=KEY) for m in (ops, reference)),
    "layer_norm": tuple(lambda x, f=f: f(x, b, b) for f in (ops.layer_norm, reference.layer_norm)),
    "rms_norm": tuple(lambda x, f=f: f(x, b) for f in (ops.rms_norm, reference.rms_norm)),
    "batch_norm": tuple(lambda x, m=m: m.batch_norm(x, b, b, STATE, training=True)[0] for m in (ops, reference)),
    "softmax cross-entropy, labels": tuple(
        lambda x, m=m: m.softmax_cross_entropy_with_integer_labels(x, LABELS) for m in (losses, reference)
    ),
    "sigmoid cross-entropy": tuple(
        lambda x, m=m: m.sigmoid_binary_cross_entropy(x, jnp.zeros((N, D))) for m in (losses, reference)
    ),
} | {
    f"layer with {name}": (
        lambda x, name=name: ops.layer(x, w, b, activation=name),
        lambda x, f=f: f(x @ w + b),
    )
    for name, f in {"relu": jax.nn.relu, "tanh": jnp.tanh, "silu": jax.nn.silu, "gelu": jax.nn.gelu}.items()
}


def saved_units(fun) -> float:
    """The size of the residuals, excluding weights, in units of one float32 activation [N, D]."""
    residuals = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(fun, x)[1], x))
    return sum(r.size * r.dtype.itemsize for r in residuals if r.shape[:1] == (N,)) / UNIT


def network(layers: int, activation: str, scanned: bool, by_rules: bool):
    """The compiled gradient of the sum of squares of several layers' output, and its arguments."""
    params = fcfunc.init(jax.random.key(0), [D] * (layers + 1))
    plain = {"relu": jax.nn.relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu, "tanh": jnp.tanh}[activation]

    def by_autodiff(params, x):
        if scanned:
            return jnp.sum(jax.lax.scan(lambda h, p: (plain(h @ p["w"] + p["b"]), None), x, params)[0] ** 2)
        for p in params:
            x = plain(x @ p["w"] + p["b"])
        return jnp.sum(x**2)

    net = fcfunc.mlp([D] * (layers + 2), activation=activation)  # its `features` are the layers

    def by_apply(params, x):
        return jnp.sum(net.features(params, x) ** 2)

    if by_rules:
        params = [*params, params[-1]]
        params = fcfunc.stack(params) if scanned else params
    elif scanned:
        params = jax.tree.map(lambda *a: jnp.stack(a), *params)
    inputs = jax.random.normal(jax.random.key(1), (N, D))
    lowered = jax.jit(jax.grad(by_apply if by_rules else by_autodiff, argnums=(0, 1))).lower(params, inputs)
    start = time.perf_counter()
    compiled = lowered.compile()
    return compiled, (params, inputs), time.perf_counter() - start


def table_of_residuals() -> str:
    """The memory that each rule saves, compared with autodiff."""
    rows = [f"| {name} | {saved_units(f):.2f} | {saved_units(g):.2f} |" for name, (f, g) in SAVED.items()]
    return "\n".join(["| function | rule | autodiff |", "|---|---|---|", *rows])


def table_of_networks() -> str:
    """Temporaries and times of gradients of eight layers."""
    rows = ["| eight layers | autodiff | rules | memory ratio | time ratio |", "|---|---|---|---|---|"]
    for scanned in (True, False):
        for activation in ("relu", "gelu", "silu", "tanh"):
            programs, units = {}, {}
            for by_rules in (False, True):
                compiled, args, _ = network(8, activation, scanned, by_rules)
                programs[by_rules] = (compiled, args)
                units[by_rules] = compiled.memory_analysis().temp_size_in_bytes / UNIT
            seconds = in_turns(programs)
            rows.append(
                f"| {activation}, {'scanned' if scanned else 'unrolled'} | {units[False]:.2f} | {units[True]:.2f} "
                f"| {units[True] / units[False]:.2f} | {ratio(seconds[True], seconds[False])} |"
            )
    return "\n".join(rows)


def table_of_options() -> str:
    """Temporaries of the gradient of eight stacked layers by `apply`, with each of its options."""
    rows = ["| eight layers with gelu, scanned | temporaries |", "|---|---|"]
    for name, options in (
        ("plain", {}),
        ("residual", {"residual": True}),
        ("dropout", {"dropout_rate": 0.1}),
        ("rms_norm", {"norm": "rms_norm"}),
        ("layer_norm", {"norm": "layer_norm"}),
        ("bfloat16 matmuls", {"compute_dtype": "bfloat16"}),
    ):
        net = fcfunc.mlp([D] * 10, activation="gelu", **options)
        params = fcfunc.stack(net.init(jax.random.key(0)))

        def loss(params, x, net=net):
            return jnp.sum(net.features(params, x, key=KEY) ** 2)

        analysis = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x).compile().memory_analysis()
        rows.append(f"| {name} | {analysis.temp_size_in_bytes / UNIT:.2f} |")
    return "\n".join(rows)


def compilation() -> str:
    """How much longer 64 stacked layers take to compile than 4."""
    seconds = {depth: [network(depth, "gelu", True, True)[2] for _ in range(5)] for depth in (4, 64)}
    return ratio(seconds[64], seconds[4])


PAGE_TEXT = """# Memory use

This page compares the memory and the time of fcfunc's backward rules with those of automatic differentiation.
Written by `python -m benchmarks.memory` with jax {version} on {device} ({cores} cores, {machine}).

All sizes are in units of one float32 activation of shape [{rows}, {width}], {unit:.1f} MB.

## Memory saved for the backward pass

The table shows the size of the arrays that are kept from the forward pass for the backward pass. Weights are
excluded. A function's own inputs and outputs are included, although an adjacent layer often keeps them anyway.
"autodiff" is the automatic differentiation of JAX's own function, or of the reference implementation where JAX has
none.

{residuals}

## Memory and time of a gradient

The table shows the temporary memory and the time of the compiled gradient of eight layers of width {width}, with
fcfunc's rules and with automatic differentiation of the same layers in plain JAX. Scanned layers are stacked by
`fcfunc.stack`. Under a scan, the memory depends on what each rule saves. In an unrolled program, XLA decides what to
keep, and it merges a recomputed pre-activation with the first one. Both ratios are rules over autodiff. The time
ratio is the median of seven alternating runs, with the lowest and the highest.

{networks}

The next table shows what options of `fcfunc.mlp` add. For some bfloat16 matmuls, XLA's CPU backend converts the
operands into separate arrays of a wider dtype. The arrays kept between the passes are half as large, which pays off
where the hardware multiplies bfloat16.

{options}

The gradient of 64 stacked layers takes {compilation} times as long to compile as that of 4.
"""


def main() -> None:
    """Writes the page."""
    PAGE.write_text(
        PAGE_TEXT.format(
            version=jax.__version__,
            device=jax.devices()[0].platform.upper(),
            cores=os.cpu_count(),
            machine=platform.machine(),
            rows=N,
            width=D,
            unit=UNIT / 1e6,
            residuals=table_of_residuals(),
            networks=table_of_networks(),
            options=table_of_options(),
            compilation=compilation(),
        )
    )
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
