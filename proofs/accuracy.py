"""Measures the accuracy of each rule's gradient in ulps, next to automatic differentiation and PyTorch.

    python -m proofs.accuracy > docs/background/accuracy.md

The true gradient is computed with 60 digits, at arguments and cotangents that the dtype represents exactly. Errors are
in units in the last place (ulps) of the true element, the distance between neighboring numbers of the dtype. Autodiff
differentiates the reference implementation in fcfunc.reference. Needs mpmath, and torch for the PyTorch column.
"""

import importlib.util
import os
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mpmath
import numpy as np

from fcfunc.testing._interpreter import Program, exact
from tests.rules import OPTIONS, RULES, Row, split_real

DTYPES = ("float32", "bfloat16", "float16")
DIGITS = 60
ROWS, COLUMNS, DRAWS = 12, 8, 5
TAILS = (-90.0, -20.0, -6.0, -1.0, -1e-2, -1e-6, 1e-6, 1e-2, 1.0, 6.0, 20.0, 90.0)
OFFSET = {"float32": 1e4, "bfloat16": 100.0, "float16": 100.0}


class Compared(NamedTuple):
    """A row of the table of rules, the points at which it is compared, and torch's function of the same arguments."""

    row: str
    points: tuple[str, ...]
    torch: Callable | None = None


def functions() -> list[Compared]:
    """The functions to compare. Those of torch are called only if it is installed."""
    from types import SimpleNamespace

    if importlib.util.find_spec("torch") is None:
        torch: Any = SimpleNamespace()
        F: Any = SimpleNamespace()
    else:
        import torch  # pyright: ignore[reportMissingImports]
        import torch.nn.functional as F  # pyright: ignore[reportMissingImports]

    cross_entropy = "softmax_cross_entropy_with_integer_labels"
    everywhere, in_range = ("ordinary", "tails", "offset"), ("ordinary",)
    return [
        Compared("affine", everywhere, lambda x, w, b: F.linear(x, w.T, b)),
        Compared("relu", everywhere, lambda x: F.relu(x)),
        Compared("leaky_relu-negative_slope=0.2", everywhere, lambda x: F.leaky_relu(x, 0.2)),
        Compared("elu-alpha=0.7", everywhere, lambda x: F.elu(x, 0.7)),
        Compared("sigmoid", everywhere, lambda x: torch.sigmoid(x)),
        Compared("tanh", everywhere, lambda x: torch.tanh(x)),
        Compared("softplus", everywhere, lambda x: F.softplus(x)),
        Compared("silu", everywhere, lambda x: F.silu(x)),
        Compared("gelu", everywhere, lambda x: F.gelu(x, approximate="tanh")),
        Compared("gelu-approximate=False", everywhere, lambda x: F.gelu(x)),
        Compared("layer-activation=relu", everywhere, lambda x, w, b: F.relu(F.linear(x, w.T, b))),
        Compared("layer-activation=gelu", everywhere, lambda x, w, b: F.gelu(F.linear(x, w.T, b), approximate="tanh")),
        Compared("layer-activation=tanh", everywhere, lambda x, w, b: torch.tanh(F.linear(x, w.T, b))),
        Compared("layer-activation=sigmoid", everywhere, lambda x, w, b: torch.sigmoid(F.linear(x, w.T, b))),
        Compared("layer-activation=softplus", everywhere, lambda x, w, b: F.softplus(F.linear(x, w.T, b))),
        Compared("layer-activation=elu", everywhere, lambda x, w, b: F.elu(F.linear(x, w.T, b))),
        Compared("layer-activation=softmax", everywhere, lambda x, w, b: F.softmax(F.linear(x, w.T, b), -1)),
        Compared("layer_norm", everywhere, lambda x, s, o: F.layer_norm(x, x.shape[-1:], s, o, 1e-5)),
        Compared("rms_norm", everywhere, lambda x, s: F.rms_norm(x, x.shape[-1:], s, 1e-5)),
        Compared("batch_norm", everywhere),
        Compared("softmax", everywhere, lambda x: F.softmax(x, -1)),
        Compared("log_softmax", everywhere, lambda x: F.log_softmax(x, -1)),
        Compared(
            cross_entropy,
            everywhere,
            lambda z, y: F.cross_entropy(z, y.long(), reduction="none"),
        ),
        Compared(
            f"{cross_entropy}-label_smoothing=0.2",
            everywhere,
            lambda z, y: F.cross_entropy(z, y.long(), reduction="none", label_smoothing=0.2),
        ),
        Compared(
            "softmax_cross_entropy_with_integer_labels-where-weights-class_weights-label_smoothing=0.2", everywhere
        ),
        Compared("softmax_cross_entropy", everywhere, lambda z, t: F.cross_entropy(z, t, reduction="none")),
        Compared(
            "linear_softmax_cross_entropy-chunk_size=3",
            everywhere,
            lambda x, w, b, y: F.cross_entropy(F.linear(x, w.T, b), y.long(), reduction="none"),
        ),
        Compared(
            "sigmoid_binary_cross_entropy",
            everywhere,
            lambda z, t: F.binary_cross_entropy_with_logits(z, t, reduction="none"),
        ),
        Compared("squared_error", everywhere, lambda y, t: F.mse_loss(y, t, reduction="none")),
        Compared("negative_log_likelihood", in_range, lambda p, y: F.nll_loss(p.log(), y.long(), reduction="none")),
        Compared("multiclass_svm", everywhere),
        Compared("l2_penalty", in_range),
    ]


def points(row: Row, names: tuple[str, ...], dtype: str, seed: int) -> Iterator[tuple]:
    """Arguments of a row: ordinary numbers, tails in parts of the first argument, or the first argument shifted."""
    rng = np.random.default_rng([seed, 5])
    for i, name in enumerate(names):
        args = row.draw(10 * seed + i, ROWS, COLUMNS, jnp.dtype(dtype))
        if name == "tails":
            tails = jnp.asarray(rng.choice(TAILS, args[0].shape), args[0].dtype)
            args = (jnp.where(jnp.asarray(rng.uniform(size=args[0].shape) < 0.7), tails, args[0]), *args[1:])
        elif name == "offset":
            args = (args[0] + jnp.asarray(OFFSET[dtype], args[0].dtype), *args[1:])
        yield args


def gradients(fun: Callable, args: tuple, g) -> list:
    """The leaves of the gradients with respect to the real arguments."""
    reals, fill = split_real(args)
    return jax.tree.leaves(jax.vjp(lambda *reals: fun(*fill(reals)), *reals)[1](g))


def true_gradients(row: Row, args: tuple, g) -> list[np.ndarray]:
    """The same gradients, computed with many digits."""
    with jax.enable_x64(True), mpmath.workdps(DIGITS):
        wide = jax.tree.map(
            lambda a: jnp.asarray(np.asarray(a, np.float64)) if jnp.issubdtype(a.dtype, jnp.floating) else a, args
        )
        reals, fill = split_real(wide)
        g = jnp.asarray(np.asarray(g, np.float64))
        program = Program(lambda reals: gradients(row.reference, tuple(fill(reals)), g), reals)
        return [np.asarray(a, np.float64) for a in program(*(exact(a) for a in jax.tree.leaves(reals)))]


def by_torch(fun: Callable, args: tuple, g) -> list[np.ndarray]:
    """Torch's gradients of the same function at the same numbers."""
    import torch  # pyright: ignore[reportMissingImports]

    def tensor(a):
        if jnp.issubdtype(a.dtype, jnp.floating):
            wide = torch.tensor(np.asarray(a, np.float64), dtype=getattr(torch, str(a.dtype)))
            return wide.requires_grad_()
        return torch.tensor(np.asarray(a))

    tensors = [tensor(a) for a in args]
    out = fun(*tensors)
    out.backward(torch.tensor(np.asarray(g, np.float64)).to(out.dtype))
    return [t.grad.double().numpy() for t in tensors if t.requires_grad]


def ulps(got: list, truth: list, dtype: str, *, of_array: bool) -> np.ndarray:
    """The errors of all elements in ulps of the element, or of the largest element of its array.

    Elements that the dtype cannot represent are omitted.
    """
    limits, errors = jnp.finfo(dtype), []
    for a, t in zip(got, truth, strict=True):
        held = np.abs(t) < float(limits.max)
        size = np.maximum(np.abs(t), float(limits.tiny))
        if of_array:
            size = np.full_like(size, size.max(initial=float(limits.tiny), where=held))
        error = np.abs(np.asarray(a, np.float64) - t) / (float(limits.eps) * 2.0 ** np.floor(np.log2(size)))
        errors.append(error[held].ravel())
    return np.nan_to_num(np.concatenate(errors), nan=np.inf)


def compared(entry: Compared, dtype: str) -> dict[str, tuple[float, float, float]]:
    """The median and largest error by element, and the largest by array, of the rule, autodiff and torch."""
    row = next(row for row in [*RULES, *OPTIONS] if row.name == entry.row)
    with_torch = entry.torch is not None and importlib.util.find_spec("torch") is not None
    draws: dict[str, list] = {"rule": [], "autodiff": [], **({"torch": []} if with_torch else {})}
    for seed in range(DRAWS):
        by_point: dict[str, list] = {by: [] for by in draws}
        for args in points(row, entry.points, dtype, seed):
            out = jax.eval_shape(row.fun, *args)
            g = jnp.asarray(np.random.default_rng(seed).standard_normal(out.shape), dtype).astype(out.dtype)
            truth = true_gradients(row, args, g)
            by_point["rule"].append((gradients(row.fun, args, g), truth))
            by_point["autodiff"].append((gradients(row.reference, args, g), truth))
            if with_torch:
                by_point["torch"].append((by_torch(entry.torch, args, g), truth))
        for by, found in by_point.items():
            each = np.concatenate([ulps(*pair, dtype, of_array=False) for pair in found])
            of_array = np.concatenate([ulps(*pair, dtype, of_array=True) for pair in found])
            draws[by].append((np.median(each), each.max(), of_array.max()))
    return {by: tuple(float(e) for e in np.median(found, axis=0)) for by, found in draws.items()}


def shown(errors: tuple[float, ...] | None) -> str:
    """Formats errors as a cell of the table."""
    return "" if errors is None else " / ".join(f"{e:.1f}" if e < 100 else f"{e:.1e}" for e in errors)


INTRODUCTION = """# Accuracy of the gradients

This page compares the errors of every rule's gradient with those of automatic differentiation and PyTorch.
Written by `python -m proofs.accuracy` with {versions} on {machine}.

Each cell has three errors in units in the last place (ulps) of the true gradient:

1. the median error, in ulps of each element,
2. the largest error, in ulps of each element,
3. the largest error, in ulps of the largest element of the same array.

Each figure is the median of {draws} draws, and 0.5 is correct rounding. The true gradient is computed with {digits}
digits from the same numbers. The column "autodiff" is automatic differentiation of the reference implementation in
`fcfunc.reference`. The column "PyTorch" is empty where PyTorch has no such function.

Where a sum cancels, or where a slope is the small difference of larger numbers, few digits are left and the second
figure is large. The third figure shows how much that matters relative to the other elements.

A layer in half precision rounds the cotangent of its pre-activation to that dtype, so that both matmuls of the backward
pass run in it, as in PyTorch. The reference implementation keeps that cotangent in float32. The difference shows mainly
in the second figure.

Each draw has arrays of {rows} rows and {columns} columns at three kinds of points:

- standard normal numbers,
- the same with many elements of the first argument replaced by one of
  {tails},
- the same with the first argument shifted by {offset:g} ({half_offset:g} in half precision).

`negative_log_likelihood` and `l2_penalty` are measured on the first kind only.
"""


def introduction() -> str:
    """The introduction of the page, with the versions and the machine."""
    installed = [name for name in ("jax", "numpy", "torch") if importlib.util.find_spec(name)]
    return INTRODUCTION.format(
        versions=", ".join(f"{name} {version(name)}" for name in installed),
        machine=f"{os.cpu_count()} CPU cores ({platform.machine()})",
        draws=DRAWS,
        digits=DIGITS,
        rows=ROWS,
        columns=COLUMNS,
        tails=", ".join(f"{t:g}" for t in TAILS),
        offset=OFFSET["float32"],
        half_offset=OFFSET["float16"],
    )


def main() -> list[str]:
    """Prints the page; returns the errors that are more than twice those of autodiff."""
    print(introduction())
    worse = []
    for dtype in DTYPES:
        print(f"## {dtype}\n\n| rule | fcfunc | autodiff | PyTorch |\n|---|---|---|---|")
        for entry in functions():
            errors = compared(entry, dtype)
            print(f"| {entry.row} | {' | '.join(shown(errors.get(by)) for by in ('rule', 'autodiff', 'torch'))} |")
            for kind, rule, auto in zip(
                ("median", "largest by element", "largest by array"), errors["rule"], errors["autodiff"], strict=True
            ):
                if rule > 2 * max(auto, 0.5):
                    worse.append(f"| {entry.row} | {dtype} | {kind} | {rule:.1f} | {auto:.1f} |")
        print()
    print("## Errors more than twice those of autodiff\n")
    print("Errors of autodiff below 0.5 count as 0.5.\n")
    print("| rule | dtype | error | fcfunc | autodiff |\n|---|---|---|---|---|", *worse, sep="\n")
    return worse


if __name__ == "__main__":
    main()
