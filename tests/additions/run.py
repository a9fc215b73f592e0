"""Tests `Add a cell` and `Add an option` of CONTRIBUTING.md: makes both in a copy, and builds it.

    python tests/additions/run.py

The option `negate_output` changes the sign of a network's output, and not of h_n and c_n. The cell
is the minimal gated unit. CELL and OPTION are all that they take: the files must be those of the
lists in CONTRIBUTING.md. checks.py has the option's tests.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from edited_copy import ROOT, Copy

HERE = Path(__file__).parent
# file -> what is replaced, and by what. A new file replaces nothing.
CELL = {
    "csrc/cells/mgu.h": [("", (HERE / "mgu.h").read_text())],
    "fastrnn/reference.py": [
        (
            "@_cell\ndef rnn_tanh",
            f"{(HERE / 'reference_mgu.py').read_text()}\n\n@_cell\ndef rnn_tanh",
        ),
    ],
    "csrc/cells/registry.h": [
        ('#include "lstm.h"\n', '#include "lstm.h"\n#include "mgu.h"\n'),
        (
            "    X(gru, ::fastrnn::Gru)",
            "    X(gru, ::fastrnn::Gru) \\\n    X(mgu, ::fastrnn::Mgu)",
        ),
    ],
}
OPTION = {
    "csrc/torch/options.h": [
        ("X(bool, return_states)\n", "X(bool, return_states) \\\n    X(bool, negate_output)\n"),
    ],
    "csrc/torch/network.cpp": [
        (
            "    if (!returns_c) return;\n",
            "    if (a.options.negate_output) r.output.neg_();\n    if (!returns_c) return;\n",
        ),
        (
            "gradients.output->contiguous() : Tensor();\n",
            "gradients.output->contiguous() : Tensor();\n"
            "    if (a.options.negate_output && grad_output.defined())\n"
            "        grad_output = grad_output.neg();\n",
        ),
    ],
    "fastrnn/network.py": [
        ("    train: bool = False\n", "    negate_output: bool = False\n    train: bool = False\n"),
    ],
    "fastrnn/functional.py": [
        (
            "    train: bool = False,\n    recompute: bool = False,\n",
            "    train: bool = False,\n    recompute: bool = False,\n"
            "    negate_output: bool = False,\n",
        ),
        (
            "        train=train,\n        recompute=recompute,\n",
            "        train=train,\n        recompute=recompute,\n"
            "        negate_output=negate_output,\n",
        ),
    ],
    "fastrnn/reference.py": [
        (
            "    dropout_mask: Tensor | None = None,\n",
            "    dropout_mask: Tensor | None = None,\n    negate_output: bool = False,\n",
        ),
        (
            "x.unflatten(0, (T, B))\n",
            "x.unflatten(0, (T, B))\n    output = -output if negate_output else output\n",
        ),
    ],
}


# Those of tests/test_ops.py call the operators without the new option.
OF_THE_CELL = ["tests/test_registry.py", "-k", "mgu or same_cells"]


def listed(title: str) -> set[str]:
    """The files of a section's list in CONTRIBUTING.md."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    section = page.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return set(re.findall(r"^\d+\. \[(.+?)\]", section, re.MULTILINE))


def edit(copy: Copy, edits: dict[str, list[tuple[str, str]]], title: str) -> None:
    for file, changes in edits.items():
        for old, new in changes:
            if old:
                copy.replace(file, old, new)
            else:
                (copy.root / file).write_text(new)
    # csrc/cells/mgu.h is listed as its folder.
    files = {file if (ROOT / file).exists() else str(Path(file).parent) for file in edits}
    if files != listed(title) or len(files) > 5:
        raise SystemExit(f"CONTRIBUTING.md lists {listed(title)}, changed are {files}")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(folder)
        edit(copy, CELL, "Add a cell")
        edit(copy, OPTION, "Add an option")
        # Neither depends on the instruction set: one is enough.
        copy.environment["FASTRNN_ISAS"] = "generic"
        copy.build()
        print("cell:", copy.test(*OF_THE_CELL, at_least=10))
        print("option:", copy.test("tests/additions/checks.py", at_least=60))


if __name__ == "__main__":
    main()
