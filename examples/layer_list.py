"""A network described by a list of layers, trained on ten examples: one classification and one regression problem.

python -m examples.layer_list --batch-size 5 --out runs/layer_list
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fcfunc
from fcfunc import data, losses, train

X = np.array(
    [
        [1, 1, 1, 0, 0],
        [1, 2, 1, 0, -1],
        [2, 1, 1, -1, 0],
        [2, 2, 2, 0, 0],
        [1, 2, 2, 0, -1],
        [0, 0, 0, 1, 1],
        [-1, 0, 0, 2, 1],
        [0, -1, 0, 1, 2],
        [-1, -1, 0, 2, 2],
        [0, -1, 0, 1, 1],
    ],
    np.float32,
)
LABELS = np.array([1] * 5 + [0] * 5, np.int32)
TARGETS = np.array([1, 2, 2, 4, 3, 0, 1, 1, 2, 0], np.float32)


class Input(NamedTuple):
    """The first layer; `width` is the number of features."""

    width: int


class Hidden(NamedTuple):
    """A hidden layer; `activation` is "relu" or "linear"."""

    width: int
    activation: str = "relu"


class Output(NamedTuple):
    """The last layer: "softmax" with negative log-likelihood, or "linear" with mean squared error."""

    width: int
    activation: str = "softmax"


def network(layers: list) -> tuple[Callable, Callable]:
    """Turns a list of layers into `init(key) -> params` and `loss_fn(params, batch, key) -> loss`.

    Raises:
      ValueError: the list does not begin with an Input, does not end with an Output, or has other layers than Hidden
        between them; an activation is not supported for that kind of layer.
    """
    if len(layers) < 2 or not isinstance(layers[0], Input):
        raise ValueError(f"network: the first layer must be an Input, got {layers[0] if layers else 'no layer'}")
    if not isinstance(layers[-1], Output):
        raise ValueError(f"network: the last layer must be an Output, got {layers[-1]}")
    for position, layer in enumerate(layers[1:-1], start=1):
        if not isinstance(layer, Hidden) or layer.activation not in ("relu", "linear"):
            raise ValueError(f"network: layer {position} must be Hidden with relu or linear, got {layer}")
    output = layers[-1]
    if output.activation not in ("softmax", "linear"):
        raise ValueError(f"network: the output must be softmax or linear, got {output}")
    activations = [layer.activation for layer in layers[1:-1]]
    dims = [layer.width for layer in layers]
    net = fcfunc.mlp(dims, activation=activations, final_activation=output.activation)

    def init(key):
        weights = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal")  # sqrt(1 / fan_in) · normal
        params = net.init(key, w_init=weights)
        for p, activation in zip(params, [*activations, output.activation], strict=True):
            p["b"] = jnp.full_like(p["b"], 0.1 if activation == "relu" else 0.0)
        return params

    def loss_fn(params, batch, key):
        del key  # the loss is not random
        outputs = net.apply(params, batch.x)
        if output.activation == "softmax":
            return jnp.mean(losses.negative_log_likelihood(outputs, batch.y))
        return jnp.mean(losses.squared_error(outputs, jnp.reshape(batch.y, outputs.shape)))

    return init, loss_fn


def learn(layers: list, batch: data.Dataset, *, steps: int, batch_size: int, seed: int) -> list[float]:
    """Gradient descent with learning rate 0.1 for at least `steps` steps; returns the loss of each step."""
    init, loss_fn = network(layers)
    optimizer = optax.sgd(0.1)
    init_key, run_key = jax.random.split(jax.random.key(seed))
    state = train.init_state(init(init_key), optimizer, run_key)
    epoch = train.make_train_epoch(loss_fn, optimizer, batch_size)
    curve: list[float] = []
    while len(curve) < steps:
        state, metrics = epoch(state, batch)
        curve.extend(np.asarray(metrics["loss"]).tolist())
    return [*curve, float(train.evaluate(loss_fn, state.params, batch)["loss"])]


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Trains on both problems, draws both loss curves, and returns the losses before and after."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=10, help="examples per step (default: 10, all examples)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", default="runs/layer_list")
    args = parser.parse_args(argv)
    x = data.standardizer(X)(X)
    problems = {
        "classification": ([Input(5), Hidden(5), Output(2)], data.Dataset(x, LABELS)),
        "regression": ([Input(5), Hidden(5), Output(1, "linear")], data.Dataset(x, TARGETS)),
    }
    figures, curves = {}, {}
    for name, (layers, batch) in problems.items():
        curve = learn(layers, batch, steps=args.steps, batch_size=args.batch_size, seed=args.seed)
        print(f"{name}: loss {curve[0]:.4f} before, {curve[-1]:.4f} after {len(curve) - 1} steps")
        curves[name] = curve
        figures |= {f"{name}_before": curve[0], f"{name}_after": curve[-1]}
    draw(curves, Path(args.out))
    return figures


def draw(curves: dict[str, list[float]], out: Path) -> None:
    """Draws the loss of each step, with one panel per problem."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(curves), figsize=(9, 3.2), layout="constrained")
    for panel, (name, curve) in zip(panels, curves.items(), strict=True):
        panel.plot(curve)
        panel.set(title=name, xlabel="step", ylabel="loss", yscale="log")
        panel.grid(alpha=0.3)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "loss_curves.png", dpi=120)
    plt.close(figure)
    print(f"wrote {out / 'loss_curves.png'}")


if __name__ == "__main__":
    main()
