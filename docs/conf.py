"""How `make docs` makes the site of these pages. Every warning is an error there."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The servers of the tests, which the commands of cli.md are run against; and the extensions beside this file.
sys.path[:0] = [str(ROOT), str(Path(__file__).parent / "_ext")]

project = "ray_stateful"
html_title = "ray_stateful"
html_theme = "furo"
html_show_copyright = False

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "docstrings",
    "outside_links",
    "transcripts",
]
exclude_patterns = ["_ext"]

# Links between pages may name a heading, as on GitHub.
myst_heading_anchors = 3

# Docstrings: single backticks are code, sections are Google's.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
