"""The progress bar of `fit`."""

import io
import re
import sys

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from fcfunc import sharding, train
from fcfunc.train import _progress
from fcfunc.train._progress import ProgressBar
from tests.helpers import loss_fn, make_data, make_state
from tests.rules import slow


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("on_a_mesh", [False, slow(True)])
def test_the_bar_moves_within_an_epoch_and_the_numbers_are_those_without_it(on_a_mesh, monkeypatch):
    moves, optimizer, data = [], optax.sgd(0.1), make_data(50)
    if on_a_mesh:
        data = sharding.global_batch(data, sharding.make_mesh(data=2, devices=jax.devices()[:2]))
    options = {"epochs": 3, "batch_size": 4}
    expected, _ = train.fit(loss_fn, optimizer, make_state(optimizer), data, **options)
    monkeypatch.setattr(sys, "stderr", Terminal())
    to_step, handle = ProgressBar.to_step, ProgressBar.handle
    monkeypatch.setattr(ProgressBar, "to_step", lambda bar, step: (moves.append(int(step)), to_step(bar, step)))
    monkeypatch.setattr(ProgressBar, "handle", lambda bar: handle(bar) | {"every": jnp.int32(5)})
    state, history = train.fit(loss_fn, optimizer, make_state(optimizer), data, progress=True, **options)
    assert sorted(moves) == list(range(5, 40, 5))  # 13 steps per epoch, the last on a short batch
    chex.assert_trees_all_equal(state.params, expected.params)
    assert history["epochs"] == 3


def test_the_estimate_of_the_bar_leaves_compilation_out(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setattr(_progress.time, "time", lambda: now[0])
    monkeypatch.setattr(_progress.time, "perf_counter", lambda: now[0])
    with ProgressBar(epochs=10, steps=4, first_step=0) as bar:
        monkeypatch.setattr(bar.bar, "_time", lambda: now[0])
        now[0] += 60  # compilation
        bar.to_step(1)
        now[0] += 0.5
        bar.to_step(2)
        drawn = bar.bar.format_dict
    assert (drawn["n"], drawn["initial"], drawn["elapsed"]) == (0.5, 0.25, 0.5)
    assert "0.50/10 [00:00<00:19" in terminal.getvalue()  # 9.5 epochs left, at 0.5 seconds per quarter epoch


def test_outside_of_a_terminal_each_epoch_is_a_line_with_the_digits_of_small_numbers(capsys):
    optimizer = optax.sgd(1e-9)

    def tiny(params, batch, key):
        return 1e-7 * loss_fn(params, batch, key)[0]

    train.fit(tiny, optimizer, make_state(optimizer), make_data(50), epochs=2, batch_size=25, progress=True)
    printed = capsys.readouterr().err
    assert "\r" not in printed
    lines = printed.splitlines()
    assert [line.split(":")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    assert all(re.search(r"loss \d\.\d+e-07 ", line) for line in lines), lines
