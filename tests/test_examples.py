"""The results of each example, and the classifier script as users run it."""

import importlib.util
import json
import re
import subprocess
import sys
from typing import Any

import jax
import jax.export
import numpy as np
import onnxruntime
import pandas
import pytest
import skops.io

import fcfunc
from examples import (
    laplace_uncertainty,
    layer_list,
    layers_by_hand,
    mislabeled_digits,
    noise_scale,
    one_neuron,
    private_digits,
    sigmoid_network,
    sweep,
    train_classifier,
)
from fcfunc import data, params_file
from tests.rules import slow


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the script with a command line; returns its exit status, output and errors."""
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["train_classifier", *map(str, argv)])
        status = train_classifier.run()
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def by_onnx(path, x) -> Any:
    return onnxruntime.InferenceSession(path).run(["y"], {"x": x})[0]


def test_layers_chained_by_hand_have_the_gradients_of_jax_and_learn():
    figures = layers_by_hand.main([])
    assert figures["gradient_error"] < 1e-6
    assert figures["accuracy"] > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("dims", ["64,10", "64,20,20,20,10"])
def test_layers_chained_by_hand_take_any_depth(dims):
    assert layers_by_hand.main(["--dims", dims, "--epochs", "1"])["gradient_error"] < 1e-5


def test_layers_chained_by_hand_give_scores_where_no_labels_are_given():
    params = fcfunc.init(jax.random.key(0), [12, 5, 3])
    images = np.random.default_rng(0).standard_normal((4, 2, 2, 3)).astype(np.float32)
    np.testing.assert_allclose(
        layers_by_hand.loss(params, images), fcfunc.apply(params, images.reshape(4, 12)), rtol=1e-6
    )


def test_the_sigmoid_network_has_the_loss_and_gradients_that_torch_printed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    figures = sigmoid_network.main()
    assert figures["source"] == "stored torch values"
    assert abs(figures["loss"] - 35.6094379) < 1e-5
    assert figures["worst"] < 1e-5


def test_the_sigmoid_network_has_the_loss_and_gradients_of_torch():
    pytest.importorskip("torch", reason="torch is not installed; stored values are compared instead")
    figures = sigmoid_network.main()
    assert figures["source"] == "torch"
    assert figures["worst"] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", ["10", "3"])
def test_the_layer_list_learns_both_problems(batch_size, tmp_path):
    figures = layer_list.main(["--batch-size", batch_size, "--out", str(tmp_path)])
    assert figures["classification_after"] < 0.1 < figures["classification_before"]
    assert figures["regression_after"] < 0.5 < figures["regression_before"]
    assert (tmp_path / "loss_curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "the first layer must be an Input, got no layer"),
        ([layer_list.Hidden(5), layer_list.Output(2)], r"must be an Input, got Hidden"),
        ([layer_list.Input(5), layer_list.Hidden(5)], r"the last layer must be an Output, got Hidden"),
        ([layer_list.Input(5), layer_list.Input(5), layer_list.Output(2)], "layer 1 must be Hidden"),
        ([layer_list.Input(5), layer_list.Hidden(5, "tanh"), layer_list.Output(2)], "layer 1 must be Hidden with relu"),
        ([layer_list.Input(5), layer_list.Output(2, "relu")], "output must be softmax or linear"),
    ],
)
def test_an_impossible_list_of_layers_is_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        layer_list.network(layers)


def test_layer_list_biases_are_a_tenth_under_relu_and_zero_elsewhere():
    layers = [layer_list.Input(5), layer_list.Hidden(4, "linear"), layer_list.Hidden(3), layer_list.Output(2)]
    params = layer_list.network(layers)[0](jax.random.key(0))
    np.testing.assert_allclose([float(p["b"][0]) for p in params], [0, 0.1, 0])


def test_the_neurons_gradients_agree_and_it_learns_and():
    figures = one_neuron.main()
    assert max(figures["vector"], figures["ones"]) < 1e-6
    assert figures["network"] < 1e-5
    assert figures["right"] == 4
    assert figures["error_after"] < 0.01 < figures["error_before"]


@pytest.mark.slow
def test_norm_residual_dropout_and_bfloat16_are_options_of_the_classifier(run, tmp_path):
    options = ["--norm", "layer_norm", "--residual", "--dropout", "0.1", "--compute-dtype", "bfloat16"]
    status, out, _ = run(
        *options, "--dims", "64,64,64,10", "--activation", "gelu", "--epochs", "8", "--batch-size", "64"
    )
    assert status == 0
    assert "layer_norm" in out
    assert float(out.split("test accuracy ")[1][:6]) >= 0.9


def test_the_digits_are_learned_and_three_files_written(run, tmp_path):
    status, out, _ = run()
    assert status == 0
    assert float(out.split("test accuracy ")[1][:6]) >= 0.97
    errors = [
        float(line.split()[-1])
        for line in out.splitlines()
        if line.startswith(("affine", "layer: affine and relu", "softmax_cross"))
    ]
    assert len(errors) == 3
    assert max(errors) < 1e-5
    folder = tmp_path / "runs" / "digits"
    assert sorted(p.name for p in folder.iterdir()) == ["history.jsonl", "learning_curve.png", "params.safetensors"]
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert history[-1]["epoch"] == len(history) == 60
    params, config = params_file.load(folder / "params.safetensors")
    net = fcfunc.mlp(**config["network"])
    assert net.dims == (64, 256, 10)
    digits = data.digits()
    assert np.mean(np.argmax(net.apply(params["layers"], digits.x), axis=-1) == digits.y) > 0.97


def test_the_users_csv_is_classified_by_the_names_of_its_classes(run, tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        f"{rng.normal(3 * k)},{rng.normal(-3 * k)},{name}"
        for k, name in enumerate(("ant", "bee", "cat"))
        for _ in range(60)
    ]
    (tmp_path / "my.csv").write_text("length,width,kind\n" + "\n".join(rows) + "\n")
    status, out, _ = run("--data", "my.csv", "--optimizer", "adam", "--learning-rate", "0.01")
    assert status == 0
    assert float(out.split("test accuracy ")[1][:6]) > 0.85


def houses(rows=300, seed=0):
    """A realistic table: numbers and names, some of them missing, and a price that depends on all columns."""
    rng = np.random.default_rng(seed)
    area, city, age = (
        rng.uniform(40, 200, rows),
        rng.choice(["Bonn", "Köln, Altstadt", "Ulm"], rows),
        rng.uniform(0, 90, rows),
    )
    price = 3000 * area + 200_000 * (city == "Ulm") - 1000 * age + rng.normal(0, 5000, rows)
    table = pandas.DataFrame({"area": area, "city": city, "age": age, "price": price})
    table.loc[rng.random(rows) < 0.1, "age"] = None
    table.loc[rng.random(rows) < 0.1, "city"] = None
    return table


def test_text_and_missing_values_in_a_csv_file_are_learned_and_the_saved_pipeline_reads_new_rows(run, tmp_path):
    houses().to_csv(tmp_path / "houses.csv", index=False)
    status, out, _ = run("--data", "houses.csv", "--optimizer", "adam", "--learning-rate", "0.01")
    assert status == 0
    assert "text columns: city; with missing values: city, age" in out
    folder = tmp_path / "runs" / "houses"
    preprocessing = skops.io.load(folder / "preprocessing.skops", trusted=["numpy.dtype"])
    params, config = params_file.load(folder / "params.safetensors")
    net = fcfunc.mlp(**config["network"])
    new = houses(seed=1)
    outputs = net.apply(params["layers"], preprocessing.transform(new).astype(np.float32))
    predicted = data.Standardizer(**params["target"]).inverse(outputs)[:, 0]
    assert np.mean((predicted - new["price"]) ** 2) < 0.1 * np.var(new["price"])


def test_a_word_among_numbers_is_no_category_and_is_named(run, tmp_path):
    table = houses().astype({"area": object})
    table.loc[7, "area"] = "ninety"
    table.to_csv(tmp_path / "houses.csv", index=False)
    status, _, err = run("--data", "houses.csv")
    assert status == 2
    assert "houses.csv, row 8, area: expected a number, as in most rows, got 'ninety'" in err


def test_a_row_without_a_target_is_named(run, tmp_path):
    table = houses()
    table.loc[4, "price"] = None
    table.to_csv(tmp_path / "houses.csv", index=False)
    status, _, err = run("--data", "houses.csv")
    assert status == 2
    assert "houses.csv, row 5: no target in 'price'" in err


def test_a_batch_size_beyond_the_examples_is_one_batch_with_a_message(run):
    status, out, _ = run("--batch-size", "5000", "--epochs", "1")
    assert status == 0
    assert "--batch-size 5000: the 1258 training examples form one batch" in out


@pytest.mark.slow
def test_the_users_npz_is_learned_as_a_regression_in_its_own_unit(run, tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(50, 10, (400, 3))
    np.savez(tmp_path / "my.npz", X=x, y=1000 + x @ [1, 2, 3] + rng.normal(0, 1, 400))
    status, out, _ = run(
        "--data", "my.npz", "--dims", "3,16,1", "--optimizer", "sgd", "--activation", "tanh", "--epochs", "100"
    )
    assert status == 0
    assert 0.5 < float(out.split("test RMSE ")[1].split()[0]) < 4  # the noise is 1, and the spread of y is 37
    params, _ = params_file.load(tmp_path / "runs" / "my" / "params.safetensors")
    assert {"mean", "scale"} == params["input"].keys() == params["target"].keys()


def test_an_exported_regression_takes_the_users_numbers_and_answers_in_the_users_unit(run, tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(50, 10, (400, 3))
    y = 1000 + x @ [1, 2, 3] + rng.normal(0, 1, 400)
    np.savez(tmp_path / "my.npz", X=x, y=y)
    options = ["--norm", "batch_norm", "--optimizer", "adam", "--learning-rate", "0.01", "--weight-decay", "0.01"]
    status, out, _ = run("--data", "my.npz", "--epochs", "60", *options, "--export", "onnx", "stablehlo")
    assert status == 0
    r2 = float(out.split("R² ")[1].split()[0])
    folder, x = tmp_path / "runs" / "my", x.astype(np.float32)
    predicted = by_onnx(folder / "net.onnx", x)
    assert 0.9 < r2 < 1
    assert abs(1 - np.mean((predicted[:, 0] - y) ** 2) / np.var(y) - r2) < 0.05
    by_jax = jax.export.deserialize(bytearray((folder / "net.stablehlo").read_bytes())).call(x)
    np.testing.assert_allclose(by_jax, predicted, rtol=1e-5)
    assert re.search(r"test RMSE [\d.]+ in the target's unit, standard deviation [\d.]+, R² ", out)


def test_an_exported_classifier_answers_with_probabilities(run, tmp_path):
    status, _, _ = run("--epochs", "3", "--norm", "batch_norm", "--export", "onnx")
    assert status == 0
    digits = data.digits()
    predicted = by_onnx(tmp_path / "runs" / "digits" / "net.onnx", digits.x)
    np.testing.assert_allclose(predicted.sum(axis=1), 1, rtol=1e-5)
    assert np.mean(np.argmax(predicted, axis=1) == digits.y) > 0.9


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data", "nothing.npz"], "nothing.npz: no such file"),
        (
            ["--norm", "batch_norm", "--batch-size", "419"],
            "leaves a last batch of 1, which batch_norm cannot normalize",
        ),
        (["--data", "nothing"], "expected digits, fashion-mnist"),
        (["--data", "fashion-mnist:here"], "here/train-images-idx3-ubyte.gz: no such file"),
        (["--dims", "64,10,9"], "--dims 64,10,9: the data has 64 features and 10 outputs"),
        (["--dims", "64,x,10"], "argument --dims"),
        (["--dims", "64,0,10"], "argument --dims: must be above 0 .*, got 0"),
        (["--dims", "64,99999999999,10"], "argument --dims: .* got 99999999999"),
        (["--seed", "1180591620717411303424"], "argument --seed: must be at least 0 and below"),
        (["--target", "y"], "--target names a column, which needs a CSV file"),
        (["--task", "regression"], "the targets of digits are classes"),
        (["--activation", "swoosh"], "argument --activation: invalid choice: 'swoosh'"),
        (["--batch-size", "0"], "argument --batch-size: must be above 0 and below 1e.38, got 0"),
        (["--learning-rate", "-1"], "argument --learning-rate: must be above 0 .*, got -1"),
        (["--learning-rate", "nan"], "argument --learning-rate: must be above 0"),
        slow(
            ["--learning-rate", "1e30"],
            r"grads\[0\]\['b'\] was not finite at step \d+ \(epoch 1\).*; try a lower learning rate",
        ),
        (["--out", "blocked"], "--out blocked: a file is in the way"),
        (["--epochs", "1", "--out", "half"], "half/history.jsonl: a folder is in the way"),
    ],
)
def test_bad_use_is_one_line_and_status_2_and_writes_nothing(argv, message, run, tmp_path):
    (tmp_path / "blocked").write_text("a file where a folder should be")
    (tmp_path / "half" / "history.jsonl").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    status, _, err = run(*argv)
    errors = [line for line in err.splitlines() if "error: " in line]
    assert status == 2
    assert len(errors) == 1
    assert re.search(message, errors[0])
    assert "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.zeros(3)}, "expected arrays x and y .*, got a"),
        ({"x": np.zeros((5, 2)), "y": np.zeros(4)}, r"expected x \[n, ...\] and y \[n\], got x \[5, 2\] and y \[4\]"),
        ({"x": np.zeros((0, 2)), "y": np.zeros(0)}, r"got x \[0, 2\]"),
        ({"x": np.full((50, 2), np.nan), "y": np.zeros(50)}, r"must be finite, got nan"),
        ({"x": np.zeros((50, 2)), "y": np.full(50, -1)}, r"must be a label in \[0, .*\), got -1"),
        ({"x": np.zeros((5, 2)), "y": np.zeros(5)}, "too few"),
        ({"x": np.float64(1), "y": np.zeros(5)}, r"got x \[\]"),
        ({"x": np.zeros((50, 2)) * 1j, "y": np.zeros(50)}, "expected real numbers, got x complex128"),
        ({"x": np.full((50, 2), 1e300), "y": np.zeros(50)}, "too large for float32"),
        (
            {"x_train": np.zeros((60, 2)), "y_train": np.zeros(50), "x_test": np.zeros((5, 2)), "y_test": np.zeros(5)},
            "x_train",
        ),
        (
            {"x_train": np.zeros((60, 2)), "y_train": np.zeros(60), "x_test": np.zeros((5, 3)), "y_test": np.zeros(5)},
            "equal shapes in x",
        ),
        ({"x": np.zeros((50, 2)), "y": np.arange(50) * 1000}, "if y is a quantity, use --task regression"),
    ],
)
def test_bad_arrays_of_the_user_are_one_line_and_status_2(arrays, message, run, tmp_path):
    np.savez(tmp_path / "my.npz", **arrays)
    status, _, err = run("--data", "my.npz")
    assert status == 2
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["my.npz"]
    assert re.search(message, err)


def test_a_gpu_that_is_not_there_is_one_line_and_status_2(tmp_path):
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    command = [sys.executable, "-m", "examples.train_classifier", "--device", "gpu", "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "error: --device gpu: JAX finds no GPU" in result.stderr
    assert "Traceback" not in result.stderr


def test_help_reads_well(run, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("--help")
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert all(option in out for option in ("--data", "--l2", "--optimizer", "default: sgd", "regression"))


@pytest.mark.slow
def test_the_sweep_finds_a_learning_rate_that_recognises_the_digits_and_draws(tmp_path, capsys):
    figures = sweep.main(["--seeds", "2", "--rates", "3", "--epochs", "8", "--out", str(tmp_path)])
    assert figures["accuracy"] > 0.94
    assert 0.05 < figures["rate"] < 0.2  # between a rate that is too small and one that is too large
    assert (tmp_path / "sweep.png").stat().st_size > 10_000
    assert len(re.findall(r"^ +\d\.\d{4} ", capsys.readouterr().out, re.MULTILINE)) == 3


def test_the_private_digits_have_the_epsilon_asked_for_and_are_recognized(tmp_path):
    figures = private_digits.main(["--out", str(tmp_path)])
    assert 2.9 < figures["epsilon"] <= 3
    assert figures["private"] > 0.9
    assert figures["plain"] > 0.97
    assert (tmp_path / "private_digits.png").stat().st_size > 10_000


def test_influence_finds_twenty_of_thirty_wrong_labels_among_sixty(tmp_path):
    figures = mislabeled_digits.main(["--out", str(tmp_path)])
    assert figures["found"] >= 20
    assert (tmp_path / "mislabeled_digits.png").stat().st_size > 10_000


def test_the_laplace_approximation_is_unsure_where_there_are_no_data(tmp_path):
    figures = laplace_uncertainty.main(["--out", str(tmp_path)])
    assert figures["gap"] > 4 * figures["near"]
    assert figures["far"] > figures["gap"]
    assert figures["covered"] > 0.9
    assert figures["plain confidence at 90"] > 0.95
    assert figures["laplace confidence at 90"] < 0.85
    assert figures["laplace loss at 90"] < figures["plain loss at 90"] / 3
    assert (tmp_path / "laplace_uncertainty.png").stat().st_size > 10_000


def test_the_noise_scale_grows_and_is_that_of_all_examples(tmp_path):
    figures = noise_scale.main(["--out", str(tmp_path)])
    assert figures["last"] > 5 * figures["first"]
    assert 0.5 < figures["first"] / figures["first_exact"] < 2
    assert 0.3 < figures["last"] / figures["last_exact"] < 3
    assert (tmp_path / "noise_scale.png").stat().st_size > 10_000
