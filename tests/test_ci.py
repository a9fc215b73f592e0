""".ci/run with programs that only print their arguments: each line of it is run."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "run"
pytestmark = [pytest.mark.once, pytest.mark.cpu("about a script")]
# `make` also makes the environments whose Python the script runs.
PROGRAMS = {
    "make": """for env in .venv .venv-cuda; do
    mkdir -p $env/bin && cp stub/python $env/bin/python
done""",
    "python": "",
    "apt-get": "",
    "pip": "",
}


def run(folder: Path, script: str) -> str:
    (folder / ".ci").mkdir()
    (folder / ".ci" / "run").write_text(script)
    for name, does in PROGRAMS.items():
        program = folder / "stub" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\necho "$0 $*"\n{does}\n')
        program.chmod(0o755)
    vgpu = folder / "tests" / "vgpu" / "vgpu"
    vgpu.parent.mkdir(parents=True)
    shutil.copy(folder / "stub" / "python", vgpu)
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    environment = {**os.environ, "PATH": f"{folder}/stub:{os.environ['PATH']}"}
    found = subprocess.run(
        ["bash", ".ci/run"], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout[-1000:] + found.stderr
    return found.stdout


@pytest.mark.skipif(not SCRIPT.exists() or not shutil.which("git"), reason="not a clone")
def test_every_stage_runs(tmp_path):
    script = SCRIPT.read_text()
    found = run(tmp_path, script)
    stages = re.findall(r"^ *(?:heading ['\"]\w|if .*fits \d+ )", script, re.MULTILINE)
    assert found.count("=== ") == len(stages)
    assert "=== all passed" in found
    assert "left out" not in found


@pytest.mark.skipif(not SCRIPT.exists() or not shutil.which("git"), reason="not a clone")
def test_on_a_slow_machine_stages_are_left_out(tmp_path):
    hour_ago = "began=$((SECONDS - 65 * 60))"
    script = SCRIPT.read_text()
    assert "began=$SECONDS" in script
    found = run(tmp_path, script.replace("began=$SECONDS", hour_ago))
    assert "=== all passed" in found
    assert "left out for time: AddressSanitizer" in found
