"""What fcfunc, Optax and PyTorch return for hostile inputs; writes docs/background/hostile-inputs.md.

    python -m proofs.hostile_inputs

The criterion: a correct result, or NaN in the loss and gradient, or an error before execution. NumPy computes the
correct result in float64 from the definition, element by element, on the inputs in their own dtype.
"""

import itertools
import os
import platform
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax

import fcfunc
from fcfunc import losses, ops

PAGE = Path(__file__).parents[1] / "docs" / "background" / "hostile-inputs.md"
UNDEFINED = "undefined"
INF, NAN = float("inf"), float("nan")


class Row(NamedTuple):
    """One hostile input: the name of an operation, its arguments, and its options.

    `truth` is the correct result if the definition does not give it: UNDEFINED, or `(loss, gradient)`.
    """

    title: str
    operation: str
    args: tuple
    options: dict = {}  # noqa: RUF012
    truth: Any = None


def cross_entropy_truth(logits, labels, where=None, weights=None, class_weights=None, label_smoothing=0.0, **_):
    """The loss of each row, and the gradient of their sum, by the definition."""
    z = np.asarray(logits, np.float64)
    n, classes = z.shape
    loss, grad = np.zeros(n), np.zeros_like(z)
    for i in range(n):
        if where is not None and not where[i]:
            continue
        y = int(labels[i])
        if not 0 <= y < classes or np.isnan(z[i]).any() or z[i].max() in (INF, -INF):
            loss[i], grad[i] = NAN, NAN
            continue
        t = (np.arange(classes) == y) * (1 - label_smoothing) + label_smoothing / classes
        u = t if class_weights is None else t * np.asarray(class_weights, np.float64)
        shifted = z[i] - z[i].max()
        lse = np.log(np.exp(shifted).sum())
        p = np.exp(shifted - lse)
        r = 1.0 if weights is None else float(weights[i])
        counted = u > 0
        loss[i] = r * (u[counted] * (lse - shifted[counted])).sum() if r else 0.0
        grad[i] = r * (u.sum() * p - u)
    return loss, grad


def binary_truth(logits, targets):
    """log(1 + e^z) − t z for each logit, and σ(z) − t."""
    z, t = np.float64(logits), np.float64(targets)
    # e^−|z| cannot overflow: log(1 + e^z) = max(z, 0) + log(1 + e^−|z|); an infinite logit gives the limit.
    tail = np.log1p(np.exp(-np.abs(z)))
    towards = np.where(z > 0, (1 - t), t)
    with np.errstate(invalid="ignore"):
        far = np.where(towards == 0, 0.0, towards * np.abs(z))
    sigmoid = np.where(z > 0, 1 / (1 + np.exp(-np.abs(z))), np.exp(-np.abs(z)) / (1 + np.exp(-np.abs(z))))
    return far + tail, sigmoid - t


def squared_truth(predictions, targets):
    """(p − t)² for each example."""
    p, t = np.float64(predictions), np.float64(targets)
    if p.shape != t.shape:
        return UNDEFINED
    return (p - t) ** 2, 2 * (p - t)


def log_softmax_truth(x):
    """The definition, with the gradient of the sum of the first column."""
    loss, grad = cross_entropy_truth(x, [0] * len(x))
    return -loss, -grad


def likelihood_truth(probs, labels):
    """−log p at the label."""
    p, (n, classes) = np.float64(probs), probs.shape
    loss, grad = np.full(n, NAN), np.full((n, classes), NAN)
    for i, y in enumerate(labels):
        if 0 <= y < classes:
            loss[i], grad[i] = -np.log(p[i, y]), -1.0 * (np.arange(classes) == y) / p[i, y]
    return loss, grad


def svm_truth(scores, labels):
    """Σ max(0, s_k − s_y + 1) over the wrong classes."""
    s, (n, classes) = np.float64(scores), scores.shape
    loss, grad = np.full(n, NAN), np.full((n, classes), NAN)
    for i, y in enumerate(labels):
        if 0 <= y < classes:
            over = np.where(np.arange(classes) == y, 0, np.maximum(s[i] - s[i, y] + 1, 0))
            loss[i], grad[i] = over.sum(), (over > 0) - (over > 0).sum() * (np.arange(classes) == y)
    return loss, grad


def _torch(function: Callable) -> Callable:
    def call(first, *rest, **options):
        import torch

        def tensor(a):
            if isinstance(a, np.ndarray) and a.dtype == ml_dtypes.bfloat16:
                return torch.tensor(a.astype(np.float32)).bfloat16()
            tensor = torch.tensor(a)
            return tensor.long() if a.dtype.kind in "iu" and a is not first else tensor

        first = tensor(first)
        if first.is_floating_point() or first.is_complex():
            first.requires_grad_()
        loss = function(torch, first, *map(tensor, rest), **options)
        loss.sum().backward()

        def array(tensor):
            dtype = ml_dtypes.bfloat16 if tensor.dtype == torch.bfloat16 else None
            return tensor.float().numpy().astype(dtype) if dtype else tensor.numpy()

        return array(loss.detach()), array(first.grad)

    return call


def _jax(function: Callable) -> Callable:
    def call(first, *rest, **options):
        first, rest = jnp.asarray(first), [a if isinstance(a, np.ndarray) else jnp.asarray(a) for a in rest]
        fun = lambda first: function(first, *rest, **options)  # noqa: E731
        loss, pull = jax.vjp(jax.jit(fun), first)
        (grad,) = pull(jnp.ones_like(loss))
        return np.asarray(loss), np.asarray(grad)

    return call


def _torch_cross_entropy(torch, logits, labels, class_weights=None, label_smoothing=0.0, **options):
    if {"where", "weights", "ignore_index"} - {"ignore_index"} & options.keys():
        raise NotImplementedError
    weight = None if class_weights is None else torch.tensor(class_weights)
    ignore = options.get("ignore_index", -100)
    function = torch.nn.functional.cross_entropy
    return function(logits, labels, weight, reduction="none", ignore_index=ignore, label_smoothing=label_smoothing)


def _optax_cross_entropy(logits, labels, **options):
    if options.keys() - {"where"}:
        raise NotImplementedError
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels, **options)


def _fcfunc_network(x, dims):
    return fcfunc.apply(fcfunc.init(jax.random.key(0), dims), x)[:, 0]


def _plain_network(x, dims):
    layers = zip(jax.random.split(jax.random.key(0), len(dims)), dims[:-1], dims[1:], strict=False)
    params = [(jax.nn.initializers.he_normal()(k, (m, n)), jnp.zeros(n)) for k, m, n in layers]
    for w, b in params[:-1]:
        x = jax.nn.relu(x @ w + b)
    return (x @ params[-1][0] + params[-1][1])[:, 0]


def _torch_network(torch, x, dims):
    layers = [torch.nn.Linear(m, n) for m, n in itertools.pairwise(dims)]
    for layer in layers[:-1]:
        x = torch.relu(layer(x))
    return layers[-1](x)[:, 0]


def _large(logits, labels, **options):
    """The logits as those of a linear layer with an identity for its weights, in chunks of 2 classes."""
    w, b = jnp.eye(logits.shape[-1], dtype=logits.dtype), jnp.zeros(logits.shape[-1], logits.dtype)
    return losses.linear_softmax_cross_entropy(logits, w, b, labels, chunk_size=2, **options)


OPERATIONS: dict[str, tuple[Callable | None, Callable, Callable | None, Callable | None]] = {
    "cross-entropy": (
        cross_entropy_truth,
        losses.softmax_cross_entropy_with_integer_labels,
        _optax_cross_entropy,
        _torch_cross_entropy,
    ),
    "large output layer": (cross_entropy_truth, _large, None, None),
    "sigmoid cross-entropy": (
        binary_truth,
        losses.sigmoid_binary_cross_entropy,
        optax.sigmoid_binary_cross_entropy,
        lambda torch, z, t: torch.nn.functional.binary_cross_entropy_with_logits(z, t, reduction="none"),
    ),
    "squared error": (
        squared_truth,
        losses.squared_error,
        optax.squared_error,
        lambda torch, p, t: torch.nn.functional.mse_loss(p, t, reduction="none"),
    ),
    "negative log-likelihood": (
        likelihood_truth,
        losses.negative_log_likelihood,
        None,
        lambda torch, p, y: torch.nn.functional.nll_loss(torch.log(p), y, reduction="none"),
    ),
    "multiclass hinge loss (multiclass SVM)": (
        svm_truth,
        losses.multiclass_svm,
        None,
        lambda torch, s, y: s.shape[1] * torch.nn.functional.multi_margin_loss(s, y, reduction="none"),
    ),
    "log-softmax": (
        log_softmax_truth,
        lambda x: ops.log_softmax(x)[:, 0],
        lambda x: jax.nn.log_softmax(x)[:, 0],
        lambda torch, x: torch.nn.functional.log_softmax(x, -1)[:, 0],
    ),
    "network": (None, _fcfunc_network, _plain_network, _torch_network),
}
"""By operation name: the definition, and the functions of fcfunc, Optax (or plain JAX) and PyTorch."""

LOGITS = np.linspace(-1.5, 1.5, 15, dtype=np.float32).reshape(3, 5)
LABELS = np.array([0, 4, 2], np.int32)


def changed(a: np.ndarray, at, value) -> np.ndarray:
    """A copy with `value` at index `at`."""
    a = a.copy()
    a[at] = value
    return a


def _labels(value, dtype: Any = np.int32) -> np.ndarray:
    return changed(LABELS.astype(dtype), 1, value)


ROWS = [
    *(
        Row(f"label {name}", operation, (LOGITS, _labels(value, dtype)))
        for operation in ("cross-entropy", "large output layer")
        for name, value, dtype in (
            ("−1", -1, np.int32),
            ("C", 5, np.int32),
            ("2³¹ − 1", 2**31 - 1, np.int32),
            ("−100", -100, np.int32),
        )
    ),
    Row(
        "label −100 with `ignore_index=-100`",
        "cross-entropy",
        (LOGITS, _labels(-100)),
        {"ignore_index": -100},
        tuple(np.delete(a, 1, 0) for a in cross_entropy_truth(LOGITS, LABELS)),
    ),
    Row("label 255 in uint8", "cross-entropy", (LOGITS, _labels(255, np.uint8))),
    Row("label −1 in int8", "cross-entropy", (LOGITS, _labels(-1, np.int8))),
    Row("label 2⁴⁰ in int64, from NumPy", "cross-entropy", (LOGITS, _labels(2**40, np.int64))),
    Row("float labels", "cross-entropy", (LOGITS, LABELS.astype(np.float32)), truth=UNDEFINED),
    Row("boolean labels", "cross-entropy", (LOGITS, LABELS > 0), truth=UNDEFINED),
    Row("labels [N, 1]", "cross-entropy", (LOGITS, LABELS[:, None]), truth=UNDEFINED),
    Row("fewer labels than rows", "cross-entropy", (LOGITS, LABELS[:2]), truth=UNDEFINED),
    *(
        Row(name, operation, (logits, LABELS) if operation != "log-softmax" else (logits,))
        for operation in ("cross-entropy", "large output layer", "log-softmax")
        for name, logits in (
            ("a row of only −inf", changed(LOGITS, 1, -INF)),
            ("one +inf", changed(LOGITS, (1, 0), INF)),
            ("a NaN", changed(LOGITS, (1, 0), NAN)),
            ("logits of ±3e38", changed(changed(LOGITS, (1, 0), 3e38), (1, 1), -3e38)),
        )
    ),
    Row("+inf at the label", "cross-entropy", (changed(LOGITS, (1, 4), INF), LABELS)),
    Row("−inf at another class", "cross-entropy", (changed(LOGITS, (1, 0), -INF), LABELS)),
    Row("−inf at the label", "cross-entropy", (changed(LOGITS, (1, 4), -INF), LABELS)),
    Row("logits shifted by 1e8", "cross-entropy", (LOGITS * 0 + np.float32(1e8), LABELS)),
    Row("logits shifted by −1e8, in chunks", "large output layer", (LOGITS * 0 - np.float32(1e8), LABELS)),
    *(
        Row(f"100,000 equal logits in {dtype}", "cross-entropy", (np.zeros((2, 100_000), dtype), LABELS[:2]))
        for dtype in (np.dtype("float16"), np.dtype(ml_dtypes.bfloat16), np.dtype("float32"))
    ),
    Row("logits of 6e4 in float16", "cross-entropy", ((LOGITS * 4e4).astype(np.float16), LABELS)),
    Row("empty batch", "cross-entropy", (LOGITS[:0], LABELS[:0])),
    Row("one class", "cross-entropy", (LOGITS[:, :1], LABELS * 0)),
    Row("one row", "cross-entropy", (LOGITS[:1], LABELS[:1])),
    Row("no classes", "cross-entropy", (LOGITS[:, :0], LABELS * 0)),
    Row("float64 logits, from NumPy", "cross-entropy", (LOGITS.astype(np.float64), LABELS)),
    Row(
        "float64 logits of 1e300",
        "cross-entropy",
        (changed(LOGITS.astype(np.float64), (1, 0), 1e300), LABELS),
    ),
    Row("integer logits", "cross-entropy", (LOGITS.astype(np.int32), LABELS), truth=UNDEFINED),
    Row("complex logits", "cross-entropy", (LOGITS.astype(np.complex64), LABELS), truth=UNDEFINED),
    Row("all rows masked", "cross-entropy", (LOGITS, LABELS), {"where": np.zeros(3, bool)}),
    Row(
        "a NaN in a masked row",
        "cross-entropy",
        (changed(LOGITS, (1, 0), NAN), LABELS),
        {"where": np.array([True, False, True])},
    ),
    Row(
        "label C in a masked row",
        "cross-entropy",
        (LOGITS, _labels(5)),
        {"where": np.array([True, False, True])},
    ),
    Row("all row weights 0", "cross-entropy", (LOGITS, LABELS), {"weights": np.zeros(3, np.float32)}),
    Row(
        "row weight 0 on an infinite loss",
        "cross-entropy",
        (changed(LOGITS, (1, 4), -INF), LABELS),
        {"weights": np.array([1, 0, 1], np.float32)},
    ),
    Row("all class weights 0", "cross-entropy", (LOGITS, LABELS), {"class_weights": np.zeros(5, np.float32)}),
    Row("label smoothing of 1", "cross-entropy", (LOGITS, LABELS), {"label_smoothing": 1.0}),
    Row("label smoothing of 1.5", "cross-entropy", (LOGITS, LABELS), {"label_smoothing": 1.5}, UNDEFINED),
    *(
        Row(f"logit {z:g}, target {t:g}", "sigmoid cross-entropy", (np.float32([z, 0.5]), np.float32([t, 1])))
        for z, t in ((INF, 1), (INF, 0), (-INF, 0), (3e38, 0), (-3e38, 1), (1e8, 1), (NAN, 0), (1, NAN), (88.9, 0.5))
    ),
    Row("predictions [N], targets [N, 1]", "squared error", (np.float32([1, 2, 3]), np.float32([[1], [2], [3]]))),
    Row("a NaN target", "squared error", (np.float32([1, 2]), np.float32([1, NAN]))),
    Row("a difference of 1e30", "squared error", (np.float32([1e30, 2]), np.float32([0, 1]))),
    *(
        Row(f"label {name}", operation, (np.abs(LOGITS) / 2 + 0.1, _labels(value)))
        for operation in ("negative log-likelihood", "multiclass hinge loss (multiclass SVM)")
        for name, value in (("−1", -1), ("C", 5))
    ),
    Row("a layer of width 0", "network", (LOGITS, (5, 0, 3)), truth=(np.zeros(3), np.zeros((3, 5)))),
    Row("inputs of the wrong width", "network", (LOGITS, (4, 3)), truth=UNDEFINED),
]
"""The rows of the table."""


@np.errstate(all="ignore")
def outcome(call: Callable, row: Row) -> str:
    """Returns "right", "NaN and NaN", "not offered", the class of an error, or a description of a wrong result."""
    definition, truth = OPERATIONS[row.operation][0], row.truth
    try:
        loss, grad = call(*row.args, **row.options)
    except NotImplementedError:
        return "not offered"
    except Exception as e:
        return type(e).__name__
    if truth is None and definition:
        held = row.args[0].astype(grad.dtype)  # JAX converts float64 to float32, and 1e300 to an infinity
        truth = definition(held, *row.args[1:], **row.options)
    if "ignore_index" in row.options:
        loss, grad = (np.delete(a, 1, 0) if not np.any(a[1]) else a for a in (loss, grad))
    eps = [float(jnp.finfo(a.dtype).eps) for a in (loss, grad)]
    loss, grad = np.float64(loss), np.float64(grad)
    if truth is UNDEFINED or np.shape(truth[0]) != loss.shape or np.shape(truth[1]) != grad.shape:
        return f"wrong: no error, loss {list(loss.shape)}"
    undefined = np.isnan(truth[0])
    by_row = (lambda a: a.reshape(*loss.shape, -1)) if grad.size else (lambda a: np.zeros((*loss.shape, 0)))
    right = _close(loss, truth[0], 32 * eps[0]) & _close(by_row(grad), by_row(truth[1]), 32 * eps[1]).all(-1)
    lost = np.isnan(loss) & (np.isnan(by_row(grad)).any(-1) | (not grad.size))
    fine = np.where(undefined, lost, right)
    if fine.all():
        return "NaN and NaN" if undefined.any() else "right"
    row_of = np.unravel_index(np.argmin(fine), fine.shape)
    bad = not np.isfinite(by_row(grad)[row_of]).all()
    return f"wrong: loss {loss[row_of]:.4g}, gradient {'not finite' if bad else 'finite'}"


def _close(got, expected, tolerance) -> np.ndarray:
    """Whether the values are equal up to rounding. Expected values outside of float32's range count as infinite."""
    with np.errstate(over="ignore"):
        expected = np.where(np.abs(expected) > np.finfo(np.float32).max, np.sign(expected) * INF, expected)
    scale = np.maximum(np.abs(expected), 1e-3)
    with np.errstate(invalid="ignore"):
        return (got == expected) | (np.abs(got - expected) <= tolerance * scale)


def libraries(row: Row) -> dict[str, str]:
    """The outcome of a row in each library."""
    _, ours, of_optax, of_torch = OPERATIONS[row.operation]
    found = {"fcfunc": outcome(_called(_jax(ours), row), row)}
    found["Optax"] = outcome(_called(_jax(of_optax), row), row) if of_optax else "-"
    found["PyTorch"] = outcome(_called(_torch(of_torch), row), row) if of_torch else "-"
    return found


def _called(call: Callable, row: Row) -> Callable:
    """Passes the widths of a network as an option, because they are not an array."""
    if row.operation != "network":
        return call
    return lambda x, dims: call(x, **{"dims": dims})


def ours(row: Row) -> str:
    """The outcome of a row in fcfunc."""
    return outcome(_called(_jax(OPERATIONS[row.operation][1]), row), row)


INTRODUCTION = """# Hostile inputs

This page shows what fcfunc, Optax and PyTorch return for impossible labels, non-finite values and extreme arguments.
Written by `python -m proofs.hostile_inputs` with {versions} on {machine}.

The criterion: a correct result, or NaN in the loss and gradient of the affected rows, or an error before execution.
Anything else is a failure, above all a finite but wrong result.

- "right": the loss and the gradient agree with those that NumPy computes in float64 from the definition.
- "NaN and NaN": both the loss and the gradient of the affected rows are NaN, and the definition gives no value there.
- An error is listed by its class.
- **Bold**: a failure, with the loss of the first wrong row.
- "not offered": the library has the function, but not this option. "-": the library does not have the function.

C is the number of classes. The column "Optax" is plain JAX where Optax has no such function. JAX converts float64
inputs to float32, in which 1e300 is an infinity, and its results are compared with the definition at that infinity.

| input | function | fcfunc | Optax | PyTorch |
|---|---|---|---|---|
"""


def main() -> None:
    """Writes the page."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("fcfunc", "jax", "optax", "torch"))
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    lines = [INTRODUCTION.format(versions=versions, machine=machine).rstrip("\n")]
    counts = dict.fromkeys(("fcfunc", "Optax", "PyTorch"), 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for row in ROWS:
            found = libraries(row)
            for name, text in found.items():
                counts[name] += text.startswith("wrong")
            cells = (f"**{text}**" if text.startswith("wrong") else text for text in found.values())
            lines.append(f"| {row.title} | {row.operation} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    shown = ", ".join(f"{name} {count}" for name, count in counts.items())
    lines += ["", f"Failures among the {len(ROWS)} inputs: {shown}.", ""]
    PAGE.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
