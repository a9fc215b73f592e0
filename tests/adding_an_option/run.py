"""Tests `Add an option` of CONTRIBUTING.md: adds one in a copy, builds it, and tests the option.

    python tests/adding_an_option/run.py

The option `negate_output` changes the sign of a network's output, and not of h_n and c_n. EDITS is
all that it takes: these files must be the list in CONTRIBUTING.md. checks.py has its tests.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from edited_copy import ROOT, Copy

# file -> what is replaced, and by what
EDITS = {
    "csrc/torch/options.h": [
        ("    X(double, dropout)\n", "    X(double, dropout) \\\n    X(bool, negate_output)\n"),
    ],
    "csrc/torch/network.cpp": [
        (
            "        device.forward(task);\n    }\n}\n\nForwardResult forward(",
            "        device.forward(task);\n    }\n"
            "    if (a.options.negate_output) r.output.neg_();\n}\n\nForwardResult forward(",
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


def listed() -> list[str]:
    """The files of the list in CONTRIBUTING.md."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    section = page.split("\n## Add an option\n")[1].split("\n## ")[0]
    return re.findall(r"^\d+\. \[(.+?)\]", section, re.MULTILINE)


def changed(copy: Copy) -> set[str]:
    """The files of the copy's sources that are not those of the project."""
    files = [
        path.relative_to(copy.root)
        for folder in ("csrc", "fastrnn")
        for path in (copy.root / folder).rglob("*")
        if path.is_file()
    ]
    return {
        str(file)
        for file in files
        if not (ROOT / file).exists()
        or (ROOT / file).read_bytes() != (copy.root / file).read_bytes()
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(folder)
        for file, edits in EDITS.items():
            for old, new in edits:
                copy.replace(file, old, new)
        if changed(copy) != set(listed()) or len(listed()) > 5:
            raise SystemExit(f"CONTRIBUTING.md lists {listed()}, changed are {changed(copy)}")
        # An option does not depend on the instruction set: one is enough.
        copy.environment["FASTRNN_ISAS"] = "generic"
        copy.build()
        print(copy.test("tests/adding_an_option/checks.py", at_least=60))


if __name__ == "__main__":
    main()
