"""Findings, and the comparison of two gradients."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from fcfunc.testing._case import Case, Inconclusive, NotApplicable, RuleRaised, first_line, widened

EVERY_ARGUMENT = ""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One error in a rule.

    Attributes:
      message: what is wrong.
      argument: the path of the argument whose gradient is wrong, such as `args[0]['w']`; empty if it concerns all.
      index: the index of the worst element, or None.
      got: the rule's value at that index.
      expected: the correct value.
      ulps: the error in units in the last place of the expected value.
      dtype: the dtype in which the error was found.
      check: the name of the check that found the error.
      seed: the seed of the draw.
      sizes: the sizes that were drawn.
      reproduce: Python code that reproduces the finding.
      also: the other checks that found the same error.
    """

    message: str
    argument: str = EVERY_ARGUMENT
    index: tuple[int, ...] | None = None
    got: complex | None = None
    expected: complex | None = None
    ulps: float | None = None
    dtype: str = ""
    check: str = ""
    seed: int = 0
    sizes: dict[str, Any] | None = None
    reproduce: str = ""
    also: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = f" {self.argument}{list(self.index) if self.index else ''}" if self.argument else ""
        values = ""
        if self.got is not None and self.expected is not None:
            off = abs(self.got - self.expected)
            values = f": got {self.got:.9g}, expected {self.expected:.9g}"
            values += f", off by {off:.2g}" if math.isfinite(off) else ""
            values += f" ({self.ulps:.2g} ulp of {self.dtype})" if self.ulps is not None else ""
        sizes = " at " + ", ".join(f"{k}={v}" for k, v in self.sizes.items()) if self.sizes else ""
        also = f"\n    also found by {', '.join(self.also)}" if self.also else ""
        code = "".join(f"\n    {line}" for line in self.reproduce.splitlines())
        return f"{self.check}{where}{sizes}, {self.dtype}{values}\n    {self.message}{also}{code}"


def finding(case: Case, message: str, argument: str = EVERY_ARGUMENT, *values) -> Finding:
    """A finding for a case; `values` are the index, the value and the expected value there, and the error in ulps."""
    return Finding(message, argument, *values, dtype=case.dtype.name, sizes=case.sizes)


def attempt(findings: Iterator[Finding]) -> tuple[list[Finding], Exception | str | None]:
    """The findings of a check, and its remark on passing or the NotApplicable or Inconclusive that ended it.

    An exception loses no earlier finding. A rule that raises is a finding, unless the oracle raises the same error.
    """
    found: list[Finding] = []
    try:
        with np.errstate(all="ignore"):  # infinities are compared on purpose
            while True:
                found.append(next(findings))
    except StopIteration as end:
        return found, end.value
    except (NotApplicable, Inconclusive) as e:
        return found, e
    except RuleRaised as e:
        try:
            e.case.by_oracle(e.case.cotangent(0))
        except Inconclusive as by_oracle:
            if str(by_oracle).endswith(str(e)):
                return found, Inconclusive(f"the rule and automatic differentiation both raise: {e}")
        way = f"{e.way} " if e.way else ""
        return [*found, finding(e.case, f"{way}the rule raises: {e}{e.place}")], None
    except Exception as e:
        return found, Inconclusive(f"the check ended in an error: {first_line(e)}")


def compare(case: Case, got: list, expected: list, allowed: list | float, message: str) -> Iterator[Finding]:
    """Yields a finding for each leaf with an element outside its tolerance, at the worst element."""
    if len(got) != len(expected):
        yield finding(case, f"{message}: expected {len(expected)} gradients, got {len(got)}")
        return
    tolerances = allowed if isinstance(allowed, list) else [allowed] * len(got)
    paths = [*case.paths, *["the cotangent"] * (len(got) - len(case.paths))]
    for path, a, b, tolerance in zip(paths, got, expected, tolerances, strict=False):
        if a.shape != b.shape:
            yield finding(case, f"{message}: expected shape {list(b.shape)}, got {list(a.shape)}", path)
            continue
        a, b = widened(a), widened(b)
        with np.errstate(invalid="ignore"):
            error = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
        error = np.where(np.isnan(error), np.inf, error)
        excess = error - tolerance
        if error.size and excess.max() > 0:
            worst = tuple(int(i) for i in np.unravel_index(np.argmax(excess), a.shape))
            size = abs(b[worst])
            ulps = in_ulps(case, float(error[worst]), float(size))
            yield finding(case, message, path, worst, a[worst].item(), b[worst].item(), ulps)


def in_ulps(case: Case, error: float, size: float) -> float | None:
    """An error in units in the last place of a number of this size; None if the size is 0 or non-finite."""
    return error / (case.eps * 2.0 ** math.floor(math.log2(size))) if size and math.isfinite(size) else None


def max_abs(leaf: np.ndarray) -> float:
    """The largest finite magnitude of a leaf."""
    values = np.abs(widened(leaf))
    return float(values.max(initial=0.0, where=np.isfinite(values)))


def underflow(case: Case) -> float:
    """The magnitude below which terms may have been flushed to 0; float16 is computed in float32."""
    limits = jnp.finfo(case.dtype)
    return float(limits.tiny) * (2.0**24 if limits.maxexp > 100 else 1.0)


def rounding(case: Case, leaves: list, factor: float = 1024.0, g: list | None = None) -> list[float]:
    """How far two evaluation orders of the same arithmetic may differ: a multiple of eps times each leaf's maximum.

    If a whole leaf cancels, its size says nothing about the size of the terms that were added. If `leaves` are the
    gradients for the cotangent `g`, the change of the outputs per unit of the argument estimates those terms.
    """
    tiny = float(jnp.finfo(case.dtype).tiny)
    size = max((max_abs(a) * max_abs(b) for a, b in zip(g or (), case.outputs() if g else (), strict=True)), default=0)
    terms = [size / max(max_abs(x), 1e-3) for x in case.reals] if g else [0.0] * len(leaves)
    return [
        min(factor * case.eps, 0.25) * (max_abs(leaf) + term) + case.rtol * max_abs(leaf) + case.atol + tiny
        for leaf, term in zip(leaves, terms, strict=True)
    ]


def moved_by_rounding(case: Case, arrays: list, rng: np.random.Generator) -> list:
    """Perturbs each element up or down by the rounding error of the case's dtype."""
    return [a * (1 + case.eps * rng.choice([-1.0, 1.0], a.shape)) for a in arrays]


def truth_and_allowance(case: Case, g: list) -> tuple[list, list]:
    """The gradient in float64, and the error that a gradient in the case's dtype may have.

    The tolerance is a multiple of two errors: that of automatic differentiation in this dtype, and the change of the
    true gradient when every input is perturbed by its rounding error. If a sum cancels, a correct rule is off too.
    """
    auto = case.by_oracle(g)
    least = rounding(case, auto, 16.0, g)
    try:
        wide = case.in_float64
    except NotApplicable:
        # A sum over an argument's elements that cancels has an error of the size of its terms.
        terms = 16 * case.eps * max(map(max_abs, g), default=0.0) * max(map(max_abs, case.reals), default=0.0)
        inside = case.computes_in != case.dtype  # then autodiff in that dtype is the only comparison
        return auto, [max(t if inside else 4 * t, terms) for t in least]
    wide_g = [widened(a) for a in g]
    truth = wide.by_oracle(wide_g)
    allowed = [
        8 * max_abs(np.where(np.isfinite(widened(a) - t), widened(a) - t, 0)) + t0
        for a, t, t0 in zip(auto, truth, least, strict=True)
    ]
    suspicious = any(a > 4 * max_abs(t) + b for a, t, b in zip(allowed, truth, least, strict=True))
    if suspicious and not case.same_function_in_float64:  # for example, a mask drawn in float64 is a different mask
        return auto, [4 * t for t in least]
    rng = case.rng(99)
    for _ in range(3):
        moved = wide.with_reals(moved_by_rounding(case, wide.reals, rng))
        shifted = moved.by_oracle(moved_by_rounding(case, wide_g, rng))
        allowed = [max(t, 8 * max_abs(s - u)) for t, s, u in zip(allowed, shifted, truth, strict=True)]
    # An overflow is accepted if automatic differentiation overflows in this dtype too.
    truth = [np.where(np.isfinite(widened(a)), t, widened(a)) for a, t in zip(auto, truth, strict=True)]
    return truth, allowed


def disagreements(case: Case, directions: int, message: str) -> Iterator[Finding]:
    """Compares the rule's gradients with the oracle's, element by element, for several cotangents."""
    undecided: list[str] = []
    findings: list[Finding] = []
    for direction in range(directions):
        at = case.redraw_numbers(direction)
        g = at.cotangent(direction)
        truth, allowed = truth_and_allowance(at, g)
        got = at.by_rule(g)
        found = list(compare(at, got, where_defined(got, truth), allowed, message))
        reason = says_nothing(at, got, truth)
        if reason:
            undecided.append(reason)
            findings += found
        elif found:
            yield from found
            return
    if len(undecided) == directions:
        raise Inconclusive(undecided[0])
    yield from findings[:1]  # the oracle is 0 at this point, but not at all of them


def systematic_error(case: Case, message: str) -> Iterator[Finding]:
    """Finds a leaf that is too large or too small as a whole by more than a few rounding errors of one number."""
    g, rng = case.cotangent(0), case.rng(98)
    auto, got = case.by_oracle(g), case.by_rule(g)
    cancels = rounding(case, auto, 8.0, g)  # below this, a sum of larger terms is only rounding
    try:
        wide, wide_g = case.in_float64, [widened(a) for a in g]
    except NotApplicable:  # automatic differentiation in that dtype is the only comparison
        truth, moved = [widened(a) for a in auto], []
        least = (8 if case.eps > 1e-4 else 1024) * case.eps
    else:
        if not case.same_function_in_float64:
            return
        truth, least = wide.by_oracle(wide_g), 2 * case.eps
        moved = [wide.with_reals(moved_by_rounding(case, wide.reals, rng)).by_oracle(wide_g) for _ in range(3)]
    for leaf, (path, t) in enumerate(zip(case.paths, truth, strict=True)):
        size = float(np.sum(np.abs(t) ** 2))
        if not np.isfinite(size) or max_abs(t) <= 2 * cancels[leaf]:
            continue
        of_auto, of_rule, *of_moved = (
            abs(float(np.sum((widened(a[leaf]) - t) * np.conj(t)).real)) / size for a in (auto, got, *moved)
        )
        allowed = least + 4 * max(of_auto, *of_moved, 0.0) + case.rtol
        if np.isfinite(of_auto) and not of_rule <= allowed:
            off = f"too large or too small by {of_rule:.1%}, which is more than rounding explains"
            yield finding(case, f"{message} as a whole is {off}", path)


def says_nothing(case: Case, got: list, expected: list) -> str:
    """Why the oracle's gradient cannot be compared with the rule's; empty if it can.

    It cannot if it is NaN everywhere, or if it is 0 everywhere while the rule is not and the outputs do change.
    """
    if not any(a.size for a in expected):
        return "the arguments are empty"
    if all(np.isnan(widened(a)).all() for a in expected):
        return "automatic differentiation gives NaN here; the finite-difference checks decide"
    if any(a.any() for a in expected) or not any(max_abs(a) > 1e-6 for a in got):
        return ""
    moved = case.with_reals([a * np.asarray(1.25, a.dtype) for a in case.reals]).outputs()
    if all(np.allclose(widened(a), widened(b), 4 * case.eps) for a, b in zip(moved, case.outputs(), strict=True)):
        return ""
    why = "automatic differentiation gives 0 everywhere, as it does for a function that searches or rounds"
    return f"{why}; the finite-difference checks decide, or pass reference="


def where_defined(got: list, expected: list) -> list:
    """The oracle's gradient, or the rule's where only the oracle's is NaN: some rules exist to avoid that NaN."""
    if [a.shape for a in got] != [a.shape for a in expected]:
        return expected
    return [
        np.where(np.isnan(widened(b)) & np.isfinite(widened(a)), a, b).astype(b.dtype)
        for a, b in zip(got, expected, strict=True)
    ]


def raising(case: Case, way: str, run: Callable) -> Any:
    """Calls `run()`. If it raises, raises `RuleRaised` with a description of the way in which it was run."""
    try:
        with np.errstate(all="ignore"):
            return run()
    except (NotApplicable, Inconclusive):
        raise
    except RuleRaised as e:
        raise RuleRaised(e.case, e.error, way) from e
    except Exception as e:
        raise RuleRaised(case, e, way) from e
