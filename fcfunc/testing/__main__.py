"""Checks a backward rule from a shell.

    python -m fcfunc.testing package.module:function "n d, d m, m"

Prints the report. The exit status is 0 if the report is ok, 1 if an error was found, 2 if the function could not be
imported or called, 3 if no error was found but something required could not be compared, and 130 on Ctrl-C.
"""

import argparse
import importlib
import json
import sys
from typing import Any

from fcfunc._arguments import first_line
from fcfunc.testing._checks import GROUPS
from fcfunc.testing._report import check_vjp


def imported(target: str) -> Any:
    """Imports the object that `package.module:function` names."""
    module, colon, name = target.partition(":")
    if not (colon and module and name):
        raise ValueError(f"expected package.module:function, got {target!r}")
    fun: Any = importlib.import_module(module)
    for part in name.split("."):
        fun = getattr(fun, part)
    return fun


def json_object(text: str) -> dict[str, Any]:
    """Parses options by name, such as `{"axis": 0}`."""
    options = json.loads(text)
    if not isinstance(options, dict):
        raise argparse.ArgumentTypeError(f'expected a JSON object, such as {{"axis": 0}}, got {text}')
    return options


def size(text: str) -> tuple[str, int]:
    """Parses a named size, such as `n=3`."""
    name, _, number = text.partition("=")
    return name, int(number)


def derivative(text: str) -> tuple[float, float]:
    """Parses the derivative at a point, such as `0=0.5`."""
    point, _, value = text.partition("=")
    return float(point), float(value)


def main(argv: list[str] | None = None) -> int:
    """Checks the function named on the command line and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fcfunc.testing", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("function", help="package.module:function")
    parser.add_argument("shapes", help='the shapes of the arguments, "n d, d m, m"; see docs/guides/checking-a-rule.md')
    parser.add_argument(
        "--kwargs", type=json_object, default={}, help='keyword arguments of the function, as JSON: {"axis": 0}'
    )
    parser.add_argument(
        "--reference", help="package.module:function to use as the oracle instead of the rule's own function"
    )
    parser.add_argument(
        "--require", nargs="*", choices=(*GROUPS, "all"), default=[], help="groups of further checks that must pass"
    )
    parser.add_argument("--only", nargs="*", default=[], help="checks or groups to run")
    parser.add_argument("--skip", nargs="*", default=[], help="checks or groups to skip")
    parser.add_argument(
        "--argnums", type=int, nargs="*", help="positions of the arguments to differentiate (default: all)"
    )
    parser.add_argument("--rtol", type=float, default=0.0, help="relative error to allow, for solvers")
    parser.add_argument("--atol", type=float, default=0.0, help="absolute error to allow")
    parser.add_argument("--dtype", default="float32", help="dtype of the drawn arguments")
    parser.add_argument("--dtypes", nargs="*", help="other dtypes that the rule supports")
    parser.add_argument("--no-float64", dest="float64", action="store_false", help="the rule does not support float64")
    parser.add_argument("--sizes", nargs="*", type=size, help="fixed sizes instead of a sweep: n=3 d=4")
    parser.add_argument(
        "--at-kink", nargs="*", type=derivative, help="the intended derivative at a kink, as point=derivative: 0=0"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of every draw")
    parser.add_argument("--budget", type=float, help="seconds after which no further check starts")
    options = {name: given for name, given in vars(parser.parse_args(argv)).items() if given is not None}
    function, shapes = options.pop("function"), options.pop("shapes")
    options["require"] = "all" if "all" in options["require"] else options["require"]
    options |= {name: dict(options[name]) for name in ("sizes", "at_kink") if name in options}
    try:
        if "reference" in options:
            options["reference"] = imported(options["reference"])
        report = check_vjp(imported(function), shapes, **options)
    except KeyboardInterrupt:
        return 130
    except Exception as e:
        print(f"error: {function}: {first_line(e)}", file=sys.stderr)
        return 2
    print(report)
    return {"ok": 0, "FAILED": 1}.get(report.status, 3)


if __name__ == "__main__":
    sys.exit(main())
