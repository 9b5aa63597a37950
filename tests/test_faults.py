"""Real runs, killed (SIGKILL) once in each of their stages, end with the bits of an undisturbed one."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT
from faults import STAGES

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="watches runs by inotify and /proc")


def test_a_run_killed_in_each_stage_ends_with_the_bits_of_an_undisturbed_one(tmp_path):
    """tests/faults.py in short: one run, compiled but once, its processes forks of one with PyTorch."""
    line = [sys.executable, str(ROOT / "tests" / "faults.py"), "--kills", str(len(STAGES))]
    line += [
        "--kills-per-run",
        str(len(STAGES)),
        "--sorts",
        "sinusoid, compiled",
        "--kinds",
        "fork",
        "--quick",
    ]
    line += ["--folder", str(tmp_path / "runs"), "--out", str(tmp_path / "faults.json")]
    done = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
    assert done.returncode == 0, done.stdout
    assert f"faults injected {len(STAGES)}, survived {len(STAGES)}, lost 0" in done.stdout
    found = json.loads((tmp_path / "faults.json").read_text())["single"]
    assert {kill["stage"] for kill in found["kills"]} == {*STAGES}
    assert found["runs"] and not any(run["differences"] for run in found["runs"])
