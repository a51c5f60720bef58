"""Sphinx settings: pages in MyST Markdown, reference from the docstrings, equations as MathML, no network."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_extensions"))
sys.path.insert(0, str(HERE.parent))

import fluidsched  # noqa: E402

project = "fluidsched"
author = "The fluidsched developers"
copyright = "the fluidsched developers, Apache-2.0"
version = release = fluidsched.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "mathml",
    "docstrings",
    "notebooks",
]
exclude_patterns = ["_build", "_extensions"]
suppress_warnings = [
    "ref.python"
]  # `resident_kv` in prose may be a field of several classes: then it is no link

# Markdown
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # tests/test_notebooks.py executes them and keeps their outputs fresh
nb_merge_streams = True

# Reference
default_role = "py:obj"  # `name` in a docstring: a link where it names something, code where not
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # types stand in the docstrings, with shapes and units
autodoc_class_signature = "mixed"
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
add_module_names = False

# Pages
html_theme = "furo"
html_title = f"fluidsched {version}"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["fluidsched.css"]
html_copy_source = False
html_show_sphinx = False
