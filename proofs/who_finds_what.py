"""Runs `check_vjp`, `jax.test_util.check_grads` and `torch.autograd.gradcheck` on rules with planted bugs.

    python -m proofs.who_finds_what > docs/background/gradient-checkers.md

The introduction of the page explains how each checker is called.
"""

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import platform
import sys
import warnings
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
from jax.test_util import check_grads

from fcfunc.testing import check_vjp
from fcfunc.testing._case import is_inexact
from fcfunc.testing._draw import Shapes, base_sizes
from tests.planted import PLANTED, RIGHT, Planted


def draw(bug: Planted, seed: int, dtype) -> tuple:
    """Arguments of small, unequal sizes."""
    shapes = Shapes(bug.args)
    args = shapes.draw(np.random.default_rng(seed), base_sizes(shapes.letters))
    return tuple(jnp.asarray(a, dtype) if is_inexact(a) else jnp.asarray(a) for a in args)


def by_check_vjp(bug: Planted, seed: int) -> bool:
    """Whether all checks together report anything."""
    return bool(check_vjp(bug.fun, bug.args, seed=seed, require="all", skip=("ranks",), **bug.options).findings)


def by_default_check_vjp(bug: Planted, seed: int) -> bool:
    """Whether a call without options fails."""
    return check_vjp(bug.fun, bug.args, seed=seed, **bug.options).status == "FAILED"


def by_check_grads(bug: Planted, seed: int) -> bool:
    """Whether `check_grads` raises in float32."""
    return check_grads_raises(bug, draw(bug, seed, jnp.float32))


def by_wide_check_grads(bug: Planted, seed: int) -> bool:
    """Whether `check_grads` raises in float64."""
    with jax.enable_x64(True):
        return check_grads_raises(bug, draw(bug, seed, jnp.float64))


def check_grads_raises(bug: Planted, args: tuple) -> bool:
    """Whether `check_grads` raises on the real arguments."""
    reals = [i for i, a in enumerate(args) if is_inexact(a)]

    def of_reals(*given):
        filled = list(args)
        for i, a in zip(reals, given, strict=True):
            filled[i] = a
        return bug.fun(*filled)

    try:
        check_grads(of_reals, [args[i] for i in reals], order=2, modes=("rev",))
    except Exception:
        return True
    return False


def by_gradcheck(bug: Planted, seed: int) -> bool | None:
    """Whether `gradcheck` raises or returns False; None if the rule has no port."""
    import torch  # pyright: ignore[reportMissingImports]

    rule = bug.fun
    if not isinstance(rule, jax.custom_vjp) or rule.symbolic_zeros:
        return None
    with jax.enable_x64(True):
        args = draw(bug, seed, jnp.float64)
        reals = [i for i, a in enumerate(args) if is_inexact(a)]

        class Ported(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *tensors):
                given = list(args)
                for i, t in zip(reals, tensors, strict=True):
                    given[i] = jnp.asarray(t.detach().numpy())
                out = rule.fun(*given)
                _, ctx.residuals = rule.fwd(*given)
                ctx.many = isinstance(out, tuple)
                outs = out if ctx.many else (out,)
                ported = tuple(torch.from_numpy(np.array(o)) for o in outs)
                return ported if ctx.many else ported[0]

            @staticmethod
            def backward(ctx, *grads):
                g = tuple(jnp.asarray(t.detach().numpy()) for t in grads)
                cotangents = rule.bwd(ctx.residuals, g if ctx.many else g[0])
                kept = [cotangents[i] for i in reals]
                return tuple(None if c is None else torch.from_numpy(np.array(c)) for c in kept)

        inputs = [torch.tensor(np.array(args[i]), requires_grad=True) for i in reals]
        try:
            return not torch.autograd.gradcheck(Ported.apply, inputs)
        except Exception:
            return True


CHECKERS = {
    "`check_vjp`, all checks": by_check_vjp,
    "`check_vjp`": by_default_check_vjp,
    "`check_grads`, float64": by_wide_check_grads,
    "`check_grads`": by_check_grads,
    "`gradcheck`": by_gradcheck,
}

INTRODUCTION = """# Comparison of gradient checkers

This page compares `fcfunc.testing.check_vjp`, `jax.test_util.check_grads` and `torch.autograd.gradcheck` on {count}
rules with a planted bug each. Written by `python -m proofs.who_finds_what` with {versions} on {machine}.

The bugs are those of `tests/planted.py`, which the tests of `check_vjp` require it to find.

- `check_vjp` runs once for each bug with `require="all"` and `skip=("ranks",)`, and once with its default checks, on
  8 virtual devices. On one device the checks that need several do not run.
- `check_grads` runs in reverse mode to order 2, in float64 and in float32 (the default of JAX). Its default modes raise
  an error for any `custom_vjp`.
- `gradcheck` runs in float64 on the rule wrapped as an `autograd.Function` with the planted backward pass. The cell is
  empty where a rule cannot be wrapped in this way.

`check_grads` and `gradcheck` get three random draws of small arguments with 5 rows. A bug counts as found if at least
one of the three calls fails.
"""


def main() -> None:
    """Prints the table in Markdown."""
    warnings.simplefilter("ignore")
    rows, counts = [], dict.fromkeys(CHECKERS, 0)
    for bug in PLANTED:
        cells = []
        for name, found_by in CHECKERS.items():
            found = [found_by(bug, seed) for seed in range(1 if "check_vjp" in name else 3)]
            counts[name] += any(found)
            cells.append("" if found[0] is None else "found" if any(found) else "-")
        rows.append(f"| {bug.name.replace('_', ' ')} | {' | '.join(cells)} |")
        print(bug.name, cells, file=sys.stderr, flush=True)
    alarms = {
        name: sum(bool(f(rule, s)) for rule in RIGHT for s in range(3))
        for name, f in CHECKERS.items()
        if "check_vjp" not in name
    }
    print(
        INTRODUCTION.format(
            count=len(PLANTED),
            versions=", ".join(f"{name} {version(name)}" for name in ("fcfunc", "jax", "torch")),
            machine=f"{os.cpu_count()} CPU cores ({platform.machine()})",
        )
    )
    print(f"| planted bug | {' | '.join(CHECKERS)} |\n|---|{'---|' * len(CHECKERS)}")
    print("\n".join(rows))
    print(f"| **found of {len(PLANTED)}** | {' | '.join(f'**{n}**' for n in counts.values())} |")
    print(
        f"\nFalse alarms on {len(RIGHT)} correct rules with three draws each: "
        + "; ".join(f"{k}: {v}" for k, v in alarms.items())
        + "."
    )
    print("`python -m proofs.false_alarms` measures those of `check_vjp`.")


if __name__ == "__main__":
    main()
