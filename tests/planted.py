"""Rules with one planted bug each, and the checks by which `check_vjp` must find it.

Each is a small, complete rule with its own formula: the undecorated function is right and only the rule is wrong.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer


class Planted(NamedTuple):
    """A wrong rule, the arguments to check it with, and the checks of which at least one must report it."""

    name: str
    fun: Callable
    args: Any
    found_by: tuple[str, ...]
    options: dict


PLANTED: list[Planted] = []


def rule(fun, fwd, bwd, *, symbolic_zeros=False, nondiff_argnums=()):
    made = jax.custom_vjp(fun, nondiff_argnums=nondiff_argnums)
    made.defvjp(fwd, bwd, symbolic_zeros=symbolic_zeros)
    return made


def plant(name, args, found_by, fun, fwd, bwd, **options):
    def copy(*args):  # each bug has its own function, and so its own name
        return fun(*args)

    copy.__name__ = name
    checks = (found_by,) if isinstance(found_by, str) else tuple(found_by)
    PLANTED.append(Planted(name, rule(copy, fwd, bwd), args, checks, options))


# --- affine: y = x w + b


def affine(x, w, b):
    return x @ w + jnp.broadcast_to(b, (*x.shape[:-1], w.shape[1]))


def affine_fwd(x, w, b):
    return affine(x, w, b), (x, w)


def affine_bwd(res, g):
    x, w = res
    return g @ w.T, x.T @ g, jnp.sum(g, axis=0)


AFFINE = "n d, d m, m"
plant_affine = functools.partial(plant, args=AFFINE, fun=affine, fwd=affine_fwd)


def with_affine(change):
    """The right gradients, changed by `change(x, w, g, dx, dw, db)`."""

    def bwd(res, g):
        return change(*res, g, *affine_bwd(res, g))

    return bwd


plant_affine("affine_bias_mean", found_by="oracle", bwd=with_affine(lambda x, w, g, dx, dw, db: (dx, dw, db / len(x))))
plant_affine("affine_bias_first_row", found_by="oracle", bwd=with_affine(lambda x, w, g, dx, dw, db: (dx, dw, g[0])))
plant_affine("affine_weights_halved", found_by="oracle", bwd=with_affine(lambda x, w, g, dx, dw, db: (dx, dw / 2, db)))
plant_affine(
    "affine_weights_averaged", found_by="oracle", bwd=with_affine(lambda x, w, g, dx, dw, db: (dx, dw / len(x), db))
)
plant_affine(
    "affine_batch_of_ten", found_by="oracle", bwd=with_affine(lambda x, w, g, dx, dw, db: (dx, dw * len(x) / 10, db))
)
plant_affine(
    "affine_gradient_averaged_before_propagation",
    found_by="oracle",
    bwd=with_affine(lambda x, w, g, dx, dw, db: (dx, jnp.outer(jnp.mean(x, 0), jnp.sum(g, 0)), db)),
)
plant_affine(
    "affine_output_for_input",
    found_by=("oracle", "shape_sweep", "every_size"),
    bwd=with_affine(lambda x, w, g, dx, dw, db: (dx, dw if x.shape[1] != w.shape[1] else (x @ w).T @ g, db)),
)
plant_affine(
    "affine_forgets_to_transpose_square_weights",
    found_by=("shape_sweep", "every_size"),
    bwd=with_affine(lambda x, w, g, dx, dw, db: (g @ w if w.shape[0] == w.shape[1] else dx, dw, db)),
)
plant_affine(
    "affine_wrong_at_batch_one",
    found_by=("shape_sweep", "every_size"),
    bwd=with_affine(lambda x, w, g, dx, dw, db: (dx, dw, db * 0 if len(x) == 1 else db)),
)
plant_affine(
    "affine_wrong_above_32_rows",
    found_by=("shape_sweep", "every_size"),
    bwd=with_affine(lambda x, w, g, dx, dw, db: (dx, x[:32].T @ g[:32], db)),
)
plant_affine(
    "affine_drops_the_tail_of_a_tile_of_128",
    found_by=("shape_sweep", "every_size"),
    bwd=with_affine(lambda x, w, g, dx, dw, db: (dx.at[:, 128:].set(0) if x.shape[1] > 128 else dx, dw, db)),
)
plant_affine(
    "affine_batch_of_none_gives_ones",
    found_by=("shape_sweep", "every_size"),
    bwd=with_affine(lambda x, w, g, dx, dw, db: (dx, dw, db if len(x) else jnp.ones_like(db))),
)
plant_affine(
    "affine_clips_large_cotangents",
    found_by="linear_in_cotangent",
    bwd=with_affine(lambda x, w, g, dx, dw, db: (jnp.clip(dx, -1e4, 1e4), dw, db)),
)
plant_affine(
    "affine_drops_tiny_cotangents",
    found_by="linear_in_cotangent",
    bwd=with_affine(lambda x, w, g, dx, dw, db: (jnp.where(jnp.abs(dx) < 1e-10, 0, dx), dw, db)),
)
plant_affine(
    "affine_bias_in_bfloat16",
    found_by="oracle",
    bwd=with_affine(lambda x, w, g, dx, dw, db: (dx, dw, db.astype(jnp.bfloat16).astype(db.dtype))),
)
plant_affine(
    "affine_gradient_dtype",
    found_by="cotangent_types",
    bwd=with_affine(lambda x, w, g, dx, dw, db: (dx.astype(jnp.bfloat16), dw, db)),
)
plant_affine(
    "affine_bias_shape",
    found_by="cotangent_types",
    bwd=with_affine(lambda x, w, g, dx, dw, db: (dx, dw, db[None])),
)
plant_affine("affine_two_cotangents", found_by="cotangent_types", bwd=with_affine(lambda x, w, g, dx, dw, db: (dx, dw)))
plant_affine("affine_no_bias_gradient", found_by="oracle", bwd=with_affine(lambda x, w, g, dx, dw, db: (dx, dw, None)))
plant_affine(
    "affine_detached_from_the_second_derivative",
    found_by=("reverse_over_reverse", "forward_over_reverse"),
    bwd=with_affine(lambda x, w, g, dx, dw, db: (g @ lax.stop_gradient(w).T, dw, db)),
)
plant_affine(
    "affine_wrong_in_bfloat16",
    found_by="precision_of_dtypes",
    bwd=with_affine(lambda x, w, g, dx, dw, db: (dx, dw * (2 if g.dtype == jnp.bfloat16 else 1), db)),
)
plant_affine(
    "affine_wrong_in_float16",
    found_by="precision_of_dtypes",
    bwd=with_affine(lambda x, w, g, dx, dw, db: (dx, dw + (1 if g.dtype == jnp.float16 else 0), db)),
)
plant_affine(
    "affine_off_by_a_millionth",
    found_by="oracle",
    bwd=with_affine(lambda x, w, g, dx, dw, db: (dx, dw * np.asarray(1 + 1e-6, dw.dtype), db)),
)
plant_affine(
    "affine_one_element_wrong",
    found_by="oracle",
    bwd=with_affine(lambda x, w, g, dx, dw, db: (dx, dw.at[-1, -1].multiply(1.01), db)),
)


def second_call_bwd():
    calls = []

    def bwd(res, g):
        calls.append(1)
        dx, dw, db = affine_bwd(res, g)
        return (dx, dw, db) if len(calls) % 2 else (dx, dw * 2, db)

    return bwd


plant_affine("affine_every_second_call", found_by="repeatable", bwd=second_call_bwd())


def remembered():
    """Residuals kept in shared state: the second forward pass overwrites those of the first."""
    kept = {}

    def fwd(x, w, b):
        kept["x"] = x
        return affine(x, w, b), (x, w)

    def bwd(res, g):
        x = kept["x"]
        dx, dw, db = affine_bwd(res, g)
        return dx, (x.T @ g if x.shape == res[0].shape and not isinstance(x, Tracer) else dw), db

    return fwd, bwd


_fwd, _bwd = remembered()
plant("affine_remembers_the_last_input", AFFINE, "interleaved", affine, _fwd, _bwd)


def wrong_when_traced(res, g):
    dx, dw, db = affine_bwd(res, g)
    return dx, dw, db * (2 if isinstance(g, Tracer) else 1)


plant_affine(
    "affine_wrong_when_traced",
    found_by=("compiled_equals_eager", "vmap_equals_loop", "shape_sweep", "every_size"),
    bwd=wrong_when_traced,
)


@jax.custom_batching.custom_vmap
def _batched_sum(g):
    return jnp.sum(g, axis=0)


@_batched_sum.def_vmap
def _(axis_size, in_batched, g):
    del axis_size, in_batched
    return jnp.mean(g, axis=1), True


plant_affine(
    "affine_wrong_under_vmap",
    found_by="vmap_equals_loop",
    bwd=lambda res, g: (*affine_bwd(res, g)[:2], _batched_sum(g)),
)
plant(
    "affine_forward_returns_another_output", AFFINE, "forward_output", affine,
    lambda x, w, b: (affine(x, w, b) * 1.001, (x, w)), affine_bwd,
)  # fmt: skip
plant(
    "affine_input_detached", AFFINE, ("reverse_over_reverse", "forward_over_reverse"), affine,
    lambda x, w, b: (affine(x, w, b), (lax.stop_gradient(x), w)), affine_bwd,
)  # fmt: skip


def on_a_mesh(res, g):
    dx, dw, db = affine_bwd(res, g)
    return dx, dw * (2 if jax.sharding.get_abstract_mesh().shape else 1), db


plant_affine(
    "affine_wrong_on_a_mesh", found_by=("sharded_equals_unsharded", "shard_map_equals_unsharded"), bwd=on_a_mesh
)


def no_sum_over_shards(res, g):
    x, w = res
    dx = g @ w.T
    # casts to varying and back with pmean, where a sum over the shards is needed
    axes = tuple(jax.typeof(g).manual_axis_type.varying)
    dw, db = x.T @ g, jnp.sum(g, axis=0)
    return (dx, lax.pmean(dw, axes), lax.pmean(db, axes)) if axes else (dx, dw, db)


plant_affine("affine_mean_over_shards", found_by="shard_map_equals_unsharded", bwd=no_sum_over_shards)
plant_affine("affine_textbook_rule_in_shard_map", found_by="shard_map_equals_unsharded", bwd=affine_bwd)

# --- elementwise


def relu(x):
    return jnp.maximum(x, 0)


def one(fun, bwd, residual=lambda x, y: (x, y)):
    """fwd and bwd of a function of one array, given a formula in terms of input, output and cotangent."""
    return {
        "fun": fun,
        "fwd": lambda x: ((y := fun(x)), residual(x, y)),
        "bwd": lambda res, g: (bwd(*res, g),),
    }


plant_x = functools.partial(plant, args="n d")
plant_x("relu_mask_with_equality", found_by="kinks", **one(relu, lambda x, y, g: jnp.where(x >= 0, g, 0)))
plant_x(
    "relu_declared_zero_is_half", found_by="kinks", at_kink={0.0: 0.0},
    **one(relu, lambda x, y, g: jnp.where(x > 0, g, jnp.where(x == 0, g / 2, 0))),
)  # fmt: skip
plant_x("relu_mask_of_the_cotangent", found_by="oracle", **one(relu, lambda x, y, g: jnp.where(g > 0, g, 0)))
plant_x("relu_passes_everything", found_by="oracle", **one(relu, lambda x, y, g: g))
plant_x("relu_leaks_a_hundredth", found_by="oracle", **one(relu, lambda x, y, g: jnp.where(x > 0, g, g / 100)))
plant_x(
    "relu_wrong_beyond_six",
    found_by=("extremes", "shape_sweep", "every_size"),
    **one(relu, lambda x, y, g: jnp.where((x > 0) & (x < 6), g, 0)),
)
plant_x("sigmoid_derivative_of_the_input", found_by="oracle", **one(jax.nn.sigmoid, lambda x, y, g: g * x * (1 - x)))
plant_x("sigmoid_without_one_minus", found_by="oracle", **one(jax.nn.sigmoid, lambda x, y, g: g * y))
plant_x("sigmoid_ignores_the_cotangent", found_by="oracle", **one(jax.nn.sigmoid, lambda x, y, g: y * (1 - y)))
plant_x(
    "sigmoid_wrong_at_exactly_zero", found_by="kinks",
    **one(jax.nn.sigmoid, lambda x, y, g: jnp.where(x == 0, 0, g * y * (1 - y))),
)  # fmt: skip
plant_x(
    "sigmoid_overflows", found_by="extremes",
    **one(jax.nn.sigmoid, lambda x, y, g: g * jnp.exp(-x) / (1 + jnp.exp(-x)) ** 2),
)  # fmt: skip
plant_x("tanh_without_the_square", found_by="oracle", **one(jnp.tanh, lambda x, y, g: g * (1 - y)))
plant_x("tanh_of_the_sum", found_by="oracle", **one(jnp.tanh, lambda x, y, g: g * (1 + y**2)))
plant_x(
    "tanh_constant_in_the_second_derivative", found_by=("reverse_over_reverse", "forward_over_reverse"),
    **one(jnp.tanh, lambda x, y, g: g * (1 - y**2), lambda x, y: (x, lax.stop_gradient(y))),
)  # fmt: skip
plant_x(
    "tanh_quadratic_in_the_cotangent", found_by="oracle", **one(jnp.tanh, lambda x, y, g: g * jnp.abs(g) * (1 - y**2))
)
plant_x(
    "tanh_not_zero_for_a_zero_cotangent", found_by="zero_cotangent",
    **one(jnp.tanh, lambda x, y, g: g * (1 - y**2) + np.asarray(1e-5, x.dtype)),
)  # fmt: skip
plant_x(
    "relu_spreads_a_nan", found_by=("extremes", "oracle"),
    **one(relu, lambda x, y, g: jnp.where(x > 0, g, 0) + 0 * jnp.sum(x)),
)  # fmt: skip

# --- softmax and cross-entropy


def softmax(x):
    return jax.nn.softmax(x, axis=-1)


def xent(z, labels):
    log_p = jax.nn.log_softmax(z, axis=-1)
    return -jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]


def row_sum(a):
    return jnp.sum(a, axis=-1, keepdims=True)


plant_x("softmax_diagonal_only", found_by="oracle", **one(softmax, lambda x, y, g: g * y * (1 - y)))
plant_x(
    "softmax_sums_over_the_batch",
    found_by="oracle",
    **one(softmax, lambda x, y, g: y * (g - jnp.sum(y * g, axis=0, keepdims=True))),
)
plant_x(
    "softmax_without_probabilities_in_the_sum", found_by="oracle", **one(softmax, lambda x, y, g: y * (g - row_sum(g)))
)
plant_x(
    "softmax_wrong_for_equal_logits", found_by="kinks",
    **one(softmax, lambda x, y, g: jnp.where(row_sum(jnp.abs(x - x[:, :1])) == 0, 0, y * (g - row_sum(y * g)))),
)  # fmt: skip

plant_xent = functools.partial(
    plant, args="n c, n:int<c", fun=xent, fwd=lambda z, labels: (xent(z, labels), (z, labels))
)


def hits(z, labels):
    return jax.nn.one_hot(labels, z.shape[-1], dtype=z.dtype)


plant_xent(
    "cross_entropy_divided_by_the_batch", found_by="oracle",
    bwd=lambda res, g: (g[:, None] * (softmax(res[0]) - hits(*res)) / len(g), None),
)  # fmt: skip
plant_xent("cross_entropy_without_labels", found_by="oracle", bwd=lambda res, g: (g[:, None] * softmax(res[0]), None))
plant_xent(
    "cross_entropy_first_cotangent_for_all", found_by=("oracle", "shape_sweep", "every_size"),
    bwd=lambda res, g: (jnp.full_like(res[0], 1) * g[:1, None] * (softmax(res[0]) - hits(*res)), None),
)  # fmt: skip
plant_xent(
    "cross_entropy_naive_exponentials", found_by="extremes",
    bwd=lambda res, g: (g[:, None] * (jnp.exp(res[0]) / row_sum(jnp.exp(res[0])) - hits(*res)), None),
)  # fmt: skip
plant_xent(
    "cross_entropy_gradient_of_the_labels", found_by="integer_arguments",
    bwd=lambda res, g: (g[:, None] * (softmax(res[0]) - hits(*res)), jnp.zeros_like(res[1])),
)  # fmt: skip
plant_xent(
    "cross_entropy_last_class_is_lost", found_by="oracle",
    bwd=lambda res, g: ((g[:, None] * (softmax(res[0]) - hits(*res))).at[:, -1].set(0), None),
)  # fmt: skip
plant_xent(
    "cross_entropy_wrong_for_one_class", found_by="shape_sweep",
    bwd=lambda res, g: (g[:, None] * (softmax(res[0]) - hits(*res)) + (1 if res[0].shape[1] == 1 else 0), None),
)  # fmt: skip

# --- dropout: the mask is drawn from a key


def dropout(x, key):
    keep = jax.random.bernoulli(key, 0.75, x.shape)
    return jnp.where(keep, x / np.asarray(0.75, x.dtype), 0)


plant_dropout = functools.partial(plant, args="n d, :key", fun=dropout, fwd=lambda x, key: (dropout(x, key), key))


def dropped(key, g):
    return dropout(g, key)


plant_dropout(
    "dropout_another_mask", found_by="oracle", bwd=lambda key, g: (dropped(jax.random.fold_in(key, 1), g), None)
)
plant_dropout(
    "dropout_not_rescaled", found_by="oracle", bwd=lambda key, g: (dropped(key, g) * np.asarray(0.75, g.dtype), None)
)
plant_dropout("dropout_no_mask", found_by="oracle", bwd=lambda key, g: (g, None))

# --- norms


def layer_norm(x, scale, offset):
    centered = x - jnp.mean(x, axis=-1, keepdims=True)
    normal = centered * lax.rsqrt(jnp.mean(centered**2, axis=-1, keepdims=True) + np.asarray(1e-3, x.dtype))
    return normal * jnp.broadcast_to(scale, x.shape) + jnp.broadcast_to(offset, x.shape)


def norm_fwd(x, scale, offset):
    centered = x - jnp.mean(x, axis=-1, keepdims=True)
    inverse = lax.rsqrt(jnp.mean(centered**2, axis=-1, keepdims=True) + np.asarray(1e-3, x.dtype))
    return layer_norm(x, scale, offset), (centered * inverse, inverse, scale)


def mean(a):
    return jnp.mean(a, axis=-1, keepdims=True)


def norm_bwd(term):
    def bwd(res, g):
        normal, inverse, scale = res
        scaled = g * jnp.broadcast_to(scale, g.shape)
        return term(normal, inverse, scaled), jnp.sum(g * normal, axis=0), jnp.sum(g, axis=0)

    return bwd


right_norm_bwd = norm_bwd(lambda n, i, s: i * (s - mean(s) - n * mean(s * n)))
plant_norm = functools.partial(plant, args="n d, d, d", fun=layer_norm, fwd=norm_fwd)
plant_norm("layer_norm_constant_variance", found_by="oracle", bwd=norm_bwd(lambda n, i, s: i * (s - mean(s))))
plant_norm("layer_norm_constant_mean", found_by="oracle", bwd=norm_bwd(lambda n, i, s: i * (s - n * mean(s * n))))
plant_norm("layer_norm_statistics_fixed", found_by="oracle", bwd=norm_bwd(lambda n, i, s: i * s))
plant_norm(
    "layer_norm_scale_averaged", found_by="oracle",
    bwd=lambda res, g: (right_norm_bwd(res, g)[0], jnp.mean(g * res[0], axis=0), jnp.sum(g, axis=0)),
)  # fmt: skip


def rms_norm(x):
    return x * lax.rsqrt(mean(x**2) + np.asarray(1e-3, x.dtype))


plant_x(
    "rms_norm_forgets_the_mean_of_squares", found_by="oracle",
    **one(rms_norm, lambda x, y, g: g * lax.rsqrt(mean(x**2) + np.asarray(1e-3, x.dtype))),
)  # fmt: skip
plant_x(
    "rms_norm_without_eps", found_by="oracle",
    **one(rms_norm, lambda x, y, g: lax.rsqrt(mean(x**2)) * (g - x * mean(g * x) / mean(x**2))),
)  # fmt: skip

# --- the large output layer: classes in chunks of four


CHUNK = 4


def linear_xent(x, w, labels):
    return xent(x @ w, labels)


def chunked(padding, *, keep_tail=True):
    """A backward pass over chunks of classes; `padding` is the logit of the columns that pad the last chunk."""

    def bwd(res, g):
        x, w, labels = res
        classes = w.shape[1]
        padded = -(-classes // CHUNK) * CHUNK if keep_tail else max(classes // CHUNK, 1) * CHUNK
        z = jnp.pad(x @ w, ((0, 0), (0, max(padded - classes, 0))), constant_values=padding)[:, :padded]
        p = jnp.exp(z - jnp.max(z, axis=-1, keepdims=True, initial=-1e30))
        p = (p / row_sum(p))[:, :classes]
        p = jnp.pad(p, ((0, 0), (0, classes - p.shape[1])))
        dz = g[:, None] * (p - hits(p, labels))
        return dz @ w.T, x.T @ dz, None

    return bwd


plant_linear = functools.partial(
    plant,
    args="n d, d c, n:int<c",
    fun=linear_xent,
    fwd=lambda x, w, labels: (linear_xent(x, w, labels), (x, w, labels)),
)
plant_linear(
    "linear_cross_entropy_padding_not_masked", found_by=("oracle", "shape_sweep", "every_size"), bwd=chunked(0.0)
)
plant_linear(
    "linear_cross_entropy_last_chunk_dropped",
    found_by=("oracle", "shape_sweep", "every_size"),
    bwd=chunked(-1e30, keep_tail=False),
)
plant_linear(
    "linear_cross_entropy_label_of_the_last_chunk", found_by=("oracle", "shape_sweep", "every_size"),
    bwd=lambda res, g: chunked(-1e30)((*res[:2], jnp.where(res[2] >= res[1].shape[1] // CHUNK * CHUNK, -1, res[2])), g),
)  # fmt: skip

# --- several outputs, pytrees, structure


def moments(x):
    return jnp.sum(x, axis=-1), jnp.sum(x**2, axis=-1)


plant_x(
    "two_outputs_second_cotangent_lost", found_by="oracle", fun=moments, fwd=lambda x: (moments(x), x),
    bwd=lambda x, g: (jnp.broadcast_to(g[0][:, None], x.shape),),
)  # fmt: skip
plant_x(
    "two_outputs_cotangents_exchanged", found_by="oracle", fun=moments, fwd=lambda x: (moments(x), x),
    bwd=lambda x, g: (g[1][:, None] + 2 * x * g[0][:, None],),
)  # fmt: skip


def _absent(x, g):
    first, second = g
    zero = jax.custom_derivatives.SymbolicZero
    if isinstance(second, zero):  # treated as "nothing to do", although the first output has a cotangent
        return (jnp.zeros_like(x),)
    first = jnp.zeros(x.shape[:1], x.dtype) if isinstance(first, zero) else first
    return (first[:, None] + 2 * x * second[:, None],)


PLANTED.append(
    Planted(
        "symbolic_zero_taken_for_all",
        rule(lambda x: moments(x), lambda x: (moments(x.value), x.value), _absent, symbolic_zeros=True),
        "n d",
        ("partial_cotangents",),
        {},
    )
)
PLANTED.append(
    Planted(
        "rule_bypassed",
        (lambda bypassed: lambda x: lax.stop_gradient(bypassed(x)) + x)(
            rule(jnp.sin, lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))
        ),
        "n d",
        ("rule_used",),
        {"reference": lambda x: jnp.sin(x) + x},
    )
)


def _inner_scan(x):
    wrong = rule(jnp.sin, lambda x: (jnp.sin(x), x), lambda x, g: (-g * jnp.cos(x),))
    return lax.scan(lambda c, _: (jax.jit(wrong)(c), None), x, length=3)[0]


PLANTED.append(Planted("wrong_sign_inside_jit_inside_scan", _inner_scan, "n d", ("oracle",), {}))

# --- the same rules without a bug: the checks must be silent on each

RIGHT: list[Planted] = []


def right(name, args, fun, fwd, bwd, **options):
    RIGHT.append(Planted(name, rule(fun, fwd, bwd), args, (), options))


right("dropout", "n d, :key", dropout, lambda x, key: (dropout(x, key), key), lambda key, g: (dropped(key, g), None))
right("layer_norm", "n d, d, d", layer_norm, norm_fwd, right_norm_bwd)
right("relu", "n d", at_kink={0.0: 0.0}, **one(relu, lambda x, y, g: jnp.where(x > 0, g, 0)))
right("sigmoid", "n d", **one(jax.nn.sigmoid, lambda x, y, g: g * y * (1 - y)))
right("tanh", "n d", **one(jnp.tanh, lambda x, y, g: g * (1 - y**2)))
right("softmax", "n d", **one(softmax, lambda x, y, g: y * (g - row_sum(y * g))))
right(
    "cross_entropy", "n c, n:int<c", xent, lambda z, labels: (xent(z, labels), (z, labels)),
    lambda res, g: (g[:, None] * (softmax(res[0]) - hits(*res)), None),
)  # fmt: skip
right(
    "rms_norm", "n d",
    **one(rms_norm, lambda x, y, g: lax.rsqrt(mean(x**2) + np.asarray(1e-3, x.dtype)) * (g - y * mean(g * y))),
)  # fmt: skip
right(
    "two_outputs", "n d", moments, lambda x: (moments(x), x),
    lambda x, g: (jnp.broadcast_to(g[0][:, None], x.shape) + 2 * x * g[1][:, None],),
)  # fmt: skip
