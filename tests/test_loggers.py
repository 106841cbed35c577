"""Loggers as callbacks: each writes the history that `fit` returns."""

import json

import numpy as np
import pytest

from examples import loggers

pytestmark = pytest.mark.filterwarnings("default")  # for the dependencies of the loggers


def test_json_lines_hold_the_history(tmp_path):
    history = loggers.main(["--out", str(tmp_path)])
    records = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == history["step"].tolist()
    assert [record["validation_accuracy"] for record in records] == history["validation_accuracy"].tolist()


def test_tensorboard_reads_the_history(tmp_path):
    pytest.importorskip("tensorboardX")
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    history = loggers.main(["--logger", "tensorboard", "--out", str(tmp_path)])
    events = accumulators.EventAccumulator(str(tmp_path))
    events.Reload()
    np.testing.assert_allclose([event.value for event in events.Scalars("loss")], history["loss"], rtol=1e-6)
    assert [event.step for event in events.Scalars("loss")] == history["step"].tolist()


def test_mlflow_reads_the_history(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    history = loggers.main(["--logger", "mlflow", "--out", str(tmp_path)])
    (run,) = mlflow.search_runs(experiment_names=["fcfunc"], output_format="list")
    logged = mlflow.MlflowClient().get_metric_history(run.info.run_id, "validation_loss")
    np.testing.assert_allclose([metric.value for metric in logged], history["validation_loss"])
    assert run.data.params["epochs"] == "5"


def test_weights_and_biases_writes_a_run_without_a_network(tmp_path):
    pytest.importorskip("wandb")
    loggers.main(["--logger", "wandb", "--out", str(tmp_path)])
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert b"validation_accuracy" in file.read_bytes()
