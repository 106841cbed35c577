"""Estimates what each device stores, computes and sends in a step, for a network too large for one machine.

Writes docs/background/planning.md.

    python -m proofs.plan

The formulas use only the shapes of the network. Their collectives are compared with those of the compiled step on
eight virtual CPU devices.
"""

import os

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import itertools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

import fcfunc
from fcfunc import losses, sharding, train
from tests.helpers import compiled_collectives

PAGE = Path(__file__).parent.parent / "docs" / "background" / "planning.md"
FLOAT = 4


class Collective(NamedTuple):
    """A collective: its kind, its purpose, the number of elements that it returns on each device, and its mesh axis."""

    kind: str
    what: str
    elements: int
    axis: str


def predicted(dims, batch: int, mode: str, data: int, model: int) -> list[Collective]:
    """The collectives of one step of SGD on the mean softmax cross-entropy, from the shapes alone.

    Each weight counts as gathered once, whether it is kept for the backward pass or gathered again.
    """
    rows, last = batch // data, len(dims) - 2
    found = [Collective("all-reduce", "loss", 1, "data")] if data > 1 else []
    for layer, (fan_in, fan_out) in enumerate(itertools.pairwise(dims)):
        by_columns, w, b = layer % 2 == 0, fan_in * fan_out, fan_out
        if "tensor" in mode and model > 1:
            w, b = w // model, fan_out // model if by_columns else fan_out
            if not by_columns:  # h W, each device with some rows of W: the products are summed
                found.append(Collective("all-reduce", "activations", rows * fan_out, "model"))
            elif layer > 0:  # dh = dz Wᵀ, each device with some columns of W
                found.append(Collective("all-reduce", "their gradients", rows * fan_in, "model"))
            if layer == last and by_columns:  # max, sum and label logit of each row of a softmax over sharded classes
                found += [Collective("all-reduce", "softmax", rows, "model")] * 3
        if "fsdp" in mode and data > 1:
            found.append(Collective("all-gather", "weights" if layer else "first weights", w, "data"))
            if layer < last if by_columns and mode == "fsdp" else not by_columns and mode != "fsdp":
                found.append(Collective("all-gather", "biases", b, "data"))  # biases are sharded like the columns of w
        if data > 1:
            found.append(Collective("all-reduce", "gradients", w + b, "data"))
    return found


def compiled_step(dims, batch: int, mode: str, mesh):
    """The train step, compiled for abstract arrays."""

    def loss_fn(params, batch, key):
        del key
        return jnp.mean(losses.softmax_cross_entropy_with_integer_labels(fcfunc.apply(params, batch[0]), batch[1]))

    laid = lambda a, spec: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))  # noqa: E731
    params = jax.eval_shape(lambda: fcfunc.init(jax.random.key(0), dims))
    params = jax.tree.map(laid, params, sharding.param_specs(params, mesh, mode))
    examples = [jax.ShapeDtypeStruct((batch, dims[0]), jnp.float32), jax.ShapeDtypeStruct((batch,), jnp.int32)]
    examples = tuple(laid(a, PartitionSpec("data")) for a in examples)
    optimizer = optax.sgd(0.1)
    whole = jax.eval_shape(lambda: (jnp.zeros((), jnp.int32), jax.random.key(0)))
    step, key = jax.tree.map(lambda a: laid(a, PartitionSpec()), whole)
    state = train.TrainState(params, optimizer.init(params), step, key)
    return train.make_train_step(loss_fn, optimizer).lower(state, examples).compile()


CHECKED = (([16, 64, 32, 8], 32), ([64, 128, 128, 128, 64], 64), ([256, 512, 256, 512, 64], 128))
"""Networks and batch sizes for which the formulas are compared with the compiled program."""


def compared(dims, batch: int, mode: str, mesh) -> dict[str, tuple[int, int]]:
    """The elements of the all-reduces and all-gathers, by formula and in the compiled program."""
    formula = predicted(dims, batch, mode, mesh.shape["data"], mesh.shape["model"])
    compiled = compiled_collectives(compiled_step(dims, batch, mode, mesh))
    return {
        kind: (
            sum(exchange.elements for exchange in formula if exchange.kind == kind),
            sum(sum(elements) for what, elements in compiled if what == kind),
        )
        for kind in ("all-reduce", "all-gather")
    }


def per_device(dims, batch: int, mode: str, data: int, model: int) -> dict[str, float]:
    """Bytes stored, operations, and bytes sent along each mesh axis, per device in one step with Adam."""
    pairs = list(itertools.pairwise(dims))
    params = sum(fan_in * fan_out + fan_out for fan_in, fan_out in pairs)
    share = (model if "tensor" in mode else 1) * (data if "fsdp" in mode else 1)
    operations = 6 * batch * sum(i * o for i, o in pairs) - 2 * batch * dims[0] * dims[1]  # the inputs need no gradient
    sent = {"data": 0.0, "model": 0.0}
    for exchange in predicted(dims, batch, mode, data, model):
        n = {"data": data, "model": model}[exchange.axis]
        once_around = (n - 1) / n * FLOAT * exchange.elements  # each device passes on all but its own part
        # An all-reduce goes around the ring twice. A weight is gathered for the forward pass and again for the gradient
        # of its inputs. With FSDP, gradients are reduce-scattered: each device needs only its own shard of the sum.
        scattered = exchange.what == "gradients" and "fsdp" in mode
        twice = exchange.what == "weights" or (exchange.kind == "all-reduce" and not scattered)
        sent[exchange.axis] += once_around * (2 if twice else 1)
    # A layer keeps its input and, for ReLU, a bit for each output. Layers shard one or the other over "model", in turn.
    kept = 0.0
    for layer, (fan_in, fan_out) in enumerate(pairs):
        of_input, of_output = (1, model) if layer % 2 == 0 else (model, 1)
        kept += batch / data * (FLOAT * fan_in / of_input + fan_out / 8 / of_output)
    return {
        "state": 3 * FLOAT * params / share,
        "kept": kept,
        "operations": operations / (data * model),
        "data": sent["data"],
        "model": sent["model"],
    }


INTRODUCTION = """# Planning for more than one machine

This page estimates what each device stores, computes and sends when a network is too large for one machine. Written
by `python -m proofs.plan` with jax {version}. The figures come from formulas in that script: nothing was run at
this size.

The example is a network of {layers} layers of width {width:,} with {params:.1f} billion parameters, in float32 with
Adam, and {batch:,} rows per step over all devices. All figures are per device and step.
[Multiple devices](../guides/multiple-devices.md) explains the modes.

| devices | mode | mesh, data × model | params and Adam, GB | saved for the backward pass, GB | operations, 10¹² \\
| sent over data links, GB | sent over model links, GB |
|---|---|---|---|---|---|---|---|
"""

NOTES = """
- A link connects a device to the next one in a ring along a mesh axis, in one direction. Over each link, an
  all-gather of $S$ bytes over $n$ devices sends $S (n - 1)/n$ bytes, a reduce-scatter the same, and an all-reduce
  twice as many.
- In the modes with `fsdp`, each weight is gathered for the forward pass and, except in the first layer, again for
  the backward pass. Gradients are reduce-scattered. XLA's CPU backend has no reduce-scatter and uses an all-reduce
  instead, which sends more. A gathered weight and its full gradient need memory in addition to the table, for as
  long as they are used.
- A multiply-add of a matmul counts as two operations. All other operations together are less than a thousandth of
  these.

Storing the parameters is the first limit ({whole:.0f} GB on every device in mode `data`), and communication over the
links is the second. `data` and `fsdp` send the parameters, regardless of the batch size. `tensor` sends activations,
in proportion to the rows per device. `fsdp+tensor` shards the parameters over all devices. It sends part of
the parameters along "data" and the activations along "model", whose links stay within a machine.

## Comparison with compiled programs

The table counts the elements that the collectives of one step return on each of eight virtual CPU devices, by
formula and in the compiled program. XLA may keep a gathered weight for the backward pass or gather it again. The
formula counts it once, so the compiled program gathers up to twice as many elements.

| dims | batch | mode | data × model | all-reduce: formula | compiled | all-gather: formula | compiled |
|---|---|---|---|---|---|---|---|
"""


def main():
    """Writes the page."""
    width, layers, batch = 65_536, 4, 32_768
    dims, size = [width] * (layers + 1), layers * width * (width + 1)
    table = []
    for devices, mode in itertools.product((8, 256, 4096), sharding.MODES):
        model = min(8, devices // 2 if mode == "fsdp+tensor" else devices) if "tensor" in mode else 1
        numbers = per_device(dims, batch, mode, devices // model, model)
        state, kept, data, links = (f"{numbers[name] / 1e9:,.2f}" for name in ("state", "kept", "data", "model"))
        mesh, operations = f"{devices // model} × {model}", f"{numbers['operations'] / 1e12:,.1f}"
        table.append(f"| {devices:,} | {mode} | {mesh} | {state} | {kept} | {operations} | {data} | {links} |")
    checks = []
    for (dims, rows), mode in itertools.product(CHECKED, sharding.MODES):
        model = 2 if "tensor" in mode else 1
        numbers = compared(dims, rows, mode, sharding.make_mesh(model=model))
        columns = " | ".join(f"{numbers[kind][i]:,}" for kind in numbers for i in range(2))
        checks.append(f"| {'-'.join(map(str, dims))} | {rows} | {mode} | {8 // model} × {model} | {columns} |")
    page = INTRODUCTION.format(version=jax.__version__, layers=layers, width=width, params=size / 1e9, batch=batch)
    page = page.replace(" \\\n", " ") + "\n".join(table) + "\n" + NOTES.format(whole=3 * FLOAT * size / 1e9)
    PAGE.write_text(page + "\n".join(checks) + "\n")
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
