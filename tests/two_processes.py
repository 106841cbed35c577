"""One of two processes of four virtual devices each: `python -m tests.two_processes COORDINATOR ID`.

It trains in every mode together with the other process, and checks the results against training on one local device.
"""

import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType

import fcfunc
from fcfunc import losses, sharding, stream, train

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


if __name__ == "__main__":
    main()
