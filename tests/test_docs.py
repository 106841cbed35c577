"""Docstring examples and Python blocks in the README and the docs run and print the output that they show."""

import doctest
import importlib
import inspect
import pkgutil
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest

import fcfunc

ROOT = Path(fcfunc.__file__).parents[1]
NAMESPACES = [fcfunc, *(m for name in fcfunc.__all__ if inspect.ismodule(m := getattr(fcfunc, name)))]
MODULES = [importlib.import_module(m.name) for m in pkgutil.walk_packages(fcfunc.__path__, "fcfunc.")]
PAGES = [ROOT / "README.md", *(p for p in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in p.parts)]
BLOCK = r"```(?:python|{code-cell} python3)\n(?:---\n.*?---\n)?(.*?)```"
RUN_ELSEWHERE = {"gallery": "`make docs`", "published-rules.md": "packages that are not installed here"}
"""Folders and pages whose blocks are not run here, and where they are run or why they are not."""


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_docstring_examples_print_what_they_say(module):
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for test in finder.find(module, extraglobs={"fcfunc": fcfunc, "jax": jax, "jnp": jnp, "np": np}):
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(p, id=p.name, marks=[pytest.mark.slow] if p.name == "large-output-layers.md" else [])
        for p in PAGES
        if not RUN_ELSEWHERE.keys() & set(p.parts)
    ],
)
def test_python_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    if "import torch" in page.read_text():
        pytest.importorskip("torch", reason="torch is not installed; `make docs` runs this page")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plt, "show", plt.close)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as readers run them
        names = {}
        for block in re.findall(BLOCK, page.read_text(), re.DOTALL):
            exec(compile(block, str(page), "exec"), names)


def public_functions():
    """Yields the functions in the `__all__` of each namespace, and the methods of a network."""
    for module in NAMESPACES:
        for name in getattr(module, "__all__", []):
            if inspect.isfunction(getattr(module, name)):
                yield f"{module.__name__}.{name}", getattr(module, name)
    for name, method in inspect.getmembers(fcfunc.Network, inspect.isfunction):
        if not name.startswith("_"):
            yield f"Network.{name}", method


FUNCTIONS = dict(public_functions())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_is_documented_in_full(name):
    doc, signature = FUNCTIONS[name].__doc__ or "", inspect.signature(FUNCTIONS[name])
    assert doc
    if name.endswith(("_fwd", "_bwd", ".to_dict")):
        return
    described = doc.partition("Args:")[2]
    assert [name for name in signature.parameters if name != "self" and not re.search(rf"\b{name}\b", described)] == []
    assert "Returns:" in doc or signature.return_annotation in (None, "None")


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if not n.endswith(("_fwd", "_bwd"))])
def test_every_public_function_has_an_example(name):
    assert "Example:" in (FUNCTIONS[name].__doc__ or "")


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n.startswith("Network.")])
def test_the_help_of_a_method_fits_on_one_screen(name):
    assert len(pydoc.plain(pydoc.render_doc(FUNCTIONS[name])).splitlines()) <= 50


def test_the_readme_prints_what_it_shows(tmp_path):
    found = re.findall(r"```python\n(.*?)```(?:\n\n((?:    [^\n]*\n)+))?", (ROOT / "README.md").read_text(), re.DOTALL)
    codes, shown = zip(*found, strict=True)
    assert all(shown)
    (tmp_path / "readme.py").write_text("".join(codes))
    command = [sys.executable, "readme.py"]
    printed = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    rounded = [re.sub(r"\d+\.\d+", lambda m: f"{float(m[0]):.2g}", text) for text in (printed, "".join(shown))]
    assert rounded[0].split() == rounded[1].split()


def test_the_readme_has_at_most_120_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
