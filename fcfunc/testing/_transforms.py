"""The checks of a rule under JAX's transformations: vmap, jit, scan, remat, second derivatives, other sizes, meshes."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fcfunc import _layout
from fcfunc.testing import _case
from fcfunc.testing._case import Case, NotApplicable, in_float64_if_taken, swept_sizes, to_jax, to_numpy, x64_for
from fcfunc.testing._compare import Finding, both, compare, disagreements, rounding


def _batched(case: Case, leaves: list, axes: list) -> list[np.ndarray]:
    """The gradients under `vmap`; `leaves` are the real leaves of the arguments, then the cotangents."""
    count = len(case.reals)

    def pull(*leaves):
        return _case.gradients(case.fun, case.fill(leaves[:count]), list(leaves[count:]))

    with x64_for(case.dtype):
        return to_numpy(jax.jit(jax.vmap(pull, in_axes=axes))(*to_jax(leaves)))


def _looped(case: Case, leaves: list, axes: list) -> list[np.ndarray]:
    """The same by a loop over the batch of three."""
    count, pulled = len(case.reals), []
    for k in range(3):
        row = [leaf[k] if axis == 0 else leaf for leaf, axis in zip(leaves, axes, strict=True)]
        pulled.append(case.with_reals(row[:count]).vjp(case.fun, row[count:]))
    return [np.stack(leaf) for leaf in zip(*pulled, strict=True)]


def vmap_equals_loop(case: Case) -> Iterator[Finding]:
    """Batched over everything, and over one argument at a time, the gradients are those of a loop."""
    paths = [*case.paths, "the cotangent"]
    for at in {c.dtype: c for c in (in_float64_if_taken(case), *([] if case.fast else [case]))}.values():
        rng, g, count = at.rng(200), at.cotangent(201), len(at.reals)
        stacks = [
            np.stack([a + np.asarray(k / 4, a.dtype) * rng.standard_normal(a.shape).astype(a.dtype) for k in range(3)])
            for a in [*at.reals, *g]
        ]
        for over in ("everything", *paths):
            chosen = [over in ("everything", paths[min(i, count)]) for i in range(len(stacks))]
            axes = [0 if batched else None for batched in chosen]
            leaves = [s if batched else s[0] for s, batched in zip(stacks, chosen, strict=True)]
            run = functools.partial(_batched, at, leaves, axes)
            loop = functools.partial(_looped, at, leaves, axes)
            got, expected, raised = both(at, run, loop, f"vmap over {over} raises")
            message = f"vmap over {over} differs from a loop"
            found = [raised] if raised else list(compare(at, got, expected, rounding(at, expected), message))
            if found:
                yield from found
                return


@functools.partial(jax.jit, static_argnums=0)
def _compiled_forward(fun: Callable, args: tuple):
    return jax.vjp(fun, *args)


@jax.jit
def _compiled_backward(back, g: list):
    return _case.only_real(back(g))


def compiled_equals_eager(case: Case) -> Iterator[Finding]:
    """Compiled as one program, and forward and backward apart, the gradients are those of the eager run."""
    g = case.cotangent(210)
    eager = case.vjp(case.fun, g)

    def whole():
        with x64_for(case.dtype):
            return to_numpy(_case.compiled_gradients(case.fun, case.args, to_jax(g)))

    def apart():
        with x64_for(case.dtype):
            _, back = _compiled_forward(case.fun, case.args)
            return to_numpy(_compiled_backward(back, to_jax(g)))

    for way, run in (("compiled", whole), ("compiled apart, forward and backward,", apart)):
        yield from _way(case, run, eager, rounding(case, eager, 256.0), way)


def scan_and_checkpoint(case: Case) -> Iterator[Finding]:
    """Inside `lax.scan` and `jax.checkpoint` the gradients are those outside, times the number of steps."""
    g = case.cotangent(220)
    half = [a.astype(np.float64) for a in case.vjp(case.fun, g)]
    expected = [2 * a for a in half]

    def twice(*args):
        outs = jax.checkpoint(case.fun)(*args)
        zeros = [jnp.zeros(out.shape, out.dtype) for out in outs]
        return jax.lax.scan(
            lambda c, _: ([a + b for a, b in zip(c, case.fun(*args), strict=True)], None), zeros, length=2
        )[0]

    compiled = case.as_compiled()
    found = list(_way(case, lambda: compiled.vjp(twice, g), expected, rounding(case, expected), "inside lax.scan"))
    yield from found
    if not found:
        remat = jax.checkpoint(case.fun)
        yield from _way(case, lambda: compiled.vjp(remat, g), half, rounding(case, half), "under jax.checkpoint")


def _way(case: Case, run: Callable, expected: list, allowed: list, way: str) -> Iterator[Finding]:
    """What is found if the gradients are computed in some way: the rule raises, or they differ from those expected."""
    got, _, raised = both(case, run, lambda: None, f"{way} the rule raises")
    if raised:
        yield raised
    else:
        yield from compare(case, got, expected, allowed, f"{way} the gradient differs")


def _second(case: Case, transform: Callable, message: str) -> Iterator[Finding]:
    wide = case.in_float64
    g = wide.cotangent(230)

    def derivative(fun):
        def first(reals, weights):
            return _case.gradients(fun, wide.fill(reals), weights)

        with x64_for(np.float64):
            return to_numpy(jax.jit(functools.partial(transform, first))(to_jax(wide.reals), to_jax(g)))

    got, expected, raised = both(
        wide, lambda: derivative(wide.fun), lambda: derivative(wide.oracle), f"{message} raises"
    )
    if raised:
        yield raised
    else:
        largest_of_all = max((float(np.abs(a).max(initial=0.0)) for a in expected), default=0.0)
        allowed = [t + 1e-11 * largest_of_all + 1e-12 for t in rounding(wide, expected, 4096.0)]
        yield from compare(wide, got, expected, allowed, f"{message} differs from the oracle's")


def reverse_over_reverse(case: Case) -> Iterator[Finding]:
    """The gradient of the gradient, by the arguments and by the cotangent, against the oracle's."""

    def transform(first, reals, g):
        rng = case.rng(231)
        out, back = jax.vjp(first, reals, g)
        return back([jnp.asarray(rng.standard_normal(a.shape)) for a in out])

    yield from _second(case, transform, "reverse over reverse")


def forward_over_reverse(case: Case) -> Iterator[Finding]:
    """The directional derivative of the gradient against the oracle's."""

    def transform(first, reals, g):
        rng = case.rng(232)
        tangents = [[jnp.asarray(rng.standard_normal(a.shape)) for a in tree] for tree in (reals, g)]
        return jax.jvp(first, (reals, g), tuple(tangents))[1]

    yield from _second(case, transform, "forward over reverse")


def _layouts(case: Case) -> Iterator[tuple[str, list[PartitionSpec]]]:
    """Shardings of the arguments on a mesh of axes "x" and "y", by the mesh axis of each size.

    Each even size alone over "x", as in data, column and row parallel training; all over "x", as in fully sharded
    training; and one over "y", the others over "x", as in both together. An array uses each mesh axis once, from its
    first axis on or, if that makes a difference, from its last.
    """
    leaves = jax.tree.leaves(case.args)
    sizes = sorted({n for leaf in case.reals for n in leaf.shape if n and n % 2 == 0})
    plans = [{n: "x"} for n in sizes]
    if len(sizes) > 1:
        plans += [dict.fromkeys(sizes, "x"), *(dict.fromkeys(sizes, "x") | {n: "y"} for n in sizes)]
    if len(leaves) > 1 and leaves[0].ndim and leaves[0].shape[-1] in sizes:
        first = PartitionSpec(*[None] * (leaves[0].ndim - 1), "x")
        yield "the last axis of the first argument over x", [first, *[PartitionSpec()] * (len(leaves) - 1)]
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
                over = ", ".join(f"every axis of {n} over {axis}" for n, axis in plan.items())
                yield f"{over} (the {end} where an array has two)", specs


def _sharded(fun: Callable, case: Case, g: list, mesh, specs: list) -> list[np.ndarray]:
    """The gradients, computed on sharded arguments."""

    def pull(args, g):
        out, back = jax.vjp(fun, *args)
        return _case.only_real(back([_layout.reshard_like(a, o) for a, o in zip(g, out, strict=True)]))

    leaves, treedef = jax.tree.flatten(case.args)
    with x64_for(case.dtype), jax.set_mesh(mesh):
        placed = [jax.device_put(leaf, NamedSharding(mesh, s)) for leaf, s in zip(leaves, specs, strict=True)]
        return to_numpy(jax.jit(pull)(jax.tree.unflatten(treedef, placed), to_jax(g)))


def _devices(count: int) -> list:
    if jax.device_count() < count:
        advice = "XLA_FLAGS=--xla_force_host_platform_device_count=8 makes virtual ones"
        raise NotApplicable(f"needs {count} devices: {advice}")
    return jax.devices()[:count]


def sharded_equals_unsharded(case: Case) -> Iterator[Finding]:
    """On Auto and on Explicit meshes the gradients are those of one device, wherever the oracle's are."""
    devices, case = _devices(4), case.at_even_sizes()
    g, tried = case.cotangent(240), 0
    expected = case.vjp(case.oracle, g)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind,) * 2, devices=devices)
        for layout, specs in _layouts(case):
            run = [functools.partial(_sharded, fun, case, g, mesh, specs) for fun in (case.fun, case.oracle)]
            where = f"on an {kind.name} mesh with {layout}"
            try:
                got, _, raised = both(case, run[0], run[1], f"{where} the rule raises")
            except NotApplicable:
                continue  # nor does automatic differentiation work on this layout
            tried += 1
            message = f"{where} the gradient is another"
            found = [raised] if raised else list(compare(case, got, expected, rounding(case, expected), message))
            if found:
                yield from found
                return
    if not tried:
        raise NotApplicable("no axis has an even size, or automatic differentiation works on no layout either")


def shard_map_equals_unsharded(case: Case) -> Iterator[Finding]:
    """Inside `shard_map`, rows sharded and the rest replicated, the gradients are those of one device."""
    devices, case = _devices(2), case.at_even_sizes()
    g, rows = case.cotangent(250), case.reals[0].shape[0] if case.reals[0].ndim else 0
    if not rows or rows % 2 or any(not a.ndim or a.shape[0] != rows for a in g):
        raise NotApplicable("the outputs do not have the rows of the first argument, or their number is odd")
    leaves, treedef = jax.tree.flatten(case.args)
    specs = [PartitionSpec("x") if leaf.ndim and leaf.shape[0] == rows else PartitionSpec() for leaf in leaves]
    real_specs = [s for leaf, s in zip(leaves, specs, strict=True) if _case.is_real(leaf)]
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=devices)

    def run(fun):
        local = jax.shard_map(
            lambda args, g: _case.gradients(fun, args, g),
            mesh=mesh,
            in_specs=(jax.tree.unflatten(treedef, specs), PartitionSpec("x")),
            out_specs=real_specs,
        )
        with x64_for(case.dtype):
            return to_numpy(jax.jit(local)(case.args, to_jax(g)))

    expected = case.vjp(case.oracle, g)
    message = "inside shard_map, rows sharded,"
    got, by_oracle, raised = both(case, lambda: run(case.fun), lambda: run(case.oracle), f"{message} the rule raises")
    if list(compare(case, by_oracle, expected, rounding(case, expected), "")):
        raise NotApplicable("the rows of the function are not independent")
    if raised:
        yield raised
    else:
        yield from compare(case, got, expected, rounding(case, expected), f"{message} the gradient is another")


def shape_sweep(case: Case) -> Iterator[Finding]:
    """Other sizes: batch 1, all 1, square, 0, more than 32, more than a tile of 128; against the oracle."""
    if case.redraw is None or not case.letters:
        raise NotApplicable("the sizes were given; by shapes with names, as in 'n d, d m', they are swept")
    for sizes in swept_sizes(list(case.letters), fast=case.fast):
        other = case.redraw(sizes).as_compiled()
        message = "at these sizes the rule differs from automatic differentiation"
        try:
            if case.fast:  # one dtype to compile instead of two
                other = in_float64_if_taken(other)
            found = list(disagreements(other, 1, message))
        except NotApplicable:
            continue  # the function itself does not take these sizes
        if found:
            yield from (dataclasses.replace(f, sizes=sizes) for f in found)
            return
