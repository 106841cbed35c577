"""Looks for known vulnerabilities in the installed packages that fcfunc and its extras need.

    make audit

pip-audit asks PyPI's database, then OSV's. If neither answers, this says so and returns 0, because a machine without
access to them cannot audit anything; a known vulnerability returns 1.
"""

import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement

EXTRAS = ("checkpoint", "examples", "export", "privacy", "progress", "sklearn", "tables", "testing")
"""The extras for users, without those for tests, documentation and benchmarks."""


def needed(name: str, extras: tuple[str, ...], found: dict[str, str]) -> dict[str, str]:
    """The installed versions of a package and of everything it requires, added to `found`."""
    try:
        package = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return found
    found[name] = package.version
    for line in package.requires or ():
        required = Requirement(line)
        marked = required.marker is None or any(required.marker.evaluate({"extra": e}) for e in (*extras, ""))
        if marked and required.name not in found:
            needed(required.name, tuple(required.extras), found)
    return found


def audited(requirements: Path, service: str) -> list[dict]:
    """The packages that a database knows, each with its vulnerabilities; empty if it does not answer."""
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "--disable-pip"]
    command += ["--no-deps", "--requirement", str(requirements), "--vulnerability-service", service]
    result = subprocess.run(command, capture_output=True, text=True)
    # argparse exits with 2; a known vulnerability and a database that fails both exit with 1.
    if result.returncode == 2:
        raise RuntimeError(f"pip-audit refused its arguments: {result.stderr.strip()[-300:]}")
    if not result.stdout.startswith("{"):
        print(f"pip-audit: {service} did not answer: {result.stderr.strip().splitlines()[-1][:200]}")
        return []
    return [package for package in json.loads(result.stdout)["dependencies"] if "vulns" in package]


def main() -> int:
    """Prints what was found."""
    packages = needed("fcfunc", EXTRAS, {})
    packages.pop("fcfunc")
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text("".join(f"{name}=={version}\n" for name, version in sorted(packages.items())))
        answers = next(filter(None, (audited(requirements, service) for service in ("pypi", "osv"))), [])
    if not answers:
        print(f"pip-audit: no vulnerability database can be reached; none of {len(packages)} packages was audited")
        return 0
    bad = [f"{p['name']} {p['version']}: {v['id']}" for p in answers for v in p["vulns"]]
    print(
        f"pip-audit: {len(answers)} of {len(packages)} packages audited, {len(bad)} known vulnerabilities",
        *bad,
        sep="\n",
    )
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
