"""What a check finds, and how two gradients are compared."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from fcfunc.testing._case import Case, NotApplicable, first_line

EVERY_ARGUMENT = ""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a rule.

    Attributes:
      message: what is wrong.
      argument: the path of the argument whose gradient is wrong, `args[0]['w']`; empty if it is about all of them.
      index: the index of the worst element, or None.
      got: the rule's value there.
      expected: what it should be.
      ulps: the error in units in the last place of the expected value.
      dtype: the dtype in which it was found.
      check: the name of the check that found it.
      seed: the seed of the draw.
      sizes: the sizes that were drawn.
      reproduce: a line of Python that finds it again.
    """

    message: str
    argument: str = EVERY_ARGUMENT
    index: tuple[int, ...] | None = None
    got: float | None = None
    expected: float | None = None
    ulps: float | None = None
    dtype: str = ""
    check: str = ""
    seed: int = 0
    sizes: dict[str, int] | None = None
    reproduce: str = ""

    def __str__(self) -> str:
        where = f" {self.argument}{list(self.index) if self.index else ''}" if self.argument else ""
        values = ""
        if self.got is not None and self.expected is not None:
            values = f": got {self.got:.9g}, expected {self.expected:.9g}, off by {abs(self.got - self.expected):.2g}"
            values += f" ({self.ulps:.2g} ulp of {self.dtype})" if self.ulps is not None else ""
        sizes = " at " + ", ".join(f"{k}={v}" for k, v in self.sizes.items()) if self.sizes else ""
        return f"{self.check}{where}{sizes}, {self.dtype}{values}\n    {self.message}\n    {self.reproduce}"


def finding(case: Case, message: str, argument: str = EVERY_ARGUMENT, *values) -> Finding:
    """A finding at a case; `values` are the index, what was got and expected, and the error in ulps."""
    return Finding(message, argument, *values, dtype=case.dtype.name)


def compare(case: Case, got: list, expected: list, allowed: list | float, message: str) -> Iterator[Finding]:
    """A finding for each real leaf with an element further from its expected value than allowed: the worst one."""
    if len(got) != len(expected):
        yield finding(case, f"{message}: {len(expected)} gradients expected, got {len(got)}")
        return
    tolerances = allowed if isinstance(allowed, list) else [allowed] * len(got)
    paths = [*case.paths, *["the cotangent"] * (len(got) - len(case.paths))]
    for path, a, b, tolerance in zip(paths, got, expected, tolerances, strict=False):
        if a.shape != b.shape:
            yield finding(case, f"{message}: shape {list(b.shape)} expected, got {list(a.shape)}", path)
            continue
        a, b = a.astype(np.float64), b.astype(np.float64)
        with np.errstate(invalid="ignore"):
            error = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
        error = np.where(np.isnan(error), np.inf, error)
        excess = error - tolerance
        if error.size and excess.max() > 0:
            worst = tuple(int(i) for i in np.unravel_index(np.argmax(excess), a.shape))
            spacing = case.eps * 2.0 ** np.floor(np.log2(abs(b[worst]))) if b[worst] and np.isfinite(b[worst]) else None
            ulps = None if spacing is None else float(error[worst] / spacing)
            yield finding(case, message, path, worst, float(a[worst]), float(b[worst]), ulps)


def both(case: Case, by_rule: Callable, by_oracle: Callable, message: str) -> tuple[Any, Any, Finding | None]:
    """Both results. If only the rule's raises, that is a finding; if the oracle's does, the check cannot apply."""
    try:
        expected = by_oracle()
    except Exception as e:
        raise NotApplicable(f"the oracle itself raises: {first_line(e)}") from None
    try:
        return by_rule(), expected, None
    except Exception as e:
        return None, expected, finding(case, f"{message}: {first_line(e)}")


def max_abs(leaf: np.ndarray) -> float:
    """The largest finite magnitude of a leaf."""
    values = np.abs(leaf.astype(np.float64))
    return float(values.max(initial=0.0, where=np.isfinite(values)))


def rounding(case: Case, leaves: list, factor: float = 1024.0) -> list[float]:
    """By how much two orders of the same arithmetic may differ: a multiple of eps times the largest of each leaf."""
    tiny = float(jnp.finfo(case.dtype).tiny)
    return [factor * case.eps * max_abs(leaf) + tiny for leaf in leaves]


def truth_and_allowance(case: Case, g: list) -> tuple[list, list[float]]:
    """The gradient in float64, and what a gradient in the case's own dtype may be off by.

    Allowed is a multiple of the error that automatic differentiation makes in that dtype, and of how far the true
    gradient moves when each input is moved by its own rounding error: where a sum cancels, a right rule is off too.
    """
    auto = case.vjp(case.oracle, g)
    try:
        wide = case.in_float64
    except NotApplicable:
        return auto, rounding(case, auto, 64.0)
    wide_g = [a.astype(np.float64) for a in g]
    truth = wide.vjp(wide.oracle, wide_g)
    allowed = [
        8 * max_abs(np.where(np.isfinite(a.astype(np.float64) - t), a.astype(np.float64) - t, 0))
        + 16 * case.eps * max_abs(t)
        for a, t in zip(auto, truth, strict=True)
    ]
    suspicious = any(a > 4 * max_abs(t) for a, t in zip(allowed, truth, strict=True))
    if suspicious and not case.same_function_in_float64:  # a mask drawn in float64 is another mask, say
        return auto, rounding(case, auto, 64.0)
    rng = case.rng(99)
    for _ in range(3):
        moved = wide.with_reals([a * (1 + case.eps * rng.choice([-1.0, 1.0], a.shape)) for a in wide.reals])
        moved_g = [a * (1 + case.eps * rng.choice([-1.0, 1.0], a.shape)) for a in wide_g]
        shifted = moved.vjp(wide.oracle, moved_g)
        allowed = [max(t, 8 * max_abs(s - u)) for t, s, u in zip(allowed, shifted, truth, strict=True)]
    tiny = float(jnp.finfo(case.dtype).tiny)
    # Where automatic differentiation overflows in this dtype too, that is accepted.
    truth = [
        np.where(np.isfinite(a.astype(np.float64)), t, a.astype(np.float64)) for a, t in zip(auto, truth, strict=True)
    ]
    return truth, [t + tiny for t in allowed]


def disagreements(case: Case, directions: int, message: str) -> Iterator[Finding]:
    """The rule's gradients against the oracle's, element by element, for several cotangents."""
    for direction in range(directions):
        at = case.redraw_numbers(direction)
        g = at.cotangent(direction)
        got, expected, raised = both(
            at, lambda at=at, g=g: at.vjp(at.fun, g), lambda at=at, g=g: truth_and_allowance(at, g), "the rule raises"
        )
        if raised:
            yield raised
            return
        truth, allowed = expected
        found = list(compare(at, got, truth, allowed, message))
        yield from found
        if found:
            return
