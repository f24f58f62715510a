"""How the documentation is built: `make docs`. Nothing is fetched, neither while it is built nor while it is read.

The pages are MyST Markdown, so that they read as well without being built. `extensions/` makes of the code what would
else be written twice: the reference of the configuration and of the library, and the links to both.
"""

import os
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "extensions"), str(HERE.parent / "src")]

project = "saeflow"
author = "saeflow contributors"
release = version = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]["version"]
copyright = author

extensions = ["myst_parser", "sphinx_copybutton", "api_reference", "config_reference", "links", "mathml", "notebooks"]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["attrs_block", "attrs_inline", "colon_fence", "deflist", "dollarmath", "fieldlist"]
myst_heading_anchors = 4
python_maximum_signature_line_length = 90
python_use_unqualified_type_names = True
toc_object_entries = False
copybutton_prompt_text = "$ "
copybutton_exclude = ".linenos, .gp, .go, .c1"

html_theme = "furo"
html_title = "saeflow"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/icon.svg"
html_math_renderer = "mathml"
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
pygments_style = "friendly"
pygments_dark_style = "monokai"
templates_path: list[str] = []

# The same bytes from the same tree.
html_last_updated_fmt = None
os.environ.setdefault("SOURCE_DATE_EPOCH", "0")
