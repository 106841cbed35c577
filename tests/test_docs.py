"""Every example in a docstring and every Python block in the README and the docs runs and prints what it says."""

import doctest
import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fcfunc
from tests.table import slow

ROOT = Path(fcfunc.__file__).parents[1]
MODULES = [getattr(fcfunc, name) for name in fcfunc.__all__ if inspect.ismodule(getattr(fcfunc, name))]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_docstring_examples_print_what_they_say(module):
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in finder.find(module, extraglobs={"jax": jax, "jnp": jnp, "np": np}):
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


@pytest.mark.parametrize(
    "page", [slow(p) if p.name == "precision-and-size.md" else p for p in PAGES], ids=[p.name for p in PAGES]
)
def test_python_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as a reader would run them
        names = {}
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
            exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_every_public_function_is_documented_in_full(module):
    for name in getattr(module, "__all__", []):
        function = getattr(module, name)
        if not inspect.isfunction(function):
            continue
        doc = function.__doc__ or ""
        assert doc, f"{module.__name__}.{name} has no docstring"
        if not name.endswith(("_fwd", "_bwd")):
            signature = inspect.signature(function)
            assert "Args:" in doc or not signature.parameters, f"{module.__name__}.{name}: no Args"
            assert "Returns:" in doc or signature.return_annotation is None, f"{module.__name__}.{name}: no Returns"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
