"""A network of any depth from forward/backward pairs chained by hand, with L2 and without automatic differentiation.

Course-note tutorials build this in NumPy; this version uses `fcfunc.ops` and is compiled. It trains on the scikit-learn
digits and compares the hand-chained gradients with `jax.grad` of the same loss.

    python -m examples.layers_by_hand --dims 64,100,10
"""

import argparse
import functools

import jax
import jax.numpy as jnp

import fcfunc
from fcfunc import data, losses, ops


def forward(params, x):
    """The scores and each layer's residuals for the backward pass; `x` is `[batch, d1, ..., dk]`."""
    residuals = []
    for layer, p in enumerate(params):
        x, affine_residuals = ops.affine_fwd(x, p["w"], p["b"], flatten=layer == 0)
        x, relu_residuals = ops.relu_fwd(x) if layer < len(params) - 1 else (x, None)
        residuals.append((affine_residuals, relu_residuals))
    return x, residuals


def loss(params, x, labels=None, *, l2=0.0):
    """The scores if no labels are given; otherwise the loss and its gradients, derived and chained by hand.

    Args:
      params: from `fcfunc.init`, any depth.
      x: `[batch, d1, ..., dk]`.
      labels: `[batch]`.
      l2: the factor of half the sum of squared weights.
    """
    scores, residuals = forward(params, x)
    if labels is None:
        return scores
    each, loss_residuals = losses.softmax_cross_entropy_with_integer_labels_fwd(scores, labels)
    penalty, weights = losses.l2_penalty_fwd([p["w"] for p in params])

    (decay,) = losses.l2_penalty_bwd(weights, jnp.float32(l2))
    g, *_ = losses.softmax_cross_entropy_with_integer_labels_bwd(loss_residuals, jnp.full(each.shape, 1 / each.size))
    grads = []
    for (affine_residuals, relu_residuals), dw_decay in reversed(list(zip(residuals, decay, strict=True))):
        if relu_residuals is not None:
            (g,) = ops.relu_bwd(relu_residuals, g)
        g, dw, db = ops.affine_bwd(affine_residuals, g)
        grads.append({"w": dw + dw_decay, "b": db})
    return jnp.mean(each) + l2 * penalty, grads[::-1]


def loss_by_autodiff(params, x, labels, *, l2=0.0):
    """The same loss from the reference implementation, for `jax.grad`."""
    dims = [x[0].size, *(len(p["b"]) for p in params)]
    scores = fcfunc.mlp(dims, ops=fcfunc.reference).apply(params, x.reshape(len(x), -1))
    each = fcfunc.reference.softmax_cross_entropy_with_integer_labels(scores, labels)
    return jnp.mean(each) + l2 * fcfunc.reference.l2_penalty(params)


@functools.partial(jax.jit, static_argnames=("l2", "learning_rate"))
def sgd_step(params, x, labels, *, l2, learning_rate):
    """One step of gradient descent on a batch."""
    value, grads = loss(params, x, labels, l2=l2)
    return jax.tree.map(lambda p, g: p - learning_rate * g, params, grads), value


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Trains; returns the test accuracy and the largest error of a gradient, relative to its largest element."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--dims", type=lambda s: [int(n) for n in s.split(",")], default=[64, 100, 10], metavar="N,N,..."
    )
    parser.add_argument("--l2", type=float, default=1e-3)
    parser.add_argument("--epochs", type=int, default=30)
    args = parser.parse_args(argv)

    digits = data.digits()
    images = data.Dataset(digits.x.reshape(-1, 8, 8), digits.y)  # the first layer flattens them
    training, test = data.split(images, (0.8, 0.2), seed=0)
    params = fcfunc.init(jax.random.key(0), args.dims)

    _, by_hand = jax.jit(loss)(params, training.x[:50], training.y[:50], l2=args.l2)
    by_jax = jax.jit(jax.grad(loss_by_autodiff))(params, training.x[:50], training.y[:50], l2=args.l2)
    errors = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)), by_hand, by_jax)
    error = float(max(jax.tree.leaves(errors)))
    print(f"hand-chained gradients compared with jax.grad: worst relative error {error:.1e}")

    batch = 32
    for epoch in range(args.epochs):
        (shuffled,) = data.split(training, (1.0,), seed=epoch)
        value = jnp.nan
        for start in range(0, len(shuffled.y), batch):
            rows = slice(start, start + batch)
            params, value = sgd_step(params, shuffled.x[rows], shuffled.y[rows], l2=args.l2, learning_rate=0.1)
        if epoch % 10 == 9:
            print(f"epoch {epoch + 1}: loss of the last batch {value:.4f}")
    accuracy = float(jnp.mean(jnp.argmax(forward(params, test.x)[0], axis=-1) == test.y, dtype=jnp.float32))
    print(f"test accuracy {accuracy:.4f}")
    return {"accuracy": accuracy, "gradient_error": error}


if __name__ == "__main__":
    main()
