"""Prints the oldest versions that setup.py and pyproject.toml allow.

    pip install $(python tests/oldest.py)

CI builds and tests with these versions, in addition to the newest ones. torch is excluded: CI uses
its oldest supported version everywhere else.
"""

import re
from importlib.metadata import requires
from pathlib import Path

EXTRAS = ["bench", "demo", "others", "test"]
ROOT = Path(__file__).parent.parent


def extra_requirements(extra: str) -> list[str]:
    lines = [line.partition(";") for line in requires("fastrnn") or []]
    found = [spec.strip() for spec, _, marker in lines if f'"{extra}"' in marker]
    assert found, f"fastrnn is installed without its extra '{extra}'"
    return found


def build_requirements() -> list[str]:
    # Python 3.10 has no tomllib.
    line = re.search(r"^requires = .*$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    return [spec for spec in re.findall(r'"([^"]+)"', line[0]) if spec != "wheel"]


if __name__ == "__main__":
    specs = {spec for extra in EXTRAS for spec in extra_requirements(extra)}
    specs |= set(build_requirements())
    assert all(spec.count(">=") == 1 for spec in specs), specs
    print(*sorted(spec.replace(">=", "==") for spec in specs))
