"""The progress bar promises what the rate of the compiled iterations says."""

import io

from training.progress import ProgressBar


def test_the_remaining_time_is_that_of_the_iterations_since_the_rate_began(monkeypatch):
    bar = ProgressBar(total=100, initial=10, file=io.StringIO(), mininterval=1e9)
    now = bar.start_t
    monkeypatch.setattr(bar, "_time", lambda: now)
    bar.n, now = 13, now + 3600.0  # uncompiled, and compiling
    assert "<?" in str(bar) and "1:00:00" in str(bar)
    bar.begin_rate()
    bar.n, now = 33, now + 10.0
    assert bar.format_dict["rate"] == 2.0 and "<00:33" in str(bar)
