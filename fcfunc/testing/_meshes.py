"""Checks of a rule on several devices: Auto and Explicit meshes, and `shard_map`."""

import functools
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fcfunc import _layout
from fcfunc.testing._case import (
    Case,
    Inconclusive,
    NotApplicable,
    first_line,
    pull,
    replaced,
    to_jax,
    to_numpy,
    x64_for,
)
from fcfunc.testing._compare import Finding, compare, finding, raising, rounding


def _even_cases(case: Case) -> Iterator[Case]:
    """The case at even sizes, if it is drawn, so that each axis can be sharded over two devices."""
    if case.redraw is None or not case.letters:
        yield case
        return
    yield case.at({name: 4 + 2 * i for i, name in enumerate(case.letters)})
    if "meshes" in case.required:
        yield case.at({name: 20 + 2 * i for i, name in enumerate(case.letters)})


def _layouts(case: Case) -> Iterator[tuple[str, list[PartitionSpec]]]:
    """Shardings of the arguments on a mesh with axes "x" and "y", given by the mesh axis of each size.

    Each even size alone along "x", as in data, column and row parallelism; all along "x", as in fully sharded training;
    and one along "y" with the others along "x", as in a combination of both. An array uses each mesh axis once,
    starting from its first axis or, if that makes a difference, from its last.
    """
    leaves = case.leaves
    sizes = sorted({n for leaf in case.reals for n in leaf.shape if n and n % 2 == 0})
    plans = [{n: "x"} for n in sizes]
    if len(sizes) > 1:
        plans += [dict.fromkeys(sizes, "x"), *(dict.fromkeys(sizes, "x") | {n: "y"} for n in sizes)]
    if len(leaves) > 1 and leaves[0].ndim and leaves[0].shape[-1] in sizes:
        first = PartitionSpec(*[None] * (leaves[0].ndim - 1), "x")
        yield "the last axis of the first argument sharded along x", [first, *[PartitionSpec()] * (len(leaves) - 1)]
    for plan in plans:
        seen = []
        for end, step in (("first", 1), ("last", -1)):
            specs = []
            for leaf in leaves:
                entries = [None] * leaf.ndim
                for i in range(leaf.ndim)[::step]:
                    entries[i] = plan.get(leaf.shape[i]) if plan.get(leaf.shape[i]) not in entries else None
                specs.append(PartitionSpec(*entries))
            if specs not in seen:
                seen.append(specs)
                over = ", ".join(f"axes of size {n} sharded along {axis}" for n, axis in plan.items())
                yield f"{over} (the {end} one if an array has several)", specs


def _sharded(fun: Callable, case: Case, g: list, mesh, specs: list) -> list[np.ndarray]:
    """The gradients for sharded arguments."""

    def gradients(leaves, g):
        out, back = jax.vjp(lambda *wrt: fun(*replaced(leaves, case.where, wrt)), *(leaves[i] for i in case.where))
        return list(back([_layout.reshard_like(a, o) for a, o in zip(g, out, strict=True)]))

    with x64_for(case.dtype), jax.set_mesh(mesh):
        placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(case.leaves, specs, strict=True)]
        return to_numpy(jax.jit(gradients)(placed, to_jax(g)))


def _devices(count: int) -> list:
    if jax.device_count() < count:
        advice = "set XLA_FLAGS=--xla_force_host_platform_device_count=8 to simulate them on a CPU"
        raise NotApplicable(f"needs {count} devices; {advice}")
    return jax.devices()[:count]


def sharded_equals_unsharded(case: Case) -> Iterator[Finding]:
    """Checks that gradients on Auto and Explicit meshes equal those on one device, if the oracle works there."""
    devices, tried = _devices(4), 0
    for at in _even_cases(case):
        g = at.cotangent(240)
        expected = at.by_oracle(g)
        for kind in (AxisType.Auto, AxisType.Explicit):
            mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind,) * 2, devices=devices)
            for layout, specs in _layouts(at):
                where = f"on an {kind.name} mesh with {layout},"
                try:
                    _sharded(at.oracle, at, g, mesh, specs)
                except Exception:
                    continue  # automatic differentiation fails on this layout too
                tried += 1
                run = functools.partial(_sharded, at.fun, at, g, mesh, specs)
                try:
                    got = raising(at, where, run)
                except Exception as e:
                    yield finding(at, f"{where} the rule raises: {e}")
                    return
                message = f"{where} the gradient differs from that on one device"
                found = list(compare(at, got, expected, rounding(at, expected), message))
                yield from found
                if found or "meshes" not in case.required:
                    break  # one layout of each kind unless meshes are required
            else:
                continue
            if found:
                return
    if not tried:
        raise NotApplicable("no axis has an even size, or automatic differentiation fails on every layout too")


def shard_map_equals_unsharded(case: Case) -> Iterator[Finding]:
    """Checks that gradients inside `shard_map`, with rows sharded, equal those on one device."""
    devices, case = _devices(2), next(_even_cases(case))
    g, rows = case.cotangent(250), case.reals[0].shape[0] if case.reals[0].ndim else 0
    if not rows or rows % 2 or any(not a.ndim or a.shape[0] != rows for a in g):
        raise NotApplicable("the outputs do not share the leading axis of the first argument, or its size is odd")
    specs = [PartitionSpec("x") if a.ndim and a.shape[0] == rows else PartitionSpec() for a in case.leaves]
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=devices)

    def run(fun):
        local = jax.shard_map(
            lambda leaves, g: pull(fun, case.where, leaves, g)[1],
            mesh=mesh,
            in_specs=(specs, PartitionSpec("x")),
            out_specs=[specs[i] for i in case.where],
        )
        with x64_for(case.dtype):
            return to_numpy(jax.jit(local)(to_jax(case.leaves), to_jax(g)))

    expected = case.by_oracle(g)
    try:
        by_oracle = run(case.oracle)
    except Exception as e:
        raise Inconclusive(f"the oracle raises inside shard_map: {first_line(e)}") from None
    if list(compare(case, by_oracle, expected, rounding(case, expected), "")):
        raise NotApplicable("the function mixes rows, so it cannot run on shards of them")
    way = "inside shard_map with sharded rows,"
    got = raising(case, way, lambda: run(case.fun))
    message = f"{way} the gradient differs from that on one device"
    yield from compare(case, got, expected, rounding(case, expected), message)
