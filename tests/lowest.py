"""Prints the oldest releases that pyproject.toml allows, as constraints for pip: `python -m tests.lowest`."""

import re
import tomllib
from pathlib import Path

TOOLS = ("build", "import-linter", "pip-audit", "pyright", "ruff")
"""Development tools, whose versions are not under test."""

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
required = list(project["dependencies"])
for extra in project["optional-dependencies"].values():
    required += extra
for requirement in sorted(set(required)):
    bound = re.fullmatch(r"([\w\-]+)(?:\[\w+\])?>=([\d.]+)(?:,<[\d.]+)?(?:;.*)?", requirement)
    if bound and bound[1] not in TOOLS:
        print(f"{bound[1]}=={bound[2]}")
