"""Runs `check_vjp` on correct rules in four dtypes, where it must find nothing.

    python -m proofs.false_alarms --draws 1000

Each draw has its own seed, and the draws cycle through rules and dtypes. The size sweep and the checks that only
recompile are skipped, so that a thousand draws take minutes. The tests run these checks.
"""

import argparse
import time

import numpy as np

from fcfunc import ops
from fcfunc.testing import check_vjp
from tests.planted import RIGHT
from tests.rules import RULES

DTYPES = ("float64", "float32", "bfloat16", "float16")
LEFT_OUT = (
    "shape_sweep",
    "second_order",
    "extremes",
    "meshes",
    "scan_and_checkpoint",
    "compiled_equals_eager",
    "rule_used",
    "cotangent_types",
    "integer_arguments",
)


def main(argv: list[str] | None = None) -> dict[str, int]:
    """Prints every false alarm, and the number of false alarms."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--draws", type=int, default=1000)
    draws = parser.parse_args(argv).draws
    tried: list[tuple] = [("relu [64, 256]", ops.relu, "64 256", {"at_kink": {0.0: 0.0}})]
    tried += [
        (r.name, r.fun, lambda rng, n, d, r=r: r.draw(int(rng.integers(2**31)), n, d, np.float32), {}) for r in RULES
    ]
    tried += [(r.name, r.fun, r.args, r.options) for r in RIGHT]
    alarms, start = 0, time.perf_counter()
    for seed in range(draws):
        name, fun, args, options = tried[seed % len(tried)]
        dtype = DTYPES[seed // len(tried) % len(DTYPES)]
        report = check_vjp(fun, args, seed=seed, dtype=dtype, skip=LEFT_OUT, **options)
        if not report.ok:
            alarms += 1
            print(f"{name}, {dtype}, seed {seed}:\n{report}")
    print(f"{alarms} alarms in {draws} draws over {len(tried)} correct rules, {time.perf_counter() - start:.0f} s")
    return {"draws": draws, "alarms": alarms}


if __name__ == "__main__":
    main()
