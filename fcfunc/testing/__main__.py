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


def main(argv: list[str] | None = None) -> int:
    """Checks the function that the command line names; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fcfunc.testing", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("function", help="package.module:function")
    parser.add_argument("shapes", help='the arguments by shape, "n d, d m, m"; see docs/checking-rules.md')
    parser.add_argument("--kwargs", type=json.loads, default={}, help='options of the function, as JSON: {"axis": 0}')
    parser.add_argument("--require", nargs="*", choices=(*GROUPS, "all"), default=[], help="groups of further checks")
    parser.add_argument("--only", nargs="*", default=[], help="checks or groups to run")
    parser.add_argument("--skip", nargs="*", default=[], help="checks or groups to leave out")
    parser.add_argument("--argnums", type=int, nargs="*", help="the arguments to differentiate; all by default")
    parser.add_argument("--rtol", type=float, default=0.0, help="a relative error to allow, for solvers")
    parser.add_argument("--atol", type=float, default=0.0, help="an absolute error to allow")
    parser.add_argument("--dtype", default="float32", help="of what is drawn")
    parser.add_argument("--seed", type=int, default=0, help="of every draw")
    parser.add_argument("--budget", type=float, help="seconds after which no further check is started")
    options = vars(parser.parse_args(argv))
    module, _, name = options.pop("function").partition(":")
    options["require"] = "all" if "all" in options["require"] else options["require"]
    try:
        fun: Any = importlib.import_module(module)
        for part in name.split("."):
            fun = getattr(fun, part)
        report = check_vjp(fun, options.pop("shapes"), **options)
    except KeyboardInterrupt:
        return 130
    except Exception as e:
        print(f"error: {module}:{name}: {first_line(e)}", file=sys.stderr)
        return 2
    print(report)
    return {"ok": 0, "FAILED": 1}.get(report.status, 3)


if __name__ == "__main__":
    sys.exit(main())
