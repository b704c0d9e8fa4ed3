"""Sphinx configuration."""

import tomllib
from pathlib import Path

_project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project = "iocp_loop"
author = "iocp_loop contributors"
copyright = f"2026, {author}"
release = version = _project["version"]

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"iocp_loop {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
# Every reference leads somewhere, but to names of Python itself: offline there is no inventory of its documentation.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(_?asyncio|socket|collections)\..*"),
    ("py:class", r"iocp_loop\.readers\.Stream\w+"),
    # Aliases and kin.
    (
        "py:class",
        r"HandleLike|Deliver|(iocp_loop\.threads\.)?_T|ops\.ReadinessStream|iocp_loop\.operations\.HasFileno",
    ),
]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
# In docstrings, single backquotes set a name or a piece of code.
default_role = "code"
