"""check_vjp passes every rule of this library, reports what it did, and rejects invalid arguments."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import fcfunc
from fcfunc import losses, ops, reference
from fcfunc.testing import assert_vjp, check_vjp
from tests.rules import OPTIONS, rows, slow


def drawing(row):
    return lambda rng, n, d: row.draw(int(rng.integers(2**31)), n, d, np.float32)


@rows(options=True)
def test_every_rule_of_the_table_passes_what_every_rule_must(row):
    # Options change only the numbers. test_multiprecision.py tests the accuracy.
    numbers = ["multiprecision", "interleaved", "vmap_equals_loop", "scan_and_checkpoint"] if row in OPTIONS else []
    assert_vjp(row.fun, drawing(row), skip=["second_order", "extremes", "meshes", *numbers])


@pytest.mark.slow
@rows()
def test_every_rule_of_the_table_passes_every_group(row):
    if row.variant:
        pytest.skip("the groups are left to the row with more options")
    # The extremes need the reference and have their own test; the checks outside the groups have another.
    assert_vjp(row.fun, drawing(row), only=["second_order", "sizes", "meshes"])


@pytest.mark.slow
@rows(options=True)
def test_every_rule_of_the_table_agrees_with_its_reference_at_extremes(row):
    checks = ["oracle", "forward_output", "extremes"]
    assert_vjp(row.fun, drawing(row), reference=row.reference, only=checks)


@pytest.mark.parametrize("dtype", [slow("float64"), "float32", slow("bfloat16"), slow("float16")])
@pytest.mark.parametrize("seed", [0, slow(1), slow(2)])
def test_a_relu_of_64_by_256_raises_no_alarm(dtype, seed):
    assert_vjp(
        ops.relu,
        "64 256",
        at_kink={0.0: 0.0},
        dtype=dtype,
        seed=seed,
        skip=["shape_sweep", "second_order", "extremes", "meshes"],
    )


def test_a_whole_network_passes_through_the_plain_functions_that_call_its_rules():
    params = fcfunc.init(jax.random.key(0), [3, 4, 2])

    @jax.jit
    def loss(params, x, labels):
        logits = fcfunc.apply(params, x, activation="tanh")
        return jnp.mean(losses.softmax_cross_entropy_with_integer_labels(logits, labels)) + losses.l2_penalty(params)

    x = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
    report = check_vjp(loss, (params, x, np.array([0, 1, 1, 0, 1, 0])), skip=["second_order", "extremes", "meshes"])
    assert report.ok, report
    assert report.rules == ("layer", "affine", "softmax_cross_entropy_with_integer_labels", "l2_penalty")
    assert list(report.arguments)[:2] == ["args[0][0]['b']", "args[0][0]['w']"]
    (sweep,) = [r for r in report.results if r.check == "shape_sweep"]
    assert sweep.status == "not applicable"
    assert "the sizes were given" in sweep.reason


@jax.custom_vjp
def wrong_at_one_place(x, w):
    return x * w


wrong_at_one_place.defvjp(
    lambda x, w: (x * w, (x, w)), lambda res, g: (g * res[1], (g * res[0]).at[1, 2].multiply(1.5))
)


def test_a_finding_tells_argument_index_values_error_and_how_to_see_it_again():
    report = check_vjp(wrong_at_one_place, "n d, n d", seed=7, sizes={"n": 3, "d": 4})
    finding = report.findings[0]
    assert finding.got is not None
    assert finding.expected is not None
    assert finding.ulps is not None
    assert (finding.check, finding.argument, finding.index, finding.seed) == ("oracle", "args[1]", (1, 2), 7)
    np.testing.assert_allclose(finding.got, 1.5 * finding.expected, rtol=1e-5)
    assert finding.ulps > 1000
    assert finding.sizes == {"n": 3, "d": 4}
    assert "oracle" in report.arguments["args[1]"]
    assert "oracle" not in report.arguments["args[0]"]
    assert pasted(finding) == dataclasses.replace(finding, also=())


def pasted(finding):
    """The finding of the code that reproduces a finding."""
    *imports, call = finding.reproduce.splitlines()
    names = {}
    exec("\n".join(imports), names)
    return eval(call.removeprefix("print(").removesuffix(")"), names).findings[0]


def test_an_infinite_range_can_be_pasted():
    finding = check_vjp(wrong_at_one_place, "3 4, 3 4", only="oracle", ranges={0: (0.0, math.inf)}).findings[0]
    assert pasted(finding) == finding


def test_every_check_passes_fails_or_says_why_it_does_not_apply():
    report = check_vjp(ops.relu, "n d", skip=["meshes"])
    assert {r.status for r in report.results} == {"passed", "not applicable", "not run"}
    assert all(r.reason for r in report.results if r.status != "passed")
    printed = str(report)
    assert all(r.check in printed for r in report.results)


def test_the_same_seed_gives_the_same_report_and_another_another_draw():
    one, two, three = (check_vjp(wrong_at_one_place, "3 4, 3 4", seed=s) for s in (0, 0, 1))
    assert one == two
    assert one.findings[0].got != three.findings[0].got


def test_assert_vjp_raises_with_the_report():
    with pytest.raises(AssertionError, match=r"FAILED[\s\S]*oracle args\[1\]\[1, 2\]"):
        assert_vjp(wrong_at_one_place, "3 4, 3 4")


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def scaled(x, power, name):
    assert name == "a name"
    return x**power


scaled.defvjp(lambda x, power, name: (x**power, x), lambda power, name, x, g: (g * power * x ** (power - 1),))


@pytest.mark.slow
def test_static_arguments_keywords_closures_and_partials_are_held_fixed():
    x = np.linspace(0.5, 1.5, 6, dtype=np.float32).reshape(2, 3)
    report = check_vjp(scaled, (x, 3, "a name"))
    assert report.ok, report
    assert report.statics == ("args[1]", "args[2]")
    closure = check_vjp(lambda x: scaled(x, 2, "a name"), (x,))
    assert closure.ok, closure
    assert_vjp(ops.softmax, "n d", kwargs={"axis": 0})
    assert_vjp(functools.partial(ops.softmax, axis=0), "n d")


def test_a_reference_replaces_an_oracle_in_doubt():
    """A straight-through estimator: wrong for its own function, right for the one that it stands in for."""
    rounded = jax.custom_vjp(lambda x: jnp.round(x))
    rounded.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))
    assert not check_vjp(rounded, "n d").ok
    checks = ("oracle", "zero_cotangent", "linear_in_cotangent", "vmap_equals_loop", "shape_sweep")
    assert_vjp(rounded, "n d", reference=lambda x: x, only=checks)
    found = check_vjp(rounded, "n d", reference=lambda x: x * 2, only=checks).findings
    assert found[0].check == "oracle"


def test_given_the_twin_as_reference_a_wrong_function_is_found_too():
    primal = lambda x: jnp.tanh(x) + jnp.asarray(0.1, x.dtype)
    shifted = jax.custom_vjp(primal)
    shifted.defvjp(lambda x: (primal(x), jnp.tanh(x)), lambda y, g: (g * (1 - y**2),))
    skip = ["second_order", "extremes", "meshes"]
    assert check_vjp(shifted, "n d", skip=skip).ok
    report = check_vjp(shifted, "n d", reference=jnp.tanh, skip=skip)
    assert {f.check for f in report.findings} == {"forward_output"}


def test_a_function_without_a_rule_is_said_to_have_none():
    with pytest.raises(ValueError, match="relu has no rule of its own and calls no custom_vjp"):
        check_vjp(reference.relu, "n d")


def test_rules_of_a_function_compiled_before_are_still_seen():
    compiled = jax.jit(lambda x: ops.tanh(x))
    compiled(jnp.ones((5, 3)))
    assert check_vjp(compiled, "n d", only="oracle").rules == ("tanh",)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("n d, d* m", r"cannot read the shape[\s\S]*n d, d\* m\n      \^\^\^\^\^"),
        ("n d, n:float", "cannot read the shape"),
        ("n d:int<", "cannot read the shape"),
    ],
)
def test_a_shape_that_cannot_be_read_is_shown(args, message):
    with pytest.raises(ValueError, match=message):
        check_vjp(ops.affine, args)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: check_vjp(ops.relu, np.ones(3)),
            TypeError,
            "args must be a tuple, a string of shapes or a function, got ndarray",
        ),
        (
            lambda: check_vjp(ops.relu, "n d", only=["magic"]),
            ValueError,
            "unknown name 'magic' in only; choose from repeatable, ",
        ),
        (
            lambda: check_vjp(ops.relu, "n d", require="speed"),
            ValueError,
            "unknown name 'speed' in require; choose from second_order, ",
        ),
        (lambda: check_vjp(ops.relu, "n d", argnums=1), ValueError, "argnums must be positions of the 1 arguments"),
        (lambda: check_vjp(ops.relu, "n d", rtol=-1.0), ValueError, "rtol must be a number of at least 0, got -1.0"),
        (
            lambda: check_vjp(ops.relu, (np.ones(3, np.int32),)),
            ValueError,
            "no argument is an array of real or complex",
        ),
    ],
)
def test_bad_use_gets_a_clear_error(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_rule_that_lays_dw_as_its_operands_and_not_as_w_is_found():
    """They differ if x is sharded by columns but w is not sharded by rows, and if the weights are fully sharded."""

    def laid_by_operands(residuals, g):
        x, *_ = residuals
        dx, dw, db = ops.affine_bwd(residuals, g)
        sharding = jax.typeof(x).sharding
        if AxisType.Explicit in sharding.mesh.axis_types:
            spec = PartitionSpec(*(jax.typeof(a).sharding.spec[1] for a in (x, g)))
            dw = jax.sharding.reshard(dw, NamedSharding(sharding.mesh, spec))
        return dx, dw, db

    @jax.custom_vjp
    def affine(x, w, b):
        return ops.affine_fwd(x, w, b)[0]

    affine.defvjp(ops.affine_fwd, laid_by_operands)
    report = check_vjp(affine, "n d, d m, m", only=["sharded_equals_unsharded"])
    assert "on an Explicit mesh with the last axis of the first argument sharded along x" in str(report)


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: lambda x: jax.lax.map(f, x)], ids=["jit", "loop"])
def test_the_oracle_of_a_compiled_function_keeps_the_arrays_that_it_captures(wrap):
    weights = np.array([2.0, -1.0, 0.5], np.float32)
    fun = wrap(lambda x: ops.tanh(x * jnp.broadcast_to(weights, x.shape)))
    assert_vjp(fun, "n 3", only=["oracle", "forward_output"])
