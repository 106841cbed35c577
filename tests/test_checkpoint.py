"""A saved state is restored bit for bit, on any number of devices, or an error says why not."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import fcfunc
from fcfunc import checkpoint, sharding, train
from fcfunc.checkpoint import _manifest
from tests.rules import slow

OPTIMIZER = optax.adam(1e-3)


def make_state(dims=(16, 64, 8), optimizer=OPTIMIZER, mesh=None, mode="fsdp", dtype=jnp.float32):
    params = fcfunc.mlp(dims).init(jax.random.key(0), param_dtype=dtype)
    if mesh is not None:
        params = sharding.shard(params, sharding.param_specs(params, mesh, mode), mesh)
    return train.init_state(params, optimizer, jax.random.key(1))


def moved(state, step):
    """Another state of the same run, with every number changed, at a different step."""
    change = lambda a: a if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a + jnp.ones((), a.dtype)
    return jax.tree.map(change, state)._replace(step=state.step + step)


def bits(state):
    data = lambda a: jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a
    return [np.asarray(data(leaf)).tobytes() for leaf in jax.tree.leaves(state)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_state_comes_back_to_the_bit_with_its_configuration(tmp_path, dtype):
    state = moved(make_state(dtype=dtype), 7)
    config = {"dims": [16, 64, 8], "norm": None, "rate": 0.1, "residual": False, "name": "é"}
    assert checkpoint.save(tmp_path, state, config=config) == tmp_path / "7"
    back = checkpoint.restore(tmp_path, make_state(dtype=dtype))
    assert bits(back.state) == bits(state)
    assert back.config == config
    assert (back.step, back.devices) == (7, 1)
    chex.assert_trees_all_equal_dtypes(back.state.params, state.params)
    assert jax.tree.structure(back.state) == jax.tree.structure(state)


@pytest.mark.parametrize("kind", [AxisType.Explicit, slow(AxisType.Auto)])
def test_a_state_of_one_mesh_is_restored_onto_another_and_onto_one_device(tmp_path, kind):
    eight = sharding.make_mesh(model=2, axis_type=kind)
    four = sharding.make_mesh(data=4, devices=jax.devices()[:4], axis_type=kind)
    state = moved(make_state(mesh=eight, mode="fsdp+tensor"), 3)
    checkpoint.save(tmp_path, state)
    for like in (make_state(mesh=four), make_state(), make_state(mesh=eight, mode="tensor")):
        back = checkpoint.restore(tmp_path, like)
        assert bits(back.state) == bits(state)
        assert back.devices == 8
        same = jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), back.state, like)
        assert jax.tree.all(same)


def test_the_last_and_the_best_are_kept(tmp_path):
    start = make_state()
    for step, score in enumerate([0.1, 0.9, 0.2, 0.3, 0.4], start=1):
        checkpoint.save(tmp_path, moved(start, step), keep=2, score=score)
    assert checkpoint.steps(tmp_path) == [2, 4, 5]
    assert checkpoint.restore(tmp_path, start, step=2).step == 2


def test_what_is_not_the_same_run_is_an_error_that_names_the_array(tmp_path):
    checkpoint.save(tmp_path, moved(make_state(), 1))
    with pytest.raises(
        ValueError, match=r"1: params\[0\]\['b'\] is float32 \[64\], but this run expects float32 \[32\]"
    ):
        checkpoint.restore(tmp_path, make_state(dims=(16, 32, 8)))
    with pytest.raises(ValueError, match=r"different network or optimizer: the checkpoint has opt_state"):
        checkpoint.restore(tmp_path, make_state(optimizer=optax.sgd(0.1)))
    with pytest.raises(ValueError, match=r"float32 .*, but this run expects bfloat16"):
        checkpoint.restore(tmp_path, make_state(dtype=jnp.bfloat16))
    with pytest.raises(FileNotFoundError, match=r"expected checkpoint 5, found 1"):
        checkpoint.restore(tmp_path, make_state(), step=5)
    with pytest.raises(FileNotFoundError, match=r"expected a checkpoint, found none"):
        checkpoint.restore(tmp_path / "nowhere", make_state())
    with pytest.raises(TypeError, match=r"config\['f'\]: expected plain data"):
        checkpoint.save(tmp_path, moved(make_state(), 2), config={"f": print})
    assert checkpoint.steps(tmp_path) == [1]


def test_an_existing_step_is_not_overwritten_by_another_state(tmp_path):
    state = moved(make_state(), 5)
    checkpoint.save(tmp_path, state)
    assert checkpoint.save(tmp_path, state) == tmp_path / "5"
    with pytest.raises(ValueError, match=r"step must be above 5, the last step in .*, got 5; use another folder"):
        checkpoint.save(tmp_path, moved(make_state(dims=(16, 32, 8)), 5))
    with pytest.raises(ValueError, match=r"step must be above 5, .*, got 3"):
        checkpoint.save(tmp_path, moved(make_state(), 3))
    assert bits(checkpoint.restore(tmp_path, make_state()).state) == bits(state)


def test_what_is_not_its_own_is_left_alone(tmp_path):
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "mine.txt").write_text("mine")
    for step in (10, 20, 30, 40):
        checkpoint.save(tmp_path, moved(make_state(), step), keep=2)
    assert (tmp_path / "7" / "mine.txt").read_text() == "mine"
    assert checkpoint.steps(tmp_path) == [30, 40]


def files_of(folder):
    return sorted(f for f in folder.rglob("*") if f.is_file())


def test_a_flipped_bit_is_an_error_that_names_the_file_and_the_checkpoint_before(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, moved(make_state(), step))
    rng, like, files = np.random.default_rng(0), make_state(), files_of(tmp_path / "2")
    for i in range(1000):
        path = files[i % len(files)]
        content = path.read_bytes()
        damaged = bytearray(content)
        damaged[rng.integers(len(content))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=re.escape(f"{path}: damaged; ") + ".*; the previous checkpoint is step=1"):
            checkpoint.restore(tmp_path, like)
        path.write_bytes(content)
    assert bits(checkpoint.restore(tmp_path, like).state) == bits(moved(make_state(), 2))


def test_a_file_that_is_cut_off_or_missing_is_named_and_the_damaged_checkpoint_stays(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, moved(make_state(), step))
    for path in files_of(tmp_path / "2"):
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        with pytest.raises(ValueError, match=re.escape(f"{path}: damaged")):
            checkpoint.restore(tmp_path, make_state())
        path.unlink()
        if path.name == _manifest.MANIFEST:
            assert checkpoint.steps(tmp_path) == [1]
        else:
            with pytest.raises(ValueError, match=re.escape(f"{path}: damaged; the file is missing")):
                checkpoint.restore(tmp_path, make_state())
        path.write_bytes(content)
    assert checkpoint.restore(tmp_path, make_state(), step=1).step == 1
    manifest = tmp_path / "2" / _manifest.MANIFEST
    manifest.write_bytes(manifest.read_bytes() + b" ")
    for step in (3, 4):
        checkpoint.save(tmp_path, moved(make_state(), step), keep=1)
    assert checkpoint.steps(tmp_path) == [2, 4]  # the damaged one is kept for inspection


def test_what_killed_saves_left_is_ignored_and_removed_by_the_next_and_nothing_else(tmp_path):
    checkpoint.save(tmp_path, moved(make_state(), 1))
    for name in (".2.unfinished", ".3.unfinished"):
        shutil.copytree(tmp_path / "1", tmp_path / name)
    (tmp_path / ".3.unfinished" / _manifest.MANIFEST).unlink()
    (tmp_path / "4").mkdir()
    (tmp_path / "2024").mkdir()
    (tmp_path / "2024" / "arrays_of_mine.npz").write_text("precious")
    assert checkpoint.steps(tmp_path) == [1]
    assert checkpoint.restore(tmp_path, make_state()).step == 1
    checkpoint.save(tmp_path, moved(make_state(), 5))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2024", "4", "5"]
    with pytest.raises(OSError, match=r"2024: cannot be written; .*something else with this name exists"):
        checkpoint.save(tmp_path, moved(make_state(), 2024))
    assert (tmp_path / "2024" / "arrays_of_mine.npz").read_text() == "precious"


def test_a_checkpoint_that_cannot_be_removed_is_a_warning_and_the_new_one_is_whole(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, moved(make_state(), 1))
    shutil.move(tmp_path / "1", tmp_path / "elsewhere")
    (tmp_path / "1").symlink_to(tmp_path / "elsewhere")
    checkpoint.save(tmp_path, moved(make_state(), 2), keep=1)
    assert checkpoint.steps(tmp_path) == [1, 2]  # a checkpoint that the user has moved is left alone

    def fails(path, *_, **__):
        raise PermissionError("in use")

    monkeypatch.setattr(shutil, "rmtree", fails)
    (tmp_path / ".9.unfinished").touch()
    for step in (3, 4):
        with pytest.warns(UserWarning, match=r"\.\d\.unfinished cannot be removed \(in use\)"):
            checkpoint.save(tmp_path, moved(make_state(), step), keep=1)
        assert checkpoint.restore(tmp_path, make_state()).step == step


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("files"), "it is not a manifest of format 1"),
        (lambda m: m.pop("config"), "it is not a manifest of format 1"),
        (lambda m: m.update(arrays=[]), "it is not a manifest of format 1"),
        (lambda m: m.update(format=0), "it is not a manifest of format 1"),
        (lambda m: m.update(format=float("nan")), "it is not a manifest of format 1"),
        (lambda m: m.update(score="best"), "it is not a manifest of format 1"),
        (
            lambda m: m["files"].update({"/etc/hostname": {"bytes": 1, "sha256": ""}}),
            "/etc/hostname: damaged; the file",
        ),
        (lambda m: m["files"].update({"../../x": {"bytes": 1, "sha256": ""}}), "x: damaged; the file is missing"),
        (lambda m: m["files"].clear(), "damaged; the file is not part of the checkpoint"),
        (lambda m: m.update(step=7), "is for step 7; the folder was renamed"),
    ],
)
def test_a_manifest_that_somebody_wrote_is_held_against_what_is_there(tmp_path, change, message):
    checkpoint.save(tmp_path, moved(make_state(), 1))
    path = tmp_path / "1" / _manifest.MANIFEST
    manifest = json.loads(path.read_bytes().partition(b"\n")[2])
    change(manifest)
    path.write_bytes(_manifest.encoded(manifest))
    with pytest.raises(ValueError, match=message):
        checkpoint.restore(tmp_path, make_state())


@pytest.mark.parametrize("config", [float("nan"), float("inf"), 10**5000, json.loads("[" * 40 + "]" * 40)], ids=type)
def test_a_config_that_no_reader_could_hold_is_refused(tmp_path, config):
    with pytest.raises(TypeError, match=r"checkpoint.save: config.*: expected plain data"):
        checkpoint.save(tmp_path, moved(make_state(), 1), config={"a": config})
    assert list(tmp_path.iterdir()) == []


def test_empty_arrays_and_numbers_too_large_are_laid_or_refused(tmp_path):
    mesh = sharding.make_mesh()
    empty = jax.device_put(jnp.zeros((0, 8)), jax.NamedSharding(mesh, jax.P(None, "data")))
    state = train.TrainState({"a": empty}, (), jnp.int32(1), jax.random.key(0))
    checkpoint.save(tmp_path, state)
    assert checkpoint.restore(tmp_path, state).state.params["a"].sharding == empty.sharding
    with pytest.raises(TypeError, match=r"params\['a'\] is not an array that JAX can hold"):
        checkpoint.save(tmp_path, state._replace(params={"a": 2**40}, step=jnp.int32(2)))


def test_a_newer_format_is_an_error_that_says_so(tmp_path):
    checkpoint.save(tmp_path, moved(make_state(), 1))
    path = tmp_path / "1" / _manifest.MANIFEST
    manifest = json.loads(path.read_bytes().partition(b"\n")[2]) | {"format": 2}
    path.write_bytes(_manifest.encoded(manifest))
    with pytest.raises(ValueError, match=r"manifest.json: format 2 needs a newer fcfunc; this one reads format 1"):
        checkpoint.restore(tmp_path, make_state())


@pytest.mark.parametrize("how", ["full", "forbidden"])
def test_a_failed_save_is_an_error_that_names_it_and_leaves_the_one_before(tmp_path, how):
    """Runs in a separate process, which can write only small files, or no files in this folder."""
    folder = tmp_path / "run"
    state = moved(make_state(), 1)
    checkpoint.save(folder, state)
    program = """
import os, resource, signal, sys
import jax
jax.config.update("jax_platforms", "cpu")
from fcfunc import checkpoint
from tests.test_checkpoint import bits, make_state, moved
import orbax.checkpoint
how, folder = sys.argv[1:]
state = moved(make_state(), 2)
before = bits(state)
if how == "full":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
else:
    os.seteuid(65534)
try:
    checkpoint.save(folder, state)
except OSError as e:
    assert bits(state) == before
    sys.exit(f"refused: {e}")
"""
    if how == "forbidden":
        if os.geteuid() != 0:
            pytest.skip("only root can become somebody else")
        for path in [tmp_path, *list(tmp_path.parents)[:3]]:
            path.chmod(0o755)
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-c", program, how, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=Path(__file__).parents[1])
    assert result.returncode == 1, result.stderr
    assert f"refused: {folder}/2: cannot be written; it is not a checkpoint (" in result.stderr
    assert checkpoint.steps(folder) == [1]
    assert bits(checkpoint.restore(folder, make_state()).state) == bits(state)
    checkpoint.save(folder, moved(make_state(), 3))
    assert sorted(p.name for p in folder.iterdir()) == ["1", "3"]


def test_leaves_with_names_alike_stay_apart_and_no_number_is_narrowed(tmp_path):
    tree = {
        "a.b": jnp.ones(3),
        "a": {"b": jnp.zeros(3)},
        "none": jnp.zeros((0, 3)),
        "list": [jnp.full((), i) for i in range(12)],
    }
    state = train.TrainState(tree, (), jnp.int32(1), jax.random.key(0))
    checkpoint.save(tmp_path, state)
    assert bits(checkpoint.restore(tmp_path, jax.tree.map(jnp.zeros_like, state)).state) == bits(state)
    shapes = jax.eval_shape(lambda: state)._replace(key=state.key)
    assert bits(checkpoint.restore(tmp_path, shapes).state) == bits(state)
    with pytest.raises(TypeError, match=r"params\['x'\] is int64, which JAX narrows to int32"):
        checkpoint.save(tmp_path, state._replace(params={"x": np.arange(3) + 2**40}, step=jnp.int32(2)))
    with pytest.raises(ValueError, match=r"folder must be on a file system"):
        checkpoint.save("gs://bucket/run", state)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"file: a file is in the way"):
        checkpoint.save(tmp_path / "file", state)
