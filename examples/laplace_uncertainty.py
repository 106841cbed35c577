"""Uncertainty by a Laplace approximation, for a regression with a gap in its data and for rotated digits.

    python -m examples.laplace_uncertainty

The regression has training data on both sides of a gap; its standard deviation grows inside the gap and beyond the
data. The digits are trained upright. On rotated test images the network is wrong and almost certain; with the Laplace
approximation it is less certain. The prior precision maximizes the marginal likelihood; nothing is tuned by hand.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import ndimage

import fcfunc
from examples.pictures import picture
from fcfunc import data, laplace, losses, train

CURVE, DIGITS = fcfunc.mlp([1, 50, 1], activation="tanh"), fcfunc.mlp([64, 64, 10])
NOISE = 0.1
"""The standard deviation of the measurement noise in the regression."""


def regression(seed: int = 0):
    """The posterior of the regression and its 60 examples, none of which is between -1 and 1."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(np.concatenate([rng.uniform(-3, -1, 30), rng.uniform(1, 3, 30)])[:, None], jnp.float32)
    y = jnp.sin(2 * x[:, 0]) + NOISE * jnp.asarray(rng.standard_normal(60), jnp.float32)

    def loss_fn(outputs):  # the negative log-likelihood up to a constant
        return losses.squared_error(outputs[:, 0], y) / (2 * NOISE**2)

    def posterior_loss(params, batch, key):  # with prior precision 1; laplace.kronecker then fits the precision
        return jnp.sum(loss_fn(CURVE.apply(params, batch[0]))) / 60 + losses.l2_penalty(params) / 60

    optimizer = optax.adam(optax.cosine_decay_schedule(0.02, 4000))
    epoch = train.make_train_step(posterior_loss, optimizer)
    state = train.init_state(CURVE.init(jax.random.key(seed)), optimizer, jax.random.key(1))
    for _ in range(4000):
        state, _ = epoch(state, (x, y))
    return jax.jit(lambda params: laplace.kronecker(CURVE, params, x, loss_fn))(state.params), x, y


def digits(seed: int = 0):
    """The posterior of the digits, and the test images with their labels."""
    training, test = jax.tree.map(jnp.asarray, data.split(data.digits(), (0.8, 0.2), seed=seed))

    def loss_fn(logits):
        return losses.softmax_cross_entropy_with_integer_labels(logits, training.y)

    optimizer = optax.adam(2e-3)
    epoch = train.make_train_epoch(
        lambda params, batch, key: jnp.mean(
            losses.softmax_cross_entropy_with_integer_labels(DIGITS.apply(params, batch.x), batch.y)
        ),
        optimizer,
        batch_size=64,
    )
    state = train.init_state(DIGITS.init(jax.random.key(seed)), optimizer, jax.random.key(1))
    for _ in range(40):
        state, _ = epoch(state, training)
    return jax.jit(lambda params: laplace.kronecker(DIGITS, params, training.x, loss_fn))(state.params), test


def on_rotated(posterior, test, angles) -> dict[str, np.ndarray]:
    """The accuracy at each angle, and the mean confidence and loss with and without the posterior."""

    @jax.jit
    def both(x):
        outputs, covariance = laplace.predict(DIGITS, posterior, x)
        return jax.nn.softmax(outputs), laplace.probabilities(outputs, covariance)

    images, rows = np.asarray(test.x).reshape(-1, 8, 8), []
    for angle in angles:
        rotated = ndimage.rotate(images, float(angle), axes=(1, 2), reshape=False, order=1).reshape(-1, 64)
        of_angle = [float(jnp.mean(jnp.argmax(both(rotated)[0], axis=-1) == test.y))]
        for p in both(rotated):
            own = jnp.take_along_axis(p, test.y[:, None], axis=-1)
            of_angle += [float(jnp.mean(jnp.max(p, axis=-1))), float(-jnp.mean(jnp.log(own)))]
        rows.append(of_angle)
    names = ("accuracy", "plain confidence", "plain loss", "laplace confidence", "laplace loss")
    return {name: np.asarray(column) for name, column in zip(names, np.asarray(rows).T, strict=True)}


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Prints and draws the standard deviations and confidences, and returns the numbers."""
    parser = argparse.ArgumentParser(prog="laplace_uncertainty", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", default="runs/laplace_uncertainty", help="folder for the picture")
    args = parser.parse_args(argv)

    posterior, x, y = regression()
    grid = jnp.linspace(-4, 4, 201)[:, None]
    mean, covariance = laplace.predict(CURVE, posterior, grid)
    deviation, at = np.sqrt(np.asarray(covariance)[:, 0, 0]), np.asarray(grid)[:, 0]
    near, gap, far = np.abs(np.abs(at) - 2) < 1, np.abs(at) < 0.5, np.abs(at) > 3.5
    figures = {name: float(deviation[part].mean()) for name, part in (("near", near), ("gap", gap), ("far", far))}
    inside = np.abs(np.asarray(mean)[:, 0] - np.sin(2 * at)) < 2 * deviation
    figures["covered"] = float(inside[np.abs(at) < 3].mean())
    print(f"regression, prior precision {float(posterior.prior_precision):.3f}")
    print("standard deviation of the output: " + ", ".join(f"{figures[n]:.3f} {n}" for n in ("near", "gap", "far")))
    print(
        f"the true curve is within two standard deviations at {figures['covered']:.0%} of the points between -3 and 3"
    )

    of_digits, test = digits()
    angles = np.arange(0, 181, 15)
    rotated = on_rotated(of_digits, test, angles)
    print(
        f"\ndigits, prior precision {float(of_digits.prior_precision):.3f}; confidence (loss) without and with Laplace"
    )
    print(f"{'angle':>6}{'accuracy':>10}{'without':>16}{'with':>16}")
    for i, angle in enumerate(angles):
        plain, laplaced = (
            f"{rotated[f'{n} confidence'][i]:.3f} ({rotated[f'{n} loss'][i]:.2f})" for n in ("plain", "laplace")
        )
        print(f"{angle:6d}{rotated['accuracy'][i]:10.3f}{plain:>16}{laplaced:>16}")
    figures |= {f"{name} at {angle}": float(rotated[name][angle // 15]) for name in rotated for angle in (0, 90)}
    with picture(Path(args.out) / "laplace_uncertainty.png", ncols=2, figsize=(10, 3.8)) as (left, right):
        center = np.asarray(mean)[:, 0]
        left.fill_between(
            at, center - 2 * deviation, center + 2 * deviation, alpha=0.3, label="± 2 standard deviations"
        )
        left.plot(at, center, label="network")
        left.plot(at, np.sin(2 * at), "k--", lw=1, label="sin 2x")
        left.plot(x[:, 0], y, ".", color="black", ms=4, label="measurements")
        left.set(ylim=(-3, 3), xlabel="x", title="regression with a gap")
        left.legend(fontsize=7)
        right.plot(angles, rotated["accuracy"], "k--", label="accuracy")
        right.plot(angles, rotated["plain confidence"], "o-", label="confidence of the network")
        right.plot(angles, rotated["laplace confidence"], "o-", label="with Laplace")
        right.set(ylim=(0, 1.05), xlabel="rotation in degrees", title="test digits, trained upright")
        right.legend(loc=(0.32, 0.2), fontsize=8)
    return figures


if __name__ == "__main__":
    main()
