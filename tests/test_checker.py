"""The verdicts of check_vjp on small rules: right ones that are hard to judge, wrong ones that are easy to miss."""

import gc
import importlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.core import Tracer
from jax.extend.core import Jaxpr

from fcfunc import ops
from fcfunc.testing import __main__ as command
from fcfunc.testing import assert_vjp, check_vjp

ORACLE = ("oracle", "projected_differences")
GROUPS = ("second_order", "extremes", "meshes")


def rule(fun, fwd, bwd, **options):
    made = jax.custom_vjp(fun, **options)
    made.defvjp(fwd, bwd)
    return made


sine = rule(jnp.sin, lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))
float64_in_half = rule(
    jnp.sin,
    lambda x: (jnp.sin(x), x),
    lambda x, g: (g * jnp.cos(x) * (0.5 if x.dtype == jnp.float64 else 1),),
)
half_sine = rule(jnp.sin, lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x) / 2,))


def power(x):
    return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * x), (0, jnp.ones_like(x)))[1]


def cube(factor):
    return rule(power, lambda x: (power(x), x), lambda x, g: (factor * g * x * x,))


def test_a_function_without_reverse_mode_is_compared_with_forward_mode():
    assert_vjp(cube(3), "n d", only="oracle")
    assert check_vjp(cube(2), "n d", only="oracle").status == "FAILED"


def on_the_host(x):
    return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x, vmap_method="expand_dims")


@pytest.mark.parametrize("args", ["n d", (jnp.zeros((0, 3)),)], ids=["a callback", "no element"])
def test_a_report_in_which_nothing_was_compared_is_inconclusive(args):
    fun = on_the_host if args == "n d" else jnp.sin
    wrong = rule(fun, lambda x: (fun(x), x), lambda x, g: (-5 * g * jnp.cos(x),))
    only = ("oracle", "kinks", "zero_cotangent", "multiprecision")
    report = check_vjp(wrong, args, only=only)
    assert not report.findings
    assert report.status == "inconclusive"
    assert not report.ok
    with pytest.raises(AssertionError, match="inconclusive"):
        assert_vjp(wrong, args, only=only)


def of_five_rows(x):
    if x.shape[0] != 5:
        raise ValueError("five rows expected")
    return jnp.sin(x)


@pytest.mark.parametrize("reference", [None, of_five_rows])
def test_sizes_that_the_function_does_not_take_are_left_out(reference):
    five = rule(of_five_rows, lambda x: (of_five_rows(x), x), lambda x, g: (g * jnp.cos(x),))
    assert_vjp(five, "n d", reference=reference, only=("oracle", "shape_sweep"))


def softmax_sum(x):
    return jnp.sum(jax.nn.softmax(x, axis=-1), axis=-1)


@pytest.mark.parametrize(
    "bwd",
    [
        lambda x, g: (jnp.zeros_like(x),),
        lambda x, g: jax.vjp(lambda x: jnp.sum(jnp.exp(jax.nn.log_softmax(x)), -1), x)[1](g),
    ],
    ids=["exact", "rounded"],
)
def test_a_gradient_that_is_zero_may_be_rounded(bwd):
    assert_vjp(rule(softmax_sum, lambda x: (softmax_sum(x), x), bwd), "n d", skip=GROUPS)


def test_none_in_an_argument_is_no_array():
    def linear(p, x):
        return x * p["w"][None]

    def bwd(residuals, g):
        p, x = residuals
        return {"w": jnp.sum(g * x, 0), "b": None}, g * p["w"][None]

    params = {"w": np.ones(3, np.float32), "b": None}
    assert_vjp(
        rule(linear, lambda p, x: (linear(p, x), (p, x)), bwd), (params, np.ones((4, 3), np.float32)), skip=GROUPS
    )


def test_the_oracle_goes_through_a_linear_solve():
    def bwd(residuals, g):
        a, x = residuals
        db = jnp.linalg.solve(a.T, g)
        return -jnp.outer(db, x), db

    def fwd(a, b):
        x = jnp.linalg.solve(a, b)
        return x, (a, x)

    rng = np.random.default_rng(3)
    a = (np.eye(4) * 3 + rng.standard_normal((4, 4))).astype(np.float32)
    assert_vjp(rule(jnp.linalg.solve, fwd, bwd), (a, rng.standard_normal(4).astype(np.float32)), skip=GROUPS)


def test_the_oracle_goes_through_shard_map():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("x")
    sharded = jax.shard_map(lambda x: sine(x), mesh=mesh, in_specs=spec, out_specs=spec)
    assert_vjp(sharded, "n d", only=("oracle", "rule_used"))


def test_code_may_index_with_a_tracer():
    def first_three(table):
        zero = jnp.zeros(table.shape[1:], table.dtype)
        return jax.lax.fori_loop(0, 3, lambda k, total: total + table[k], zero)

    summed = rule(first_three, lambda t: (first_three(t), t), lambda t, g: (jnp.zeros_like(t).at[:3].set(g),))
    assert_vjp(summed, (np.arange(12, dtype=np.float32).reshape(4, 3),), skip=GROUPS)


def test_a_rule_called_in_the_forward_pass_of_another_needs_no_backward_pass():
    outer = rule(lambda x: sine(x) * 2, lambda x: (sine(x) * 2, x), lambda x, g: (2 * g * jnp.cos(x),))
    report = check_vjp(outer, "n d", only=("oracle", "rule_used", "cotangent_types"))
    assert report.ok, report
    assert report.rules == ("<lambda>", "sin")


def test_a_rule_may_be_called_with_keywords_and_defaults():
    def scaled(x, y, factor=2.0):
        return x * y * factor

    def bwd(residuals, g):
        x, y, factor = residuals
        return g * y * factor, g * x * factor, jnp.sum(g * x * y)

    made = rule(scaled, lambda x, y, factor: (scaled(x, y, factor), (x, y, factor)), bwd)
    assert_vjp(lambda x, y: made(x, y=y), "n d, n d", skip=GROUPS)


def test_a_reference_may_return_another_dtype():
    assert_vjp(sine, "n d", reference=lambda x: jnp.sin(x.astype(jnp.float32)), skip=GROUPS)


def sum_of_squares(x):
    return jnp.sum(x.astype(jnp.float32) ** 2, axis=-1)


@pytest.mark.parametrize(("factor", "status"), [(2, "ok"), (1, "FAILED")])
def test_a_function_that_returns_float32_whatever_it_is_given_is_judged_in_float32(factor, status):
    def bwd(x, g):
        return ((factor * g[:, None] * x.astype(jnp.float32)).astype(x.dtype),)

    made = rule(sum_of_squares, lambda x: (sum_of_squares(x), x), bwd)
    assert check_vjp(made, "n d", skip=GROUPS).status == status
    assert check_vjp(made, "n d", dtypes=(), only="oracle").status == status


@pytest.mark.parametrize(
    ("fun", "bwd", "shapes"),
    [
        (jnp.log, lambda x, g: (g / x,), "n d:positive"),
        (jnp.arcsin, lambda x, g: (g / jnp.sqrt(1 - x * x),), "n d:-1..1"),
    ],
    ids=["log", "arcsin"],
)
def test_no_check_leaves_a_declared_range(fun, bwd, shapes):
    @jax.custom_vjp
    def watched(x):
        return fun(x)

    watched.defvjp(lambda x: (fun(x), x), bwd)
    report = check_vjp(watched, shapes, require=("second_order", "extremes"))
    assert report.ok, report


def test_a_range_may_be_given_for_arguments_that_are_drawn_by_the_caller():
    root = rule(jnp.sqrt, lambda x: (jnp.sqrt(x), x), lambda x, g: (g / (2 * jnp.sqrt(x)),))
    x = np.linspace(0.5, 2, 6, dtype=np.float32)
    assert_vjp(root, (x,), ranges={0: (0.0, np.inf)}, require=("extremes",))


def test_a_cause_is_one_finding_with_the_other_checks_under_it():
    report = check_vjp(half_sine, "n d", skip=GROUPS)
    (found,) = report.findings
    assert found.check == "oracle"
    assert {"projected_differences", "adjoint", "precision_of_dtypes", "shape_sweep"} <= set(found.also)
    assert "also found by multiprecision" in str(report)


def test_an_exception_is_one_finding_however_many_checks_meet_it():
    def bwd(x, g):
        raise RuntimeError("no backward pass on this device")

    (found,) = check_vjp(rule(jnp.sin, lambda x: (jnp.sin(x), x), bwd), "n d", skip=GROUPS).findings
    assert "no backward pass on this device" in found.message
    assert len(found.also) > 5


@jax.custom_vjp
def calls_itself(x):
    return jnp.sin(x)


calls_itself.defvjp(lambda x: (calls_itself(x), x), lambda x, g: (g * jnp.cos(x),))


def test_a_forward_pass_that_calls_the_decorated_function_is_a_note_that_explains_itself():
    report = check_vjp(calls_itself, "n d", skip=["meshes"])
    assert report.ok, report
    (note,) = report.notes
    assert note.check == "forward_over_reverse"
    assert "calls the decorated function; call the undecorated one" in note.message
    assert not check_vjp(calls_itself, "n d", require="second_order", only=["oracle", "second_order"]).ok


@pytest.mark.parametrize("name", ["relu", "softplus", "relu6", "mish"])
def test_a_custom_jvp_function_of_jax_passes(name):
    report = check_vjp(getattr(jax.nn, name), "n d", skip=GROUPS)
    assert report.ok, report
    assert {r.check for r in report.results if r.status == "passed"} >= {"oracle", "adjoint", "forward_mode"}


def test_a_wrong_custom_jvp_is_found_in_both_modes():
    wrong = jax.custom_jvp(jnp.sin)
    wrong.defjvp(lambda x, t: (jnp.sin(x[0]), t[0] * jnp.cos(x[0]) / 2))
    assert {f.check for f in check_vjp(wrong, "n d", skip=GROUPS).findings} == {"oracle", "forward_mode"}


def absolute_square(z):
    return jnp.real(z) ** 2 + jnp.imag(z) ** 2


@pytest.mark.parametrize(
    ("fun", "right", "wrong"),
    [
        (lambda z: z * z, lambda z, g: (2 * z * g,), lambda z, g: (2 * jnp.conj(z) * g,)),
        (
            absolute_square,
            lambda z, g: (2 * g.astype(z.dtype) * jnp.conj(z),),
            lambda z, g: (2 * g.astype(z.dtype) * z,),
        ),
    ],
    ids=["square", "absolute square"],
)
def test_complex_arguments_follow_the_convention_of_jax(fun, right, wrong):
    fwd = lambda z: (fun(z), z)
    assert_vjp(rule(fun, fwd, right), "n d:complex", require="second_order", skip=("extremes", "meshes"))
    assert check_vjp(rule(fun, fwd, wrong), "n d:complex", only="oracle").status == "FAILED"


def test_argnums_holds_the_other_arrays_fixed():
    def bwd(residuals, g):
        table, _ = residuals
        return None, g * table

    product = rule(lambda table, x: table * x, lambda table, x: (table * x, (table, x)), bwd)
    assert check_vjp(product, "n d, n d", only="oracle").status == "FAILED"
    report = check_vjp(product, "n d, n d", argnums=1, only="oracle")
    assert report.ok, report
    assert report.statics == ("args[0]",)


def solved(x):
    return jnp.sin(x)


def test_a_solver_may_be_allowed_an_error():
    rough = rule(solved, lambda x: (solved(x), x), lambda x, g: (g * jnp.cos(x) * (1 + 1e-4),))
    assert check_vjp(rough, "n d", only="oracle").status == "FAILED"
    assert_vjp(rough, "n d", rtol=1e-3, skip=GROUPS)
    assert check_vjp(rough, "n d", rtol=1e-6, only="oracle").status == "FAILED"


def test_float64_can_be_left_out():
    def bwd(x, g):
        return (g * jnp.cos(x.astype(jnp.float32)).astype(x.dtype),)

    single = rule(jnp.sin, lambda x: (jnp.sin(x), x), bwd)
    assert check_vjp(single, "n d", only="oracle").status == "FAILED"
    assert_vjp(single, "n d", float64=False, skip=GROUPS)


def test_a_budget_ends_the_report_and_says_what_was_not_run():
    report = check_vjp(sine, "n d", budget=0.0)
    assert report.status == "inconclusive"
    assert {r.status for r in report.results if r.required} == {"not run"}
    assert "the time budget of 0.0 s was spent" in str(report)


def test_ctrl_c_prints_the_report_so_far(capsys):
    calls = []

    def bwd(x, g):
        calls.append(1)
        if len(calls) > 12:
            raise KeyboardInterrupt
        return (g * jnp.cos(x),)

    with pytest.raises(KeyboardInterrupt):
        check_vjp(rule(jnp.sin, lambda x: (jnp.sin(x), x), bwd), "n d")
    printed = capsys.readouterr().err
    assert "passed: repeatable" in printed
    assert "interrupted" in printed


def test_the_draws_are_not_those_of_a_generator_of_the_same_seed():
    seen = []

    def fun(x):
        seen.append(x)
        return jnp.sin(x)

    x = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    made = rule(fun, lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))
    check_vjp(made, lambda rng: (rng.standard_normal((4, 6)),), only="zero_cotangent")
    drawn = np.random.default_rng([0, 0]).standard_normal((4, 6)).astype(np.float32)
    np.testing.assert_array_equal(x, drawn)  # NumPy treats these two seeds as the same
    from fcfunc.testing import _draw

    ours = _draw.Shapes("4 6").draw(np.random.default_rng([_draw.STREAM, 0, 0]), {})[0]
    assert not np.array_equal(ours.astype(np.float32), x)


def test_a_dtype_that_fails_when_the_function_is_compiled_is_not_one_of_the_rules():
    inverse = rule(jnp.linalg.inv, lambda a: (jnp.linalg.inv(a),) * 2, lambda b, g: (-b.T @ g @ b.T,))
    checked = check_vjp(inverse, "4 4", only="precision_of_dtypes", reference=lambda a: a / a / a, dtypes=["float16"])
    (refused,) = checked.results
    assert refused.status == "not applicable"
    assert "float16" in refused.reason


def test_a_rule_is_not_held_to_slopes_where_the_function_jumps():
    assert check_vjp(jnp.linalg.pinv, "5 3", only="kinks").ok  # equal columns reduce the rank


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["fcfunc.ops:relu", "n d"], 0),
        (["tests.test_checker:half_sine", "n d", "--only", "oracle"], 1),
        (["fcfunc.ops:softmax", "n d", "--kwargs", '{"axis": 0}', "--only", "oracle"], 0),
        (["fcfunc.ops:relu", "n d", "--only", "zero_cotangent"], 3),
        (["fcfunc.ops:relu", "n d", "--only", "oracle", "--reference", "jax.nn:relu"], 0),
        (["fcfunc.ops:relu", "n d", "--only", "oracle", "--reference", "jax.nn:gelu"], 1),
        (["fcfunc.ops:relu", "n d", "--only", "kinks", "oracle", "--sizes", "n=3", "d=2", "--at-kink", "0=0"], 0),
        (["fcfunc.ops:relu", "n d", "--only", "kinks", "oracle", "--at-kink", "0=0.5"], 1),
        (["tests.test_checker:float64_in_half", "n d", "--only", "precision_of_dtypes", "oracle"], 1),
        (["tests.test_checker:float64_in_half", "n d", "--only", "oracle", "--no-float64", "--dtypes"], 0),
        (["fcfunc.ops.relu", "n d"], 2),
        (["fcfunc.ops:relu", "n d", "--reference", "jax.nn:nothing"], 2),
        (["fcfunc.ops:nothing", "n d"], 2),
        (["no_such_package:f", "n d"], 2),
        (["fcfunc.ops:affine", "n d"], 2),
    ],
)
def test_the_command_says_by_its_status_what_became_of_the_function(arguments, status, capsys):
    assert command.main(arguments) == status
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") if status == 2 else printed.out.startswith("check_vjp of ")


def test_a_tree_may_hold_functions_and_numbers_beside_arrays():
    def layer(p, x):
        return p["activation"](x * p["w"][None] * p["scale"])

    params = {"activation": ops.tanh, "w": np.ones(3, np.float32), "scale": 2.0}
    report = check_vjp(layer, (params, np.ones((2, 3), np.float32)), skip=GROUPS)
    assert report.ok, report
    assert list(report.arguments) == ["args[0]['w']", "args[1]"]
    assert report.statics == ("args[0]['activation']", "args[0]['scale']")


def test_numbers_that_are_equal_and_of_another_type_are_other_arguments():
    seen = []

    @jax.custom_vjp
    def scaled(x):
        return jnp.sin(x)

    scaled.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))

    def fun(x, flag):
        seen.append(type(flag))
        return scaled(x)

    for flag in (1, True, 1.0):
        check_vjp(fun, (np.ones(3, np.float32), flag), only="zero_cotangent")
        assert seen[-1] is type(flag)


@pytest.mark.parametrize(
    ("check", "fwd", "bwd", "shapes"),
    [
        ("accuracy", jnp.logaddexp, lambda y, g: (g * (1 - jnp.exp(-y)),), "n d"),
        ("spoiled_cotangents", None, lambda y, g: (g * jnp.cos(y) + 0 * jnp.sum(g),), "n d"),
        ("ranks", None, lambda y, g: (g * jnp.cos(y) if g.ndim < 3 else g,), "n d"),
    ],
    ids=["softplus by 1 - exp(-y)", "a cotangent that leaks", "wrong at rank 3"],
)
def test_a_fault_at_points_that_are_seldom_tried_is_found(check, fwd, bwd, shapes):
    if fwd is None:
        made = rule(jnp.sin, lambda x: (jnp.sin(x), x), bwd)
    else:
        softplus = lambda x: fwd(x, jnp.zeros_like(x))
        made = rule(softplus, lambda x: (softplus(x), softplus(x)), bwd)
    assert [f.check for f in check_vjp(made, shapes, only=(check,)).findings] == [check]


def nll(z, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(z), labels[:, None], -1, mode="fill")[:, 0]


def test_a_loss_of_nan_with_a_finite_gradient_is_found():
    def bwd(residuals, g):
        z, labels = residuals
        return g[:, None] * (jax.nn.softmax(z) - jax.nn.one_hot(labels, z.shape[-1], dtype=z.dtype)), None

    textbook = rule(nll, lambda z, labels: (nll(z, labels), (z, labels)), bwd)
    (found,) = check_vjp(textbook, "n c, n:int<c", only=("oracle", "nan_kept")).findings
    assert found.check == "nan_kept"
    assert "the output of row 0 is NaN but its gradient is finite" in found.message


def test_labels_of_eight_bits_must_give_the_gradient_of_thirty_two():
    def bwd(residuals, g):
        z, labels = residuals
        wrapped = labels if labels.dtype == jnp.int32 else labels // 2
        return g[:, None] * (jax.nn.softmax(z) - jax.nn.one_hot(wrapped, z.shape[-1], dtype=z.dtype)), None

    wraps = rule(nll, lambda z, labels: (nll(z, labels), (z, labels)), bwd)
    found = check_vjp(wraps, "n c, n:int<c", only=("oracle", "other_integers")).findings
    assert "with integers of dtype int8, the gradient changes" in found[0].message


def high_level_sine(scale):
    """Sine as a primitive of `jax.experimental.hijax`, with its gradient multiplied by `scale`."""
    hijax: Any = importlib.import_module("jax.experimental.hijax")

    class Sine(hijax.HiPrim):
        def __init__(self, aval, scale):
            self.in_avals, self.out_aval, self.params = (aval,), aval, {"scale": scale}
            super().__init__()

        def expand(self, x):
            return jnp.sin(x)

        def vjp_fwd(self, _, x):
            return self(x), x

        def vjp_bwd_retval(self, x, g):
            return (g * jnp.cos(x) * self.scale,)

        def jvp(self, primals, tangents):
            return self(*primals), tangents[0] * jnp.cos(primals[0])

        def batch(self, _, args, dims):
            return jnp.sin(args[0]), dims[0]

    return lambda x: Sine(jax.typeof(x), scale)(x)


@pytest.mark.parametrize(("scale", "status"), [(1.0, "ok"), (0.5, "FAILED")])
def test_a_high_level_primitive_is_checked(scale, status):
    if not hasattr(pytest.importorskip("jax.experimental.hijax"), "HiPrim"):
        pytest.skip("since JAX 0.12")
    report = check_vjp(high_level_sine(scale), "n d", skip=GROUPS)
    assert report.status == status, report
    assert report.rules == ("Sine",)


@pytest.mark.skipif(not hasattr(jax.custom_vjp, "defvjp_with_logs"), reason="since JAX 0.12")
def test_a_rule_that_returns_logs_is_checked():
    logged: Any = jax.custom_vjp(jnp.sin)
    logged.defvjp_with_logs(lambda x: (jnp.sin(x), x), lambda x, g: ((g * jnp.cos(x),), {"total": jnp.sum(g)}))
    assert_vjp(logged, "n d", skip=GROUPS)


def test_an_equinox_rule_is_checked_with_the_arrays_of_its_other_arguments_fixed():
    equinox = pytest.importorskip("equinox")

    class Scale(equinox.Module):
        weight: jax.Array
        bias: jax.Array | None
        activation: Any

        def __call__(self, x):
            return self.activation(x * self.weight[None])

    def rule_of(factor):
        @equinox.filter_custom_vjp
        def apply(model, x):
            return model(x)

        apply.def_fwd(lambda perturbed, model, x: (model(x), None))

        @apply.def_bwd
        def bwd(residuals, g, perturbed, model, x):
            (gradient,) = equinox.filter_vjp(lambda model: model(x), model)[1](g)
            return jax.tree.map(lambda a: a * factor, gradient)

        return apply

    args = (Scale(jnp.ones(3), None, jnp.tanh), np.ones((4, 3), np.float32))
    report = check_vjp(rule_of(1), args, argnums=0, skip=GROUPS)
    assert report.ok, report
    assert report.statics == ("args[0].activation", "args[1]")
    assert check_vjp(rule_of(2), args, argnums=0, only="oracle").status == "FAILED"


@jax.custom_jvp
def nan_avoided(x):
    return jnp.where(x > 0, x * jnp.sqrt(x), 0.0)


@nan_avoided.defjvp
def nan_avoided_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    return nan_avoided(x), t * jnp.where(x > 0, 1.5 * jnp.sqrt(jnp.where(x > 0, x, 1)), 0.0)


def test_a_rule_may_be_finite_where_automatic_differentiation_gives_nan():
    report = check_vjp(nan_avoided, "n", skip=["second_order", "extremes", "meshes"])
    assert report.ok, report


def bisected(a, low, high):
    """The root of x³ + x = a, by bisection: the derivative of a step carries no information."""

    def halved(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        above = middle**3 + middle > a
        return jnp.where(above, low, middle), jnp.where(above, middle, high)

    return sum(jax.lax.fori_loop(0, 60, halved, (low, high))) / 2


def root(a):
    return bisected(a, 0 * a - 20, 0 * a + 20)


def root_in_moving_bounds(a):
    return bisected(a, -1 - jnp.abs(a), 1 + jnp.abs(a))


@pytest.mark.parametrize(("factor", "status"), [(3.0, "ok"), (6.0, "FAILED")])
def test_differences_decide_on_a_function_that_searches(factor, status):
    made = rule(root, lambda a: (root(a),) * 2, lambda x, g: (g / (factor * x**2 + 1),))
    report = check_vjp(made, "n:-3..3", rtol=1e-3, skip=["second_order", "extremes", "meshes"])
    assert report.status == status, report
    (oracle,) = [result for result in report.results if result.check == "oracle"]
    assert "gives 0 everywhere" in oracle.reason


def test_a_solver_that_squares_its_cotangent_is_given_moderate_ones():
    def by_gradient(residuals, g):
        d, x = residuals
        u = jax.scipy.sparse.linalg.cg(lambda v: d * v, g)[0]
        return -u * x, u

    solve = rule(lambda d, b: b / d, lambda d, b: (b / d, (d, b / d)), by_gradient)
    report = check_vjp(solve, "n:1..2, n", rtol=1e-3, dtypes=["float32"], only=["linear_in_cotangent", "oracle"])
    assert report.ok, report


def test_what_is_returned_for_an_argument_that_is_none_is_nothing():
    made = rule(
        lambda x, state=None: jnp.sin(x),
        lambda x, state: (jnp.sin(x), x),
        lambda x, g: (g * jnp.cos(x), jnp.zeros(3, x.dtype)),
    )
    assert check_vjp(lambda x: made(x, None), "n", only=["cotangent_types", "precision_of_dtypes"]).ok


def test_a_function_that_cannot_be_batched_itself_is_not_blamed_on_its_rule():
    product = lambda a, b: jax.lax.ragged_dot(a, b, jnp.array([3, 2]))
    made = rule(product, lambda a, b: jax.vjp(product, a, b), lambda back, g: back(g))
    (result,) = check_vjp(made, "5 d, 2 d m", only="vmap_equals_loop").results
    assert result.status == "not applicable"
    assert "the function itself cannot be batched" in result.reason


def test_coefficients_in_an_array_are_named_as_rounded_constants():
    coefficients = np.array([1 / 362880, -1 / 5040, 1 / 120, -1 / 6, 1.0])
    value = lambda x: x * jnp.polyval(jnp.array(coefficients, x.dtype), x * x)
    slope = lambda z: 1 - z / 2 + z**2 / 24 - z**3 / 720 + z**4 / 40320
    made = rule(value, lambda x: (value(x), x), lambda x, g: (g * slope(x * x),))
    (result,) = check_vjp(made, "n", only="multiprecision").results
    assert result.status == "passed"
    assert "these constants are rounded" in result.reason


def test_a_function_that_computes_in_bfloat16_is_compared_to_its_precision():
    narrow = lambda x, w: jnp.dot(x.astype("bfloat16"), w.astype("bfloat16"), preferred_element_type=jnp.float32)

    def by(factor):
        def bwd(residuals, g):
            x, w = (a.astype(jnp.float32) for a in residuals)
            return factor * (g @ w.T), x.T @ g

        return rule(narrow, lambda x, w: (narrow(x, w), (x.astype("bfloat16"), w.astype("bfloat16"))), bwd)

    report = check_vjp(by(1.0), "n d, d m", dtypes=["float32"], only=["oracle", "linear_in_cotangent"])
    assert report.ok, report
    assert "to the precision of bfloat16" in report.results[0].reason + report.results[1].reason
    assert not check_vjp(by(0.5), "n d, d m", dtypes=["float32"], only="oracle").ok


def cubic_root(slope_at_0):
    return rule(
        root_in_moving_bounds, lambda a: (root_in_moving_bounds(a),) * 2, lambda x, g: (g / (3 * x**2 + slope_at_0),)
    )


def test_differences_decide_where_automatic_differentiation_of_a_search_is_not_its_slope():
    report = check_vjp(cubic_root(1), "n")
    assert report.ok, report
    (by_oracle,) = [r for r in report.results if r.check == "oracle"]
    assert by_oracle.status == "inconclusive"
    assert "differences of the function agree with the rule" in by_oracle.reason
    assert check_vjp(cubic_root(2), "n").status == "FAILED"


def test_what_is_not_required_does_not_make_a_report_ok():
    compared = ("oracle", "multiprecision", "projected_differences", "adjoint", "precision_of_dtypes", "kinks")
    report = check_vjp(half_sine, "n d", skip=(*compared, "shape_sweep", "second_order"))
    assert report.status == "inconclusive", report


def test_a_required_group_of_which_nothing_can_be_checked_makes_a_report_inconclusive():
    options: dict[str, Any] = {"require": "second_order", "skip": "second_multiprecision"}
    assert check_vjp(sine, "n d", **options).ok
    report = check_vjp(sine, "n d", float64=False, **options)
    assert report.status == "inconclusive"
    assert "no check of the required group second_order could run: float64=False" in str(report)


def row_norm(x):
    return jnp.sqrt(jnp.sum(x**2, axis=-1))


def test_a_norm_whose_gradient_is_nan_at_0_fails_the_extremes_only():
    norm = rule(row_norm, lambda x: (row_norm(x), x), lambda x, g: (g[:, None] * x / row_norm(x)[:, None],))
    assert check_vjp(norm, "n d").ok
    (finding,) = check_vjp(norm, "n d", require="extremes").findings
    assert finding.check == "nan_at_zero"


def test_a_backward_pass_that_loses_a_nan_of_the_cotangent_fails_the_extremes():
    cleaned = rule(jnp.sin, lambda x: (jnp.sin(x), x), lambda x, g: (jnp.nan_to_num(g) * jnp.cos(x),))
    (finding,) = check_vjp(cleaned, "n d", only="spoiled_cotangents").findings
    assert "a cotangent of NaN is lost" in finding.message


def test_a_rule_that_is_wrong_for_cotangents_of_one_sign_is_found():
    def bwd(x, g):
        return (jnp.where(jnp.all(g <= 0), 2 * g, g) * jnp.cos(x),)

    wrong = rule(jnp.sin, lambda x: (jnp.sin(x), x), bwd)
    (finding,) = check_vjp(wrong, "n d").findings
    assert finding.check == "linear_in_cotangent"


def test_a_number_that_is_not_differentiated_is_drawn_for_nondiff_argnums():
    scaled = rule(lambda x, c: x * c, lambda x, c: (x * c, None), lambda c, _, g: (g * c,), nondiff_argnums=(1,))
    report = check_vjp(scaled, "n d, ")
    assert report.ok, report
    assert report.statics == ("args[1]",)


def test_a_rule_of_the_reference_is_kept():
    def clipped(limit):
        return rule(lambda x: x, lambda x: (x, None), lambda _, g: (jnp.clip(g, -limit, limit),))

    options: dict[str, Any] = {"skip": ("linear_in_cotangent", "second_order", "adjoint")}
    assert check_vjp(clipped(0.5), "n d", reference=clipped(0.5), **options).ok
    assert check_vjp(clipped(0.5), "n d", reference=clipped(0.6), **options).status == "FAILED"


def test_a_straight_through_estimator_passes_against_what_it_stands_for_in_second_order_too():
    def rounded(x):
        return jnp.round(x)

    def stands_for(x):
        return x + jax.lax.stop_gradient(rounded(x) - x)

    through = rule(rounded, lambda x: (rounded(x), None), lambda _, g: (g,))
    report = check_vjp(through, "n d", reference=stands_for, require="second_order")
    assert report.ok, report
    (finding,) = check_vjp(through, "n d", reference=lambda x: x).findings
    assert "for a straight-through estimator, x + stop_gradient(f(x) - x)" in finding.message


def test_an_argument_of_a_rule_that_raises_was_not_compared():
    raises = rule(jnp.matmul, lambda a, b: (a @ b, (a, b)), lambda r, g: (g @ r[1], r[0].T @ g))
    report = check_vjp(raises, "n d, d m")
    assert report.arguments == {"args[0]": "not compared", "args[1]": "not compared"}
    assert len(report.findings) == 1
    assert report.notes == ()
    assert "test_checker.py:" in report.findings[0].message


def test_shapes_are_drawn_from_the_range_of_their_argument():
    root = rule(jnp.sqrt, lambda x: (jnp.sqrt(x), x), lambda x, g: (g / (2 * jnp.sqrt(x)),))
    report = check_vjp(root, "n d", ranges={0: (0.0, float("inf"))})
    assert report.ok, report
    assert "every difference crossed a kink" not in str(report)


@pytest.mark.parametrize(("factor", "dtype"), [(1.05, jnp.bfloat16), (1.01, jnp.float16)])
def test_a_rule_that_is_a_few_roundings_off_as_a_whole_in_one_dtype_is_found(factor, dtype):
    def bwd(x, g):
        return (g * jnp.cos(x) * (jnp.asarray(factor, x.dtype) if x.dtype == dtype else 1),)

    wrong = rule(jnp.sin, lambda x: (jnp.sin(x), x), bwd)
    (finding,) = check_vjp(wrong, "n d", only="precision_of_dtypes").findings
    assert "which is more than rounding explains" in finding.message


def larger(share):
    def bwd(residuals, g):
        a, b = residuals
        return jnp.where(a >= b, g, 0), jnp.where(b >= a if share == "given twice" else b > a, g, 0)

    return rule(jnp.maximum, lambda a, b: (jnp.maximum(a, b), (a, b)), bwd)


def test_the_gradient_of_two_equal_arguments_may_be_given_to_one_but_not_to_both():
    assert check_vjp(larger("to the first"), "n d, n d", only="kinks").ok
    (finding,) = check_vjp(larger("given twice"), "n d, n d", only="kinks").findings
    assert "are equal, the sum of their gradients is wrong" in finding.message


def test_a_backward_pass_that_frees_an_output_is_found():
    times = jax.jit(lambda g, y: g * y, donate_argnums=0)
    freeing = rule(jnp.exp, lambda x: (jnp.exp(x),) * 2, lambda y, g: (times(g, y),))
    (finding,) = check_vjp(freeing, "n d", only="arguments_untouched").findings
    assert finding.message == "a cotangent was freed by the backward pass"


def test_what_leaks_from_one_run_to_the_next_only_where_nothing_is_traced_is_found():
    last = {}

    def fwd(x):
        if not isinstance(x, Tracer):
            last["x"] = x
        return x**3, x

    def bwd(x, g):
        return (3 * (x if isinstance(x, Tracer) else last["x"]) ** 2 * g,)

    assert check_vjp(rule(lambda x: x**3, fwd, bwd), "n d", only="compiled_equals_eager").findings


def test_integers_are_batched_too():
    @jax.custom_batching.custom_vmap
    def one_hot(labels):
        return jnp.arange(4)[None] == labels[:, None]

    @one_hot.def_vmap
    def _(size, batched, labels):
        return jnp.zeros((*labels.shape, 4), bool), True

    def squares(z, labels):
        return jnp.sum(jnp.where(jnp.arange(4)[None] == labels[:, None], z**2, 0), axis=-1)

    wrong = rule(
        squares,
        lambda z, labels: (squares(z, labels), (z, labels)),
        lambda residuals, g: (jnp.where(one_hot(residuals[1]), 2 * g[:, None] * residuals[0], 0), None),
    )
    (finding,) = check_vjp(wrong, "n 4, n:int<4", only="vmap_equals_loop").findings
    assert "vmap over everything" in finding.message


def test_a_rule_that_is_wrong_for_two_of_three_arguments_is_found():
    def fwd(a, b, c):
        factor = 2.0 if (a.perturbed, b.perturbed, c.perturbed) == (True, True, False) else 1.0
        return a.value * b.value * c.value, (a.value, b.value, c.value, factor)

    def bwd(residuals, g):
        a, b, c, factor = residuals
        return factor * g * b * c, g * a * c, g * a * b

    product = jax.custom_vjp(lambda a, b, c: a * b * c)
    product.defvjp(fwd, bwd, symbolic_zeros=True)
    (finding,) = check_vjp(product, "n d, n d, n d", only="partial_cotangents").findings
    assert finding.argument == "args[0]"


def test_a_rule_whose_gradient_is_not_needed_is_no_finding():
    tanh = rule(jnp.tanh, lambda x: (jnp.tanh(x), x), lambda x, g: (g * (1 - jnp.tanh(x) ** 2),))
    report = check_vjp(lambda x: jnp.where(tanh(x) > 0.1, sine(x), x), "n d")
    assert report.ok, report
    (used,) = [r for r in report.results if r.check == "rule_used"]
    assert used.reason == "the backward pass of tanh never runs, and automatic differentiation gives the same gradient"


def test_a_rule_that_is_defined_again_is_checked_again():
    made = jax.custom_vjp(lambda x: jnp.sin(x))
    made.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g,))
    assert check_vjp(made, "n d").status == "FAILED"
    made.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))
    assert check_vjp(made, "n d").ok


def test_a_number_of_steps_is_not_set_to_its_largest_value():
    def power_of(x, k):
        return jax.lax.fori_loop(0, k, lambda _, product: product * x, jnp.ones_like(x))

    def bwd(residuals, g):
        x, k = residuals
        return k.astype(x.dtype) * power_of(x, k - 1) * g, None

    made = rule(power_of, lambda x, k: (power_of(x, k), (x, k)), bwd)
    args = (jnp.linspace(0.5, 1.5, 6).reshape(2, 3), jnp.array(5))
    assert check_vjp(made, args, reference=lambda x, k: x ** k.astype(x.dtype), skip="second_order").ok


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_labels_of_narrow_dtypes_are_put_out_of_range(dtype):
    def at_label(z, labels):
        is_label = jnp.arange(4)[None] == labels[:, None].astype(jnp.int32)
        return jnp.where((labels >= 0) & (labels < 4), jnp.sum(jnp.where(is_label, z**2, 0), axis=1), jnp.nan)

    def bwd(residuals, g):
        z, labels = residuals
        return jnp.where(jnp.arange(4)[None] == labels[:, None].astype(jnp.int32), 2 * z * g[:, None], 0), None

    made = rule(at_label, lambda z, labels: (at_label(z, labels), (z, labels)), bwd)
    args = (jnp.linspace(1, 2, 12).reshape(3, 4), jnp.array([3, 0, 1], dtype))
    (finding,) = check_vjp(made, args, only="nan_kept").findings
    assert "the output of row 0 is NaN but its gradient is finite" in finding.message


def test_arguments_of_two_precisions_are_taken_as_jax_takes_them():
    product = rule(lambda a, b: a * b, lambda a, b: (a * b, (a, b)), lambda r, g: (g * r[1], g * r[0]))
    report = check_vjp(product, (np.random.default_rng(0).standard_normal((3, 2)), jnp.ones((3, 2))))
    assert report.ok, report


def solved_to_the_dtype(a):
    """Iterates `x = tanh(x) / 2 + a` until it converges."""

    def going(c):
        step = jnp.max(jnp.abs(c[0] - c[1]), initial=0)
        return (step > 4 * jnp.finfo(a.dtype).eps * (1 + jnp.max(jnp.abs(c[0]), initial=0))) & (c[2] < 200)

    start = (a, 0.5 * jnp.tanh(a) + a, 0)
    return jax.lax.while_loop(going, lambda c: (c[1], 0.5 * jnp.tanh(c[1]) + a, c[2] + 1), start)[1]


def by_implicit_differentiation(factor):
    def bwd(x, g):
        return (factor(x) * g / (1 - 0.5 * (1 - jnp.tanh(x) ** 2)),)

    return rule(solved_to_the_dtype, lambda a: (solved_to_the_dtype(a),) * 2, bwd)


def halved_60_times(x):
    """The cube root by 60 bisections."""

    def halve(_, c):
        middle = (c[0] + c[1]) / 2
        low = middle**3 < x
        return jnp.where(low, middle, c[0]), jnp.where(low, c[1], middle)

    return jax.lax.fori_loop(0, 60, halve, (jnp.zeros_like(x), 0 * x + 4))[0]


def cube_root(factor):
    return rule(halved_60_times, lambda x: (halved_60_times(x),) * 2, lambda y, g: (factor(y) * g / (3 * y * y),))


def in_float32_three(a):
    return 3 if a.dtype == jnp.float32 else 1


def of_67_five(a):
    return 5 if a.shape[0] == 67 else 1


@pytest.mark.parametrize("factor", [in_float32_three, of_67_five])
@pytest.mark.parametrize("of", [by_implicit_differentiation, cube_root])
def test_where_reverse_mode_does_not_decide_other_dtypes_and_sizes_are_compared(of, factor):
    shapes, checks = "n:1..2", ("oracle", "precision_of_dtypes", "shape_sweep", "projected_differences")
    assert_vjp(of(lambda a: 1), shapes, rtol=1e-6, only=checks)
    assert check_vjp(of(factor), shapes, rtol=1e-6, only=checks).status == "FAILED"


def stops(x):
    return x * jax.lax.stop_gradient(jnp.sum(x * x, axis=-1, keepdims=True))


def test_a_function_that_stops_gradients_is_judged_by_automatic_differentiation():
    size = lambda x: jnp.sum(x * x, axis=-1, keepdims=True)
    assert_vjp(rule(stops, lambda x: (stops(x), size(x)), lambda s, g: (s * g,)), "n d", skip="second_order")
    whole = lambda x, g: jax.vjp(lambda x: x * size(x), x)[1](g)
    assert check_vjp(rule(stops, lambda x: (stops(x), x), whole), "n d").status == "FAILED"


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_a_wrong_factor_is_found_in_a_function_of_bfloat16_alone(factor):
    def squared(x):
        if x.dtype != jnp.bfloat16:
            raise TypeError("bfloat16 only")
        return x * x

    def by(factor):
        return rule(squared, lambda x: (squared(x), x), lambda x, g: ((factor * x * g).astype(x.dtype),))

    assert check_vjp(by(2.0), "n d", dtype="bfloat16", only="oracle").ok
    assert check_vjp(by(factor), "n d", dtype="bfloat16", only="oracle").status == "FAILED"


def test_an_integer_output_is_compared_under_differentiation():
    def largest(x):
        return tuple(jax.lax.top_k(x, 2))

    def bwd(residuals, g):
        i, x = residuals
        return (jnp.sum(jax.nn.one_hot(i, x.shape[-1], dtype=x.dtype) * g[0][..., None], axis=-2),)

    def by(factor):
        return rule(largest, lambda x: ((largest(x)[0], factor * largest(x)[1]), (largest(x)[1], x)), bwd)

    assert check_vjp(by(1), "n 5", only="forward_output").status == "inconclusive"  # it compares, but not gradients
    assert "integer output 0" in check_vjp(by(0), "n 5", only="forward_output").findings[0].message


@pytest.mark.parametrize(
    "where", [lambda x: x.shape[0] == 67, lambda x: x.dtype == jnp.bfloat16], ids=["67", "bfloat16"]
)
def test_another_forward_pass_is_found_at_other_sizes_and_dtypes(where):
    twice = rule(jnp.sin, lambda x: (jnp.sin(x) * (2 if where(x) else 1), x), lambda x, g: (g * jnp.cos(x),))
    assert check_vjp(twice, "n d", only=("precision_of_dtypes", "shape_sweep")).status == "FAILED"


@pytest.mark.parametrize("seed", range(3))
def test_equal_arguments_of_a_function_that_computes_in_float32_are_compared_to_its_precision(seed):
    w = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)

    def narrow(a, b):
        return jnp.tanh(w @ ops.sigmoid(a + 3 * b).astype(jnp.float32)).astype(a.dtype)

    assert check_vjp(narrow, "n, n", sizes={"n": 8}, seed=seed, only=["oracle", "kinks"]).ok


def test_a_gradient_that_cancels_to_the_rounding_of_float64_has_the_error_of_its_terms():
    def normalized(x, b, state):  # the gradient of b is 0, and in float64 about 1e-17
        return jnp.tanh(ops.batch_norm(ops.affine(x, x[:8].T, b), *state, training=True)[0])

    state = jnp.ones(8), jnp.zeros(8), {"mean": jnp.zeros(8), "var": jnp.ones(8)}
    x = np.random.default_rng(0).standard_normal((16, 12)).astype(np.float32)
    assert check_vjp(normalized, (x, jnp.zeros(8), state), only="accuracy").ok


@pytest.mark.parametrize("axis", [0, 1])
def test_a_maximum_may_choose_among_ties_along_any_axis_but_not_count_them_all(axis):
    largest = lambda x: jnp.max(x, axis)

    def first(x, g):
        chosen = jax.nn.one_hot(jnp.argmax(x, axis), x.shape[axis], axis=axis, dtype=x.dtype)
        return (chosen * jnp.expand_dims(g, axis),)

    def all_of_them(x, g):
        return (jnp.where(x == jnp.max(x, axis, keepdims=True), jnp.expand_dims(g, axis), 0),)

    assert_vjp(rule(largest, lambda x: (largest(x), x), first), "n d", only="kinks")
    (found,) = check_vjp(rule(largest, lambda x: (largest(x), x), all_of_them), "n d", only="kinks").findings
    assert "are equal, but their gradients do not sum to the slope" in found.message


@pytest.mark.parametrize(("at_zero", "status"), [(0.0, "ok"), (1.0, "ok"), (7.0, "FAILED")])
def test_where_automatic_differentiation_is_nan_the_slopes_decide(at_zero, status):
    def norm(x):
        return jnp.sqrt(jnp.sum(x * x, axis=-1))

    def bwd(residuals, g):
        x, n = residuals
        n = n[..., None]
        return (jnp.where(n == 0, at_zero, x / jnp.where(n == 0, 1, n)).astype(x.dtype) * g[..., None],)

    made = rule(norm, lambda x: (norm(x), (x, norm(x))), bwd)
    assert check_vjp(made, "n d", only="kinks").status == status


def test_one_declared_kink_does_not_excuse_another():
    clip = lambda x: jnp.clip(x, 0, 1)
    bwd = lambda x, g: (jnp.where((x > 0) & (x < 1), g, jnp.where(x == 1, 7 * g, 0)),)
    assert check_vjp(rule(clip, lambda x: (clip(x), x), bwd), "n d", at_kink={0.0: 0.0}, only="kinks").findings


def test_kinks_are_tried_where_a_function_computes_in_float32():
    def positive(x):
        return jnp.maximum(x.astype(jnp.float32), 0).astype(x.dtype)

    def by(at_zero):
        bwd = lambda x, g: (jnp.where(x > 0, g, jnp.where(x == 0, at_zero * g, 0)),)
        return rule(positive, lambda x: (positive(x), x), bwd)

    assert_vjp(by(0), "n d", only="kinks")
    assert check_vjp(by(5), "n d", only="kinks").status == "FAILED"


def test_blocks_that_divide_the_batch_are_tried():
    def bwd(_, g):
        summed = jax.lax.cumsum(g, reverse=True)
        return (summed - g if len(g) and len(g) % 8 == 0 else summed,)

    made = rule(lambda x: jnp.cumsum(x, axis=0), lambda x: (jnp.cumsum(x, axis=0), None), bwd)
    assert check_vjp(made, "n d", only="shape_sweep").status == "FAILED"


def test_a_rule_that_is_more_accurate_than_automatic_differentiation_passes():
    def cancels(x):
        return (1 - jnp.cos(x)) / x**2

    def series(x):
        return sum((-1) ** k * 2 * k / math.factorial(2 * k + 2) * x ** (2 * k - 1) for k in range(1, 12))

    def bwd(x, g):
        far = jnp.where(jnp.abs(x) < 1, 1, x)
        return (g * jnp.where(jnp.abs(x) < 1, series(x), jnp.sin(far) / far**2 - 2 * (1 - jnp.cos(far)) / far**3),)

    assert_vjp(rule(cancels, lambda x: (cancels(x), x), bwd), "n", skip=("second_order", "extremes", "meshes"))


def test_a_loop_that_ends_when_float64_is_reached_is_no_finding_in_200_digits():
    def root(x):
        return jax.lax.fori_loop(0, 5, lambda i, y: (y + x / y) / 2, jnp.ones_like(x))

    made = rule(root, lambda x: (root(x),) * 2, lambda y, g: (g / (2 * y),))
    (result,) = check_vjp(made, "n:0.8..1.25", only="multiprecision").results
    assert result.status == "passed"
    assert "a loop of the function may end early" in result.reason


def test_a_function_that_rounds_to_bfloat16_inside_is_no_finding_in_200_digits():
    narrow = lambda x: jax.nn.gelu(x.astype(jnp.bfloat16)).astype(x.dtype)
    made = rule(narrow, lambda x: (narrow(x), x), lambda x, g: jax.vjp(jax.nn.gelu, x)[1](g))
    assert_vjp(made, "n d", only="multiprecision")


def test_a_rule_inside_of_a_function_that_is_defined_again_is_checked_again():
    base = jax.custom_vjp(jnp.sin)

    def model(x):
        return 2 * base(x)

    for sign, status in ((-1, "FAILED"), (1, "ok"), (-1, "FAILED")):
        base.defvjp(lambda x: (jnp.sin(x), x), lambda x, g, sign=sign: (sign * g * jnp.cos(x),))
        assert check_vjp(model, "n d", only="oracle").status == status


def test_arguments_of_several_dtypes_are_compared_as_they_are():
    def mixed(x, w):
        return (x.astype(jnp.float32) @ w).astype(x.dtype)

    def bwd(residuals, g):
        x, w = residuals
        g = g.astype(jnp.float32)
        return (g @ w.T).astype(x.dtype), x.astype(jnp.float32).T @ g

    rng = np.random.default_rng(0)
    args = jnp.asarray(rng.standard_normal((5, 3)), jnp.bfloat16), jnp.asarray(rng.standard_normal((3, 4)), jnp.float32)
    assert_vjp(rule(mixed, lambda x, w: (mixed(x, w), (x, w)), bwd), args, skip=("second_order", "extremes", "meshes"))


def test_a_function_with_a_loop_that_may_not_end_for_nan_is_not_given_one():
    (result,) = [r for r in check_vjp(cube(3), "n d").results if r.check == "nan_kept"]
    assert result.status == "not run"
    assert "may not end for a NaN" in result.reason


def test_a_check_leaks_no_tracers():
    with jax.check_tracer_leaks():
        assert check_vjp(sine, "n d", only=("oracle", "cotangent_types", "integer_arguments")).status == "ok"


def test_200_digits_are_evaluated_in_a_loop_under_vmap():
    def one(x):
        return jax.lax.while_loop(lambda c: (c[0] < 3) & (x < 1), lambda c: (c[0] + 1, c[1] * x), (0, x))[1]

    powers = rule(jax.vmap(one), lambda x: (jax.vmap(one)(x), x), lambda x, g: (g * jnp.where(x < 1, 4 * x**3, 1),))
    (result,) = check_vjp(powers, "n:0.5..1.5", only="multiprecision").results
    assert result.status == "passed", result
    assert "equal to" in result.reason


def test_a_rule_inside_a_compiled_function_is_found_by_every_check():
    compiled = jax.jit(lambda x: sine(jnp.cos(x)))
    for _ in range(3):
        assert_vjp(compiled, (np.float32([0.5, 1.0]),), only=("rule_used", "oracle"))


def test_a_rule_that_was_replaced_between_checks_is_checked():
    rules = [sine]
    fun = lambda x: rules[0](x)
    assert_vjp(fun, (np.float32([0.5, 1.0]),), only="oracle")
    rules[0] = half_sine
    with pytest.raises(AssertionError):
        assert_vjp(fun, (np.float32([0.5, 1.0]),), only="oracle")


def test_checking_a_rule_again_keeps_no_further_traces():
    def traces():
        gc.collect()
        return sum(type(a) is Jaxpr for a in gc.get_objects())  # isinstance would run code of lazy objects

    found = []
    for _ in range(4):
        assert_vjp(sine, (np.float32([0.5, 1.0]),), only=("rule_used", "cotangent_types", "oracle"))
        found.append(traces())
    assert found[3] == found[2], found


def test_a_rule_that_a_compiled_function_calls_only_in_a_later_check_is_found():
    calls_rule = []
    compiled = jax.jit(lambda x: half_sine(x) if calls_rule else jnp.sin(x))
    fun = lambda x: compiled(x)
    with pytest.raises(ValueError, match="nothing to check"):
        check_vjp(fun, (np.float32([0.5, 1.0]),))
    calls_rule.append(True)
    assert not check_vjp(fun, (np.float32([0.5, 1.0]),), only="oracle").ok
