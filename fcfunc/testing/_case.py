"""The test case: arguments (drawn or given), and gradients at them."""

import contextlib
import dataclasses
import functools
import inspect
import itertools
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fcfunc._arguments import first_line

TOKEN = re.compile(r"(?P<dims>(([A-Za-z_]\w*|\d+)\s*)*)(:(?P<kind>int<\w+|int|bool|positive|key))?")


class NotApplicable(Exception):
    """Raised by a check that cannot apply to a case; its text is the reason, for the report."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A function, its oracle and one set of arguments.

    Attributes:
      fun: arrays in, a list of real arrays out.
      oracle: the same without its rules.
      args: the arguments, trees of NumPy arrays (and random keys).
      seed: of every draw.
      sizes: what the letters of a shape string stood for.
      fast: fewer directions, fewer sizes.
      at_kink: the declared derivative at a kink, by the point.
      has_reference: the oracle was given by the caller, not read from the rule.
      redraw: makes the case at other sizes; None where the arguments were given.
      letters: the names of the sizes.
      dtypes: the other dtypes that the rule claims.
      compiled: whether the rule is compiled; the oracle always is.
    """

    fun: Callable
    oracle: Callable
    args: tuple
    seed: int
    sizes: dict[str, int]
    fast: bool
    at_kink: dict[float, float]
    has_reference: bool
    redraw: Callable[..., "Case"] | None = None
    letters: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("float16", "bfloat16", "float32")
    compiled: bool = False

    @functools.cached_property
    def paths(self) -> list[str]:
        """The real leaves of the arguments, as a person would write them."""
        leaves = jax.tree.leaves_with_path(self.args)
        return [f"args{jax.tree_util.keystr(path)}" for path, leaf in leaves if is_real(leaf)]

    @functools.cached_property
    def reals(self) -> list[np.ndarray]:
        """The real leaves of the arguments."""
        return [leaf for leaf in jax.tree.leaves(self.args) if is_real(leaf)]

    @property
    def dtype(self) -> np.dtype:
        """The narrowest dtype among the real leaves, which bounds what can be asked of the gradient."""
        return max((leaf.dtype for leaf in self.reals), key=lambda d: jnp.finfo(d).eps)

    @property
    def eps(self) -> float:
        """The distance from 1 to the next number of `dtype`."""
        return float(jnp.finfo(self.dtype).eps)

    def fill(self, reals: Sequence) -> tuple:
        """The arguments with other real leaves."""
        new = iter(reals)
        return jax.tree.map(lambda leaf: next(new) if is_real(leaf) else leaf, self.args)

    def with_reals(self, reals: Sequence) -> "Case":
        """The same case at other real leaves."""
        return dataclasses.replace(self, args=self.fill(reals))

    def cast(self, dtype) -> "Case":
        """The same case with every real leaf in another dtype."""
        return self.with_reals([leaf.astype(dtype) for leaf in self.reals])

    def at_even_sizes(self) -> "Case":
        """The case at even sizes, where it was drawn, so that two devices can share each axis."""
        if self.redraw is None or not self.letters:
            return self
        return self.redraw({name: 4 + 2 * i for i, name in enumerate(self.letters)})

    def redraw_numbers(self, salt: int) -> "Case":
        """The case at other numbers of the same sizes and dtype, where it was drawn; salt 0 is the case itself."""
        if self.redraw is None or not salt:
            return self
        other = self.redraw(self.sizes, salt).cast(self.dtype)
        return dataclasses.replace(other, redraw=self.redraw, compiled=self.compiled)

    @functools.cached_property
    def same_function_in_float64(self) -> bool:
        """Whether the outputs in float64 are those in the case's dtype, rounded."""
        wide, outs = self.in_float64, []
        for case in (self, wide):
            with x64_for(case.dtype):
                outs.append([a.astype(np.float64) for a in to_numpy(case.fun(*case.args))])
        scale = 100 * self.eps
        return all(
            np.allclose(a, b, rtol=scale, atol=scale * (1 + np.abs(b).max(initial=0)))
            for a, b in zip(*outs, strict=True)
        )

    def rng(self, salt: int) -> np.random.Generator:
        """Draws that repeat: from the seed, the salt of a check and nothing else."""
        return np.random.default_rng([self.seed, salt])

    def cotangent(self, salt: int) -> list[np.ndarray]:
        """Random numbers of order 1 in the shapes and dtypes of the outputs."""
        rng = self.rng(salt)
        with x64_for(self.dtype):
            outs = jax.eval_shape(self.oracle, *self.args)
        return [rng.standard_normal(out.shape).astype(out.dtype) for out in outs]

    def vjp(self, fun: Callable, g: list) -> list[np.ndarray]:
        """The gradients of the real leaves, as NumPy arrays."""
        run = compiled_gradients if self.compiled or fun is self.oracle else gradients
        with x64_for(self.dtype):
            return to_numpy(run(fun, self.args, to_jax(g)))

    def as_compiled(self) -> "Case":
        """The same case, its rule compiled: at many sizes or points that is faster, and eager is checked elsewhere."""
        return dataclasses.replace(self, compiled=True)

    @functools.cached_property
    def in_float64(self) -> "Case":
        """The same case in float64, where the function takes it; else NotApplicable says why it does not."""
        wide = dataclasses.replace(self.cast(np.float64), compiled=self.compiled or self.fast)
        try:
            with x64_for(np.float64):
                outs = jax.eval_shape(self.fun, *wide.args)
        except Exception as e:
            raise NotApplicable(f"the function does not take float64: {first_line(e)}") from None
        if any(out.dtype != np.float64 for out in outs):
            raise NotApplicable(f"the function returns {', '.join(str(o.dtype) for o in outs)} for float64 arguments")
        return wide


def in_float64_if_taken(case: Case) -> Case:
    """The case in float64 if its function takes that, where a difference is a difference and not rounding."""
    try:
        return case.in_float64
    except NotApplicable:
        return case


def gradients(fun: Callable, args: tuple, g: list) -> list:
    """The gradients of the real leaves of `args`."""
    _, back = jax.vjp(fun, *args)
    return only_real(back(to_jax(g)))


compiled_gradients = jax.jit(gradients, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def compiled_outputs(fun: Callable, args: tuple) -> list:
    """The outputs of `fun`, compiled."""
    return fun(*args)


@functools.partial(jax.jit, static_argnums=0)
def compiled_tangents(fun: Callable, args: tuple, tangents: list) -> list:
    """The tangents of the outputs of `fun` for those of the real leaves of `args`, compiled."""
    leaves, treedef = jax.tree.flatten(args)

    def of_reals(*reals):
        new = iter(reals)
        return fun(*jax.tree.unflatten(treedef, [next(new) if is_real(leaf) else leaf for leaf in leaves]))

    return jax.jvp(of_reals, [leaf for leaf in leaves if is_real(leaf)], tangents)[1]


def only_real(cotangents) -> list:
    """The leaves that are not float0, the cotangent of what cannot be differentiated."""
    return [leaf for leaf in jax.tree.leaves(cotangents) if leaf.dtype != jax.dtypes.float0]


def to_numpy(tree) -> list[np.ndarray]:
    """Leaves as NumPy arrays, in their own dtype."""
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def to_jax(arrays: Sequence) -> list[jax.Array]:
    """A list of arrays on the device."""
    return [jnp.asarray(a) for a in arrays]


def x64_for(dtype):
    """Float64 for the block where `dtype` is, the caller's setting otherwise."""
    return jax.enable_x64(True) if np.dtype(dtype) == np.float64 else contextlib.nullcontext()


def is_real(leaf) -> bool:
    """Whether a leaf is an array of real floating-point numbers."""
    return jnp.issubdtype(leaf.dtype, jnp.floating)


@functools.lru_cache(maxsize=256)
def close_statics(fun: Callable, statics: tuple, kwargs: tuple) -> Callable:
    """`fun` as a function of its arrays alone, and only the real leaves of its output."""

    def of_arrays(*arrays):
        args, left = [], iter(arrays)
        static = dict(statics)
        for i in range(len(arrays) + len(statics)):
            args.append(static[i] if i in static else next(left))
        outs = jax.tree.leaves(fun(*args, **dict(kwargs)))
        return [out for out in map(jnp.asarray, outs) if jnp.issubdtype(out.dtype, jnp.floating)]

    of_arrays.__name__ = getattr(fun, "__name__", type(fun).__name__)
    return of_arrays


class Shapes:
    """Arguments by shape, `"n d, d m, m"`: letters are sizes, equal letters equal sizes, numbers themselves.

    A suffix says what is drawn: `n:int<c` labels in [0, c), `n:int` integers, `n:bool`, `n d:positive` numbers in
    (0, 1), `:key` a random key; without one, normal numbers.
    """

    def __init__(self, text: str):
        self.tokens, self.letters, position = [], [], 0
        for part in text.split(","):
            match = TOKEN.fullmatch(part.strip())
            if match is None or not text.strip():
                raise ValueError(
                    "check_vjp: cannot read this shape; expected are names or numbers of sizes, then at most one of "
                    f":int, :int<size, :bool, :positive, :key\n  {text}\n  {' ' * position}{'^' * max(len(part), 1)}"
                )
            dims, kind = match["dims"].split(), match["kind"] or "real"
            self.tokens.append((dims, kind))
            names = [*dims, kind.partition("<")[2]]
            self.letters += [n for n in names if n and not n.isdigit() and n not in self.letters]
            position += len(part) + 1

    def draw(self, rng: np.random.Generator, sizes: dict[str, int]) -> tuple:
        """Arguments of these sizes."""
        return tuple(self._one(rng, dims, kind, sizes) for dims, kind in self.tokens)

    @staticmethod
    def _one(rng, dims, kind, sizes):
        shape = [sizes[d] if d in sizes else int(d) for d in dims]
        if kind.startswith("int"):
            name = kind.partition("<")[2]
            below = sizes[name] if name in sizes else int(name or 10)
            return rng.integers(0, max(below, 1), shape, dtype=np.int32)
        if kind == "bool":
            return rng.integers(0, 2, shape).astype(bool)
        if kind == "key":
            return jax.random.key(int(rng.integers(2**31)))
        return rng.standard_normal(shape) if kind == "real" else rng.uniform(0.05, 1, shape)


class DrawnBy:
    """Arguments by a function `draw(rng, n, d)`: its parameters after the first without a default are the sizes."""

    def __init__(self, draw: Callable):
        self._draw = draw
        parameters = list(inspect.signature(draw).parameters.values())[1:]
        self.letters = [p.name for p in parameters if p.default is p.empty]

    def draw(self, rng: np.random.Generator, sizes: dict[str, int]) -> tuple:
        """Arguments of these sizes."""
        drawn = self._draw(rng, **sizes)
        if not isinstance(drawn, tuple):
            raise TypeError(f"check_vjp: draw must return a tuple of arguments, got {type(drawn).__name__}")
        return drawn


def base_sizes(letters: list[str]) -> dict[str, int]:
    """Small, all different, none a power of two: no two axes can be confused."""
    return dict(zip(letters, [5, 3, 7, 6, *range(9, 9 + len(letters))], strict=False))


def swept_sizes(letters: list[str], *, fast: bool) -> list[dict[str, int]]:
    """Batch 1, all 1, square, 0, primes, more than 32, more than a tile of 128: the sizes at which rules break."""
    base = base_sizes(letters)
    first, others = letters[0], letters[1:]
    sweep = [dict.fromkeys(letters, 1), base | {first: 0}, base | {first: 67}]
    if not fast:
        sweep += [dict.fromkeys(letters, 4), base | {first: 1}]
        sweep += [base | {name: 1} for name in others]
        sweep += [base | {name: 0} for name in others]
        sweep += [base | {name: 131} for name in letters]
        sweep += [base | {name: 257} for name in letters]
        sweep += [base | {a: 8, b: 8} for a, b in itertools.combinations(letters, 2)]
        sweep += [base | {first: n} for n in (32, 520)]
        sweep += [dict.fromkeys(letters, 2), dict.fromkeys(letters, 66)]
    return sweep
