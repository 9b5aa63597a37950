"""The picture and the table of growth.py, from its record: curves by panel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import harness
import numpy as np

from evaluation import style

COLUMNS = 5
COLOURS = ("this tool", "this tool, uncompiled", "torch.func, eager", "higher, loop")  # in every panel


@style.use_style()
def draw(panels: dict[str, Any], path: Path) -> None:
    """Draw time above memory, panel by panel; legends have the exponents."""
    from matplotlib.ticker import LogLocator, NullFormatter

    rows = -(-len(panels) // COLUMNS)
    figure = style.new_figure(2.7 * COLUMNS, 6.2 * rows)
    axes = figure.subplots(2 * rows, COLUMNS, squeeze=False)
    for number, (title, curves) in enumerate(panels.items()):
        ticks = max((curve["values"] for curve in curves.values()), key=len)
        for row, (what, scale, label) in enumerate((("seconds", 1e3, "ms"), ("peak", 1e-6, "peak in MB"))):
            panel = axes[number // COLUMNS * 2 + row, number % COLUMNS]
            for position, (name, curve) in enumerate(curves.items()):
                look = style.curve_style(COLOURS.index(name) if name in COLOURS else position)
                y = [scale * value for value in curve[what]]
                panel.plot(curve["values"], y, label=f"{curve['exponents'][row]:.2f}  {name}", **look)
            panel.set(xscale="log", yscale="log", title=title, ylabel=label)
            panel.set_xticks(ticks, [str(value) for value in ticks])
            panel.xaxis.minorticks_off()
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter(NullFormatter())
            panel.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.1), title="exponent, curve")
    style.write_figure(path, figure)


def tabulate(panels: dict[str, Any]) -> str:
    """Return a row for each curve: its ends, exponents, memory also in units of the parameters."""
    rows = []
    for title, name, curve in ((title, *pair) for title, curves in panels.items() for pair in curves.items()):
        ms, mb = (np.array(curve["seconds"]) * 1e3, np.array(curve["peak"]) / 1e6)
        columns = (np.array(curve["values"]), ms, mb, mb * 1e6 / 4 / np.array(curve["parameters"]))
        span, times, peaks, units = (f"{show(column[0])} to {show(column[-1])}" for column in columns)
        exponents = [f"{exponent:.2f}" for exponent in curve["exponents"]]
        rows.append([title, name, span, times, exponents[0], peaks, exponents[1], units])
    head = ["over", "", "from, to", "ms", "exponent", "peak in MB", "exponent", "in parameters"]
    return harness.markdown(head, rows)


def show(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def describe(machine: dict[str, Any]) -> str:
    """Return the line above the table: command, processor, date and load."""
    words = f"{machine['machine']}, torch {machine['torch']}, {machine['date']}"
    return f"`python benchmarks/growth.py`, {words}, load {machine['load']} of other work at the start:"
