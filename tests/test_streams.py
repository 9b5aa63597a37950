"""A run outlives its readers, its terminal and its current folder: no traceback, whatever is closed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

MAIN = f"{sys.executable} {ROOT / 'main.py'}"


def shell(line: str, **options) -> subprocess.CompletedProcess:
    command = ["bash", "-o", "pipefail", "-c", line]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        (f"{MAIN} --help | head -1", 0, ""),
        (f"{MAIN} --help 2>&1 >&-", 0, ""),
        (f"{MAIN} --help >/dev/full", 0, "main.py: <stdout>: No space left on device: it goes on without\n"),
        (f"{MAIN} -k 0 2>&-", 2, ""),
        (f"{MAIN} -k 0 2>/dev/full", 2, ""),
        (f"{MAIN} -k 0 >&- 2>&-", 2, ""),
        (f"COLUMNS=1 {MAIN} --help | tail -1", 0, ""),
    ],
)
def test_flags_answer_whoever_reads(line, code, said):
    run = shell(line)
    assert (run.returncode, run.stderr) == (code, said)


def test_a_file_never_takes_the_number_of_a_closed_stream(tmp_path):
    code = (
        "import os, streams; streams.outlive_readers()\n"
        f"file = open({str(tmp_path / 'file')!r}, 'w'); os.write(1, b'lost'); os.write(2, b'lost')"
    )
    assert (
        shell(f'{sys.executable} -c "$CODE" >&- 2>&-', cwd=ROOT, env={**os.environ, "CODE": code}).returncode
        == 0
    )
    assert (tmp_path / "file").read_text() == ""


def test_a_character_that_the_terminal_has_not_is_shown_by_its_code():
    code = "import streams; streams.outlive_readers(); print('1 ± 2')"
    run = shell(f'PYTHONIOENCODING=ascii {sys.executable} -c "{code}"', cwd=ROOT)
    assert (run.returncode, run.stdout, run.stderr) == (0, "1 \\xb1 2\n", "")


def test_a_current_folder_that_is_gone_is_said_in_one_line(tmp_path):
    run = shell(f"mkdir gone && cd gone && rmdir ../gone && {MAIN}", cwd=tmp_path)
    said = "main.py: error: the current folder is not there any more: cd into one that is\n"
    assert (run.returncode, run.stdout, run.stderr) == (2, "", said)


def test_training_goes_on_where_nobody_reads(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    flags = ["--iterations", "3", "--compile", "off", "--checkpoint-path", str(tmp_path), "--run-name", "a"]
    command = [sys.executable, str(ROOT / "main.py"), *flags]
    run = subprocess.run(command, stdout=writer, stderr=writer, cwd=tmp_path, timeout=300)
    os.close(writer)
    assert run.returncode == 0
    assert {"last.pt", "training.json"} <= {path.name for path in Path(tmp_path, "a").iterdir()}
