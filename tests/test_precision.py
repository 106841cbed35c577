"""Mixed precision: dtypes of the matmuls, where values are rounded, and the error relative to float64."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import fcfunc
from fcfunc import losses, ops, reference, train
from proofs import accuracy

DIMS = [64, 128, 128, 10]


def batch(seed, dtype=jnp.float32):
    x = jax.random.normal(jax.random.key(seed), (96, DIMS[0]), dtype)
    return x, jax.random.randint(jax.random.key(seed + 1), (96,), 0, DIMS[-1])


def loss_fn(params, batch, key, *, losses=losses, **options):
    x, y = batch
    logits = fcfunc.mlp(DIMS, **options).apply(params, x)
    return jnp.mean(losses.softmax_cross_entropy_with_integer_labels(logits, y))


def products(jaxpr):
    """Yields the dtypes of operands and result for every `dot_general` in a jaxpr and its nested jaxprs."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield tuple(v.aval.dtype.name for v in (*eqn.invars, *eqn.outvars))
        for param in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr")):
            inner = getattr(param, "jaxpr", param if hasattr(param, "eqns") else None)
            if inner is not None:
                yield from products(inner)


def step_and_state(**options):
    optimizer = optax.adam(1e-3)
    params = fcfunc.init(jax.random.key(0), DIMS)
    state = train.init_state(params, optimizer, jax.random.key(1))
    return train.make_train_step(functools.partial(loss_fn, **options), optimizer), state


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_every_product_of_a_bfloat16_step_has_bfloat16_operands_and_a_float32_sum(activation):
    step, state = step_and_state(activation=activation, compute_dtype="bfloat16")
    found = list(products(jax.make_jaxpr(step)(state, batch(0)).jaxpr))
    recomputed = 2 if activation == "gelu" else 0  # each hidden layer's pre-activation, in the backward pass
    assert len(found) >= 3 + 5 + recomputed  # 3 forward; 5 backward, plus possibly an unused dx
    assert set(found) == {("bfloat16", "bfloat16", "float32")}


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_so_they_reach_the_compiler_on_every_platform(platform):
    step, state = step_and_state(compute_dtype="bfloat16")
    text = step.trace(state, batch(0)).lower(lowering_platforms=(platform,)).as_text()
    signatures = re.findall(
        r"dot_general.*: \(tensor<[\dx]*x(\w+)>, tensor<[\dx]*x(\w+)>\) -> tensor<[\dx]*x(\w+)>", text
    )
    assert len(signatures) == 8
    assert set(signatures) == {("bf16", "bf16", "f32")}


def test_in_the_compiled_program_every_operand_is_bfloat16_or_widened_from_it():
    """XLA's CPU backend widens the operands of matmuls it has no kernel for, which is exact."""
    step, state = step_and_state(compute_dtype="bfloat16")
    text = step.lower(state, batch(0)).compile().as_text()
    found = list(dot_operands(text))
    assert len(found) == 2 * 8
    assert {dtype for dtype, _ in found} <= {"bf16", "f32"}
    assert all(dtype == "bf16" or source == "bf16" for dtype, source in found)


def dot_operands(text):
    """Yields the dtype of each `dot` operand in a compiled program, and the dtype it was converted from."""
    definitions, callers, computation, roots = {}, {}, "", {}
    for line in text.splitlines():
        header = re.match(r"(?:ENTRY )?%(\S+) \(", line)
        if header:
            computation = header[1]
        match = re.match(r"\s+(ROOT )?%(\S+) = \(?(\w+)\[[^ ]* (\w[\w-]*)\((.*)", line)
        if not match:
            continue
        root, name, dtype, opcode, rest = match.groups()
        operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
        definitions[computation, name] = (dtype, opcode, operands, rest)
        if root:
            roots[computation] = name
        for called in re.findall(r"calls=%([\w.\-]+)", rest):
            callers[called] = (computation, operands)

    def origin(computation, name):
        """Returns the dtype before the last conversion, looking through fusions and their parameters."""
        dtype, opcode, operands, rest = definitions[computation, name]
        if opcode == "parameter" and computation in callers:
            outer, arguments = callers[computation]
            return origin(outer, arguments[int(rest.split(")")[0])])
        if opcode == "fusion":
            called = re.findall(r"calls=%([\w.\-]+)", rest)[0]
            return origin(called, roots[called])
        if opcode in ("convert", "bitcast", "copy", "transpose", "reshape"):
            before = definitions[computation, operands[0]][0]
            return before if before != dtype else origin(computation, operands[0])
        return dtype

    for (computation, _), (_, opcode, operands, _) in list(definitions.items()):
        if opcode == "dot":
            for operand in operands:
                yield definitions[computation, operand][0], origin(computation, operand)


@pytest.mark.slow
def test_gradients_arrive_in_the_masters_dtype_unrounded():
    params = fcfunc.init(jax.random.key(0), DIMS)
    grads = jax.grad(loss_fn)(params, batch(0), None, compute_dtype="bfloat16")
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, params)
    kernel = np.asarray(grads[1]["w"])
    assert np.mean(kernel != kernel.astype(jnp.bfloat16).astype(np.float32)) > 0.9


def test_outputs_are_float32_and_the_features_bfloat16():
    net, (x, _) = fcfunc.mlp(DIMS, compute_dtype="bfloat16"), batch(0)
    params = net.init(jax.random.key(0))
    assert net.apply(params, x).dtype == jnp.float32
    assert net.features(params, x).dtype == jnp.bfloat16


def test_a_cotangent_is_rounded_to_the_operands_dtype():
    """The operands are already exact in bfloat16, so no other value is rounded."""
    x, w = (jax.random.normal(jax.random.key(s), (40, 40)).astype(jnp.bfloat16).astype(jnp.float32) for s in (0, 1))
    b, g = jnp.zeros(40), jax.random.normal(jax.random.key(2), (40, 40))
    _, exact = jax.vjp(ops.affine, x, w, b)
    affine = functools.partial(ops.affine, compute_dtype="bfloat16", out_dtype="float32")
    _, pull = jax.vjp(affine, x, w, b)
    for got, expected in zip(pull(g)[:2], exact(g)[:2], strict=True):
        error = float(jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected))
        assert 1e-4 <= error <= 2**-8


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
def test_gradients_are_at_most_a_fifth_further_from_float64_than_those_of_autodiff(activation, x64):
    options = {"activation": activation, "compute_dtype": "bfloat16"}
    errors = []
    for seed in range(4):
        params, data = fcfunc.init(jax.random.key(seed), DIMS), batch(seed)
        wide = jax.tree.map(lambda a: a.astype(jnp.float64), (params, data[0]))
        flat = lambda fun, *args: np.asarray(ravel_pytree(jax.jit(jax.grad(fun))(*args))[0], np.float64)
        by_twins = functools.partial(loss_fn, ops=reference, losses=reference)
        truth = flat(functools.partial(by_twins, activation=activation), wide[0], (wide[1], data[1]), None)
        ours = flat(functools.partial(loss_fn, **options), params, data, None)
        theirs = flat(functools.partial(by_twins, **options), params, data, None)
        errors.append([np.linalg.norm(grads - truth) / np.linalg.norm(truth) for grads in (ours, theirs)])
    ours, theirs = np.mean(errors, axis=0)
    assert ours <= 1.2 * theirs


def test_float32_masters_move_where_bfloat16_params_do_not():
    def moved(param_dtype, **options):
        optimizer = optax.adam(1e-3)
        params = jax.tree.map(jnp.ones_like, fcfunc.mlp(DIMS).init(jax.random.key(0), param_dtype=param_dtype))
        state = train.init_state(params, optimizer, jax.random.key(1))
        step = train.make_train_step(functools.partial(loss_fn, **options), optimizer)
        for _ in range(10):
            state, _ = step(state, batch(0, param_dtype))
        return not bool(jnp.all(state.params[0]["w"] == 1))

    assert moved(jnp.float32, compute_dtype="bfloat16")
    assert not moved(jnp.bfloat16)


@pytest.mark.slow
def test_an_ensemble_trains_in_bfloat16():
    params = jax.vmap(lambda key: fcfunc.init(key, DIMS))(jax.random.split(jax.random.key(0), 3))
    grads = jax.vmap(lambda p: jax.grad(loss_fn)(p, batch(0), None, compute_dtype="bfloat16"))(params)
    for i in range(3):
        one = jax.grad(loss_fn)(jax.tree.map(lambda a, i=i: a[i], params), batch(0), None, compute_dtype="bfloat16")
        chex.assert_trees_all_close(jax.tree.map(lambda a, i=i: a[i], grads), one, rtol=2e-2, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", accuracy.DTYPES)
@pytest.mark.parametrize("entry", accuracy.functions(), ids=lambda entry: entry.row)
def test_the_gradient_is_no_more_than_twice_as_inaccurate_as_automatic_differentiation(entry, dtype):
    errors = accuracy.compared(entry._replace(torch=None), dtype)
    (median, of_element, of_array), auto = errors["rule"], [2 * max(error, 0.5) for error in errors["autodiff"]]
    assert median <= auto[0]
    assert of_array <= auto[2]
    if dtype != "float32" and not entry.row.startswith(("layer-", "linear_")):  # these round a cotangent on purpose
        assert of_element <= auto[1]
