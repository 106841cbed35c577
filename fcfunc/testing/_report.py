"""`check_vjp`, which runs the checks on a function, and the report that it returns."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fcfunc import _arguments
from fcfunc._arguments import FLOATS
from fcfunc.testing import _oracle
from fcfunc.testing._case import Case, DrawnBy, NotApplicable, Shapes, base_sizes, close_statics, first_line, x64_for
from fcfunc.testing._checks import CHECKS, FULL_ONLY
from fcfunc.testing._compare import Finding, finding


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of one check.

    Attributes:
      check: its name.
      status: "passed", "failed" or "not applicable".
      reason: why it could not apply; empty otherwise.
      findings: what it found.
    """

    check: str
    status: str
    reason: str
    findings: tuple[Finding, ...]


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of `check_vjp`; `print` it.

    Attributes:
      name: of the function.
      rules: the names of the rules that it calls.
      results: one `Result` for each check, in the order they ran.
      arguments: a verdict for each real argument, by its path: "ok" or the checks that its gradient failed.
      statics: the positions of the arguments that were held fixed because they are not arrays.
    """

    name: str
    rules: tuple[str, ...]
    results: tuple[Result, ...]
    arguments: dict[str, str]
    statics: tuple[int, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All that was found, in the order of the checks."""
        return tuple(finding for result in self.results for finding in result.findings)

    def __str__(self) -> str:
        passed = [r.check for r in self.results if r.status == "passed"]
        lines = [f"check_vjp of {self.name} (rules: {', '.join(self.rules)}): {'ok' if self.ok else 'FAILED'}"]
        lines += [f"  {path}: {verdict}" for path, verdict in self.arguments.items()]
        if self.statics:
            lines.append(f"  held fixed, not being arrays: arguments {', '.join(map(str, self.statics))}")
        lines += [f"- {finding}" for finding in self.findings]
        lines.append(f"passed: {', '.join(passed) or 'none'}")
        lines += [f"not applicable: {r.check}: {r.reason}" for r in self.results if r.status == "not applicable"]
        return "\n".join(lines)


def check_vjp(
    fun: Callable,
    args: tuple | str | Callable,
    *,
    reference: Callable | None = None,
    kwargs: dict | None = None,
    fast: bool = False,
    seed: int = 0,
    dtype: str = "float32",
    dtypes: Sequence[str] = ("float16", "bfloat16", "float32"),
    sizes: dict[str, int] | None = None,
    at_kink: dict[float, float] | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
) -> Report:
    """Tries to show that a hand-written rule is wrong.

    The oracle is automatic differentiation of the undecorated function, which is read from the `custom_vjp` objects
    that the function calls, wherever they stand in it. docs/checking-rules.md lists the checks.

    Args:
      fun: a `custom_vjp` function, or a function that calls some, of positional arrays or trees of arrays.
      args: concrete arguments, as a tuple; or their shapes by name, `"n d, d m, m"`, with what to draw where it is not
        normal numbers: `"n c, n:int<c"` (labels), `"n d:positive"`, `"n:bool"`, `":key"`; or a function
        `draw(rng, n, d)` that returns the tuple, its parameters after the first being the sizes. By shapes or by a
        function the checker draws and sweeps the sizes. Non-array arguments (a string, a Python number, a function)
        and `nondiff_argnums` are held fixed.
      reference: the oracle's function, where the rule's own is in doubt or the rule is a deliberate surrogate.
      kwargs: options of `fun`, held fixed.
      fast: fewer directions and sizes, no element-by-element differences, no meshes: under a second once warm.
      seed: of every draw; the same seed gives the same report.
      dtype: of what is drawn.
      dtypes: the other dtypes that the rule claims, checked besides where the function takes them; float64 always is.
      sizes: the sizes by name, instead of a sweep.
      at_kink: the derivative that the rule declares at a kink, by the point: `{0.0: 0.0}` for ReLU. The first real
        argument is set to the point everywhere.
      only: names of the checks to run; empty for all.
      skip: names of checks to leave out, e.g. `("reverse_over_reverse",)` of a rule meant for one derivative.

    Returns:
      A `Report`.

    Raises:
      TypeError: complex arguments, which are not supported; `args` that is not a tuple, string or function.
      ValueError: the function calls no rule, has no real argument or output, or a shape cannot be read; no such check.

    Example:
      >>> from fcfunc import ops
      >>> check_vjp(ops.relu, "n d", at_kink={0.0: 0.0}, fast=True).ok
      True
    """
    only = (only,) if isinstance(only, str) else tuple(only)
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    _arguments.function("check_vjp", fun=fun)
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"check_vjp: seed must be an integer of at least 0, got {seed!r}")
    if at_kink is not None and not isinstance(at_kink, dict):
        raise TypeError(f"check_vjp: at_kink must be a dict of point: derivative, got {at_kink!r}")
    for name in (dtype, *dtypes):
        if name not in FLOATS:
            raise ValueError(f"check_vjp: a dtype must be one of {', '.join(FLOATS)}, got {name!r}")
    names = [check.__name__ for check in CHECKS]
    unknown = [name for name in (*only, *skip) if name not in names]
    if unknown:
        raise ValueError(f"check_vjp: no check {unknown[0]!r}; there are {', '.join(names)}")
    source = Shapes(args) if isinstance(args, str) else DrawnBy(args) if callable(args) else None
    if source is None and not isinstance(args, tuple):
        raise TypeError(f"check_vjp: args must be a tuple, a string of shapes or a function, got {type(args).__name__}")
    letters = tuple(source.letters) if source else ()
    for name, size in (sizes or {}).items():
        if name not in letters or not isinstance(size, int) or size < 0:
            raise ValueError(f"check_vjp: sizes must give {', '.join(letters) or 'none'} as integers, got {sizes}")
    first = base_sizes(list(letters)) | (sizes or {}) if source else {}
    make = functools.partial(_case, fun, args, source, reference, kwargs or {}, fast, seed, dtype, at_kink or {})
    case, statics = make(first)
    rules = _rules_called(fun, case)

    def redraw(sizes, salt=0):
        return dataclasses.replace(make(sizes, salt)[0], dtypes=tuple(dtypes))

    swept = () if sizes is not None else letters
    case = dataclasses.replace(case, redraw=redraw if source else None, letters=swept, dtypes=tuple(dtypes))
    options = {"seed": seed, "dtype": dtype, "reference": reference, "kwargs": kwargs, "at_kink": at_kink}
    line = functools.partial(_reproduction, case.fun.__name__, args, **options)
    results = []
    for check in CHECKS:
        if check.__name__ not in skip and (not only or check.__name__ in only):
            results.append(_result(check, case, line))
    failed: dict[str, list[str]] = {path: [] for path in case.paths}
    for result in results:
        for found in result.findings:
            failed.get(found.argument, []).append(result.check)
    verdicts = {path: ", ".join(dict.fromkeys(names)) or "ok" for path, names in failed.items()}
    return Report(case.fun.__name__, rules, tuple(results), verdicts, statics)


def assert_vjp(fun: Callable, args: tuple | str | Callable, **options) -> None:
    """`check_vjp` for a test: raises where it found something.

    Args:
      fun: as for `check_vjp`.
      args: as for `check_vjp`.
      **options: as for `check_vjp`.

    Raises:
      AssertionError: with the printed report, where something was found.

    Example:
      >>> from fcfunc import ops
      >>> assert_vjp(ops.affine, "n d, d m, m", fast=True)
    """
    report = check_vjp(fun, args, **options)
    if not report.ok:
        raise AssertionError(str(report))


def _case(fun, args, source, reference, kwargs, fast, seed, dtype, at_kink, sizes, salt=0):
    """The case at some sizes, and the positions of the arguments that are held fixed."""
    given = source.draw(np.random.default_rng([seed, salt, *sizes.values()]), sizes) if source else args
    held = set(getattr(fun, "nondiff_argnums", ()))
    fixed = {i: a for i, a in enumerate(given) if i in held or not _is_tree_of_arrays(a)}
    free = tuple(
        jax.tree.map(np.asarray, a, is_leaf=_is_key) if not _is_key(a) else a
        for i, a in enumerate(given)
        if i not in fixed
    )
    complexes = [leaf for leaf in jax.tree.leaves(free) if jnp.issubdtype(leaf.dtype, jnp.complexfloating)]
    if complexes:
        raise TypeError(f"check_vjp: complex arguments are not supported, got {complexes[0].dtype}")
    statics, options = tuple(fixed.items()), tuple(sorted(kwargs.items()))
    bind = close_statics
    try:
        hash((statics, options, fun, reference))
    except TypeError:
        bind = close_statics.__wrapped__  # what cannot be hashed cannot be kept for the next call
    call = bind(fun, statics, options)
    oracle = bind(reference, statics, options) if reference is not None else call
    case = Case(call, _oracle.without_rules(oracle), free, seed, dict(sizes), fast, at_kink, reference is not None)
    if source:
        case = case.cast(jnp.dtype(dtype))
    if any(not np.isfinite(leaf.astype(np.float64)).all() for leaf in case.reals):
        raise ValueError("check_vjp: the arguments hold a NaN or an infinity; those are tried by the check extremes")
    if not case.reals:
        raise ValueError("check_vjp: no argument is an array of real floating-point numbers: nothing to differentiate")
    return case, tuple(fixed)


def _rules_called(fun: Callable, case: Case) -> tuple[str, ...]:
    with x64_for(case.dtype):
        calls, raised = _oracle.watch(case.fun, *case.args)
        if raised is not None:
            raise raised
        outs = jax.eval_shape(case.fun, *case.args)
    if not calls:
        name = getattr(fun, "__name__", type(fun).__name__)
        raise ValueError(f"check_vjp: {name} has no rule of its own and calls no custom_vjp function: nothing to check")
    if not outs:
        raise ValueError("check_vjp: no output is an array of real floating-point numbers: nothing to differentiate")
    return tuple(dict.fromkeys(call.name for call in calls))


def _result(check: Callable, case: Case, line: Callable) -> Result:
    name = check.__name__
    if case.fast and check in FULL_ONLY:
        return Result(name, "not applicable", "left to the full mode", ())
    try:
        with np.errstate(all="ignore"):  # infinities are compared on purpose
            found = list(check(case))
    except NotApplicable as e:
        return Result(name, "not applicable", str(e), ())
    except Exception as e:
        found = [finding(case, f"the check ended in an error: {first_line(e)}")]
    found = [dataclasses.replace(f, check=name, seed=case.seed, sizes=f.sizes or case.sizes) for f in found]
    once = {(f.argument, f.message, f.dtype): dataclasses.replace(f, reproduce=line(f, case)) for f in found}
    return Result(name, "failed" if found else "passed", "", tuple(once.values()))


def _reproduction(name: str, args, finding: Finding, case: Case, **options) -> str:
    """The call that finds it again; what has no short spelling stands under the caller's own names."""
    swept = finding.check == "shape_sweep"
    shown = {"only": ("oracle" if swept else finding.check,), "seed": options["seed"]}
    if swept or (case.sizes and not case.letters):
        shown["sizes"] = finding.sizes
    if options["dtype"] != "float32":
        shown["dtype"] = options["dtype"]
    shown |= {key: options[key] for key in ("kwargs", "at_kink") if options[key]}
    spelled = [f"{key}={value!r}" for key, value in shown.items()]
    spelled += ["reference=reference"] if options["reference"] is not None else []
    spelled += ["fast=True"] if case.fast else []
    source = repr(args) if isinstance(args, str) else "draw" if callable(args) else "args"
    return f"check_vjp({name}, {source}, {', '.join(spelled)})"


def _is_key(leaf) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _is_tree_of_arrays(arg) -> bool:
    leaves = jax.tree.leaves(arg)
    return bool(leaves) and all(isinstance(leaf, jax.Array | np.ndarray | np.generic) for leaf in leaves)
