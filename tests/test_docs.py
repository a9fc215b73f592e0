"""The Python code in README.md, CONTRIBUTING.md and docs/ runs.

The ```python blocks of a page run in order, in one namespace and in a new process per page. Blocks
marked ```python no-run are only compiled.
"""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import fastrnn

pytestmark = [pytest.mark.once, pytest.mark.cpu("documentation")]

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]
BLOCK = re.compile(r"^( *)```(python.*)\n((?:.*\n)*?)\1```$", re.MULTILINE)


def blocks(text):
    """Yields the info string and code of each Python block, padded to keep its line numbers."""
    for block in BLOCK.finditer(text):
        _, info, code = block.groups()
        yield info, "\n" * text.count("\n", 0, block.start(3)) + textwrap.dedent(code)


def joined(codes):
    """Joins padded blocks into one program in which each keeps its line numbers."""
    lines = []
    for code in codes:
        lines += code.split("\n")[len(lines) :]
    return "\n".join(lines)


def test_blocks_keep_their_line_numbers():
    page = (
        "a\n```python\nx = 1\n```\n- b\n\n  ```python no-run\n  y\n  ```\n```python\nz = x\n```\n"
    )
    found = list(blocks(page))
    assert found == [
        ("python", "\n\nx = 1\n"),
        ("python no-run", "\n" * 7 + "y\n"),
        ("python", "\n" * 10 + "z = x\n"),
    ]
    assert joined(code for info, code in found if info == "python") == "\n\nx = 1" + "\n" * 8 + (
        "z = x\n"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_of_page_runs(page, tmp_path):
    found = list(blocks(page.read_text()))
    for info, code in found:
        assert info in ("python", "python no-run"), f"{page.name}: ```{info}"
        compile(code, str(page), "exec")
    program = joined(code for info, code in found if info == "python")
    if program:
        if page.name == "pytorch.md" and torch.__version__ < "2.13":
            pytest.skip("the page is about torch.onnx.export of torch 2.13 and newer")
        run = "import sys; exec(compile(sys.stdin.read(), sys.argv[1], 'exec'))"
        subprocess.run(
            [sys.executable, "-c", run, str(page)],
            input=program,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=True,
        )


def test_api_page_has_all_public_names():
    page = (ROOT / "docs/api.md").read_text()
    documented = re.findall(r"^\.\. (?:auto\w+|py:data):: fastrnn\.(\w+)$", page, re.MULTILINE)
    assert sorted(documented) == sorted(fastrnn.__all__)
