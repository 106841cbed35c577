"""Compares per-example gradients and curvature with opacus, BackPACK, jax_privacy, curvlinops and laplax.

    python -m benchmarks.per_example     # needs: pip install "fcfunc[per-example-bench]" torch==2.13.0

784-1024-1024-10 with ReLU and softmax cross-entropy in float32. Times are medians of alternating runs, as ratios to an
ordinary gradient by fcfunc. Memory is the growth of the peak of a separate process. Each result is compared with
fcfunc's, and again in float64 on 256 examples, because in float32 the other library's rounding errors may dominate.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import fcfunc
from benchmarks.timing import in_turns, ratio
from fcfunc import curvature, losses, per_example

DIMS, BATCH, SMALL, FEW, MAX_NORM = [784, 1024, 1024, 10], 4096, 1024, 256, 1.0
"""All gradients of SMALL examples, with one copy, fit in 24 GiB of memory. FEW examples are compared in float64."""

NET = fcfunc.mlp(DIMS)


def problem(batch: int):
    """Parameters, inputs, labels and a direction; in float64 if it is enabled in JAX."""
    rng = np.random.default_rng(0)
    dtype = jax.dtypes.canonicalize_dtype(jnp.float64)
    params = jax.tree.map(lambda a: a.astype(dtype), NET.init(jax.random.key(0)))
    x = jnp.asarray(rng.standard_normal((batch, DIMS[0])), dtype)
    labels = jnp.asarray(rng.integers(0, DIMS[-1], batch), jnp.int32)
    direction = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape), dtype), params)
    return params, x, labels, direction


def cross_entropy(outputs, labels):
    """The loss of each example."""
    return losses.softmax_cross_entropy_with_integer_labels(outputs, labels)


def one_loss(params, x, labels):
    """The loss of one example, in plain JAX."""
    h = x
    for p in params[:-1]:
        h = jax.nn.relu(h @ p["w"] + p["b"])
    outputs = h @ params[-1]["w"] + params[-1]["b"]
    return jax.nn.logsumexp(outputs) - outputs[labels]


def by_fcfunc(what: str, batch: int) -> Callable:
    """One of fcfunc's quantities, as a compiled function without arguments."""
    params, x, labels, direction = problem(batch)
    loss_fn = lambda labels: lambda outputs: cross_entropy(outputs, labels)  # noqa: E731

    def gradient(params, x, labels, v):
        return jax.grad(lambda params: jnp.sum(cross_entropy(NET.apply(params, x), labels)))(params)

    def clipped(params, x, labels, v):
        return per_example.clipped_sum(NET.example_gradients(params, x, loss_fn(labels))[1], MAX_NORM)

    def norms(params, x, labels, v):
        return per_example.squared_norms(NET.example_gradients(params, x, loss_fn(labels))[1])

    def both(params, x, labels, v):  # the gradient and the norms, like BackPACK's backward pass
        gradients = NET.example_gradients(params, x, loss_fn(labels))[1]
        return per_example.weighted_sum(gradients, jnp.ones(len(x))), per_example.squared_norms(gradients)

    def ggn(params, x, labels, v):
        return curvature.ggn_vector_product(NET, params, x, loss_fn(labels), v)

    def hessian(params, x, labels, v):
        return curvature.hessian_vector_product(NET, params, x, loss_fn(labels), v)

    made = {f.__name__: f for f in (gradient, clipped, norms, both, ggn, hessian)}[what]
    compiled = jax.jit(made)
    return lambda: jax.block_until_ready(compiled(params, x, labels, direction))


def by_vmap(batch: int) -> Callable:
    """`vmap(grad)` followed by clipping, with all gradients in memory at once."""
    params, x, labels, _ = problem(batch)

    @jax.jit
    def clipped(params, x, labels):
        gradients = jax.vmap(jax.grad(one_loss), in_axes=(None, 0, 0))(params, x, labels)
        squared = sum(jnp.sum(a.reshape(batch, -1) ** 2, axis=1) for a in jax.tree.leaves(gradients))
        factors = jnp.minimum(1, MAX_NORM / jnp.sqrt(squared))
        return jax.tree.map(lambda a: jnp.tensordot(factors, a, 1), gradients)

    return lambda: jax.block_until_ready(clipped(params, x, labels))


def by_jax_privacy(microbatch: int, batch: int) -> Callable:
    """`jax_privacy.clipped_grad`, in microbatches."""
    import jax_privacy

    params, x, labels, _ = problem(batch)
    clipped = jax.jit(
        jax_privacy.clipped_grad(
            one_loss, l2_clip_norm=MAX_NORM, batch_argnums=(1, 2), keep_batch_dim=False, microbatch_size=microbatch
        )
    )
    return lambda: jax.block_until_ready(clipped(params, x, labels))


def by_laplax(batch: int) -> Callable:
    """Laplax's product with the generalized Gauss-Newton matrix, for the sum of the losses."""
    from laplax.curv.ggn import create_ggn_mv_without_data

    params, x, labels, direction = problem(batch)

    def model_fn(input, params):
        h = input
        for p in params[:-1]:
            h = jax.nn.relu(h @ p["w"] + p["b"])
        return h @ params[-1]["w"] + params[-1]["b"]

    @jax.jit
    def product(params, x, labels, v):
        data = {"input": x, "target": labels}
        return create_ggn_mv_without_data(model_fn, params, "cross_entropy", 1.0)(v, data)

    return lambda: jax.block_until_ready(product(params, x, labels, direction))


def torch_network(params):
    """The same network in torch."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    layers = []
    for p in params:
        linear = torch.nn.Linear(*p["w"].shape, dtype=getattr(torch, p["w"].dtype.name))
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(np.asarray(p["w"]).T.copy()))
            linear.bias.copy_(torch.from_numpy(np.asarray(p["b"]).copy()))
        layers += [linear, torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def torch_problem(batch: int):
    """The network, its inputs and its labels in torch."""
    import torch

    params, x, labels, direction = problem(batch)
    x, labels = torch.from_numpy(np.array(x)), torch.from_numpy(np.array(labels, np.int64))
    return torch_network(params), x, labels, direction


def like_ours(tensors) -> np.ndarray:
    """Torch's gradients, flattened in fcfunc's order: for each layer, b, then w as [fan_in, fan_out]."""
    tensors = list(tensors)
    parts = [
        a for w, b in zip(tensors[::2], tensors[1::2], strict=True) for a in (b.numpy().ravel(), w.numpy().T.ravel())
    ]
    return np.concatenate(parts)


def by_torch(batch: int) -> Callable:
    """An ordinary gradient in torch."""
    import torch

    network, x, labels, _ = torch_problem(batch)

    def run():
        network.zero_grad()
        torch.nn.functional.cross_entropy(network(x), labels, reduction="sum").backward()
        return [p.grad for p in network.parameters()]

    return run


def by_opacus(batch: int) -> Callable:
    """Ghost clipping: one backward pass for the norms, and a second one with reweighted losses."""
    import torch
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    network, x, labels, _ = torch_problem(batch)
    module = GradSampleModuleFastGradientClipping(
        network, max_grad_norm=MAX_NORM, use_ghost_clipping=True, loss_reduction="sum"
    )

    def run():
        module.zero_grad()
        module.enable_hooks()
        values = torch.nn.functional.cross_entropy(module(x), labels, reduction="none")
        values.sum().backward(retain_graph=True)
        factors = module.get_clipping_coef()
        module.zero_grad()
        module.disable_hooks()
        (factors * values).sum().backward()
        return [p.grad for p in network.parameters()]

    return run


def by_backpack(batch: int) -> Callable:
    """BackPACK's batch L2 norms, together with the gradient."""
    import torch
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad

    network, x, labels, _ = torch_problem(batch)
    network, loss_fn = extend(network), extend(torch.nn.CrossEntropyLoss(reduction="sum"))

    def run():
        network.zero_grad()
        with backpack(BatchL2Grad()):
            loss_fn(network(x), labels).backward()
        return sum(p.batch_l2 for p in network.parameters())

    return run


def by_curvlinops(what: str, batch: int) -> Callable:
    """Curvlinops's products, for the sum of the losses."""
    import torch
    from curvlinops import GGNLinearOperator, HessianLinearOperator

    network, x, labels, direction = torch_problem(batch)
    parameters = list(network.parameters())
    operator = {"ggn": GGNLinearOperator, "hessian": HessianLinearOperator}[what](
        network, torch.nn.CrossEntropyLoss(reduction="sum"), parameters, [(x, labels)], check_deterministic=False
    )
    vectors = [torch.from_numpy(np.array(a).T.copy()) for p in direction for a in (p["w"], p["b"])]

    def run():
        return operator @ vectors

    return run


WAYS: dict[str, Callable[[int], Callable]] = {
    "gradient, fcfunc": partial(by_fcfunc, "gradient"),
    "gradient, torch": by_torch,
    "clipped sum, fcfunc": partial(by_fcfunc, "clipped"),
    "clipped sum, opacus ghost clipping": by_opacus,
    "gradient and squared norms, fcfunc": partial(by_fcfunc, "both"),
    "gradient and squared norms, BackPACK": by_backpack,
    "GGN product, fcfunc": partial(by_fcfunc, "ggn"),
    "GGN product, curvlinops": partial(by_curvlinops, "ggn"),
    "GGN product, laplax": by_laplax,
    "Hessian product, fcfunc": partial(by_fcfunc, "hessian"),
    "Hessian product, curvlinops": partial(by_curvlinops, "hessian"),
}
SMALL_WAYS: dict[str, Callable[[int], Callable]] = {
    "gradient, fcfunc": partial(by_fcfunc, "gradient"),
    "clipped sum, fcfunc": partial(by_fcfunc, "clipped"),
    "clipped sum, vmap(grad)": by_vmap,
    "clipped sum, jax_privacy in microbatches of 64": partial(by_jax_privacy, 64),
}


def flat(result) -> np.ndarray:
    """A result as one vector, without the gradient that is returned with norms."""
    if hasattr(result, "numpy"):  # norms from torch
        return result.numpy()
    if all(hasattr(a, "numpy") for a in result):
        return like_ours(result)
    return np.asarray(ravel_pytree(result[-1] if isinstance(result, tuple) else result)[0])


def status(field: str) -> int:
    """A size in kB from /proc/self/status."""
    return int(
        next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)).split()[1]
    )


def apart(results: dict[str, np.ndarray]) -> dict[str, float]:
    """The relative distance of each result from fcfunc's."""
    ours = {name: results[f"{name.split(',')[0]}, fcfunc"] for name in results}
    return {name: float(np.linalg.norm(a - ours[name]) / np.linalg.norm(ours[name])) for name, a in results.items()}


def elsewhere(option: str, *args: str, **environment: str):
    """Runs this module with an option in a separate process; returns the last line that it prints."""
    command = [sys.executable, "-m", "benchmarks.per_example", option, *args]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | environment)
    return json.loads(done.stdout.splitlines()[-1])


def compare(ways: dict[str, Callable[[int], Callable]], batch: int, rounds: int) -> None:
    """Prints the table for one batch size."""
    exactly = elsewhere("--apart", JAX_ENABLE_X64="1")
    runs = {name: (made(batch), ()) for name, made in ways.items()}
    off = apart({name: flat(run()) for name, (run, _) in runs.items()})
    seconds = in_turns(runs, rounds)
    ordinary = next(iter(ways))
    print(f"784-1024-1024-10, batch {batch}\n")
    print("| | seconds | times a gradient by fcfunc | distance from fcfunc | distance in float64 | peak memory, MB |")
    print("|---|---|---|---|---|---|")
    for name in ways:
        times = ratio(seconds[name], seconds[ordinary])
        peak = elsewhere("--memory", name, str(batch))
        cells = (name, f"{statistics.median(seconds[name]):.3f}", times, f"{off[name]:.1e}", f"{exactly[name]:.1e}")
        print(f"| {' | '.join(cells)} | {peak:.0f} |", flush=True)


def main(argv=None) -> None:
    """Prints the tables, the memory of one way, or the distances between the ways."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--memory", nargs=2, metavar=("WAY", "BATCH"), help="the growth of the peak memory, in MB")
    parser.add_argument("--apart", action="store_true", help=f"distance of each result from fcfunc's on {FEW} examples")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore", message="Full backward hook")  # from torch, for inputs without a gradient
    if options.memory:
        way, batch = options.memory
        run = (WAYS | SMALL_WAYS)[way](int(batch))
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak; getrusage would include the parent's
        before = status("VmRSS")
        run(), run()
        print(json.dumps((status("VmHWM") - before) / 1024))
        return
    if options.apart:
        print(json.dumps(apart({name: flat(made(FEW)()) for name, made in (WAYS | SMALL_WAYS).items()})))
        return
    start = time.perf_counter()
    compare(WAYS, BATCH, options.rounds)
    print()
    compare(SMALL_WAYS, SMALL, min(options.rounds, 3))
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
