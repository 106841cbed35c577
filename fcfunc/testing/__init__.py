"""Tests for hand-written backward rules, those of this library and your own.

`check_vjp(fun, args)` runs its checks on a function that has a `custom_vjp` or `custom_jvp` rule, or that calls some,
and reports what it found; `assert_vjp` raises where it found something. `python -m fcfunc.testing module:function
shapes` does it from a shell. docs/guides/checking-a-rule.md is the guide.
"""

from fcfunc.testing._compare import Finding
from fcfunc.testing._report import Report, Result, assert_vjp, check_vjp

__all__ = ["Finding", "Report", "Result", "assert_vjp", "check_vjp"]
