"""Tests that need a GPU."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fcfunc
from fcfunc import losses, train

pytestmark = pytest.mark.gpu


def loss_fn(params, batch, key, **options):
    x, y = batch
    dims = [x.shape[1], *(len(p["b"]) for p in params)]
    logits = fcfunc.mlp(dims, **options).apply(params, x)
    return jnp.mean(losses.softmax_cross_entropy_with_integer_labels(logits, y))


def make(dims, rows):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, dims[0]), dtype=np.float32)
    return fcfunc.init(jax.random.key(0), dims), (x, rng.integers(0, dims[-1], rows, dtype=np.int32))


def test_a_step_in_full_float32_is_that_of_the_cpu():
    params, batch = make([100, 300, 10], 77)
    gradient = jax.jit(jax.grad(loss_fn))
    with jax.default_matmul_precision("highest"):
        on_gpu = gradient(params, batch, None)
    with jax.default_device(jax.devices("cpu")[0]):
        on_cpu = gradient(jax.device_put(params, jax.devices("cpu")[0]), batch, None)
    chex.assert_trees_all_close(jax.device_get(on_gpu), jax.device_get(on_cpu), rtol=1e-4, atol=1e-6)


def test_default_products_err_no_more_than_their_ten_bits():
    params, batch = make([512, 512, 10], 256)
    gradient = jax.grad(loss_fn)
    fast = jax.jit(gradient)(params, batch, None)
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(gradient)(params, batch, None)
    for a, b in zip(jax.tree.leaves(fast), jax.tree.leaves(exact), strict=True):
        assert np.linalg.norm(a - b) <= 2e-3 * np.linalg.norm(b)  # TF32 keeps 10 bits of the mantissa


def test_an_epoch_of_a_donated_state_never_holds_the_parameters_twice_over():
    (device,) = jax.devices()[:1]
    params, data = make([4096, 4096, 4096, 10], 64)
    epoch = train.make_train_epoch(loss_fn, optax.sgd(0.01), 16)
    state = train.init_state(params, optax.sgd(0.01), jax.random.key(1))
    size = sum(a.nbytes for a in jax.tree.leaves(params))
    del params
    state, _ = jax.block_until_ready(epoch(state, data))
    held = device.memory_stats()["bytes_in_use"]
    state, _ = jax.block_until_ready(epoch(state, data))
    assert device.memory_stats()["bytes_in_use"] <= held
    assert device.memory_stats()["peak_bytes_in_use"] <= 3.5 * size  # includes the first copy and one set of gradients


def test_a_gradient_in_bfloat16_errs_no_more_than_its_eight_bits():
    params, batch = make([128, 256, 64], 512)
    grads = jax.jit(jax.grad(functools.partial(loss_fn, compute_dtype="bfloat16")))(params, batch, None)
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(jax.grad(loss_fn))(params, batch, None)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(exact), strict=True):
        assert np.linalg.norm(a - b) <= 0.05 * np.linalg.norm(b)  # some ReLU masks flip too


def test_runs_repeat_to_the_bit_where_xla_is_asked_to():
    """Runs an epoch in two processes with the flag, because XLA chooses its kernels once per process."""
    program = (
        "import hashlib, jax, numpy, optax, tests.test_gpu as t\n"
        "params, data = t.make([100, 300, 10], 640)\n"
        "epoch = t.train.make_train_epoch(t.loss_fn, optax.adam(1e-3), 64)\n"
        "state, _ = epoch(t.train.init_state(params, optax.adam(1e-3), jax.random.key(1)), data)\n"
        "print([hashlib.sha256(numpy.asarray(a)).hexdigest() for a in jax.tree.leaves(state.params)])\n"
    )
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip()
    options = {"capture_output": True, "text": True, "check": True, "cwd": Path(__file__).parents[1]}
    env = os.environ | {"XLA_FLAGS": flags}
    one, two = (subprocess.run([sys.executable, "-c", program], env=env, **options).stdout for _ in range(2))
    assert one == two
