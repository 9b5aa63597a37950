"""The progress bar of training: iterations, elapsed time, and the time that remains at the present rate."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm


class ProgressBar(tqdm):
    """A bar whose rate is that of all iterations since `begin_rate`; before that it shows none.

    A run begins uncompiled, many times slower than it is later: a rate from its start would promise hours.
    Validations count, since they come back.
    """

    begun: tuple[int, float] | None = None  # iterations and time at `begin_rate`

    def begin_rate(self) -> None:
        """Measure the rate from now on."""
        self.begun = None if self.disable else (self.n, self._time())

    @property
    def format_dict(self) -> dict[str, Any]:
        """Return what is shown, with the rate and so the remaining time."""
        iterations, start = self.begun or (self.n, 0.0)
        done = self.n - iterations
        return super().format_dict | {"rate": done / (self._time() - start) if done else 0.0}
