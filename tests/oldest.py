"""Prints the oldest versions of what setup.py and pyproject.toml ask for.

    pip install $(python tests/oldest.py)

CI runs tests and builds with those, beside all others with the newest. torch is left out: CI has
its oldest everywhere but where it has its newest.
"""

import tomllib
from importlib.metadata import requires
from pathlib import Path

EXTRAS = ["bench", "demo", "others", "test"]
ROOT = Path(__file__).parent.parent


def of_extra(extra: str) -> list[str]:
    lines = [line.partition(";") for line in requires("fastrnn") or []]
    found = [asked.strip() for asked, _, when in lines if f'"{extra}"' in when]
    assert found, f"fastrnn is installed without its extra '{extra}'"
    return found


def to_build() -> list[str]:
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    return [name for name in asked if name != "wheel" and not name.startswith("torch>")]


if __name__ == "__main__":
    asked = {name for extra in EXTRAS for name in of_extra(extra)} | set(to_build())
    assert all(name.count(">=") == 1 for name in asked), asked
    print(*sorted(name.replace(">=", "==") for name in asked))
