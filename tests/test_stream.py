"""Data that is read in chunks while training runs."""

import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fcfunc import stream, train
from tests.helpers import loss_fn, make_data, make_state

N = 103


def count_loss(params, batch, key):
    """With SGD at rate 1, `params[i]` counts how often example i was used."""
    return -jnp.sum(params[batch])


def count_state():
    return train.init_state(jnp.zeros(N), optax.sgd(1.0), jax.random.key(0))


def numbers(chunk_size):
    return stream.Stream(N, chunk_size, lambda start, stop: np.arange(start, stop))


def in_chunks(data, chunk_size=24):
    return stream.from_arrays(data, chunk_size=chunk_size)


@pytest.mark.parametrize("chunk_size", [1, 8, 30, 32, N, 1000])
def test_every_epoch_visits_each_example_once(chunk_size):
    state, _ = train.fit(count_loss, optax.sgd(1.0), count_state(), numbers(chunk_size), epochs=2, batch_size=8)
    np.testing.assert_array_equal(state.params, np.full(N, 2))


def visited(state, epochs):
    """The examples in the order of their use, from the metrics of batches of one."""
    loss = lambda params, batch, key: (jnp.sum(params) * 0.0, {"example": batch[0].astype(jnp.float32)})
    epoch = train.make_train_epoch(loss, optax.sgd(1.0), 1)
    orders = []
    for _ in range(epochs):
        state, metrics = epoch(state, numbers(20))
        orders.append(metrics["example"].astype(int))
    return np.array(orders)


def test_chunks_and_their_examples_come_in_another_order_in_each_epoch():
    orders = visited(count_state(), 40)
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.broadcast_to(np.arange(N), orders.shape))
    chunks = orders[:, ::20] // 20
    assert len({tuple(c) for c in chunks.tolist()}) > 30
    inside = np.stack([order[order // 20 == 1] for order in orders]) - 20
    assert abs(inside.mean(axis=0) - 9.5).max() < 4.5 * np.sqrt(20**2 / 12 / 40)
    assert len({tuple(order) for order in inside.tolist()}) == 40
    assert not np.array_equal(orders[0][orders[0] // 20 == 1] - 20, orders[0][orders[0] // 20 == 2] - 40)


def test_without_a_shuffle_a_stream_trains_as_its_arrays_do():
    data, optimizer = make_data(90), optax.adam(1e-2)
    options = {"epochs": 2, "batch_size": 8, "shuffle": False}
    expected, by_arrays = train.fit(loss_fn, optimizer, make_state(optimizer), data, **options)
    found, by_stream = train.fit(loss_fn, optimizer, make_state(optimizer), in_chunks(data), **options)
    chex.assert_trees_all_close(found.params, expected.params, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(by_stream["loss"], by_arrays["loss"], rtol=1e-6)


def test_an_epoch_program_takes_the_steps_of_fit():
    data, optimizer = in_chunks(make_data(90)), optax.adam(1e-2)
    expected, history = train.fit(loss_fn, optimizer, make_state(optimizer), data, epochs=2, batch_size=8)
    epoch, state = train.make_train_epoch(loss_fn, optimizer, 8), make_state(optimizer)
    state, _ = epoch(state, data)
    state, metrics = epoch(state, data)
    chex.assert_trees_all_equal(state.params, expected.params)
    assert metrics["loss"].shape == (3 * 3 + 3,)
    assert history["step"].tolist() == [12, 24]


@pytest.mark.parametrize("every", [2, 5])
def test_a_run_that_was_interrupted_within_a_chunk_continues_bit_for_bit(every):
    data, optimizer, saved = in_chunks(make_data(90)), optax.adam(1e-2), []
    options = {"batch_size": 8, "every": every}
    keep = lambda state: saved.append(jax.tree.map(jnp.copy, state))
    expected, _ = train.fit(loss_fn, optimizer, make_state(optimizer), data, epochs=2, on_steps=keep, **options)
    for state in saved[:-1]:
        epochs = 2 - int(state.step) // 12
        found, _ = train.fit(loss_fn, optimizer, state, data, epochs=epochs, on_steps=lambda state: None, **options)
        chex.assert_trees_all_equal(found.params, expected.params)


def test_the_next_chunk_is_read_in_a_thread_and_no_more_than_one_ahead():
    reads, trained = [], []

    def read(start, stop):
        reads.append((start, threading.current_thread() is threading.main_thread(), len(trained)))
        return np.arange(start, stop)

    rows = stream.Stream(N, 16, read)
    train.fit(
        count_loss, optax.sgd(1.0), count_state(), rows, epochs=1, batch_size=16, every=1, on_steps=trained.append
    )
    chunks = reads[1:]  # the first read finds the shapes
    assert not any(main for _, main, _ in chunks)
    assert all(before >= i - 1 for i, (_, _, before) in enumerate(chunks))


def test_a_stream_is_evaluated_as_its_arrays_are():
    data, state = make_data(90), make_state(optax.sgd(0.1))
    expected = train.evaluate(loss_fn, state.params, data, batch_size=16)
    found = train.evaluate(loss_fn, state.params, in_chunks(data, 32), batch_size=16)
    chex.assert_trees_all_close(found, expected, rtol=1e-6)
    _, history = train.fit(
        loss_fn, optax.sgd(0.1), state, data, epochs=1, batch_size=16, validation_data=in_chunks(make_data(40, 1))
    )
    _, by_arrays = train.fit(
        loss_fn, optax.sgd(0.1), state, data, epochs=1, batch_size=16, validation_data=make_data(40, 1)
    )
    np.testing.assert_allclose(history["validation_loss"], by_arrays["validation_loss"], rtol=1e-6)


def test_a_non_finite_step_names_the_examples_of_the_whole_data():
    x = np.ones((N, 2), np.float32)
    x[77] = 1e30
    loss = lambda params, batch, key: jnp.mean((batch @ params) ** 2)
    optimizer = optax.sgd(1e-2)
    state = train.init_state(jnp.ones(2), optimizer, jax.random.key(0))
    with pytest.raises(train.NonFiniteError) as caught:
        train.fit(loss, optimizer, state, in_chunks(x), epochs=1, batch_size=8)
    assert 77 in caught.value.indices
    assert len(caught.value.indices) == 8


def test_values_of_a_chunk_are_checked_when_it_is_read():
    data = make_data(90)
    data.y[53] = 7
    short = stream.Stream(90, 24, lambda start, stop: jax.tree.map(lambda a: a[:3], data))
    for rows, message in (
        (in_chunks(data), r"the stream's chunk at example 48: data.y\[5\] must be a label in \[0, 3\), got 7"),
        (short, r"read\(0, 8\) must return 8 examples, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            train.fit(loss_fn, optax.sgd(0.1), make_state(optax.sgd(0.1)), rows, epochs=1, batch_size=8, num_classes=3)


def test_sharded_chunks_train_as_those_of_one_device():
    data, optimizer = make_data(100), optax.adam(1e-2)
    mesh = jax.make_mesh((4,), ("data",))
    rows = stream.sharded(in_chunks(data), jax.NamedSharding(mesh, jax.P("data")))
    assert rows.read(0, 24)[0].sharding.spec == jax.P("data")
    assert rows.read(96, 99)[0].sharding.spec == jax.P()
    options = {"epochs": 2, "batch_size": 8}
    expected, _ = train.fit(loss_fn, optimizer, make_state(optimizer), in_chunks(data), **options)
    found, _ = train.fit(loss_fn, optimizer, make_state(optimizer), rows, **options)
    chex.assert_trees_all_close(jax.device_get(found.params), expected.params, rtol=1e-5, atol=1e-6)


def test_memory_mapped_files_are_read_as_written(tmp_path):
    x, y = make_data(50)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    mapped = {name: np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("x", "y")}
    rows = stream.from_arrays(mapped, chunk_size=16)
    assert rows.examples == 50
    for start, stop in ((0, 16), (48, 50), (7, 9)):
        found = rows.read(start, stop)
        np.testing.assert_array_equal(found["x"], x[start:stop])
        np.testing.assert_array_equal(found["y"], y[start:stop])
        assert not isinstance(found["x"], np.memmap)


def test_a_copy_on_write_map_keeps_the_changes_of_its_owner(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(8, np.float32))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="c")
    mapped[3] = 7
    rows = stream.from_arrays(mapped)
    assert rows.read(0, 8)[3] == rows.read(0, 8)[3] == mapped[3] == 7


def test_safetensors_are_read_as_written(tmp_path):
    from safetensors.numpy import save_file

    x, y = make_data(50)
    save_file({"x": x, "y": y}, tmp_path / "rows.safetensors")
    found = stream.from_safetensors(tmp_path / "rows.safetensors").read(5, 20)
    np.testing.assert_array_equal(found["x"], x[5:20])
    np.testing.assert_array_equal(found["y"], y[5:20])
    whole = (tmp_path / "rows.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        stream.from_safetensors(tmp_path / "cut.safetensors")
    save_file({"x": x, "y": y[:9]}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="same leading axis"):
        stream.from_safetensors(tmp_path / "other.safetensors")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_tables_are_read_as_written(tmp_path, kind):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    x, y = make_data(50)
    columns = {"y": y, **{f"c{i}": x[:, i] for i in range(x.shape[1])}, "name": ["a"] * 50}
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        parquet.write_table(pa.table(columns), path, row_group_size=7)
    else:
        with pa.ipc.new_file(path, pa.table(columns).schema) as file:
            file.write_table(pa.table(columns), max_chunksize=7)
    features = [f"c{i}" for i in range(x.shape[1])]
    rows = stream.from_table(path, target="y", features=features, chunk_size=16)
    assert rows.examples == 50
    for start, stop in ((0, 16), (13, 15), (48, 50), (0, 50), (7, 14)):
        found = rows.read(start, stop)
        np.testing.assert_array_equal(found.x, x[start:stop])
        np.testing.assert_array_equal(found.y, y[start:stop])
    with pytest.raises(ValueError, match="column 'name' must be numeric, got string"):
        stream.from_table(path, target="y")
    with pytest.raises(ValueError, match="no column 'z'; it has y, c0"):
        stream.from_table(path, target="z", features=["c0"])
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="rows"):
        stream.from_table(path, target="y")


def test_a_table_with_missing_values_is_rejected_with_the_column(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"a": [1.0, None], "y": [0, 1]}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="column 'a' has missing values"):
        stream.from_table(tmp_path / "t.parquet", target="y").read(0, 2)


def test_records_are_stacked():
    source = [{"x": np.full(3, i, np.float32), "y": i} for i in range(10)]
    found = stream.from_source(source, chunk_size=4).read(4, 6)
    np.testing.assert_array_equal(found["x"], [[4, 4, 4], [5, 5, 5]])
    np.testing.assert_array_equal(found["y"], [4, 5])
    with pytest.raises(TypeError, match="from_source: source must have len"):
        stream.from_source(iter(source))


def test_wrong_arguments_are_rejected():
    with pytest.raises(ValueError, match="chunk_size must be an integer of at least 1"):
        stream.from_arrays(np.ones(3), chunk_size=0)
    with pytest.raises(TypeError, match=r"arrays\['x'\]\[0\] must have a shape and slices, got int"):
        stream.from_arrays({"x": [1, 2]})
    with pytest.raises(ValueError, match="same leading axis"):
        stream.from_arrays((np.ones(3), np.ones(4)))


def test_whole_numbers_in_a_table_may_be_larger_than_int32(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "times.parquet"
    pq.write_table(pa.table({"time": [1_700_000_000_000, -(2**40)], "y": [0, 1]}), path)
    np.testing.assert_array_equal(stream.from_table(path, target="y").read(0, 2).x, np.float32([[1.7e12], [-(2**40)]]))


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_a_table_that_is_damaged_or_empty_is_an_error_that_names_the_file(tmp_path, name):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / name

    def write(table):
        if name.endswith("parquet"):
            pq.write_table(table, path)
        else:
            with pa.ipc.new_file(path, table.schema) as f:
                f.write_table(table)

    write(pa.table({"a": [1.0, 2.0], "y": [0, 1]}))
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at])
        with pytest.raises(ValueError, match=name):
            stream.from_table(path, target="y")
    write(pa.table({"a": pa.array([], pa.float32()), "y": pa.array([], pa.int32())}))
    with pytest.raises(ValueError, match=f"{name}: no rows"):
        stream.from_table(path, target="y")
    write(pa.Table.from_arrays([pa.array([1.0]), pa.array([2.0]), pa.array([0])], ["a", "a", "y"]))
    with pytest.raises(ValueError, match="two columns have the same name"):
        stream.from_table(path, target="y")


def test_a_parquet_file_whose_row_counts_differ_is_damaged(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path, outcomes = tmp_path / "rows.parquet", []
    pq.write_table(pa.table({"a": [1.0, 2.0, 3.0], "y": [0, 1, 1]}), path)
    whole = path.read_bytes()
    three, two = bytes([0x16, 6]), bytes([0x16, 4])  # 64-bit integers in the footer
    for at in [i for i in range(len(whole)) if whole[i : i + 2] == three]:
        path.write_bytes(whole[:at] + two + whole[at + 2 :])
        try:
            table = stream.from_table(path, target="y")
            outcomes.append(table.read(0, table.examples).y.tolist())
        except ValueError as e:
            outcomes.append(str(e))
    refused = [outcome for outcome in outcomes if outcome != [0, 1, 1]]
    assert all("rows.parquet" in outcome for outcome in refused)
    assert sum("damaged; has " in outcome for outcome in refused) == 2  # of the file, of its row group


def test_labels_of_a_table_that_int32_cannot_hold_stay_out_of_range(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    for kind, label in ((pa.uint64(), 2**64 - 1), (pa.uint32(), 2**32 - 1), (pa.int64(), 2**40)):
        pq.write_table(pa.table({"a": [1.0], "y": pa.array([label], kind)}), path)
        assert stream.from_table(path, target="y").read(0, 1).y.tolist() == [2**31 - 1]
