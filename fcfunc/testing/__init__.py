"""Tests for hand-written backward rules: those of this library and your own.

`check_vjp(fun, args)` checks a function that has a `custom_vjp` or `custom_jvp` rule, or that calls functions with
such rules, and returns a report. `assert_vjp` raises an `AssertionError` unless the report is ok.
`python -m fcfunc.testing module:function shapes` runs the checks from a shell. docs/guides/checking-a-rule.md is the
guide.
"""

from fcfunc.testing._compare import Finding
from fcfunc.testing._report import Report, Result, assert_vjp, check_vjp

__all__ = ["Finding", "Report", "Result", "assert_vjp", "check_vjp"]
