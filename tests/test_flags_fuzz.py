"""Any command line is settled, or refused in one printable line; never a traceback.

Lines are generated from the flags' declarations, so that a new flag is among them without more ado.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commands import parser
from commands.call import ALL_FLAGS, check_call
from commands.members import list_members
from commands.resolve import resolve
from common import errors
from common.errors import UsageError
from common.options import Flag
from common.sizes import Size

# What no flag should stumble over, whatever its kind.
ODD = (
    "", " ", "0", "1", "-1", "1.5", "1e3", "٣", "²", "½", "0x10", "1_000", "2147483648", "9" * 20,
    "9" * 5000, "1e309", "1e-320", "nan", "-inf", "None", "true", "auto", "\0", "a\nb", "\x1b[31mred",
    "\ud800", "caf\udce9", "\u202ea", "🎲", "%s%n{0}", "%(prog)s",
    "'", "$(false)", "-", "--", "=", ":", ",", "..", "/",
    "a:b", "x.py:f", ":f", "a:", "images:", "table:/dev/null", "torchvision:x", "os:getcwd", "/dev/null/x",
    "x" * 100_000, "1," * 20_000 + "1", "0-999999999999", "5-3", "1-2-3", "0,0,0", "flip,flip", "a=b", "=b",
    "a=" + "(" * 5_000, "s=1,2", "inner-lr=0.1,0.1", "seed=1,2", "run-name=a,b", "oracle=yes,no", "oracle=1",
)  # fmt: skip
# What is valid, apart from a flag's suggestions, where a check says more than the kind does.
FITTING: dict[str, tuple[str, ...]] = {
    "dataset": ("images:folder", "table:file.csv", "own.py:f", "sinusoid + harmonic"),
    "mix": ("1,2", "3,0.5"),
    "learner": ("torchvision:resnet18", "own.py:f"),
    "loss": ("own.py:f",),
    "sweep": ("inner-lr=0.1,0.01", "s=1,2", "first-order=yes", "algorithm=maml,anil", "n=2,5"),
    "seeds": ("0-2", "1,5"),
    "columns": ("task=t", "target=a,b", "class=c"),
    "augment": ("flip", "crop,rotate"),
    "split_shares": ("64,16,20", "1,0,1"),
    "channels": ("1", "3"),
}
BY_KIND: dict[object, tuple[str, ...]] = {
    int: ("1", "2", "5", "20"),
    Size: ("1", "2", "5", "20", "1-3", "2-20"),
    float: ("0.5", "0.01", "1", "0"),
    str: ("name", "y"),
    tuple: ("width=8", "c=[1,2]"),
    Path: ("folder", "no/such", "."),
}

odd = st.one_of(st.sampled_from(ODD), st.text(max_size=20), st.integers().map(str), st.floats().map(str))


def written(
    name: str, flag: Flag, value: st.SearchStrategy[str] | None = None
) -> st.SearchStrategy[list[str]]:
    """Write a flag with an argument, by default one that fits, in each form that it has."""
    if flag.kind is bool:
        return st.sampled_from([[form] for n in flag.names for form in (n, f"--no-{n.lstrip('-')}")])
    if value is None:
        fitting = flag.suggestions + FITTING.get(name, ())
        value = st.sampled_from(flag.choices or fitting or BY_KIND[flag.kind])
    pairs = st.tuples(st.sampled_from(flag.names), value)
    return st.one_of(pairs.map(list), pairs.map(lambda pair: ["=".join(pair)]))


good = st.one_of([written(name, flag) for name, flag in ALL_FLAGS.items()])
bad = st.one_of([odd.map(lambda v: [v]), *(written(name, flag, odd) for name, flag in ALL_FLAGS.items())])
few = st.lists(good, max_size=3)
lines = st.one_of(
    st.lists(good, max_size=6),
    st.lists(bad, max_size=6),
    st.tuples(few, bad, few).map(lambda parts: [*parts[0], parts[1], *parts[2]]),
).map(lambda parts: [*chain(*parts)])


@pytest.fixture(scope="module", autouse=True)
def _one_parser():
    """Build the parser once: it takes longer than everything else."""
    with pytest.MonkeyPatch.context() as patch:
        one = parser.build_parser()
        patch.setattr(parser, "build_parser", lambda: one)
        yield


@settings(max_examples=400, derandomize=True, database=None, deadline=None)
@given(line=lines)
def test_any_flags_are_settled_or_refused_in_one_line(line):
    if {"-h", "--help", "--help-all"} & set(line):
        return
    try:
        flags = parser.parse(line)
        call = check_call(flags)
        list_members(call, flags)
        if call.load is None and not call.compare:
            resolve(flags)
    except UsageError as error:
        text = errors.explain(error)
        assert text and text.isprintable(), (line, text)
