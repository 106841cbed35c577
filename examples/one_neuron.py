"""A sigmoid neuron with mean squared error, and a network with two hidden layers, in Einstein notation.

The bias is written in two ways: as a vector, `h_nj = σ(x_ni w_ij + b_j)`, and as an extra row of the weights for an
input column of ones. The gradients are equal. Repeated indices are summed, as in `jnp.einsum`.

    python -m examples.one_neuron
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

import fcfunc
from fcfunc import losses, ops


def neuron(w, b, x):
    """`ŷ_n = σ(x_ni w_i + b)`."""
    return ops.sigmoid(jnp.einsum("ni,i->n", x, w) + b)


def neuron_with_ones(wb, x):
    """The same neuron with its bias as the last weight; `x` gets a column of ones."""
    return ops.sigmoid(jnp.einsum("ni,i->n", jnp.concatenate([x, jnp.ones((len(x), 1), x.dtype)], axis=1), wb))


def gradients_by_hand(w, b, x, y):
    """`dL/dw_i = (1/m) 2 (ŷ_n − y_n) ŷ_n (1 − ŷ_n) x_ni`, and the same without `x` for the bias."""
    predictions = neuron(w, b, x)
    dz = 2 * (predictions - y) * predictions * (1 - predictions) / len(y)
    return jnp.einsum("n,ni->i", dz, x), jnp.einsum("n->", dz)


def network_by_einsum(params, x):
    """Two hidden layers: `h_nj = σ(x_ni w_ij + b_j)` twice, then the affine output."""
    for p in params[:-1]:
        z = jnp.einsum("ni,ij->nj", x, p["w"])
        x = jax.nn.sigmoid(z + jnp.broadcast_to(p["b"], z.shape))
    z = jnp.einsum("ni,ij->nj", x, params[-1]["w"])
    return z + jnp.broadcast_to(params[-1]["b"], z.shape)


def learn(x, y, *, steps: int, rate: float):
    """Gradient descent on the neuron's mean squared error with the gradients above, in one compiled loop."""

    def step(wb, _):
        w, b = wb
        dw, db = gradients_by_hand(w, b, x, y)
        return (w - rate * dw, b - rate * db), jnp.mean(losses.squared_error(neuron(w, b, x), y))

    return jax.lax.scan(step, (jnp.zeros(x.shape[1]), jnp.zeros(())), length=steps)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Compares the three gradients, learns AND, and compares the two networks; returns the largest differences."""
    del argv  # there are no options
    x_key, y_key, w_key, net_key = jax.random.split(jax.random.key(0), 4)
    x, y = jax.random.normal(x_key, (7, 3)), jax.random.uniform(y_key, (7,))
    w, b = jax.random.normal(w_key, (3,)), jnp.float32(0.5)

    by_hand = gradients_by_hand(w, b, x, y)
    as_vector = jax.grad(lambda w, b: jnp.mean(losses.squared_error(neuron(w, b, x), y)), (0, 1))(w, b)
    as_ones = jax.grad(lambda wb: jnp.mean(losses.squared_error(neuron_with_ones(wb, x), y)))(jnp.append(w, b))
    as_ones = (as_ones[:-1], as_ones[-1])
    differences = [
        max(float(jnp.max(jnp.abs(a - h))) for a, h in zip(grads, by_hand, strict=True))
        for grads in (as_vector, as_ones)
    ]
    print(f"bias as a vector: largest difference from the formula {differences[0]:.1e}")
    print(f"bias as a column of ones: largest difference from the formula {differences[1]:.1e}")

    corners = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.float32)
    (w, b), curve = jax.jit(learn, static_argnames=("steps", "rate"))(
        corners, np.array([0, 0, 0, 1], np.float32), steps=2000, rate=2.0
    )
    right = int(jnp.sum((neuron(w, b, corners) > 0.5) == (corners.sum(axis=1) == 2)))
    print(f"AND: mean squared error {curve[0]:.4f} before, {curve[-1]:.4f} after; {right} of 4 correct")

    params = fcfunc.init(net_key, [3, 5, 4, 2])
    outputs = fcfunc.apply(params, x, activation="sigmoid")
    network_difference = float(jnp.max(jnp.abs(outputs - network_by_einsum(params, x))))
    print(f"two hidden layers: largest difference between apply and einsum {network_difference:.1e}")
    return {
        "vector": differences[0],
        "ones": differences[1],
        "error_before": float(curve[0]),
        "error_after": float(curve[-1]),
        "right": right,
        "network": network_difference,
    }


if __name__ == "__main__":
    main()
