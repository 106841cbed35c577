"""Draws over right rules in four dtypes: `check_vjp` must say nothing.

    python -m proofs.false_alarms --draws 1000

Each draw has a seed of its own; rule and dtype go round. The size sweep and the checks that only compile again are left
out, so that a thousand draws end in minutes; the tests run them.
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
    """Prints every alarm, and their number."""
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
    print(f"{alarms} alarms in {draws} draws over {len(tried)} right rules, {time.perf_counter() - start:.0f} s")
    return {"draws": draws, "alarms": alarms}


if __name__ == "__main__":
    main()
