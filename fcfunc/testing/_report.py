"""`check_vjp`, which runs the checks on a function, and the `Report` that it returns."""

import ast
import dataclasses
import functools
import importlib
import inspect
import math
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from fcfunc import _arguments
from fcfunc._arguments import FLOATS
from fcfunc.testing import _case, _draw, _oracle
from fcfunc.testing._case import Case, Inconclusive, x64_for
from fcfunc.testing._checks import CHECKS, GROUPS, ON_REQUEST, WITH_ORACLE, more_accurate
from fcfunc.testing._compare import Finding, attempt
from fcfunc.testing._numbers import as_in_float64, oracle_misleads, projected_differences

WITH_DIFFERENCES = ("projected_differences", "finite_differences")
"""The checks that compare the rule with differences of the function itself."""

SWEEPS = ("shape_sweep", "every_size", "ranks")

WITH_MPMATH = ("multiprecision", "second_multiprecision")

MISLED = (
    "differences of the function agree with the rule but not with automatic differentiation, as happens if the "
    "function searches or rounds; pass reference= to decide"
)


@dataclasses.dataclass(frozen=True)
class Result:
    """The outcome of one check.

    Attributes:
      check: the name of the check.
      status: "passed", "failed", "inconclusive", "not applicable" or "not run".
      reason: why the check did not run or could not decide, what ended a failed check early, or a remark on a check
        that passed, such as "equal to 99 digits"; empty otherwise.
      findings: the errors it found.
      required: whether a finding fails the report; findings of groups that were not required are notes.
    """

    check: str
    status: str
    reason: str
    findings: tuple[Finding, ...]
    required: bool = True


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of `check_vjp`; `print` it to read it.

    Attributes:
      name: the name of the function.
      rules: the names of the rules that it calls.
      results: one `Result` for each check, in order.
      arguments: the verdict for each differentiated array, by path: "ok", the checks that failed, or "not compared".
      statics: the paths of the arguments that were held fixed: those that are not arrays or not in `argnums`.
    """

    name: str
    rules: tuple[str, ...]
    results: tuple[Result, ...]
    arguments: dict[str, str]
    statics: tuple[str, ...]

    @property
    def status(self) -> str:
        """One of "ok", "FAILED" and "inconclusive": no error was found, but something required was not compared."""
        return "FAILED" if self.findings else "inconclusive" if self._undecided else "ok"

    @property
    def _undecided(self) -> str:
        """Why a report without findings is inconclusive; empty if it is not."""
        required = [r for r in self.results if r.required]
        stopped = next((r.reason for r in required if r.status == "not run"), "")
        if stopped:
            ran = sum(r.status != "not run" for r in required)
            return f"{stopped} after {ran} of {len(required)} checks"
        if not any(r.status == "passed" and r.check in WITH_ORACLE for r in required):
            return "no check could compare the gradient with anything independent of the rule"
        for group in GROUPS:
            members = [r for r in required if r.check in {check.__name__ for check in CHECKS[group]}]
            if members and not any(r.status == "passed" for r in members):
                return f"no check of the required group {group} could run: {members[0].reason}"
        return ""

    @property
    def ok(self) -> bool:
        """Whether the status is "ok"."""
        return self.status == "ok"

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The findings that fail the report, one for each cause, in the order of the checks."""
        return _folded(_by_cause(r for r in self.results if r.required))

    @property
    def notes(self) -> tuple[Finding, ...]:
        """The findings of groups that were not required, without causes that are in `findings`."""
        known = _by_cause(r for r in self.results if r.required)
        further = _by_cause(r for r in self.results if not r.required)
        return _folded({cause: found for cause, found in further.items() if cause not in known})

    def __str__(self) -> str:
        lines = [f"check_vjp of {self.name} (rules: {', '.join(self.rules)}): {self.status}"]
        if self.status == "inconclusive":
            lines.append(f"  no error was found, but {self._undecided}")
        lines += [f"  {path}: {verdict}" for path, verdict in self.arguments.items()]
        if self.statics:
            lines.append(f"  held fixed: {', '.join(self.statics)}")
        lines += [f"- {finding}" for finding in self.findings]
        if self.notes:
            lines.append(f"notes, from groups that were not required ({', '.join(GROUPS)}):")
            lines += [f"- {finding}" for finding in self.notes]
        passed = [f"{r.check} ({r.reason})" if r.reason else r.check for r in self.results if r.status == "passed"]
        lines.append(_wrapped(f"passed: {', '.join(passed) or 'none'}"))
        for status in ("failed", "inconclusive", "not applicable", "not run"):
            reasons: dict[str, list[str]] = {}
            for r in self.results:
                if r.status == status and r.reason:
                    reasons.setdefault(r.reason, []).append(r.check)
            title = "ended early" if status == "failed" else status
            lines += [_wrapped(f"{title}: {', '.join(checks)}: {reason}") for reason, checks in reasons.items()]
        return "\n".join(lines)


def _wrapped(line: str) -> str:
    """Wraps a long line so that notebooks and terminals show all of it."""
    return textwrap.fill(line, 100, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _by_cause(results: Iterator[Result]) -> dict[tuple, list[Finding]]:
    """Groups the findings by their likely cause."""
    causes: dict[tuple, list[Finding]] = {}
    for result in results:
        for one in result.findings:
            _, raises, error = one.message.partition("raises: ")
            if raises:
                cause: tuple = ("raises", error.partition(":")[0])
            elif one.check in WITH_ORACLE:
                cause = ("differs", one.argument)
                if ("differs", "") in causes or (not one.argument and any(c[0] == "differs" for c in causes)):
                    cause = next(c for c in causes if c[0] == "differs" and (not c[1] or not one.argument))
            else:
                cause = (one.check, one.argument, one.message)
            causes.setdefault(cause, []).append(one)
    return causes


def _folded(causes: dict[tuple, list[Finding]]) -> tuple[Finding, ...]:
    """One finding for each cause, with the other checks that found it in `also`."""
    folded = []
    for first, *others in causes.values():
        also = dict.fromkeys(one.check for one in others if one.check != first.check)
        folded.append(dataclasses.replace(first, also=tuple(also)))
    return tuple(folded)


def check_vjp(
    fun: Callable,
    args: tuple | str | Callable,
    *,
    reference: Callable | None = None,
    kwargs: dict | None = None,
    argnums: int | Sequence[int] | None = None,
    require: str | Sequence[str] = (),
    dtype: str = "float32",
    dtypes: Sequence[str] = ("float16", "bfloat16", "float32"),
    float64: bool = True,
    rtol: float = 0.0,
    atol: float = 0.0,
    sizes: dict[str, int] | None = None,
    ranges: dict[int, tuple[float, float]] | None = None,
    at_kink: dict[float, float] | None = None,
    seed: int = 0,
    budget: float | None = None,
    only: str | Sequence[str] = (),
    skip: str | Sequence[str] = (),
) -> Report:
    """Tests a hand-written derivative rule and reports the errors that it finds.

    The oracle is automatic differentiation of the undecorated function. It is obtained by removing every `custom_vjp`
    rule that the function calls, at any depth, or the `custom_jvp` rules if there is no `custom_vjp`.
    docs/guides/checking-a-rule.md lists the checks.

    Args:
      fun: a function that has a rule or calls functions that have one; its positional arguments are arrays or pytrees.
      args: one of the following. A tuple of concrete arguments. Or a string of shapes, `"n d, d m, m"`, with suffixes
        for values other than normal numbers: `"n c, n:int<c"` (labels), `"n d:positive"`, `"n d:-1..1"`, `"n:bool"`,
        `"n:complex"`, `":key"`. Or a function `draw(rng, n, d)` that returns the tuple; its parameters after the first
        are the sizes. With shapes or a function, the checker draws the arguments and sweeps the sizes. Arguments that
        are not arrays (strings, Python numbers, functions in a pytree) and `nondiff_argnums` are held fixed.
      reference: a function that replaces the oracle, if the rule's own function is in doubt or the rule is a
        deliberate surrogate.
      kwargs: keyword arguments of `fun`, held fixed.
      argnums: the positions of the arguments to differentiate; all by default. Arrays in the others are held fixed.
      require: groups of checks beyond the first derivative: "second_order", "extremes", "sizes", "meshes", or "all".
        Findings of groups that are not required are notes, which do not fail the report.
      dtype: the dtype of the drawn arguments.
      dtypes: the other dtypes that the rule supports, which are checked if the function accepts them.
      float64: whether the rule supports float64; if not, comparisons are made in `dtype`.
      rtol: an error to allow besides rounding, relative to the largest element of each gradient, for solvers.
      atol: an absolute error to allow besides rounding.
      sizes: fixed sizes by name, instead of a sweep.
      ranges: `{i: (low, high)}`, the open range in which argument `i` is defined. Arguments given by shapes are drawn
        from it, and no check leaves it.
      at_kink: the intended derivative at each kink, `{0.0: 0.0}` for ReLU. The first real argument is set to the kink
        everywhere.
      seed: the seed of every draw; the same seed gives the same report.
      budget: seconds after which no further check starts.
      only: names of checks or groups to run; empty for all.
      skip: names of checks or groups to skip.

    Returns:
      A `Report`. On Ctrl-C, the report so far is printed.

    Raises:
      TypeError: `args` is not a tuple, string or function.
      ValueError: the function calls no rule, or has no real or complex argument or output; a shape cannot be read; or a
        check or option is unknown or out of range.

    Example:
      >>> from fcfunc import ops
      >>> check_vjp(ops.relu, "n d", at_kink={0.0: 0.0}, only=["oracle", "kinks"]).ok
      True
    """
    _arguments.function("check_vjp", fun=fun)
    required = _names("require", GROUPS if require == "all" else require, GROUPS)
    every = {check.__name__: (group, check) for group, checks in CHECKS.items() for check in checks}
    only, skip = (_names(name, given, (*every, *GROUPS)) for name, given in (("only", only), ("skip", skip)))
    _check_options(seed, at_kink, (dtype, *dtypes), rtol, atol, budget)
    source = _draw.Shapes(args, ranges) if isinstance(args, str) else _draw.DrawnBy(args) if callable(args) else None
    if source is None and not isinstance(args, tuple):
        raise TypeError(f"check_vjp: args must be a tuple, a string of shapes or a function, got {type(args).__name__}")
    letters = tuple(source.letters) if source else ()
    for name, size in (sizes or {}).items():
        if name not in letters or not isinstance(size, int) or size < 0:
            raise ValueError(
                f"check_vjp: sizes must map {', '.join(letters) or 'no name'} to integers of at least 0, got {sizes}"
            )

    names = [name for name, (group, _) in every.items() if not only or name in only or group in only]
    names = [name for name in names if name not in skip and every[name][0] not in skip]
    options = {
        "required": frozenset({*required, *(group for name, (group, _) in every.items() if name in only and group)}),
        "at_kink": at_kink or {}, "dtypes": tuple(dtypes), "float64": float64, "rtol": rtol, "atol": atol,
    }  # fmt: skip
    given_ranges, ranges = ranges, (source.ranges if source else {}) | (ranges or {})
    make = functools.partial(
        _case_of, fun, args, source, reference, kwargs or {}, argnums, ranges, seed, dtype, options
    )
    case, statics = make(_draw.base_sizes(list(letters)) | (sizes or {}) if source else {})
    with x64_for(case.dtype):
        calls, raised = _oracle.watch(case.fun, "outputs", case.fun, *case.leaves)
    if raised is not None:
        raise raised
    passes = tuple(call.passes for call in calls)
    if vars(case.fun).setdefault("passes", passes) != passes:  # a rule inside was redefined, as in a notebook
        _case.of_leaves.cache_clear()
        case, statics = make(case.sizes)
        vars(case.fun)["passes"] = passes
    case, rules = _with_oracle(fun, case, [call.name for call in calls])

    def redraw(sizes, salt=0):
        drawn = make(sizes, salt)[0]
        return dataclasses.replace(case, leaves=drawn.leaves, sizes=dict(sizes))

    if source:
        swept = () if sizes is not None else letters
        case = dataclasses.replace(case, redraw=redraw, letters=swept, draws_ranks=isinstance(args, str))
    shown = {"reference": reference, "kwargs": kwargs, "argnums": argnums, "dtype": dtype, "rtol": rtol, "atol": atol,
             "float64": float64, "ranges": given_ranges, "at_kink": at_kink}  # fmt: skip
    results: list[Result] = []
    start, spent = time.monotonic(), f"the time budget of {budget} s was spent"
    try:
        for name in names:
            group, check = every[name]
            needed = not group or group in required or name in only or group in only
            if budget is not None and time.monotonic() - start > budget:
                results.append(Result(name, "not run", spent, (), needed))
            elif not needed and group in ON_REQUEST:
                results.append(Result(name, "not run", f"runs only with require={group!r}", (), False))
            elif not needed and group == "extremes" and _oracle.contains(case.oracle, "while", *case.leaves):
                why = "the function has a while loop, which may not end for a NaN; runs only with require='extremes'"
                results.append(Result(name, "not run", why, (), False))
            else:
                _progress(f"check_vjp of {case.fun.__name__}: {len(results) + 1} of {len(names)}, {name}")
                results.append(_result(name, check, case, needed, functools.partial(_reproduction, fun, args, shown)))
    except KeyboardInterrupt:
        done = {r.check for r in results}
        results += [Result(name, "not run", "interrupted", ()) for name in names if name not in done]
        _progress("")
        print(_report(case, rules, results, statics), file=sys.stderr)
        raise
    _progress("")
    return _report(case, rules, results, statics)


def assert_vjp(fun: Callable, args: tuple | str | Callable, **options) -> None:
    """Runs `check_vjp` in a test and raises unless the report is ok.

    Args:
      fun: a function with a rule, as in `check_vjp`.
      args: the arguments or their shapes, as in `check_vjp`.
      **options: the keyword arguments of `check_vjp`.

    Raises:
      AssertionError: the report is "FAILED" or "inconclusive"; the message is the printed report.

    Example:
      >>> from fcfunc import ops
      >>> assert_vjp(ops.relu, "n d", at_kink={0.0: 0.0})
    """
    report = check_vjp(fun, args, **options)
    if not report.ok:
        raise AssertionError(str(report))


def _names(option: str, given: str | Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    given = (given,) if isinstance(given, str) else tuple(given)
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ValueError(f"check_vjp: unknown name {unknown[0]!r} in {option}; choose from {', '.join(known)}")
    return given


def _check_options(seed, at_kink, dtypes, rtol, atol, budget) -> None:
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"check_vjp: seed must be an integer of at least 0, got {seed!r}")
    if at_kink is not None and not isinstance(at_kink, dict):
        raise TypeError(f"check_vjp: at_kink must be a dict {{point: derivative}}, got {at_kink!r}")
    for name in dtypes:
        if name not in FLOATS:
            raise ValueError(f"check_vjp: a dtype must be one of {', '.join(FLOATS)}, got {name!r}")
    for name, number in (("rtol", rtol), ("atol", atol), ("budget", budget or 0)):
        if not math.isfinite(_arguments.number("check_vjp", **{name: number})) or number < 0:
            raise ValueError(f"check_vjp: {name} must be a number of at least 0, got {number!r}")


def _report(case: Case, rules, results, statics) -> Report:
    failed: dict[str, list[str]] = {path: [] for path in case.paths}
    for result in results:
        for found in result.findings if result.required else ():
            failed.get(found.argument, []).append(result.check)
    compared = any(r.status in ("passed", "failed") and r.check in WITH_ORACLE and r.required for r in results)
    raises = any("raises: " in found.message for result in results if result.required for found in result.findings)
    otherwise = "ok" if compared and not raises else "not compared"
    verdicts = {path: ", ".join(dict.fromkeys(names)) or otherwise for path, names in failed.items()}
    return Report(case.fun.__name__, rules, tuple(results), verdicts, statics)


def _result(name: str, check: Callable, case: Case, required: bool, reproduction: Callable) -> Result:
    with jax.debug_nans(False):  # some checks use NaN on purpose
        found, ended = attempt(check(case))
    undecided = isinstance(ended, Inconclusive)
    if (found or undecided) and name in WITH_ORACLE and name not in WITH_DIFFERENCES:
        if oracle_misleads(case):
            found = _besides_the_oracle(name, case)
            ended = None if found else ended if undecided else Inconclusive(MISLED)
        elif name not in WITH_MPMATH and found and all(map(_in_last_digits, found)) and more_accurate(case):
            found, ended = [], "automatic differentiation loses digits here; the rule agrees with 200-digit arithmetic"
    once: dict[tuple, Finding] = {}
    for one in found:
        one = dataclasses.replace(one, check=name, seed=case.seed)
        once.setdefault(
            (one.argument, one.message, one.dtype), dataclasses.replace(one, reproduce=reproduction(one, case))
        )
    status = "inconclusive" if isinstance(ended, Inconclusive) else "not applicable"
    status = status if isinstance(ended, Exception) else "passed"
    return Result(name, "failed" if found else status, str(ended or ""), tuple(once.values()), required)


def _besides_the_oracle(name: str, case: Case) -> list[Finding]:
    """The findings without the oracle: by differences at other sizes, or by comparison with the rule in float64."""
    if name in SWEEPS:
        at_sizes = (case.at(sizes) for sizes in _draw.few_sizes(list(case.letters)) if case.letters)
        return next(filter(None, (attempt(projected_differences(at))[0] for at in at_sizes)), [])
    return attempt(as_in_float64(case))[0] if name in ("oracle", "precision_of_dtypes") else []


def _in_last_digits(one: Finding) -> bool:
    """Whether a finding is a float64 error that is small relative to the value."""
    if one.dtype != "float64" or one.got is None or one.expected is None:
        return False
    return abs(one.got - one.expected) <= 1e-5 * abs(one.expected)


def _progress(text: str) -> None:
    """Overwrites the last line of a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _case_of(fun, args, source, reference, kwargs, argnums, ranges, seed, dtype, options, sizes, salt=0):
    """The case at the given sizes, without its final oracle, and the paths of the arguments that are held fixed."""
    entropy = np.hstack([_draw.STREAM, seed, salt, *sizes.values()]).astype(np.uint32)
    given = source.draw(np.random.default_rng(entropy), sizes) if source else args
    fixed_args = set(getattr(fun, "nondiff_argnums", ()))
    wanted = set(range(len(given))) if argnums is None else _positions(argnums, len(given))
    flat, treedef = jax.tree.flatten_with_path(given)
    leaves, where, paths, limits, positions, statics, held = [], [], [], [], [], [], []
    for i, (path, leaf) in enumerate(flat):
        argument, name = path[0].idx, f"args{jax.tree_util.keystr(path)}"
        if argument in fixed_args or not _case.is_array(leaf):
            number = argument in fixed_args and _case.is_array(leaf) and not np.ndim(leaf)
            leaf = np.asarray(leaf).item() if number else leaf  # a Python number has no dtype of its own
            statics.append((type(leaf), leaf))
            held.append(name)
            continue
        if argument not in wanted:
            held.append(name)
        elif not _case.is_key(leaf) and _case.is_inexact(leaf):
            where.append(len(leaves))
            paths.append(name)
            limits.append(tuple(map(float, ranges.get(argument, (-math.inf, math.inf)))))
        positions.append(i)
        leaves.append(leaf if _case.is_key(leaf) else _native(np.asarray(leaf)))
    bind: Any = functools.partial(
        _case.of_leaves,
        treedef=treedef,
        positions=tuple(positions),
        statics=tuple(statics),
        kwargs=tuple((k, type(v), v) for k, v in sorted(kwargs.items())),
        rule=tuple(getattr(fun, part, None) for part in ("fwd", "bwd")),
    )
    try:
        hash((*bind.keywords.values(), fun, reference))
    except TypeError:  # unhashable arguments cannot be cached
        bind = functools.partial(_case.of_leaves.__wrapped__, **bind.keywords)
    case = Case(
        bind(fun), bind(reference or fun), tuple(leaves), tuple(where), tuple(paths), tuple(limits), seed, dict(sizes),
        has_reference=reference is not None, **options,
    )  # fmt: skip
    if not where:
        given = ", ".join(_arguments.describe(a) if hasattr(a, "dtype") else type(a).__name__ for _, a in flat)
        raise ValueError(
            f"check_vjp: no argument is an array of real or complex numbers to differentiate, got {given:.200}"
        )
    if any(not np.isfinite(_case.widened(a)).all() for a in case.reals):
        raise ValueError("check_vjp: the arguments must be finite; the check extremes tries NaN and infinity")
    if not source and case.dtype != np.float64 and any(_case.is_inexact(a) and a.dtype.itemsize > 4 for a in leaves):
        case = case.cast(case.dtype) if case.dtype == np.float32 else case  # as JAX does if float64 is not enabled
    return case.cast(dtype) if source else case, tuple(held)


def _native(a: np.ndarray) -> np.ndarray:
    return a if a.dtype.isnative else a.astype(a.dtype.newbyteorder("="))


def _positions(argnums, count: int) -> set[int]:
    given = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    if any(not isinstance(i, int) or not -count <= i < count for i in given):
        raise ValueError(f"check_vjp: argnums must be positions of the {count} arguments, got {argnums!r:.80}")
    return {i % count for i in given}


def _with_oracle(fun: Callable, case: Case, names: list[str]) -> tuple[Case, tuple[str, ...]]:
    """The case with an oracle that has no rules, and the names of the rules that the function calls."""
    with x64_for(case.dtype):
        outs = jax.eval_shape(case.fun, *case.leaves)
        others, forward = ([], False) if names else _oracle.other_rules(case.fun, *case.leaves)
    if not names and not others:
        name = getattr(fun, "__name__", type(fun).__name__)
        raise ValueError(
            f"check_vjp: {name} has no rule of its own and calls no custom_vjp or custom_jvp function: nothing to check"
        )
    if not outs:
        raise ValueError("check_vjp: no output is an array of real or complex numbers: nothing to differentiate")
    oracle = case.oracle if case.has_reference else _oracle.without_rules(case.oracle, forward_rules=forward)
    return dataclasses.replace(case, oracle=oracle, forward_rule=forward), tuple(dict.fromkeys(names or others))


def _reproduction(fun: Callable, args, shown: dict, found: Finding, case: Case) -> str:
    """Code that reproduces a finding; objects that cannot be imported are described in comments."""
    lines, options = ["from fcfunc.testing import check_vjp"], []
    called = _importable(fun, "fun", lines)
    if isinstance(args, tuple):
        literal = _literal(args)
        lines += ["# args: the arguments that were checked"] if literal is None else []
        source = literal or "args"
    else:
        source = repr(args) if isinstance(args, str) else _importable(args, "draw", lines)
    swept = found.check in SWEEPS
    fixed = all(isinstance(size, int) for size in (found.sizes or {}).values())
    again = "oracle" if swept and fixed else found.check
    if found.sizes and fixed and (swept or not case.letters):
        options.append(f"sizes={found.sizes!r}")
    for name, value in shown.items():
        if callable(value):
            options.append(f"{name}={_importable(value, name, lines)}")
        elif value is not None and value != DEFAULTS.get(name):
            text = repr(value)
            if not _can_be_pasted(text):
                lines.append(f"# {name}: {text:.80}")
                text = name
            options.append(f"{name}={text}")
            if "inf" in text and "from math import inf" not in lines:
                lines.insert(0, "from math import inf")
    options.append(f"seed={case.seed}")
    return "\n".join([*lines, f"print(check_vjp({called}, {source}, only={again!r}, {', '.join(options)}))"])


def _importable(value: Any, role: str, lines: list[str]) -> str:
    """The name of an object in code: its importable name, or its role with a comment; both add to the lines."""
    module = getattr(value, "__module__", None)
    public = str(module).partition("._")[0]  # the public name of an object defined in a private module
    for source in dict.fromkeys((public, module)):
        try:
            names = vars(importlib.import_module(str(source)))
        except (ImportError, ValueError):
            continue
        # Search by identity, because `f = jax.custom_vjp(_f)` has the name of `_f`.
        name = next((n for n, known in names.items() if known is value and n.isidentifier()), None)
        if name is not None:
            lines += [f"from {source} import {name}"] if source != "__main__" else []
            return name
    described = getattr(value, "__name__", type(value).__name__)
    code = getattr(inspect.unwrap(value), "__code__", None)
    if code is not None and module is not None:
        described += f", line {code.co_firstlineno} of {module}"
    lines.append(f"# {role}: {described}")
    return role


def _literal(args: tuple) -> str | None:
    """The arguments as code if they are small arrays, otherwise None."""
    arrays = [np.asarray(a) for a in args if _case.is_array(a) and not _case.is_key(a)]
    if (
        len(arrays) < len(args)
        or any(not a.size for a in arrays)
        or sum(a.size for a in arrays) > 24
        or any(a.dtype.name not in NUMPY for a in arrays)
    ):
        return None
    code = [f"__import__('numpy').array({a.tolist()!r}, {a.dtype.name!r})" for a in arrays]
    return f"({', '.join(code)},)"


def _can_be_pasted(text: str) -> bool:
    """Whether the repr of an option is an expression of literals and infinities."""
    try:
        ast.literal_eval(text.replace("inf", "1e999"))
    except (ValueError, SyntaxError):
        return False
    return True


DEFAULTS: dict[str, Any] = {"dtype": "float32", "float64": True, "rtol": 0.0, "atol": 0.0, "kwargs": {}, "at_kink": {}}
"""The default values of options, which the reproduction code omits."""

NUMPY = ("float16", "float32", "float64", "int32", "int64", "bool", "complex64", "complex128")
