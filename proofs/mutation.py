"""Finds mutants of the rules that `check_vjp` misses.

    python -m proofs.mutation --mutants 1000 --seed 0

Draws mutants (proofs/mutants.py) and runs each against the rows of the tables in tests/rules.py that execute its line,
with the reference implementation as the oracle. The checks that apply to every rule run first, then the groups.
A mutant is killed if a row reports a finding, cannot be called, or returns a different dtype than the reference. It is
equivalent if it traces to the same programs as the correct rule on all of these rows, in all dtypes, at several sizes,
with and without an Explicit mesh, or if proofs/equivalent_mutants.toml lists it with a reason.
"""

import argparse
import collections
import concurrent.futures
import functools
import multiprocessing
import os
import random
import re
import sys
import time
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fcfunc.testing import check_vjp
from fcfunc.testing._checks import CHECKS
from proofs.mutants import MODULES, Mutant, mutants_of, rules_with
from tests import conftest, rules
from tests.helpers import lines_run

ROWS = {row.name: row for row in [*rules.RULES, *rules.OPTIONS]}
EQUIVALENT = tomllib.loads((Path(__file__).parent / "equivalent_mutants.toml").read_text())
STAGES: tuple[tuple[int, dict], ...] = (
    (4, {"only": ("precision_of_dtypes", "shape_sweep", "kinks")}),
    (6, {"require": ("extremes",), "only": tuple(check.__name__ for check in CHECKS["extremes"])}),
    (2, {"require": ("second_order",), "skip": ("meshes", "extremes", "multiprecision", "second_multiprecision")}),
    (2, {"require": ("sizes",), "only": tuple(check.__name__ for check in CHECKS["sizes"])}),
)
"""The number of rows and the checks of each stage, for mutants that `FIRST` does not find on any row."""

FIRST = {"only": ("oracle", "forward_output", "cotangent_types")}
ON_MESHES = {"require": ("meshes",), "only": tuple(check.__name__ for check in CHECKS["meshes"])}
ROWS_OF_A_FUNCTION = 4
"""The most rows per function, because half of the table executes the helpers that all losses share."""

SAME = "the same programs"
SIZES = ((4, 3), (0, 4), (1, 1), (70, 5))


def pulled(fun, args):
    """The outputs and gradients of the function of a row, for tracing."""
    reals, fill = rules.split_real(args)
    out, pull = jax.vjp(lambda *reals: fun(*fill(reals)), *reals)
    return out, pull(jnp.ones_like(out))


def traced(fun, args) -> str:
    """The program that computes outputs and gradients, or the error that is raised instead."""
    try:
        text = str(jax.make_jaxpr(functools.partial(pulled, fun))(args))
    except Exception as e:
        text = f"{type(e).__name__}: {e}"
    return re.sub(r"0x[0-9a-f]+", "", text)


def programs(fun, name: str) -> list[str]:
    """The programs of a row at several sizes and in all dtypes."""
    found = [traced(fun, ROWS[name].draw(0, n, d, jnp.float32)) for n, d in SIZES]
    for dtype in ("bfloat16", "float16", "float64"):
        with jax.enable_x64(dtype == "float64"):
            found.append(traced(fun, ROWS[name].draw(0, *SIZES[0], jnp.dtype(dtype))))
    return found


def programs_on_meshes(fun, name: str) -> list[str]:
    """The programs of a row on an Explicit mesh."""
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:4])
    found = []
    for n, d in ((4, 6), (6, 4)):
        args = ROWS[name].draw(0, n, d, jnp.float32)
        for axes in (("x",), (None, "x"), ("x", "y")):

            def placed(a, axes=axes):
                spec = [axis if size % 2 == 0 else None for axis, size in zip(axes, a.shape, strict=False)]
                return jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec)))

            with jax.set_mesh(mesh):
                found.append(traced(fun, jax.tree.map(placed, args)))
    return found


def types(fun, name: str) -> list:
    """The dtypes of the outputs of a row in all dtypes, or the error that is raised instead."""
    found = []
    for dtype in ("float32", "bfloat16", "float16", "float64"):
        with jax.enable_x64(dtype == "float64"):
            try:
                out = jax.eval_shape(fun, *ROWS[name].draw(0, *SIZES[0], jnp.dtype(dtype)))
                found.append([a.dtype for a in jax.tree.leaves(out)])
            except Exception as e:
                found.append(type(e).__name__)
    return found


@functools.cache
def right(kind, name: str) -> list[str]:
    """The programs of the correct rule."""
    return kind(ROWS[name].fun, name)


def rows_by_line() -> dict[tuple[str, int], list[str]]:
    """The rows that execute each line of the rules."""
    found = collections.defaultdict(list)
    files = {str(path): module for module, path in MODULES.items()}
    for name, row in ROWS.items():
        for file, line in lines_run(
            lambda row=row: (programs(row.fun, row.name), programs_on_meshes(row.fun, row.name)), files
        ):
            found[files[file], line].append(name)
    return found


def verdict_of(mutant: Mutant, names: list[str]) -> tuple[str, str]:
    """`(verdict, by)`: killed and by which check on the rows that execute its line, equivalent and why, or missed."""
    if mutant.key in EQUIVALENT:
        return "equivalent", EQUIVALENT[mutant.key]
    if not names:
        return "missed", "no row executes it"
    try:
        table = rules_with(mutant)
    except Exception as e:
        return "killed", f"import: {type(e).__name__}"
    funs = {row.name: row.fun for row in [*table.RULES, *table.OPTIONS]}
    names, count = random.Random(0).sample(names, len(names)), collections.Counter()
    first = [n for n in names if count.update([n.split("-")[0]]) or count[n.split("-")[0]] <= ROWS_OF_A_FUNCTION]
    verdict = verdict_on(funs, first)
    if verdict[0] == "killed" or len(first) == len(names):
        return verdict
    rest = verdict_on(funs, [n for n in names if n not in first])
    return max(verdict, rest, key=lambda v: ("equivalent", "missed", "killed").index(v[0]))


def verdict_on(funs: dict, names: list[str]) -> tuple[str, str]:
    """The verdict on some rows. `funs` has their functions by name."""
    changed = []
    for name in names:
        if programs(funs[name], name) != right(programs, name):
            changed.append(name)
            if types(funs[name], name) != types(ROWS[name].reference, name):
                return "killed", "the dtype of the output"
            if by := killed(funs[name], name, FIRST, ROWS[name].reference):
                return "killed", by
    on_meshes = [n for n in names if programs_on_meshes(funs[n], n) != right(programs_on_meshes, n)]
    if not changed and not on_meshes:
        return "equivalent", SAME
    changed.sort(key=len)  # shorter names first: an option can hide an error
    for most, stage in STAGES:
        for name in changed[:most]:
            if by := killed(funs[name], name, stage, ROWS[name].reference):
                return "killed", by
    for name in on_meshes[:3]:
        # With chunks, rules refuse sharded classes, but the reference does not. The correct rule is the reference here.
        reference = ROWS[name].fun if "chunk_size" in name else ROWS[name].reference
        if by := killed(funs[name], name, ON_MESHES, reference):
            return "killed", by
    return "missed", f"on {len(changed)} rows, and {len(on_meshes)} on meshes, such as {(changed + on_meshes)[0]}"


def killed(fun, name: str, options: dict, reference) -> str:
    """The check that finds a mutant on a row; empty if none does."""

    def draw(rng, n, d):
        return ROWS[name].draw(int(rng.integers(2**31)), n, d, np.float32)

    try:
        report = check_vjp(fun, draw, reference=reference, **options)
    except Exception as e:
        return f"the function raises {type(e).__name__}"
    return report.findings[0].check if report.findings else ""


def run(module: str, keys: set[str], rows: dict[tuple[str, int], list[str]]) -> list[tuple[str, str, str, float]]:
    """The verdicts on the chosen mutants of a module, given the rows that execute each line."""
    conftest.compile_quickly()
    results = []
    for mutant in mutants_of(module):
        if mutant.key in keys:
            start = time.perf_counter()
            verdict, by = verdict_of(mutant, rows.get((module, mutant.line), []))
            results.append((mutant.key, verdict, by, time.perf_counter() - start))
            print(f"{verdict}: {mutant.key} ({by}, {results[-1][3]:.1f} s)", file=sys.stderr, flush=True)
            if len(results) % 20 == 0:
                jax.clear_caches()  # the programs of each mutant stay cached
    return results


def main(argv: list[str] | None = None) -> dict[str, int]:
    """Prints the mutants that were missed, and the number that were killed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--mutants", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args(argv)
    keys = [(module, mutant.key) for module in MODULES for mutant in mutants_of(module)]
    # Each mutant is sorted by its own random number, so that changing one function keeps most of the sample.
    keys.sort(key=lambda key: random.Random(f"{options.seed} {key}").random())
    sample = keys[: options.mutants]
    chunks: dict[tuple[str, int], list[str]] = collections.defaultdict(list)
    for i, (module, key) in enumerate(sample):
        chunks[module, i % 4].append(key)
    start, results = time.perf_counter(), []
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.workers, mp_context=context, max_tasks_per_child=1) as pool:
        rows = rows_by_line()
        for future in [pool.submit(run, module, set(keys), rows) for (module, _), keys in sorted(chunks.items())]:
            results += future.result()
    counts = collections.Counter(verdict for _, verdict, _, _ in results)
    print("\n".join(f"missed: {key} ({by})" for key, verdict, by, _ in results if verdict == "missed"))
    by_check = collections.Counter(by for _, verdict, by, _ in results if verdict == "killed")
    print("killed by: " + ", ".join(f"{check} {count}" for check, count in by_check.most_common()))
    same = sum(by == SAME for _, _, by, _ in results)
    share = counts["killed"] / max(counts["killed"] + counts["missed"], 1)
    print(
        f"{len(results)} of {len(keys)} mutants, seed {options.seed}: {counts['killed']} killed, "
        f"{counts['equivalent']} equivalent ({same} of them with the same programs), {counts['missed']} missed; "
        f"{100 * share:.2f}% of non-equivalent mutants killed, {time.perf_counter() - start:.0f} s"
    )
    return dict(counts)


if __name__ == "__main__":
    main()
