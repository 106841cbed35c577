"""Tests for hand-written backward rules, those of this library and your own.

`check_vjp(fun, args)` runs every check on a function that has a `custom_vjp` rule, or that calls some, and reports what
it found; `assert_vjp` raises where it found something. docs/checking-rules.md is the guide.
"""

from fcfunc.testing._compare import Finding
from fcfunc.testing._report import Report, Result, assert_vjp, check_vjp

__all__ = ["Finding", "Report", "Result", "assert_vjp", "check_vjp"]
