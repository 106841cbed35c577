"""Checks a rule from a shell.

    python -m fcfunc.testing package.module:function "n d, d m, m"

Prints the report. Exit status: 0 where all is well, 1 where something was found, 2 where the function could not be
imported or called, 3 where nothing was found and something could not be compared, 130 on Ctrl-C.
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
    """What `package.module:function` names."""
    module, colon, name = target.partition(":")
    if not (colon and module and name):
        raise ValueError(f"package.module:function expected, got {target!r}")
    fun: Any = importlib.import_module(module)
    for part in name.split("."):
        fun = getattr(fun, part)
    return fun


def json_object(text: str) -> dict[str, Any]:
    """`{"axis": 0}`: options by name."""
    options = json.loads(text)
    if not isinstance(options, dict):
        raise argparse.ArgumentTypeError(f'a JSON object expected, such as {{"axis": 0}}, got {text}')
    return options


def size(text: str) -> tuple[str, int]:
    """`n=3`: the size by its name."""
    name, _, number = text.partition("=")
    return name, int(number)


def derivative(text: str) -> tuple[float, float]:
    """`0=0.5`: the derivative by the point."""
    point, _, value = text.partition("=")
    return float(point), float(value)


def main(argv: list[str] | None = None) -> int:
    """Checks the function that the command line names; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fcfunc.testing", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("function", help="package.module:function")
    parser.add_argument("shapes", help='the arguments by shape, "n d, d m, m"; see docs/guides/checking-a-rule.md')
    parser.add_argument("--kwargs", type=json_object, default={}, help='options of the function, as JSON: {"axis": 0}')
    parser.add_argument("--reference", help="package.module:function to compare with, where the rule's own is in doubt")
    parser.add_argument("--require", nargs="*", choices=(*GROUPS, "all"), default=[], help="groups of further checks")
    parser.add_argument("--only", nargs="*", default=[], help="checks or groups to run")
    parser.add_argument("--skip", nargs="*", default=[], help="checks or groups to leave out")
    parser.add_argument("--argnums", type=int, nargs="*", help="the arguments to differentiate; all by default")
    parser.add_argument("--rtol", type=float, default=0.0, help="a relative error to allow, for solvers")
    parser.add_argument("--atol", type=float, default=0.0, help="an absolute error to allow")
    parser.add_argument("--dtype", default="float32", help="of what is drawn")
    parser.add_argument("--dtypes", nargs="*", help="the dtypes that the rule claims")
    parser.add_argument("--no-float64", dest="float64", action="store_false", help="float64 is not one of them")
    parser.add_argument("--sizes", nargs="*", type=size, help="the sizes by name, instead of a sweep: n=3 d=4")
    parser.add_argument("--at-kink", nargs="*", type=derivative, help="the derivative at a kink, by the point: 0=0")
    parser.add_argument("--seed", type=int, default=0, help="of every draw")
    parser.add_argument("--budget", type=float, help="seconds after which no further check is started")
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
