"""Strict settings for every test: eight virtual devices, no implicit promotion of dtypes or ranks.

Warnings are errors by `filterwarnings` in pyproject.toml. `make test` skips the tests marked slow, which
`make test-all` runs, and ends with a line that says so.
"""

import os
import time
from collections import Counter

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


# The suite spends most of its time compiling. XLA aborts the process on a flag that it does not know.
QUICK_FLAGS = {
    (0, 11): "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
    (0, 13): "--xla_backend_optimization_level=0",
}
"""The flags that `make test` compiles with, for JAX before each version; `make test-all` compiles as users do."""


def compile_quickly():
    """Sets the flags. Call it before anything is compiled."""
    flags = next((flags for before, flags in QUICK_FLAGS.items() if jax.__version_info__ < before), "")
    os.environ["XLA_FLAGS"] = f"{os.environ['XLA_FLAGS']} {flags}".strip()


def pytest_addoption(parser):
    parser.addoption("--minutes", type=float, help="skip the tests that would start later than this")


STARTED = time.monotonic()


def pytest_runtest_setup(item):
    minutes = item.config.option.minutes
    if minutes is not None and time.monotonic() - STARTED > 60 * minutes:
        pytest.skip(f"the {minutes:g} minutes of --minutes were over")


def pytest_configure(config):
    if quick(config) and not hasattr(config, "workerinput"):  # the workers inherit it
        compile_quickly()


def group(item):
    """The tests that run in one process."""
    return item.get_closest_marker("xdist_group").args[0]


def quick(config):
    """Whether this is `make test`, which skips slow tests."""
    return config.option.markexpr == "not slow"


@pytest.fixture
def x64():
    """Enables float64 for one test."""
    with jax.enable_x64(True):
        yield


LONG = ("sharding", "distributed", "fuzz", "convert", "precision", "export", "examples", "docs", "package", "soak")
"""The files that take longest for their number of tests."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:  # one process per file or rule, so that each program is compiled once
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.path.name))
    # Long groups first, so that no process waits for the other at the end.
    size = Counter(map(group, items))
    long = [f"test_{name}.py" for name in LONG]
    items.sort(key=lambda item: long.index(group(item)) if group(item) in long else len(long) + 1 / size[group(item)])
    if jax.default_backend() != "gpu":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def pytest_runtest_teardown(item, nextitem):
    """Frees the compiled programs of a group after its last test; thousands of programs take gigabytes."""
    if nextitem is None or group(item) != group(nextitem):
        jax.clear_caches()


LEFT_OUT = pytest.StashKey[int]()


def pytest_deselected(items):
    if items:
        stash = items[0].config.stash
        stash[LEFT_OUT] = stash.get(LEFT_OUT, 0) + len(items)


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    left_out = getattr(node, "workeroutput", {}).get("left_out", 0)
    node.config.stash[LEFT_OUT] = max(left_out, node.config.stash.get(LEFT_OUT, 0))


def pytest_unconfigure(config):
    left_out = config.stash.get(LEFT_OUT, 0)
    if left_out and quick(config) and not hasattr(config, "workerinput"):
        print(
            f"{left_out} slow tests were left to `make test-all`: every option and size of each rule, the full mode of "
            "check_vjp, every sharding mode, several processes, and runs that are killed."
        )
