"""Prints the oldest versions of what setup.py asks for to run the examples and the tests.

    pip install $(python tests/oldest.py)

CI runs tests with those, beside all others with the newest. torch is left out: CI has its oldest
everywhere but where it has its newest.
"""

from importlib.metadata import requires

EXTRAS = ["demo", "test"]


def oldest(extra: str) -> list[str]:
    lines = [line.partition(";") for line in requires("fastrnn") or []]
    return [asked.strip().replace(">=", "==") for asked, _, when in lines if f'"{extra}"' in when]


if __name__ == "__main__":
    found = {asked for extra in EXTRAS for asked in oldest(extra)}
    assert found, "fastrnn is installed without its extras"
    assert all(asked.count("==") == 1 for asked in found), found
    print(*sorted(found))
