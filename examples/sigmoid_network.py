"""One sigmoid hidden layer, softmax, cross-entropy and L2: the loss and all four gradients, compared with PyTorch's.

The tutorial writes examples as columns, `z1 = W1 X + b1`. Here they are rows, `z1 = X W1 + b1`, so each weight and its
gradient are transposed. If torch is not installed, the comparison uses the values stored below, which torch printed.

    python -m examples.sigmoid_network
"""

import importlib.util
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

import fcfunc
from fcfunc import losses

L2 = 0.5
X = np.arange(6, dtype=np.float32).reshape(3, 2).T  # the columns of 0..5 as [3, 2] are the two examples
LABELS = np.array([3, 4])
PARAMS = [
    {"w": np.repeat(np.array([[1.0], [2.0], [3.0]], np.float32), 4, axis=1), "b": np.full(4, 1.0, np.float32)},
    {"w": np.full((4, 5), 2.0, np.float32), "b": np.full(5, 2.0, np.float32)},
]

# Printed by torch 2.13.0 in float64, `python -m examples.sigmoid_network` with torch installed.
TORCH_LOSS = 35.6094379124341
TORCH_GRADS = [
    {"w": [[0.5] * 4, [1.0] * 4, [1.5] * 4], "b": [-2.2981269043555262e-24] * 4},
    {
        "w": [[1.1999999958498007] * 3 + [0.7000000165494884, 0.69999999590111]] * 4,
        "b": [0.2, 0.2, 0.2, -0.30000000000000004, -0.30000000000000004],
    },
]


def loss_fn(params, x, labels):
    """Mean cross-entropy plus 0.5 λ (‖W1‖² + ‖W2‖²), without the biases."""
    logits = fcfunc.apply(params, x, activation="sigmoid")
    each = losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(each) + L2 * losses.l2_penalty(params)


def by_torch() -> tuple[float, list[dict[str, np.ndarray]]]:
    """The same network, loss and gradients in PyTorch, in float64."""
    import torch  # pyright: ignore[reportMissingImports]

    params = [{name: torch.tensor(a, dtype=torch.float64, requires_grad=True) for name, a in p.items()} for p in PARAMS]
    x = torch.tensor(X, dtype=torch.float64)
    logits = torch.sigmoid(x @ params[0]["w"] + params[0]["b"]) @ params[1]["w"] + params[1]["b"]
    value = torch.nn.functional.cross_entropy(logits, torch.tensor(LABELS))
    value = value + 0.5 * L2 * sum((p["w"] ** 2).sum() for p in params)
    value.backward()
    return value.item(), [{name: np.asarray(a.grad) for name, a in p.items()} for p in params]


def main(argv: Sequence[str] | None = None) -> dict:
    """Compares the loss and the four gradients; returns the loss and the largest differences."""
    del argv  # there are no options
    params = jax.tree.map(jnp.asarray, PARAMS)
    loss, grads = jax.jit(jax.value_and_grad(loss_fn))(params, X, LABELS)
    if importlib.util.find_spec("torch") is None:
        source, (torch_loss, torch_grads) = "stored torch values", (TORCH_LOSS, TORCH_GRADS)
        print("torch is not installed; comparing with values stored from it (to compare directly: pip install torch)")
    else:
        source, (torch_loss, torch_grads) = "torch", by_torch()
    print(f"loss {loss:.6f}, {source} {torch_loss:.6f}")
    worst = abs(float(loss) - torch_loss)
    for layer, (got, expected) in enumerate(zip(grads, torch_grads, strict=True), start=1):
        for name in ("w", "b"):
            error = float(np.max(np.abs(np.asarray(got[name]) - np.asarray(expected[name]))))
            print(f"d{name}{layer} {list(got[name].shape)}: largest difference from {source} {error:.1e}")
            worst = max(worst, error)
    return {"loss": float(loss), "worst": worst, "source": source}


if __name__ == "__main__":
    main()
