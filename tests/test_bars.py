"""Progress: drawn over itself in a terminal, lines now and then in a file."""

import io
from contextlib import redirect_stderr

import pytest

from common import bars


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def nobody_asks_for_redrawing(monkeypatch):
    monkeypatch.delenv("TQDM_MININTERVAL", raising=False)


def drawn(stream: io.StringIO, total: int) -> str:
    with redirect_stderr(stream), bars.of(total=total) as bar:
        for number in range(total):
            bar.set_postfix_str(f"query loss {number}")
            bar.update()
    return stream.getvalue()


def test_a_file_gets_whole_lines(monkeypatch):
    monkeypatch.setattr(bars, "LINE_SECONDS", 0.0)
    text = drawn(io.StringIO(), 3)
    lines = [line.partition("|") for line in text.splitlines()]
    assert "\r" not in text
    assert list(dict.fromkeys(done for done, *_ in lines)) == ["0%", "33%", "67%", "100%"]
    assert "query loss 2" in lines[-1][-1]


def test_a_file_gets_a_line_now_and_then_and_not_one_an_iteration():
    lines = drawn(io.StringIO(), 1000).splitlines()
    assert [line.partition("|")[0] for line in lines] == ["0%", "100%"]


def test_a_terminal_gets_one_line_drawn_over_itself():
    text = drawn(Terminal(), 2)
    assert text.count("\n") == 1 and text.count("\r") > 1 and "query loss 1" in text
