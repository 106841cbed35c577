"""What a check of a rule says, and how two gradients are compared."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from fcfunc.testing._case import Case, NotApplicable, first_line

CHECKS: dict[str, Callable[[Case], Iterator["Finding"]]] = {}
FULL_ONLY: set[str] = set()
NONE = ""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a rule.

    Attributes:
      check: the name of the check that found it.
      argument: the path of the argument whose gradient is wrong, `args[0]['w']`; empty where it is about all.
      message: what is wrong.
      index: the worst element's index, or None.
      got: the rule's value there.
      expected: what it should be.
      ulps: the error in units of the last place of the expected value.
      seed: of the draw.
      sizes: the sizes drawn.
      dtype: of the case.
      reproduce: a line of Python that finds it again.
    """

    check: str
    argument: str
    message: str
    index: tuple[int, ...] | None = None
    got: float | None = None
    expected: float | None = None
    ulps: float | None = None
    seed: int = 0
    sizes: dict[str, int] | None = None
    dtype: str = ""
    reproduce: str = ""

    def __str__(self) -> str:
        where = f" {self.argument}{list(self.index) if self.index else ''}" if self.argument else ""
        values = ""
        if self.got is not None and self.expected is not None:
            values = f": got {self.got:.9g}, expected {self.expected:.9g}, off by {abs(self.got - self.expected):.2g}"
            values += f" ({self.ulps:.2g} ulp of {self.dtype})" if self.ulps is not None else ""
        sizes = " at " + ", ".join(f"{k}={v}" for k, v in self.sizes.items()) if self.sizes else ""
        return f"{self.check}{where}{sizes}, {self.dtype}{values}\n    {self.message}\n    {self.reproduce}"


def check(function: Callable) -> Callable:
    """Registers a check under its name."""
    CHECKS[function.__name__] = function
    return function


def full_only(function: Callable) -> Callable:
    """Leaves a check to the full mode."""
    FULL_ONLY.add(function.__name__)
    return function


def compare(name: str, case: Case, got: list, expected: list, allowed: list | float, message: str) -> Iterator[Finding]:
    """A finding for each real leaf with an element further from its expected value than allowed: the worst one."""
    if len(got) != len(expected):
        yield Finding(
            name, NONE, f"{message}: {len(expected)} gradients expected, got {len(got)}", dtype=case.dtype.name
        )
        return
    tolerances = allowed if isinstance(allowed, list) else [allowed] * len(got)
    paths = [*case.paths, *["the cotangent"] * (len(got) - len(case.paths))]
    for path, a, b, tolerance in zip(paths, got, expected, tolerances, strict=False):
        if a.shape != b.shape:
            text = f"{message}: shape {list(b.shape)} expected, got {list(a.shape)}"
            yield Finding(name, path, text, dtype=case.dtype.name)
            continue
        a, b = a.astype(np.float64), b.astype(np.float64)
        with np.errstate(invalid="ignore"):
            error = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
        error = np.where(np.isnan(error), np.inf, error)
        excess = error - tolerance
        if error.size and excess.max() > 0:
            worst = tuple(int(i) for i in np.unravel_index(np.argmax(excess), a.shape))
            spacing = case.eps * 2.0 ** np.floor(np.log2(abs(b[worst]))) if b[worst] and np.isfinite(b[worst]) else None
            yield Finding(
                name, path, message, worst, float(a[worst]), float(b[worst]),
                None if spacing is None else float(error[worst] / spacing), dtype=case.dtype.name,
            )  # fmt: skip


def attempt(
    name: str, case: Case, by_rule: Callable, by_oracle: Callable, message: str
) -> tuple[Any, Any, Finding | None]:
    """Both results; where only the rule's raises that is a finding, where the oracle's does the check cannot apply."""
    try:
        expected = by_oracle()
    except Exception as e:
        raise NotApplicable(f"the oracle itself raises: {first_line(e)}") from None
    try:
        return by_rule(), expected, None
    except Exception as e:
        return None, expected, Finding(name, NONE, f"{message}: {first_line(e)}", dtype=case.dtype.name)


def largest(leaf: np.ndarray) -> float:
    """The largest finite magnitude of a leaf."""
    values = np.abs(leaf.astype(np.float64))
    return float(values.max(initial=0.0, where=np.isfinite(values)))


def rounding(case: Case, leaves: list, factor: float = 1024.0) -> list[float]:
    """What two orders of the same arithmetic may differ by: a multiple of eps, of the largest element of each leaf."""
    tiny = float(jnp.finfo(case.dtype).tiny)
    return [factor * case.eps * largest(leaf) + tiny for leaf in leaves]


def truth_and_allowance(case: Case, g: list) -> tuple[list, list[float]]:
    """The gradient in float64, and what a gradient in the case's own dtype may be off by.

    Allowed is a multiple of the error that automatic differentiation makes in that dtype, and of how far the true
    gradient moves when each input is moved by its own rounding error: where a sum cancels, a right rule is off too.
    """
    auto = case.pull(case.oracle, g)
    try:
        wide = case.in_float64
    except NotApplicable:
        return auto, rounding(case, auto, 64.0)
    wide_g = [a.astype(np.float64) for a in g]
    truth = wide.pull(wide.oracle, wide_g)
    allowed = [
        8 * largest(np.where(np.isfinite(a.astype(np.float64) - t), a.astype(np.float64) - t, 0))
        + 16 * case.eps * largest(t)
        for a, t in zip(auto, truth, strict=True)
    ]
    suspicious = any(a > 4 * largest(t) for a, t in zip(allowed, truth, strict=True))
    if suspicious and not case.same_function_in_float64:  # a mask drawn in float64 is another mask, say
        return auto, rounding(case, auto, 64.0)
    rng = case.rng(99)
    for _ in range(3):
        moved = wide.having([a * (1 + case.eps * rng.choice([-1.0, 1.0], a.shape)) for a in wide.reals])
        moved_g = [a * (1 + case.eps * rng.choice([-1.0, 1.0], a.shape)) for a in wide_g]
        shifted = moved.pull(wide.oracle, moved_g)
        allowed = [max(t, 8 * largest(s - u)) for t, s, u in zip(allowed, shifted, truth, strict=True)]
    tiny = float(jnp.finfo(case.dtype).tiny)
    # What overflows in this dtype by automatic differentiation too is right as it is.
    truth = [
        np.where(np.isfinite(a.astype(np.float64)), t, a.astype(np.float64)) for a, t in zip(auto, truth, strict=True)
    ]
    return truth, [t + tiny for t in allowed]


def agrees(name: str, case: Case, directions: int, message: str) -> Iterator[Finding]:
    """The rule's gradients against the oracle's, element by element, for several cotangents."""
    for direction in range(directions):
        at = case.redrawn(direction)
        g = at.cotangent(direction)
        got, expected, raised = attempt(
            name,
            at,
            lambda at=at, g=g: at.pull(at.fun, g),
            lambda at=at, g=g: truth_and_allowance(at, g),
            "the rule raises",
        )
        if raised:
            yield raised
            return
        truth, allowed = expected
        found = list(compare(name, at, got, truth, allowed, message))
        yield from found
        if found:
            return
