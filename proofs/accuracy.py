"""How accurate each rule's gradient is, in units in the last place, beside automatic differentiation and torch.

    python -m proofs.accuracy > docs/accuracy.md

The truth is the gradient in numbers of 60 digits, at arguments and cotangents that the dtype can hold; an error is
counted in ulps, the distances between neighboring numbers of the dtype, of each element of the truth. Autodiff is that
of the reference implementation in fcfunc.reference, and torch's is its own. Needs mpmath, and torch for its columns.
"""

import importlib.util
from collections.abc import Callable, Iterator
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
    """A row of the table of rules, the points where it is compared, and torch's function of the same arguments."""

    row: str
    points: tuple[str, ...]
    torch: Callable | None = None


def functions() -> list[Compared]:
    """What is compared; without torch installed, its functions are not called."""
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
    """Arguments of a row: ordinary numbers, the first argument in tails in places, and the first at a common offset."""
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
    """The leaves of the gradients of the real arguments."""
    reals, fill = split_real(args)
    return jax.tree.leaves(jax.vjp(lambda *reals: fun(*fill(reals)), *reals)[1](g))


def true_gradients(row: Row, args: tuple, g) -> list[np.ndarray]:
    """The same in numbers of many digits."""
    with jax.enable_x64(True), mpmath.workdps(DIGITS):
        wide = jax.tree.map(
            lambda a: jnp.asarray(np.asarray(a, np.float64)) if jnp.issubdtype(a.dtype, jnp.floating) else a, args
        )
        reals, fill = split_real(wide)
        g = jnp.asarray(np.asarray(g, np.float64))
        program = Program(lambda reals: gradients(row.reference, tuple(fill(reals)), g), reals)
        return [np.asarray(a, np.float64) for a in program(*(exact(a) for a in jax.tree.leaves(reals)))]


def by_torch(fun: Callable, args: tuple, g) -> list[np.ndarray]:
    """The gradients by torch of the same function at the same numbers."""
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
    """The errors of all elements in ulps of the element, or of the largest of its array.

    Elements that the dtype cannot hold are left out.
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
    """By the rule, by autodiff and by torch: the median and largest error by element, and the largest by array."""
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
    """Errors as a cell of the table."""
    return "" if errors is None else " / ".join(f"{e:.1f}" if e < 100 else f"{e:.1e}" for e in errors)


INTRODUCTION = f"""# Accuracy of the gradients

Printed by `python -m proofs.accuracy`. Each cell has three errors in units in the last place (ulps) of the true
gradient: the median and the largest, each in ulps of the element itself, and the largest in ulps of the largest element
of its array; of {DRAWS} draws each is the median. 0.5 is correct rounding. Where a sum cancels, or a slope is much
smaller than the numbers it is the difference of, its error is many ulps of what is left, for everyone; the third figure
says how much it matters beside the other elements.

A layer in half precision rounds the cotangent of its pre-activation to that dtype, so that both products of the
backward pass run in it, as torch does; the reference leaves it in float32. This shows in the second figure alone.

The arrays have {ROWS} rows and {COLUMNS} columns of ordinary numbers (standard normal); then the first argument has
{", ".join(f"{t:g}" for t in TAILS)}
in places; then it is at a common offset of {OFFSET["float32"]:g} (of {OFFSET["float16"]:g} in half precision). The
truth is computed in {DIGITS} digits at the same numbers.
"""


def main() -> list[str]:
    """Prints the page; returns the rules that are more than twice as inaccurate as autodiff."""
    print(INTRODUCTION)
    worse = []
    for dtype in DTYPES:
        print(f"## {dtype}\n\n| rule | fcfunc | autodiff of the reference | torch |\n|---|---|---|---|")
        for entry in functions():
            errors = compared(entry, dtype)
            print(f"| {entry.row} | {' | '.join(shown(errors.get(by)) for by in ('rule', 'autodiff', 'torch'))} |")
            for kind, rule, auto in zip(
                ("median", "by element", "by array"), errors["rule"], errors["autodiff"], strict=True
            ):
                if rule > 2 * max(auto, 0.5):
                    worse.append(f"{entry.row} in {dtype} ({kind}: {rule:.1f} against {auto:.1f})")
        print()
    print(f"More than twice as inaccurate as autodiff: {', '.join(worse) or 'none'}.")
    return worse


if __name__ == "__main__":
    main()
