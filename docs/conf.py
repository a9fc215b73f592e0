"""Sphinx: `make docs` builds README.md and docs/ with the API reference, into build/docs.

The source folder is the repository's root, so that a link to a file of the repository is the same
here and on a plain checkout. MyST copies what a page links to and is no page itself.
"""

import shutil
from pathlib import Path
from typing import Any

project = "fastrnn"
author = copyright = "The fastrnn authors"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
include_patterns = ["*.md", "docs/*.md", "tests/vgpu/README.md"]
exclude_patterns = [".*", "build"]
root_doc = "README"
myst_heading_anchors = 4  # links to headings are checked, as those to files are
default_role = "code"
autodoc_typehints = "none"
autodoc_member_order = "bysource"

html_theme = "furo"
html_title = "fastrnn"
html_copy_source = False

# The table of contents: here, since README.md is also read as it is.
CONTENTS = {
    "Guides": [
        "docs/installing",
        "docs/commands",
        "docs/swapping",
        "docs/pytorch",
        "docs/reliability",
        "docs/versions",
        "docs/cpu",
        "docs/cuda",
        "docs/cells",
        "tests/vgpu/README",
    ],
    "Examples": [
        "docs/simple_rnn",
        "docs/forecast",
        "docs/classify_text",
        "docs/train_ddp",
        "docs/tag_sequence",
        "docs/translate",
        "docs/generate",
    ],
    "Reference": ["docs/api", "docs/benchmarks"],
    "Project": ["CONTRIBUTING", "docs/releasing", "docs/versions", "CHANGELOG", "SECURITY"],
}


def add_contents(_: Any, name: str, source: list[str]) -> None:
    if name == root_doc:
        for caption, pages in CONTENTS.items():
            names = "\n".join(f"/{page}" for page in pages)
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{names}\n```\n"


def add_index(app: Any, error: Exception | None) -> None:
    if error is None and app.builder.name == "html":
        shutil.copy(Path(app.outdir) / f"{root_doc}.html", Path(app.outdir) / "index.html")


def setup(app: Any) -> None:
    app.connect("source-read", add_contents)
    app.connect("build-finished", add_index)
