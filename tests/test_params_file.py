"""Parameter files: parameters and config load bit for bit, or an error says why they do not."""

import json
import os
import struct
import tempfile

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import fcfunc
from fcfunc import data, params_file, sharding

NET = fcfunc.mlp([4, 8, 8, 3], activation="tanh", norm="layer_norm")
PARAMS = NET.init(jax.random.key(0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_params_come_back_to_the_bit_with_their_configuration(tmp_path, dtype):
    params = jax.tree.map(lambda a: a.astype(dtype), PARAMS)
    params_file.save(tmp_path / "p.safetensors", params, config=NET.to_dict())
    got, config = params_file.load(tmp_path / "p.safetensors")
    chex.assert_trees_all_equal(got, params)
    chex.assert_trees_all_equal_dtypes(got, params)
    assert fcfunc.mlp(**config) == NET
    assert os.listdir(tmp_path) == ["p.safetensors"]


def test_params_on_a_mesh_are_gathered_and_other_trees_keep_their_shape(tmp_path):
    mesh = sharding.make_mesh(data=4, model=2)
    params = [{"w": jnp.ones((8, 8)), "b": jnp.arange(8.0)}]
    laid = sharding.shard(params, sharding.param_specs(params, mesh, "fsdp+tensor"), mesh)
    tree = {"layers": laid, "input": {"mean": np.zeros(3, np.float32)}, "twelve": [jnp.full((), i) for i in range(12)]}
    params_file.save(tmp_path / "p", tree)
    got, config = params_file.load(tmp_path / "p")
    assert config is None
    chex.assert_trees_all_equal(got, jax.tree.map(np.asarray, tree))


def test_one_bit_turned_over_is_an_error_or_changes_nothing_that_is_read(tmp_path):
    path = tmp_path / "p"
    params_file.save(path, PARAMS, config={"activation": "relu"})
    content, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(500):
        damaged = bytearray(content)
        damaged[rng.integers(len(content))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            params, config = params_file.load(path)
        except ValueError as e:
            refused += str(path) in str(e)
        else:
            chex.assert_trees_all_equal(params, PARAMS)
            assert config == {"activation": "relu"}
    assert refused > 490  # the other flips hit the padding of the header


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"activation": "os.system"}, ValueError, "unknown activation 'os.system'"),
        ({"ops": "os"}, ValueError, "ops must be fcfunc.ops or fcfunc.reference, got 'os'"),
        ({"residual": 1}, TypeError, "residual must be True or False, got 1"),
        ({"dims": [4, 2.5]}, TypeError, "dims must be a sequence of integers"),
        ({"w_init": "eval"}, TypeError, "unexpected keyword argument 'w_init'"),
    ],
)
def test_a_network_is_not_made_from_a_configuration_that_it_does_not_allow(tmp_path, change, error, message):
    params_file.save(tmp_path / "p", PARAMS, config=NET.to_dict() | change)
    _, config = params_file.load(tmp_path / "p")
    with pytest.raises(error, match=message):
        fcfunc.mlp(**config)


def test_what_cannot_be_saved_as_it_is_is_refused_and_leaves_the_file_of_before(tmp_path):
    params_file.save(tmp_path / "p", PARAMS)
    for wrong, message in (
        ([{"a.b": jnp.ones(1)}], "names must be printable, without dots"),
        ([{"3": jnp.ones(1)}], "names must be printable, without dots"),
        ([], "the empty list at the top"),
        ([{"w": 1.0}], "got float at '0.w'"),
        (({"w": jnp.ones(1)},), "got tuple at the top"),
        (jnp.ones(1), "must be a list, dict or named tuple of arrays, got an array"),
        ([{"__metadata__": jnp.ones(1)}], "names must be printable, without dots"),
        ([{"\udc80": jnp.ones(1)}], "names must be printable, without dots"),
        ([{"w": jnp.ones(1, "float8_e4m3fn")}], r"dtype of 0\.w must be one of bool, .* got float8_e4m3fn"),
        ([{"w": jax.random.key(0)}], "params must be lists, dicts and arrays"),
    ):
        with pytest.raises(TypeError, match=message):
            params_file.save(tmp_path / "p", wrong)
    with pytest.raises(TypeError, match=r"config\['f'\]: expected plain data"):
        params_file.save(tmp_path / "p", PARAMS, config={"f": print})
    with pytest.raises(OSError, match="nowhere"):
        params_file.save(tmp_path / "nowhere" / "p", PARAMS)
    chex.assert_trees_all_equal(params_file.load(tmp_path / "p")[0], PARAMS)
    assert os.listdir(tmp_path) == ["p"]


def test_a_link_stays_one_and_numbers_of_the_other_byte_order_come_back(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "p")
    params_file.save(tmp_path / "link", [{"w": np.arange(3, dtype=">f4")}])
    assert (tmp_path / "link").is_symlink()
    np.testing.assert_array_equal(params_file.load(tmp_path / "p")[0][0]["w"], np.arange(3))
    (tmp_path / "plain").touch()
    assert (tmp_path / "p").stat().st_mode == (tmp_path / "plain").stat().st_mode


def header(entries, body=b""):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 7,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**42),
        header({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        header({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, bytes(4)),
        header({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(4)),
        header({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(5)),
        header({"w": {"dtype": "PICKLE", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        header(
            {"__metadata__": {"config": "{"}, "w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)
        ),
        header({"." * 5000: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}),
        header({"a." * 3000 + "b": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}),
        header({f"{a}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for a in ("0", "0.w")}),
    ],
)
def test_malformed_files_are_refused_with_the_name_of_the_file(tmp_path, content):
    (tmp_path / "p").write_bytes(content)
    with pytest.raises(ValueError, match=str(tmp_path / "p")):
        params_file.load(tmp_path / "p")


def test_files_that_are_none_or_too_large_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        params_file.load(tmp_path / "p")
    with pytest.raises(ValueError, match="not a regular file"):
        params_file.load(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ValueError, match="not a regular file"):
        params_file.load(tmp_path / "fifo")
    save_file({"w": np.ones(100)}, tmp_path / "wide")
    with pytest.raises(ValueError, match=r"\d+ bytes, more than the 100 allowed"):
        params_file.load(tmp_path / "wide", max_bytes=100)


def test_numbers_of_64_bits_stay_as_they_are():
    """Every PyTorch model with batch norm has an int64 counter."""
    counter, mean = np.array([2**40 + 1]), np.array([1 / 3])
    with tempfile.TemporaryDirectory() as folder:
        save_file({"norm.tracked": counter, "layer.weight": np.ones(2, np.float32), "mean": mean}, f"{folder}/p")
        loaded, _ = params_file.load(f"{folder}/p")
        params_file.save(f"{folder}/q", {"x": loaded})
        again, _ = params_file.load(f"{folder}/q")
    for params in (loaded, again["x"]):
        assert isinstance(params["layer"]["weight"], jax.Array)
        for a, expected in ((params["norm"]["tracked"], counter), (params["mean"], mean)):
            assert isinstance(a, np.ndarray)
            assert a.dtype == expected.dtype
            np.testing.assert_array_equal(a, expected)


def test_a_torch_model_with_batch_norm_is_loaded():
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    model(torch.randn(5, 4))
    with tempfile.TemporaryDirectory() as folder:
        save_torch(model.state_dict(), f"{folder}/p")
        params, _ = params_file.load(f"{folder}/p")
    assert int(params[1]["num_batches_tracked"]) == 1
    np.testing.assert_array_equal(params[0]["weight"], model[0].weight.detach().numpy())


def test_a_standardizer_is_saved_beside_the_parameters_and_made_again(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.normal(1e6, 3, (50, 2)), rng.normal(-4, 2, 50)
    inputs, targets = data.standardizer(x), data.standardizer(y)
    params_file.save(tmp_path / "p", {"layers": PARAMS, "input": inputs, "target": targets})
    saved, _ = params_file.load(tmp_path / "p")
    np.testing.assert_array_equal(data.Standardizer(**saved["input"])(x), inputs(x))
    np.testing.assert_allclose(data.Standardizer(**saved["target"]).inverse(targets(y)), y, rtol=1e-6)
