"""Finds wrong labels by the self-influence of the examples.

    python -m examples.mislabeled_digits

Of 1000 digits, 30 get a wrong label. The squared norm of an example's gradient, summed over checkpoints of a run,
estimates to first order how much a step on the example lowers its own loss (TracIn, Pruthi et al. 2020). This
self-influence is large for an example that the others do not explain. No clean data is needed, and the per-example
gradients are never formed.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fcfunc
from examples.pictures import picture
from fcfunc import data, losses, per_example, train

NET = fcfunc.mlp([64, 64, 10])
COUNT, WRONG, LOOKED_AT = 1000, 30, 60


def planted(seed: int):
    """Digits of which some have a wrong label, and a mask of the wrong ones."""
    digits, rng = data.digits(), np.random.default_rng(seed)
    chosen = rng.permutation(len(digits.x))[:COUNT]
    x, labels = digits.x[chosen], digits.y[chosen].copy()
    wrong = rng.choice(COUNT, WRONG, replace=False)
    labels[wrong] = (labels[wrong] + rng.integers(1, 10, WRONG)) % 10
    return data.Dataset(x, labels), np.isin(np.arange(COUNT), wrong)


def loss_fn(params, batch, key):
    """The mean cross-entropy."""
    del key
    return jnp.mean(losses.softmax_cross_entropy_with_integer_labels(NET.apply(params, batch.x), batch.y))


@jax.jit
def self_influence(params, digits):
    """The squared norm of each example's gradient."""

    def of_labels(logits):
        return losses.softmax_cross_entropy_with_integer_labels(logits, digits.y)

    return per_example.squared_norms(NET.example_gradients(params, digits.x, of_labels)[1])


def main(argv: list[str] | None = None) -> dict[str, int]:
    """Trains, ranks the examples, draws the top ones, and returns the number of wrong labels among them."""
    parser = argparse.ArgumentParser(prog="mislabeled_digits", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/mislabeled_digits", help="folder for the picture")
    args = parser.parse_args(argv)

    digits, wrong = planted(args.seed)
    init_key, run_key = jax.random.split(jax.random.key(args.seed))
    optimizer = optax.adam(2e-3)
    epoch = train.make_train_epoch(loss_fn, optimizer, batch_size=50)
    state = train.init_state(NET.init(init_key), optimizer, run_key)
    influence = np.zeros(COUNT)
    for _ in range(args.epochs):
        state, _ = epoch(state, digits)
        influence += np.asarray(self_influence(state.params, digits))
    order = np.argsort(-influence)
    found = {n: int(wrong[order[:n]].sum()) for n in (WRONG, LOOKED_AT)}
    print(f"{WRONG} of {COUNT} labels are wrong; {args.epochs} epochs of {NET.dims}")
    for n, hits in found.items():
        print(f"among the {n} examples with the largest self-influence: {hits} wrong labels")
    with picture(Path(args.out) / "mislabeled_digits.png", nrows=6, ncols=10, figsize=(8, 6.4)) as panels:
        for panel, i in zip(panels.ravel(), order, strict=False):
            panel.imshow(digits.x[i].reshape(8, 8), cmap="gray_r")
            panel.set_title(str(digits.y[i]), color="red" if wrong[i] else "black", fontsize=9)
            panel.axis("off")
        panels[0, 0].figure.suptitle("largest self-influence first, with labels; red: wrong label", fontsize=10)
    return {"found": found[LOOKED_AT], "found_in_first": found[WRONG]}


if __name__ == "__main__":
    main()
