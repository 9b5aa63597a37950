"""The targets of speed: which count as met, what the page says of them, and how they are measured."""

import subprocess
import sys

import pytest
import speed
from conftest import ROOT
from harness import read_json
from targets import ADAPT, BUSY, COLD, COMPILED, FIVE_WAY, HIGHER, ONE, REDUCED, TARGETS


def test_the_page_says_what_the_records_say():
    page = (ROOT / "docs" / "speed.md").read_text()
    for mark, text in speed.page_texts(speed.read_records()).items():
        assert f"<!-- {mark} -->\n{text}<!-- /{mark} -->" in page


def test_a_target_is_met_on_its_own_side_of_the_limit():
    higher, busy = (next(t for t in TARGETS if (t.work, t.number) == (FIVE_WAY, n)) for n in (HIGHER, BUSY))
    for ours, verdict in ((5.49, "not met"), (5.5, "met")):
        results = {FIVE_WAY: {"contenders": {HIGHER: {"ours_is_faster_by": ours}}}}
        assert higher.row(results)[1:] == [f"{ours:.3g}", verdict]
    for ours, verdict in ((3.0, "met"), (3.01, "not met")):
        assert busy.row({FIVE_WAY: {BUSY: ours}})[1:] == [f"{ours:.3g}", verdict]
    assert higher.row({})[1:] == ["", "not measured"]
    assert higher.row({FIVE_WAY: {}})[1:] == ["", "not measured: needs `pip install -e '.[peers]'`"]


@pytest.mark.parametrize(("end", "code"), [("pass", 0), ("os.kill(os.getpid(), 9)", -9)])
def test_busy_processes_end_with_what_they_were_started_for(end, code):
    line = [sys.executable, "-c", f"import os, targets\nwith targets.occupy_cores(2): {end}"]
    # returns when nobody holds its output any more
    done = subprocess.run(line, cwd=ROOT / "benchmarks", stdout=subprocess.PIPE, timeout=60, check=False)
    assert done.returncode == code


@pytest.mark.slow
def test_the_rehearsal_measures_every_kind_of_target(tmp_path):
    script = [sys.executable, ROOT / "benchmarks/speed.py", "--targets", "--quick", "--rounds", "2"]
    subprocess.run([*script, "--out", tmp_path], check=True, capture_output=True)
    record = read_json(*tmp_path.glob("*.json"))
    one = record["results"][ONE]
    assert 0 < one[COMPILED] <= 100 and min(one[number] for number in (BUSY, COLD, REDUCED)) > 0
    assert record["results"][ADAPT]["seconds"] > 0 and record["machine"]["gflop_per_second"]
