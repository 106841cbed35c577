"""Importing the package, missing extras, and the contents of a release."""

import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

from fcfunc import checkpoint, data, params_file, privacy, train
from fcfunc.train._progress import ProgressBar

STATE = train.init_state({"w": jnp.ones(1)}, optax.sgd(0.1), jax.random.key(0))
ROOT = Path(__file__).parents[1]

IMPORTS = """
import sys
import jax, optax, jax.experimental.multihost_utils
seen = []
sys.addaudithook(lambda event, args: seen.append((event, args)) if WATCHED(event, args) else None)
import fcfunc
assert not seen, seen
extras = {"matplotlib", "orbax", "safetensors", "sklearn", "torch", "tqdm", "pytest"}
assert not extras & sys.modules.keys(), extras & sys.modules.keys()
from jax._src import xla_bridge
assert not xla_bridge._backends, "a device was started"
"""

WATCHED = """
import os
def WATCHED(event, args):
    if event == "open":
        written = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        return bool(written) and "__pycache__" not in str(args[0])
    return event.startswith(("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.remove", "urllib."))
"""


def test_importing_the_package_imports_no_extra_starts_no_device_and_touches_nothing():
    result = subprocess.run([sys.executable, "-c", WATCHED + IMPORTS], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_the_watch_over_the_import_sees_a_file_that_is_written(tmp_path):
    program = WATCHED + IMPORTS.replace("import fcfunc\n", f"import fcfunc\nopen({str(tmp_path / 'f')!r}, 'w')\n")
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 1
    assert "AssertionError" in result.stderr


def test_the_oldest_releases_are_those_of_pyproject():
    result = subprocess.run([sys.executable, "-m", "tests.lowest"], capture_output=True, text=True, cwd=ROOT)
    lines = result.stdout.split()
    assert {"jax==0.10", "jaxlib==0.10", "optax==0.2.8", "chex==0.1.92"} <= set(lines)
    assert all("==" in line for line in lines)


@pytest.mark.parametrize(
    ("module", "package", "call"),
    [
        ("tqdm", "tqdm", lambda path: ProgressBar(epochs=1, steps=1, first_step=0)),
        ("sklearn.datasets", "scikit-learn", lambda path: data.digits()),
        ("safetensors.numpy", "safetensors", lambda path: params_file.save(path, [{"w": jnp.ones(1)}])),
        (
            "dp_accounting",
            "dp-accounting",
            lambda path: privacy.epsilon(rate=0.1, noise_multiplier=1.0, steps=1, delta=0.1),
        ),
        ("orbax.checkpoint", "orbax-checkpoint", lambda path: checkpoint.save(path, STATE)),
    ],
)
def test_the_error_of_a_missing_package_names_it(module, package, call, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{package}.* is not installed; pip install {package}$"):
        call(tmp_path)


def test_tests_and_benchmarks_do_not_import_each_other():
    for folder, other in (("tests", "benchmarks"), ("benchmarks", "tests")):
        for path in (ROOT / folder).glob("*.py"):
            imports = [line for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]
            assert not [line for line in imports if line.split()[1].split(".")[0] == other], path


@pytest.mark.slow
@pytest.mark.parametrize("table", ["networks", "loops", "output_layers", "populations"])
def test_the_benchmark_for_gpus_measures_without_one(table):
    code = f"from benchmarks import accelerator; print(*accelerator.table_of_{table}(1024), sep='\\n')"
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith("| ")


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    tracked = subprocess.run(["git", "ls-files", "fcfunc"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git repository")
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == set(tracked.stdout.split())
