"""The readers on valid and invalid files, the split, and the standardizer."""

import gzip
import os
import struct
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pandas
import pytest

from fcfunc import data


def idx(array, dtype_code=0x08, magic=b"\0\0"):
    header = magic + bytes([dtype_code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(data.IDX_DTYPES[dtype_code]).tobytes()


@pytest.fixture
def write(tmp_path):
    def write(content, name="file"):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


IMAGES = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


@pytest.mark.parametrize("code", data.IDX_DTYPES)
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_idx_files_of_every_dtype_come_back_gzipped_or_not(code, compress, write):
    got = data.read_idx(write(compress(idx(IMAGES, code))))
    np.testing.assert_array_equal(got, IMAGES)
    assert got.dtype.isnative
    assert got.flags.writeable


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"PK\3\4 not this", "not an IDX file"),
        (idx(IMAGES)[:6], "truncated in the header"),
        (idx(IMAGES)[:-1], r"claims \[2, 3, 4\], 24 bytes, but only 23 follow; it is truncated"),
        (idx(IMAGES) + b"x", "24 bytes, but more follow"),
        (idx(IMAGES, magic=b"\1\0"), "not an IDX file"),
        (b"\0\0\x08\x02" + struct.pack(">II", 2**32 - 1, 2**10), "more than the .* allowed"),
        (gzip.compress(idx(IMAGES))[:-9], "damaged or truncated"),
        (gzip.compress(idx(IMAGES))[:-8] + b"garbage!", "damaged or truncated"),
        (gzip.compress(idx(IMAGES)[:-1]), "it is truncated"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_idx_files_are_refused_with_the_name_of_the_file(content, message, write):
    path = write(content)
    with pytest.raises(ValueError, match=f"{path}.*{message}"):
        data.read_idx(path)


def test_a_gzip_file_that_expands_past_its_header_is_not_unpacked(write):
    path = write(gzip.compress(idx(IMAGES) + bytes(10**8)))
    with pytest.raises(ValueError, match="more follow"):
        data.read_idx(path)


@pytest.mark.parametrize("read", [data.read_idx, data.read_npz, data.read_csv])
def test_missing_files_folders_and_pipes_are_refused(read, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing: no such file"):
        read(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match=f"{path}: not a regular file"):
            read(path)


def test_npz_arrays_come_back(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", x=IMAGES, y=np.array([1.5, 2.5]), flag=np.bool_(True))
    arrays = data.read_npz(tmp_path / "a.npz")
    np.testing.assert_array_equal(arrays["x"], IMAGES)
    np.testing.assert_array_equal(arrays["y"], [1.5, 2.5])
    assert arrays["flag"]


def claim(shape):
    return (
        b"\x93NUMPY\1\0"
        + struct.pack("<H", 118)
        + f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}}}".ljust(117).encode()
        + b"\n"
    )


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (b"not an array", "not an array in NPY format"),
        (claim("(549755813888,)") + bytes(80), "claims .* 4398046511104 bytes, but 80 follow"),
        (claim("(-10, -1)") + bytes(80), "claims"),
        (claim("(10,)") + bytes(79), "80 bytes, but 79 follow"),
        (claim("(1,)").replace(b"<f8", b"|O8") + bytes(8), "expected an array of numbers, got dtype object"),
        (claim("(1,)").replace(b"<f8", b"<U2") + bytes(8), "expected an array of numbers"),
    ],
)
def test_bad_members_of_npz_files_are_refused(member, message, tmp_path):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", member)
    with pytest.raises(ValueError, match=f"{path}, x.npy: .*{message}"):
        data.read_npz(path)


def test_npz_files_that_are_none_or_cut_off_or_empty_or_too_large_are_refused(tmp_path, write):
    np.savez(tmp_path / "a.npz", x=np.zeros(1000))
    whole = (tmp_path / "a.npz").read_bytes()
    for content in (b"", b"x" * 100, whole[:-30], whole[: len(whole) // 2]):
        with pytest.raises(ValueError, match="not a complete NPZ file"):
            data.read_npz(write(content))
    flipped = bytearray(whole)
    flipped[500] ^= 1
    with pytest.raises(ValueError, match="CRC"):
        data.read_npz(write(bytes(flipped)))
    with pytest.raises(ValueError, match="8128 bytes decompressed, more than the 8000 bytes"):
        data.read_npz(tmp_path / "a.npz", max_bytes=8000)
    np.savez(tmp_path / "none.npz")
    with pytest.raises(ValueError, match="contains no array"):
        data.read_npz(tmp_path / "none.npz")


@pytest.mark.parametrize(
    ("text", "target", "x", "y", "classes"),
    [
        ("a,b,c\n1,2,0\n3,4,1\n", None, [[1, 2], [3, 4]], [0, 1], None),
        ("1,2,0.5\r\n3,4,1.5\r\n", None, [[1, 2], [3, 4]], [0.5, 1.5], None),
        ("\ufeffkind,a\ncat,1\nant,2\n", "kind", [[1], [2]], [1, 0], ["ant", "cat"]),
        ("1,red\n2,blue\n", None, [[1], [2]], [1, 0], ["blue", "red"]),
        ('"a, b",y\n"1", 2\n', None, [[1]], [2], None),
    ],
)
def test_csv_files_come_back(text, target, x, y, classes, write):
    table = data.read_csv(write(text), target=target)
    np.testing.assert_array_equal(table.x, np.array(x, np.float32))
    np.testing.assert_array_equal(table.y, y)
    assert table.classes == classes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty"),
        ("a,b\n", "a header without rows"),
        ("1\n2\n", "expected at least two columns"),
        ("a,b\n1,2\n3\n", "line 3: expected 2 cells, got 1"),
        ("a,b\nx,2\n", "line 2, a: expected a finite number, got 'x'"),
        ("a,b\nnan,2\n", "line 2, a: expected a finite number, got 'nan'"),
        ("a,b\n1,inf\n", "line 2: expected a finite number as the target, got 'inf'"),
        ("a,b\n1e300,2\n", "expected a finite number, got '1e300'"),
        ("a,b\n1_000,2\n", "expected a finite number, got '1_000'"),
        ("a,b\n,2\n", "expected a finite number, got ''"),
        ("a,b\n1,2\n1,x\n", "line 3: expected a finite number as the target, got 'x'"),
        ("a,b\n1,2\n".encode("utf-16"), "not a CSV file in UTF-8"),
        ('a,b\n"1,2\n', "not a CSV file"),
    ],
)
def test_bad_csv_files_are_refused_with_the_line(content, message, write):
    path = write(content)
    with pytest.raises(ValueError, match=f"{path}.*{message}"):
        data.read_csv(path)


def test_a_target_that_is_not_in_the_header_is_named(write):
    with pytest.raises(ValueError, match="no column 'c'; the header has a, b"):
        data.read_csv(write("a,b\n1,2\n"), target="c")


def test_digits_and_fashion_mnist_are_what_they_say():
    digits = data.digits()
    assert digits.x.shape == (1797, 64)
    assert (digits.x.min(), digits.x.max(), sorted(set(digits.y.tolist()))) == (0, 1, list(range(10)))
    if not os.path.isdir(data.FASHION_MNIST_FOLDER):
        pytest.skip("the Debian package dataset-fashion-mnist is not installed")
    training, test = data.fashion_mnist()
    assert (training.x.shape, test.x.shape, training.x.dtype) == ((60000, 28, 28), (10000, 28, 28), np.uint8)
    np.testing.assert_array_equal(np.bincount(training.y), 6000)


def test_fashion_mnist_reads_a_folder_of_the_users_and_names_what_is_missing(tmp_path):
    for part, n in (("train", 6), ("t10k", 3)):
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(np.zeros((n, 2, 2))))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.arange(n))))
    training, test = data.fashion_mnist(tmp_path)
    assert (training.x.shape, test.y.tolist()) == ((6, 2, 2), [0, 1, 2])
    (tmp_path / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="t10k-images-idx3-ubyte.gz: no such file"):
        data.fashion_mnist(tmp_path)


def test_split_gives_every_example_to_one_part():
    parts = data.split(data.Dataset(np.arange(101), np.arange(101) * 2), (0.7, 0.2, 0.1), seed=3)
    assert [len(part.x) for part in parts] == [71, 20, 10]
    assert sorted(np.concatenate([part.x for part in parts])) == list(range(101))
    assert all(np.array_equal(part.x * 2, part.y) for part in parts)


@pytest.mark.parametrize("seed", range(20))
def test_a_stratified_split_gives_each_part_its_share_of_every_class(seed):
    rng = np.random.default_rng(seed)
    y = rng.choice(np.array(["a", "b", "c", "d"]), rng.integers(20, 200), p=[0.5, 0.3, 0.15, 0.05])
    examples = data.Dataset(np.arange(len(y)), y)
    parts = data.split(examples, (0.7, 0.2, 0.1), seed=seed, stratify=y)
    assert sorted(np.concatenate([part.x for part in parts])) == list(range(len(y)))
    for part, fraction in zip(parts, (0.7, 0.2, 0.1), strict=True):
        np.testing.assert_array_equal(part.y, y[part.x])
        for name in "abcd":
            assert abs(np.sum(part.y == name) - fraction * np.sum(y == name)) < 2
        if len(part.y) > 10 and seed == 0:
            assert not np.array_equal(part.x, np.sort(part.x))


def test_split_takes_the_rows_of_a_data_frame_in_any_order_of_its_index():
    frame = pandas.DataFrame({"a": np.arange(10.0), "y": np.arange(10)}).sample(frac=1, random_state=0)
    for part in data.split({"x": frame[["a"]].to_numpy(), "frame": frame, "y": frame["y"]}, [0.8, 0.2], seed=0):
        np.testing.assert_array_equal(part["x"][:, 0], part["y"])
        np.testing.assert_array_equal(part["frame"]["y"], part["y"])


def test_rare_classes_go_to_different_parts():
    y = np.arange(100)  # one example per class
    parts = data.split(y, (0.5, 0.5), seed=0, stratify=y)
    assert [len(part) for part in parts] == [50, 50]


def test_split_refuses_labels_of_other_examples():
    with pytest.raises(ValueError, match=r"split: stratify must be \[10\], one label for each example, got \[9\]"):
        data.split(np.zeros(10), (0.5, 0.5), seed=0, stratify=np.zeros(9))


def test_split_refuses_arrays_that_disagree_about_the_number_of_examples():
    with pytest.raises(ValueError, match="same leading axis"):
        data.split(data.Dataset(np.zeros(10), np.zeros(12)), (0.5, 0.5), seed=0)


@pytest.mark.parametrize("fractions", [(), (0.5, 0.4), (1.2, -0.2), (0.99, 0.01)])
def test_split_refuses_impossible_fractions(fractions):
    with pytest.raises(ValueError, match="split"):
        data.split(np.arange(5), fractions, seed=0)


def test_the_standardizer_uses_the_statistics_it_was_made_with():
    rng = np.random.default_rng(0)
    training, test = rng.normal(5, 3, (100, 2)), rng.normal(-5, 1, (10, 2))
    training[:, 1] = test[:, 1] = 7
    scaled = data.standardizer(training)
    np.testing.assert_allclose(scaled(training)[:, 0].std(), 1, rtol=1e-5)
    np.testing.assert_allclose(scaled(training).mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(
        scaled(test)[:, 0], (test[:, 0] - training[:, 0].mean()) / training[:, 0].std(), rtol=1e-5
    )
    np.testing.assert_array_equal(scaled(test)[:, 1], 0)


def test_the_inverse_of_the_standardizer_undoes_it_in_the_unit_of_the_data():
    x = np.random.default_rng(0).normal(1000, [1, 50, 0], (20, 3))
    scaler = data.standardizer(x)
    np.testing.assert_allclose(scaler.inverse(scaler(x)), x, rtol=1e-6)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        np.testing.assert_allclose(scaler.inverse(jnp.asarray(scaler(x))), x, rtol=1e-6)


def test_an_npz_file_whose_directory_lost_an_array_is_refused(tmp_path):
    """zipfile reads as much of the directory as its size field says, and does not compare the number of entries."""
    path = tmp_path / "two.npz"
    np.savez(path, x=np.zeros(3), y=np.ones(2))
    content = bytearray(path.read_bytes())
    end, second = content.rfind(b"PK\5\6"), content.rfind(b"PK\1\2")
    size = int.from_bytes(content[end + 12 : end + 16], "little")
    content[end + 12 : end + 16] = (size - (end - second)).to_bytes(4, "little")
    del content[second:end]
    path.write_bytes(content)
    with pytest.raises(ValueError, match="expected 2 arrays, found 1"):
        data.read_npz(path)
