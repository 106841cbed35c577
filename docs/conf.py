"""The Sphinx configuration: MyST pages with executed cells, and an API reference from the docstrings."""

import importlib.util
import logging
import os
import re
import sys
import tempfile
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # pages import `examples`
profile = Path(tempfile.mkdtemp()) / "profile_default"  # isolates the cells from the user's IPython configuration
profile.mkdir()
(profile / "ipython_kernel_config.py").write_text("c.IPKernelApp.log_level = 40\n")
os.environ |= {
    "IPYTHONDIR": str(profile.parent),
    "PYTHONPATH": str(HERE.parent),
    "JAX_PLATFORMS": "cpu",
    "PYTHONWARNINGS": "ignore",
}

logging.getLogger("traitlets").setLevel(logging.WARNING)

project = "fcfunc"
author = "The fcfunc developers"
copyright = "2026, the fcfunc developers"
release = version = metadata.version("fcfunc")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]

html_theme = "furo"
html_title = f"fcfunc {release}"
mathjax = importlib.util.find_spec("sphinx-mathjax-offline")  # for its files: formulas then need no network
assert mathjax is not None
assert mathjax.origin is not None
html_static_path = ["_static", str(Path(mathjax.origin).parent / "static")]
mathjax_path = "mathjax/tex-chtml.js"
html_css_files = ["site.css"]
html_copy_source = False
html_show_search_summary = False  # a summary fetches the page, which browsers forbid for local files
html_theme_options = {"footer_icons": []}

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 4
nb_execution_mode = "force"  # a cache would show the output of an earlier version of the library
nb_execution_timeout = 240
nb_execution_show_tb = True
nb_merge_streams = True
nb_mime_priority_overrides = [("html", "text/html", 0)]

autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = ["Saved for the backward pass"]
default_role = "code"  # docstrings mark code with single backticks
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def link_pages(app, what, name, obj, options, lines):
    """Turns the paths of pages in docstrings, `docs/PAGE.md#SECTION`, into links."""
    for i, line in enumerate(lines):
        lines[i] = re.sub(
            r"\bdocs/([\w/-]+)\.md(#[\w-]+)?",
            lambda m: f"`{m[1].rpartition('/')[2]} <../{m[1]}.html{m[2] or ''}>`__",
            line,
        )


def skip_member(app, what, name, obj, skip, options):
    """Skips the fields of named tuples, which the class docstrings describe, and methods of scikit-learn."""
    request = name.startswith("set_") and name.endswith("_request")
    inherited = (getattr(obj, "__module__", None) or "").startswith("sklearn.")
    return skip or request or inherited or (getattr(obj, "__doc__", None) or "").startswith("Alias for field number")


def write_digit_network(app, exception):
    """Writes the parameters for the draw-a-digit page."""
    if exception is None and app.builder.format == "html":
        import digit_network

        digit_network.write(Path(app.outdir) / "_static" / "digit-params.js")


def setup(app):
    """Registers the hooks above."""
    app.connect("autodoc-process-docstring", link_pages)
    app.connect("autodoc-skip-member", skip_member)
    app.connect("build-finished", write_digit_network)
