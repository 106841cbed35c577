"""Measures how fast a population of networks trains in one program; writes docs/background/populations.md.

    python -m benchmarks.populations
    python -m benchmarks.populations --members 1,8 --updates 2000    # smaller, only printed

An update is one step of one network. The peer is PyTorch: `vmap` of `functional_call`, compiled.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import fcfunc
from benchmarks.peers import Task, classifier_loss
from benchmarks.training import digits, small, versions
from fcfunc import train

PAGE = Path(__file__).parents[1] / "docs" / "background" / "populations.md"
TASKS = {"4-32-32-2, batch 32, Adam": (small, 8), "64-128-10, batch 32, SGD": (digits, 4)}
"""Each task, and the number of members at once for the comparison with PyTorch."""

MEMBERS = (1, 8, 64, 512, 4096)
AT_ONCE = (1, 4, 8, 16)
PYTORCH_MEMBERS = (1, 8, 64, 512)

INTRODUCTION = """# Populations

How fast many small networks train in one program: `train.make_fit(..., members_at_once=k)`, on a state with a leading
axis of members. Written by `python -m benchmarks.populations` on {cores} CPU cores ({machine}), Python {python}:
{versions}. Nothing here was measured on a GPU.

An update is one step of one network. Speeds are updates per second, relative to one network trained alone by
`make_fit`: the median over alternating runs, with the lowest and the highest. Above 1, a member of the population
trains faster than it would alone, and the population in less time than its members one after the other. Each member
has its own parameters, and its own order of the examples.
"""


def epochs_for(task: Task, members: int, updates: int) -> int:
    """The number of epochs that makes about this many updates."""
    return max(1, round(updates / (members * (len(task.x) // task.batch_size))))


def states_of(task: Task, members: int):
    """The states of the members before their first step."""
    make = lambda key: train.init_state(fcfunc.init(key, task.dims), task.optimizer, key)  # noqa: E731
    return jax.jit(jax.vmap(make))(jax.random.split(jax.random.key(0), members))


def with_fcfunc(task: Task, members: int, at_once: int | None, epochs: int) -> Callable:
    """A run of a population; `at_once` None: all of them under `jax.vmap`."""
    options = {"epochs": epochs, "batch_size": task.batch_size}
    fit = train.make_fit(classifier_loss, task.optimizer, **options, members_at_once=at_once)
    if at_once is None:
        fit = jax.vmap(fit, in_axes=(0, None))
    states, data = states_of(task, members), (jnp.asarray(task.x), jnp.asarray(task.y))
    run = jax.jit(lambda states: fit(states, data)[0])
    return lambda: jax.block_until_ready(run(states))


def with_torch(task: Task, members: int, epochs: int) -> Callable:
    """PyTorch's model ensembling: stacked parameters, `vmap` over the gradient of `functional_call`, compiled."""
    import torch
    from torch.func import functional_call, grad, stack_module_state, vmap

    def network():
        widths = zip(task.dims[:-1], task.dims[1:], strict=True)
        layers = [layer for pair in widths for layer in (torch.nn.Linear(*pair), torch.nn.ReLU())]
        return torch.nn.Sequential(*layers[:-1])

    base = network()
    params, _ = stack_module_state([network() for _ in range(members)])
    params = {name: p.detach().requires_grad_() for name, p in params.items()}
    optimizer = (torch.optim.Adam if task.adam else torch.optim.SGD)(params.values(), lr=task.rate)
    x, y = torch.from_numpy(task.x), torch.from_numpy(task.y.astype(np.int64))

    def loss(params, x, y):
        return torch.nn.functional.cross_entropy(functional_call(base, params, (x,)), y)

    @torch.compile
    def gradients(params, places):
        return vmap(grad(loss))(params, x[places], y[places])

    def run():
        for _ in range(epochs):
            order = torch.argsort(torch.rand(members, len(x)), dim=1)
            for start in range(0, len(x) - task.batch_size + 1, task.batch_size):
                found = gradients(params, order[:, start : start + task.batch_size])
                for name, p in params.items():
                    p.grad = found[name]
                optimizer.step()

    return run


def speeds(runs: dict[str, tuple[Callable, int]], turns: int) -> dict[str, list[float]]:
    """Updates per second of each `name: (run, updates)`, in alternating runs."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for run, _ in runs.values():
        run()
    for _ in range(turns):
        for name, (run, updates) in runs.items():
            start = time.perf_counter()
            run()
            found[name].append(updates / (time.perf_counter() - start))
    return found


def relative(found: list[float], alone: list[float]) -> str:
    """The median of paired ratios, with the lowest and the highest."""
    ratios = [a / b for a, b in zip(found, alone, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def updates_of(task: Task, members: int, epochs: int) -> int:
    """The number of updates of a run."""
    return members * epochs * -(-len(task.x) // task.batch_size)


def table_of_layouts(task: Task, members: tuple[int, ...], updates: int) -> list[str]:
    """Speed by the number of members and of those that are trained at once."""
    ways = [*AT_ONCE, None]
    titles = [str(way) if way else "all (`jax.vmap`)" for way in ways]
    lines = [f"| members | {' | '.join(titles)} |", "|---" * (len(ways) + 1) + "|"]
    alone = with_fcfunc(task, 1, None, epochs_for(task, 1, updates))
    for count in members:
        epochs = epochs_for(task, count, updates)
        runs = {"alone": (alone, updates_of(task, 1, epochs_for(task, 1, updates)))}
        for way in ways:
            if way is None or way <= count:
                runs[str(way)] = with_fcfunc(task, count, way, epochs), updates_of(task, count, epochs)
        found = speeds(runs, 5 if count < 512 else 3)
        cells = [relative(found[str(way)], found["alone"]) if str(way) in found else "" for way in ways]
        lines.append(f"| {count} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


def table_of_peers(title: str, members: tuple[int, ...], updates: int) -> list[str]:
    """Updates per second of fcfunc with some members at once, on one device and on one per core, and of PyTorch."""
    make, at_once = TASKS[title]
    task = make()
    lines = [
        f"| members | one after the other | `members_at_once={at_once}` | the same, a device per core | PyTorch |",
        "|---" * 5 + "|",
    ]
    for count in members:
        epochs = epochs_for(task, count, updates)
        alone = epochs_for(task, 1, updates)
        runs = {"alone": (with_fcfunc(task, 1, None, alone), updates_of(task, 1, alone))}
        runs["population"] = with_fcfunc(task, count, at_once, epochs), updates_of(task, count, epochs)
        if count in PYTORCH_MEMBERS:
            slow = max(1, epochs // 8)
            runs["torch"] = with_torch(task, count, slow), updates_of(task, count, slow)
        found = {name: f"{statistics.median(s):,.0f}" for name, s in speeds(runs, 3).items()}
        found["devices"] = f"{on_devices(title, count, epochs):,.0f}" if count % (os.cpu_count() or 1) == 0 else ""
        cells = [found.get(name, "") for name in ("alone", "population", "devices", "torch")]
        lines.append(f"| {count} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


def on_devices(title: str, members: int, epochs: int) -> float:
    """Updates per second in a process that has one CPU device per core."""
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={os.cpu_count()}"}
    command = [sys.executable, "-m", "benchmarks.populations", "--sharded", json.dumps([title, members, epochs])]
    folder = Path(__file__).parents[1]
    answer = subprocess.run(command, check=True, capture_output=True, text=True, env=env, cwd=folder)
    return float(answer.stdout)


def sharded(title: str, members: int, epochs: int) -> float:
    """Updates per second of a population whose members are sharded over all devices."""
    make, at_once = TASKS[title]
    task, mesh = make(), jax.make_mesh((jax.device_count(),), ("members",))
    options = {"epochs": epochs, "batch_size": task.batch_size}
    fit = train.make_fit(classifier_loss, task.optimizer, **options, members_at_once=at_once)
    states = jax.device_put(states_of(task, members), jax.NamedSharding(mesh, jax.P("members")))
    data = jax.device_put((task.x, task.y), jax.NamedSharding(mesh, jax.P()))
    run = jax.jit(lambda states, data: fit(states, data)[0])
    runs = {"": (lambda: jax.block_until_ready(run(states, data)), updates_of(task, members, epochs))}
    return statistics.median(speeds(runs, 3)[""])


NOTES = """
## Reading the tables

- A small network leaves most of a step's time to the calls of its kernels. Members that are trained together share
  these calls, up to the number at which their parameters, optimizer states and activations leave the core's cache.
  `jax.vmap` over the whole population passes that number; `members_at_once` does not, so the speed per network stays
  the same for any population that fits into memory. It was highest with 8 or 16 members at once, depending on the
  machine, for 4-32-32-2 (1,282 parameters), and with 4 for 64-128-10 (9,610 parameters).
- One program runs its loops on one core unless its matmuls are large. With one device per core
  (`XLA_FLAGS=--xla_force_host_platform_device_count=2`) and states that are sharded along the axis of members, every
  core trains its own members.
- PyTorch's column compiles the gradient of all members, with its own optimizer on the stacked parameters, which is the
  fastest of the forms in its documentation.
"""


def main() -> None:
    """Prints the tables; writes the page if nothing was restricted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--members", default=",".join(map(str, MEMBERS)))
    parser.add_argument("--updates", type=int, default=40_000, help="updates per run, about")
    parser.add_argument("--sharded", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.sharded:
        return print(sharded(*json.loads(args.sharded)))
    members = tuple(int(m) for m in args.members.split(","))
    page = INTRODUCTION.format(
        cores=os.cpu_count(), machine=platform.machine(), python=platform.python_version(), versions=versions()
    )
    for title, (make, _) in TASKS.items():
        table = "\n".join(table_of_layouts(make(), members, args.updates))
        peers = "\n".join(table_of_peers(title, members, args.updates))
        page += f"\n## {title}\n\nSpeed by the number of members that are trained at once:\n\n{table}\n"
        page += f"\nUpdates per second, of all members together:\n\n{peers}\n"
    if members == MEMBERS:
        PAGE.write_text(page + NOTES)


if __name__ == "__main__":
    main()
