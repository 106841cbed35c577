"""One of two processes of four virtual devices each: `python -m tests.two_processes COORDINATOR ID FOLDER`.

It trains in every mode together with the other process, and checks the results against training on one local device.
"""

import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import multihost_utils
from jax.sharding import AxisType

import fcfunc
from fcfunc import checkpoint, losses, sharding, stream, train

DIMS = [16, 64, 32, 8]


def loss_fn(params, batch, key):
    del key
    return jnp.mean(losses.softmax_cross_entropy_with_integer_labels(fcfunc.apply(params, batch[0]), batch[1]))


def run(params, data, accumulate=1):
    """Returns the params after one SGD step at rate 1, the params after two epochs of `fit`, and validation losses."""
    optimizer = optax.sgd(1.0)
    state = train.init_state(params, optimizer, jax.random.key(1))
    step = train.make_train_step(loss_fn, optimizer, accumulate=accumulate)
    fitted, history = train.fit(
        loss_fn, optax.sgd(0.1), state, data, epochs=2, batch_size=16, validation_data=data, num_classes=DIMS[-1]
    )
    return step(state, data)[0].params, fitted.params, history["validation_loss"].tolist()


def main():
    coordinator, process = sys.argv[1], int(sys.argv[2])
    jax.distributed.initialize(coordinator, num_processes=2, process_id=process, initialization_timeout=120)
    rng = np.random.default_rng(0)
    data = rng.standard_normal((64, DIMS[0]), np.float32), rng.integers(0, DIMS[-1], 64, np.int32)
    mine = jax.tree.map(lambda a: a[32 * process : 32 * (process + 1)], data)
    params = fcfunc.init(jax.random.key(0), DIMS)
    expected = jax.tree.map(np.asarray, run(params, data))
    for mode, kind in [*((mode, AxisType.Explicit) for mode in sharding.MODES), ("fsdp+tensor", AxisType.Auto)]:
        mesh = sharding.make_mesh(model=2 if "tensor" in mode else 1, axis_type=kind)
        specs = sharding.param_specs(params, mesh, mode)
        got = run(sharding.shard(params, specs, mesh), sharding.global_batch(mine, mesh), accumulate=2)
        whole = multihost_utils.process_allgather(got, tiled=True)
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6, err_msg=f"{mode} {kind}")
        print(f"{mode} {kind.name}: as on one device", flush=True)
    check_stream(params, data)
    check_non_finite(params, data, process)
    check_resuming(params, mine, sys.argv[3])


def check_stream(params, data):
    """Trains on chunks of which each process reads its half."""
    mesh, optimizer, reads = sharding.make_mesh(), optax.sgd(0.1), []

    def read(start, stop):
        reads.append(stop - start)
        return jax.tree.map(lambda a: a[start:stop], data)

    def fitted(params, rows):
        state = train.init_state(params, optimizer, jax.random.key(1))
        return train.fit(loss_fn, optimizer, state, rows, epochs=2, batch_size=16)[0].params

    rows = stream.Stream(64, 32, read)
    expected = jax.tree.map(np.asarray, fitted(params, rows))
    reads.clear()
    replicated = sharding.shard(params, sharding.param_specs(params, mesh, "data"), mesh)
    got = fitted(replicated, stream.sharded(rows, jax.NamedSharding(mesh, jax.P("data"))))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a.addressable_data(0), b, rtol=1e-4, atol=1e-6)
    # Two epochs of 64 examples, half of them in each process, and the first batch, which finds the shapes.
    assert sum(reads) == 2 * 32 + 8, reads
    print("a stream, of which each process reads half: as on one device", flush=True)


def check_non_finite(params, data, process):
    """An example of the second process makes the loss NaN, which ends both with the same error."""
    mesh, optimizer = sharding.make_mesh(), optax.sgd(0.1)
    x, y = data[0].copy(), data[1]
    x[50, 0] = 1e30
    mine = jax.tree.map(lambda a: a[32 * process : 32 * (process + 1)], (x, y))
    state = train.init_state(sharding.shard(params, jax.P(), mesh), optimizer, jax.random.key(1))
    nan_loss = lambda p, batch, key: loss_fn(p, batch, key) + jnp.sum(jnp.where(batch[0] > 1e29, jnp.nan, 0.0))
    with pytest.raises(train.NonFiniteError) as raised:
        train.fit(nan_loss, optimizer, state, sharding.global_batch(mine, mesh), epochs=2, batch_size=16)
    said = np.frombuffer(str(raised.value).encode().ljust(400)[:400], np.uint8)
    messages = multihost_utils.process_allgather(said)
    assert (messages == messages[0]).all(), str(raised.value)
    assert 50 in raised.value.indices, raised.value
    print("the same error in both processes", flush=True)


def check_resuming(params, mine, folder):
    """A run with patience that both processes interrupt, and resume to the same bits and the same history."""
    mesh = sharding.make_mesh()
    data, optimizer = sharding.global_batch(mine, mesh), optax.adam(0.1)
    params = sharding.shard(params, sharding.param_specs(params, mesh, "fsdp"), mesh)
    options = {"epochs": 6, "batch_size": 16, "every": 3, "validation_data": data, "patience": 2}

    def fit(on_steps, **more):
        state = train.init_state(params, optimizer, jax.random.key(1))
        return train.fit(loss_fn, optimizer, state, data, on_steps=on_steps, **options, **more)

    def interrupt(state):
        if int(state.step) == 11:
            raise KeyboardInterrupt

    saver = checkpoint.Saver(folder)
    with pytest.raises(KeyboardInterrupt):
        fit(interrupt, saver=saver)
    assert checkpoint.steps(folder)[-1] == 11
    (state, history), (whole, expected) = fit(lambda state: None, saver=saver), fit(lambda state: None)
    for a, b in zip(*multihost_utils.process_allgather((state.params, whole.params), tiled=True), strict=True):
        np.testing.assert_array_equal(a["w"], b["w"])
    for name in expected.keys() - {"seconds"}:
        np.testing.assert_array_equal(history[name], expected[name], err_msg=name)
    print("an interrupted run: as the uninterrupted one", flush=True)


if __name__ == "__main__":
    main()
