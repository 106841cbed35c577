"""Arguments drawn by shape or by a function, and the sizes at which a rule is checked."""

import inspect
import itertools
import math
import re
from collections.abc import Callable

import jax
import numpy as np

NUMBER = r"-?(?:inf|\d+(?:\.\d+)?(?:e-?\d+)?)"
TOKEN = re.compile(
    r"(?P<dims>(([A-Za-z_]\w*|\d+)\s*)*)"
    rf"(:(?P<kind>int<\w+|int|bool|positive|complex|key|(?P<low>{NUMBER})\.\.(?P<high>{NUMBER})))?"
)
KINDS = ":int, :int<size, :bool, :positive, :low..high, :complex, :key"

STREAM = 0x66636675
"""Entropy for the draws of this package, so that they differ from those of a caller's `default_rng(seed)`."""


class Shapes:
    """Arguments described by shapes, `"n d, d m, m"`: names are sizes, equal names equal sizes, numbers fixed sizes.

    A suffix sets what is drawn: `n:int<c` labels in [0, c), `n:int` integers, `n:bool` booleans, `n d:positive`
    positive numbers, `n d:-1..1` numbers in that range, `n d:complex` complex numbers, `:key` a random key. The
    default is normal numbers.
    """

    def __init__(self, text: str, ranges: dict | None = None):
        self.tokens, self.letters, self.ranges, position = [], [], {}, 0
        for i, part in enumerate(text.split(",")):
            match = TOKEN.fullmatch(part.strip())
            if match is None or not text.strip():
                raise ValueError(
                    f"check_vjp: cannot read the shape {part.strip()!r}; expected names or numbers of sizes, then at "
                    f"most one of {KINDS}\n  {text}\n  {' ' * position}{'^' * max(len(part), 1)}"
                )
            dims, kind = match["dims"].split(), match["kind"] or "real"
            if kind == "positive":
                self.ranges[i] = (0.0, math.inf)
            elif match["low"]:
                self.ranges[i], kind = (float(match["low"]), float(match["high"])), "range"
            if i in (ranges or {}) and kind == "real":
                self.ranges[i], kind = tuple(map(float, (ranges or {})[i])), "range"
            self.tokens.append((dims, kind))
            names = [*dims, kind.partition("<")[2]]
            self.letters += [n for n in names if n and not n.isdigit() and n not in self.letters]
            position += len(part) + 1

    def draw(self, rng: np.random.Generator, sizes: dict) -> tuple:
        """Draws arguments of these sizes. A tuple as a size stands for several axes, or for none."""
        return tuple(self._one(rng, i, dims, kind, sizes) for i, (dims, kind) in enumerate(self.tokens))

    def _one(self, rng, i, dims, kind, sizes):
        shape = []
        for d in dims:
            size = sizes.get(d, d)
            shape += size if isinstance(size, tuple) else [int(size)]
        if kind.startswith("int"):
            name = kind.partition("<")[2]
            below = sizes.get(name, name or 10)
            below = math.prod(below) if isinstance(below, tuple) else int(below)
            return rng.integers(0, max(below, 1), shape, dtype=np.int32)
        if kind == "bool":
            return rng.integers(0, 2, shape).astype(bool)
        if kind == "key":
            return jax.random.key(int(rng.integers(2**31)))
        if kind == "complex":
            return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)) / math.sqrt(2)
        return rng.standard_normal(shape) if kind == "real" else draw_in(rng, shape, *self.ranges[i])


class DrawnBy:
    """Arguments drawn by a function `draw(rng, n, d)`; its parameters without a default, after `rng`, are the sizes."""

    ranges: dict = {}  # noqa: RUF012

    def __init__(self, draw: Callable):
        self._draw = draw
        parameters = list(inspect.signature(draw).parameters.values())[1:]
        self.letters = [p.name for p in parameters if p.default is p.empty]

    def draw(self, rng: np.random.Generator, sizes: dict) -> tuple:
        """Draws arguments of these sizes."""
        drawn = self._draw(rng, **sizes)
        if not isinstance(drawn, tuple):
            raise TypeError(f"check_vjp: draw must return a tuple of arguments, got {type(drawn).__name__}")
        return drawn


def draw_in(rng: np.random.Generator, shape, low: float, high: float) -> np.ndarray:
    """Draws numbers in a range, at least 5 % of its length from its ends, or close to the end if there is only one."""
    if math.isinf(low) and math.isinf(high):
        return rng.standard_normal(shape)
    if math.isinf(high):
        return low + rng.uniform(0.05, 1, shape)
    if math.isinf(low):
        return high - rng.uniform(0.05, 1, shape)
    return low + (high - low) * rng.uniform(0.05, 0.95, shape)


def base_sizes(letters: list[str]) -> dict[str, int]:
    """Small sizes, all different and none a power of two, so that no two axes can be confused."""
    return dict(zip(letters, [5, 3, 7, 6, *range(9, 9 + len(letters))], strict=False))


def few_sizes(letters: list[str]) -> list[dict[str, int]]:
    """All sizes 1, an empty batch, a batch larger than 64, and a batch of 128."""
    base, first = base_sizes(letters), letters[0]
    return [dict.fromkeys(letters, 1), base | {first: 0}, base | {first: 67}, base | {first: 128}]


def many_sizes(letters: list[str]) -> list[dict[str, int]]:
    """Sizes at which rules tend to break: batch 1, square, 0, primes, more than 32, more than a tile of 128."""
    base = base_sizes(letters)
    first, others = letters[0], letters[1:]
    sweep = [dict.fromkeys(letters, 4), base | {first: 1}]
    sweep += [base | {name: 1} for name in others]
    sweep += [base | {name: 0} for name in others]
    sweep += [base | {name: 131} for name in letters]
    sweep += [base | {name: 257} for name in letters]
    sweep += [base | {a: 8, b: 8} for a, b in itertools.combinations(letters, 2)]
    sweep += [base | {first: n} for n in (32, 520)]
    sweep += [dict.fromkeys(letters, 2), dict.fromkeys(letters, 66)]
    return sweep


def other_ranks(letters: list[str]) -> list[dict]:
    """The first size as no axis and as two axes: a single row, and a batch of batches."""
    base, first = base_sizes(letters), letters[0]
    return [base | {first: ()}, base | {first: (2, 3)}]
