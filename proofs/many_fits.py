"""Runs ten thousand small fits in one process. Its memory and the number of compiled programs must not grow.

python -m proofs.many_fits --fits 10000
"""

import argparse
import gc
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fcfunc
from fcfunc import losses, train


def resident() -> float:
    """The memory of this process, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


def main() -> None:
    """Prints the memory and the number of programs after every tenth of the fits."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--fits", type=int, default=10_000)
    parser.add_argument("--new-loss", action="store_true", help="give each fit its own loss function")
    args = parser.parse_args()
    compilations = []
    count = lambda event, *_, **__: compilations.append(event) if "backend_compile" in event else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(count)
    rng, optimizer = np.random.default_rng(0), optax.sgd(0.1)
    data = rng.standard_normal((10, 4), dtype=np.float32), rng.integers(0, 3, 10, dtype=np.int32)
    params = fcfunc.init(jax.random.key(0), [4, 8, 3])

    def make_loss():
        def loss_fn(params, batch, key):
            x, y = batch
            return jnp.mean(losses.softmax_cross_entropy_with_integer_labels(fcfunc.apply(params, x), y))

        return loss_fn

    loss_fn, start = make_loss(), time.perf_counter()
    for i in range(args.fits + 1):
        state = train.init_state(params, optimizer, jax.random.key(i))
        train.fit(make_loss() if args.new_loss else loss_fn, optimizer, state, data, epochs=2, batch_size=4)
        if i % max(args.fits // 10, 1) == 0:
            gc.collect()
            print(
                f"{i} fits, {time.perf_counter() - start:.0f} s: {resident():.1f} MB, {len(compilations)} programs, "
                f"{len(jax.live_arrays())} arrays",
                flush=True,
            )


if __name__ == "__main__":
    main()
