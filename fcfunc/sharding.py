"""Meshes of devices, and the sharding of params and batches.

This module only places arrays. The functions of the package are the same on one device and on several: JAX partitions
the work according to the sharding of the arguments. The mesh has two axes: examples are sharded along "data", layers
along "model".
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fcfunc import _arguments, _layout
from fcfunc._arguments import clipped
from fcfunc._layout import mesh_axes

__all__ = ["MODES", "global_batch", "logical_specs", "make_mesh", "param_specs", "shard"]

Rules = Sequence[tuple[str, str | tuple[str, ...]]]

MODES: dict[str, Rules] = {
    "data": (),
    "fsdp": (("mlp", "data"), ("embed", "data"), ("features", "data"), ("classes", "data")),
    "tensor": (("mlp", "model"), ("classes", "model")),
    "fsdp+tensor": (
        ("mlp", "model"),
        ("classes", "model"),
        ("embed", "data"),
        ("features", "data"),
        ("classes", "data"),
    ),
}
"""The rules of each mode, `(logical axis, mesh axis)` in order of preference; `param_specs` explains them."""


def make_mesh(
    *,
    data: int | None = None,
    model: int = 1,
    axis_type: AxisType = AxisType.Explicit,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh with the axes "data" and "model".

    Args:
      data: the number of devices over which the examples are sharded; None: the number of all devices divided by
        `model`.
      model: the number of devices over which each layer is sharded. They are neighbors, which have the fastest link.
      axis_type: with `AxisType.Explicit`, as in JAX's own meshes, an array's sharding is part of its type. The types
        then determine that a gradient is sharded like its parameter and that a fully sharded parameter is gathered.
        `AxisType.Auto` leaves intermediate shardings to the compiler, which may move activations if they are smaller;
        use it for loss functions and optimizers that fail with explicit types.
      devices: the devices to use; None: all devices of all processes.

    Returns:
      A `jax.sharding.Mesh`. Your own mesh from `jax.make_mesh` works everywhere, too.

    Raises:
      ValueError: a number is below 1, or the product of the two is not the number of devices.

    Example:
      >>> make_mesh(data=1, model=1, devices=jax.devices()[:1]).axis_names
      ('data', 'model')
    """
    devices = jax.devices() if devices is None else list(devices)
    _arguments.positive("make_mesh", model=model, **({} if data is None else {"data": data}))
    rows = len(devices) // model if data is None else data
    if rows * model != len(devices) or not devices:
        came = f"model={model}, which does not divide it" if data is None else f"data={data}, model={model}"
        raise ValueError(
            f"make_mesh: data x model must equal the number of devices, {len(devices)}, got {came}; "
            "to use fewer devices, pass devices=jax.devices()[:n]"
        )
    return jax.make_mesh((rows, model), ("data", "model"), axis_types=(axis_type,) * 2, devices=devices)


def param_specs(params: Any, mesh: Mesh, mode: str | Rules, *, replicate: str | Sequence[str] = ()) -> Any:
    """The sharding of a network's params on a mesh: a pytree of PartitionSpec with the structure of the params.

    Modes:
      "data": params are replicated; examples are sharded along "data".
      "fsdp": each `w` is also sharded along "data", and gathered where it is used.
      "tensor": layers are sharded along "model", alternately by columns and by rows, so that two layers need one sum.
      "fsdp+tensor": both.

    A mode is a list of rules, `(logical axis, mesh axis)`. The logical axes are "features" for the inputs, then
    alternately "mlp" and "embed" for the hidden widths, and "classes" for the outputs. A stack has the logical axes of
    its input, and its leading axis is never sharded. For each `w` the rules are tried in order. A rule applies if `w`
    has the rule's logical axis, neither that axis nor the mesh axis is assigned yet, and the width is divisible by the
    size of the mesh axis. Biases and the leaves of a norm are sharded like the columns of their `w`.

    Args:
      params: from `fcfunc.init`, stacked or not; or their shapes, from `jax.eval_shape`.
      mesh: the mesh.
      mode: one of `MODES`, or your own rules. A mesh axis may be a tuple of several.
      replicate: logical axes that stay replicated, such as "classes" or `("classes",)` if there are too few classes.

    Returns:
      A list of dicts with one PartitionSpec for each array.

    Raises:
      ValueError: the mode is unknown; a rule names an axis that the mesh or the network does not have; a width is not
        divisible by the size of its mesh axis and no other rule uses that mesh axis. A mode never replicates silently.
      TypeError: `params`, `mesh` or `mode` has the wrong type.

    Example:
      >>> from fcfunc import init
      >>> mesh = make_mesh(data=1, devices=jax.devices()[:1])
      >>> specs = param_specs(init(jax.random.key(0), [3, 4, 2]), mesh, "tensor")
      >>> specs[0]["w"], specs[1]["w"]
      (P(None, 'model'), P('model', None))
    """
    _check_mesh("param_specs", mesh)
    if isinstance(mode, str) and mode not in MODES:
        raise ValueError(f"param_specs: unknown mode {mode!r}; expected {', '.join(MODES)} or a list of rules")
    rules = _checked_rules("param_specs: mode", MODES[mode] if isinstance(mode, str) else mode)
    if isinstance(replicate, str) or not isinstance(replicate, Sequence):
        replicate = (replicate,)
    if not isinstance(params, list | tuple) or not all(isinstance(p, dict) and "w" in p for p in params):
        raise TypeError("param_specs: params must be a list of layers; for other pytrees use logical_specs")
    names = ("features", "mlp", "embed", "classes")
    for name in {*replicate, *(name for name, _ in rules)} - set(names):
        raise ValueError(
            f"param_specs: unknown logical axis {name!r} in mode or replicate; expected {', '.join(names)}"
        )
    rules = [rule for rule in rules if rule[0] not in replicate]
    specs, here, other = [], "features", "mlp"
    for layer, p in enumerate(params):
        stack = (None,) * (len(p["w"].shape) - 2)
        there = "classes" if layer == len(params) - 1 else other
        w = _assigned(f"param_specs: layer {layer}", (*stack, here, there), p["w"].shape, mesh, rules)
        specs.append({name: w if name == "w" else PartitionSpec(*w[: len(stack)], w[-1]) for name in p})
        if not stack:
            here, other = there, "embed" if there == "mlp" else "mlp"
    return specs


def logical_specs(axes: Any, tree: Any, mesh: Mesh, rules: Rules) -> Any:
    """The sharding of any pytree of arrays on a mesh, from the logical names of its axes.

    Args:
      axes: a pytree with the structure of `tree`, with a PartitionSpec of logical names for each array, such as
        `P("embed", "mlp")`; None for an axis that is not sharded.
      tree: the arrays, or their shapes.
      mesh: the mesh.
      rules: `(logical axis, mesh axis)` in order of preference, as for `param_specs`. Each name in `axes` needs a rule;
        the mesh axis None replicates it.

    Returns:
      A pytree of PartitionSpec of mesh axes.

    Raises:
      ValueError: as for `param_specs`, naming the array by its path; or a logical axis has no rule.

    Example:
      >>> mesh = make_mesh(data=1, devices=jax.devices()[:1])
      >>> logical_specs({"a": PartitionSpec("embed")}, {"a": np.zeros(4)}, mesh, [("embed", "data")])
      {'a': P('data',)}
    """
    _check_mesh("logical_specs", mesh)
    rules = _checked_rules("logical_specs: rules", rules)

    def assign(path, names, leaf):
        if not isinstance(names, tuple | PartitionSpec):
            raise TypeError(f"logical_specs: axes must be a PartitionSpec for each array, got {names!r:.80}")
        where = f"logical_specs: {jax.tree_util.keystr(path) or 'array'}"
        for name in set(names) - {None, *(name for name, _ in rules)}:
            raise ValueError(f"{where}: no rule for the logical axis {name!r}; ({name!r}, None) replicates it")
        return _assigned(where, names, np.shape(leaf), mesh, rules)

    is_axes = lambda a: isinstance(a, PartitionSpec)  # noqa: E731
    if jax.tree.structure(axes, is_leaf=is_axes) != jax.tree.structure(tree):
        raise ValueError(f"logical_specs: axes must have the structure of tree, got {axes!r:.80} for {tree!r:.80}")
    return jax.tree.map_with_path(assign, axes, tree, is_leaf=is_axes)


def shard(tree: Any, specs: Any, mesh: Mesh) -> Any:
    """Places arrays on a mesh.

    Args:
      tree: a pytree of arrays, with the same values on every process. If they are too large for one device, create them
        sharded instead: `jax.jit(net.init, out_shardings=...)`.
      specs: a pytree of PartitionSpec, as from `param_specs`; one PartitionSpec may stand for an entire subtree.
      mesh: the mesh.

    Returns:
      The same arrays, with each device holding its part.

    Raises:
      ValueError: an axis is not divisible by the size of its mesh axes; the message names the array.

    Example:
      >>> mesh = make_mesh(data=1, devices=jax.devices()[:1])
      >>> shard({"x": np.zeros((4, 2))}, PartitionSpec("data"), mesh)["x"].shape
      (4, 2)
    """
    _check_mesh("shard", mesh)
    is_spec = lambda a: isinstance(a, PartitionSpec)  # noqa: E731
    wrong = [spec for spec in jax.tree.leaves(specs, is_leaf=is_spec) if not is_spec(spec)]
    if specs is None or wrong:
        raise TypeError(
            f"shard: specs must be a PartitionSpec or a pytree of them, got {wrong[0] if wrong else None!r:.80}"
        )
    specs = jax.tree.map(lambda spec, part: jax.tree.map(lambda _: spec, part), specs, tree, is_leaf=is_spec)

    def place(path, leaf, spec):
        _check_divides(f"shard: {jax.tree_util.keystr(path) or 'array'}", spec, np.shape(leaf), mesh)
        return _layout.put(clipped(leaf), NamedSharding(mesh, spec))

    return jax.tree.map_with_path(place, tree, specs)


def global_batch(local: Any, mesh: Mesh, *, axis: str | tuple[str, ...] = "data") -> Any:
    """Examples sharded over a mesh, assembled from the part that each process has.

    Args:
      local: a pytree of arrays with a common leading axis, the examples of this process; every process must have the
        same number. If every process has all examples, use `shard(data, PartitionSpec("data"), mesh)` instead.
      mesh: the mesh.
      axis: the mesh axis, or axes, along which the examples are sharded.

    Returns:
      The same pytree with arrays of all processes' examples, in the order of the devices along `axis`.

    Raises:
      ValueError: the mesh has no such axis; the examples cannot be divided evenly; the processes have different numbers
        of examples, or share examples, because the mesh arranges several processes along another axis.

    Example:
      >>> mesh = make_mesh(data=1, devices=jax.devices()[:1])
      >>> global_batch({"x": np.zeros((4, 2))}, mesh)["x"].sharding.spec
      P('data',)
    """
    _check_mesh("global_batch", mesh)
    devices = _size("global_batch", mesh, axis)
    sharding = NamedSharding(mesh, PartitionSpec(axis))
    owners: dict[Any, set[int]] = {}  # the processes that hold each part of the examples
    for device, (part, *_) in sharding.devices_indices_map((devices,)).items():
        owners.setdefault(part.start, set()).add(device.process_index)
    if any(len(processes) > 1 for processes in owners.values()):
        raise ValueError(
            f"global_batch: several processes share the same examples along {axis!r} on this mesh; "
            "instead, pass all examples on every process to shard(data, PartitionSpec(...), mesh)"
        )
    here = sum(jax.process_index() in processes for processes in owners.values())
    _check_equal_counts(_arguments.count("global_batch", local, "local"))

    def place(path, leaf):
        leaf, where = np.asarray(clipped(leaf)), f"global_batch: {jax.tree_util.keystr(path) or 'array'}"
        if leaf.shape[0] % here:
            raise ValueError(
                f"{where}: the number of examples must be a multiple of {here}, this process's share of the {devices} "
                f"devices along {axis!r}, got {list(leaf.shape)}; drop the last few"
            )
        shape = (leaf.shape[0] // here * devices, *leaf.shape[1:])
        return jax.make_array_from_process_local_data(sharding, leaf, shape)

    return jax.tree.map_with_path(place, local)


def _check_equal_counts(count: int) -> None:
    if jax.process_count() > 1:
        counts = multihost_utils.process_allgather(np.array(count)).reshape(-1).tolist()
        if len(set(counts)) > 1:
            raise ValueError(f"global_batch: every process must have the same number of examples, got {counts}")


def _assigned(where: str, names, shape, mesh: Mesh, rules: Rules) -> PartitionSpec:
    """The mesh axis of each logical axis; `where` names the array in an error message."""
    rules = [(name, tuple(axis) if isinstance(axis, list) else axis) for name, axis in rules]
    if len(names) != len(shape):
        raise ValueError(f"{where}: {len(names)} logical axes, {names}, for an array {list(shape)}")
    entries: list[Any] = [None] * len(names)
    misfits, settled = {}, set()
    for name, axis in rules:
        size = _size(where, mesh, axis)
        used = {a for entry in entries for a in mesh_axes(entry)}
        if name not in names or name in settled or used & set(mesh_axes(axis)):
            continue
        at = names.index(name)
        if axis is None:
            settled.add(name)
        elif shape[at] % size:
            misfits.setdefault(axis, (name, shape[at], size))
        else:
            entries[at] = axis
            settled.add(name)
    for axis, (name, width, size) in misfits.items():
        if axis not in entries:
            raise ValueError(
                f"{where}, {list(shape)}: width {width} ({name}) is not divisible by the {size} devices of mesh axis "
                f"{axis!r}; choose another width, or replicate it with replicate={name!r} or ({name!r}, None)"
            )
    return PartitionSpec(*entries)


def _check_divides(where: str, spec: PartitionSpec, shape, mesh: Mesh) -> None:
    if len(spec) > len(shape):
        raise ValueError(f"{where}: {spec} has more axes than the array, {list(shape)}")
    for width, axis in zip(shape, spec, strict=False):
        if width % (size := _size(where, mesh, axis)):
            raise ValueError(
                f"{where}: width {width} of {list(shape)} is not divisible by the {size} devices of mesh axis {axis!r}"
            )


def _size(where: str, mesh: Mesh, axis) -> int:
    names = mesh_axes(axis)
    for name in names:
        if name not in mesh.shape or names.count(name) > 1:
            raise ValueError(f"{where}: unknown or repeated mesh axis {name!r}; expected {', '.join(mesh.axis_names)}")
    return math.prod(mesh.shape[name] for name in names)


def _checked_rules(where: str, rules) -> Rules:
    if isinstance(rules, list | tuple) and all(isinstance(rule, tuple | list) and len(rule) == 2 for rule in rules):
        return rules
    raise TypeError(f"{where} must be pairs of a logical axis and a mesh axis, got {rules!r:.80}")


def _check_mesh(where: str, mesh: Mesh) -> None:
    if not isinstance(mesh, Mesh):
        raise TypeError(f"{where}: mesh must be a Mesh, as from make_mesh, got {type(mesh).__name__}")
    if len(set(mesh.axis_types)) > 1:
        raise ValueError(f"{where}: the axes of the mesh must be all Explicit or all Auto, got {mesh.axis_types}")
