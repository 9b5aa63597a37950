"""Any command line ends in success, or in one line and exit code 2; never in a traceback.

Lines are generated from the flags' declarations, so that a new flag is among them without more ado. The
suite takes a few of them, always the same; `MAML_FUZZ=20 pytest tests/test_flags_fuzz.py` twenty times as
many, others each time.
"""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import choices
import config
import flags
import main
import members
import names
import presets
from errors import UsageError

TIMES = int(os.environ.get("MAML_FUZZ", "1"))
LONGEST = 420  # characters of a message
WORDS = sorted({name for flag in config.ALL_FLAGS.values() for name in flag.names})

# what no flag should stumble over, whatever its kind
ODD = (
    "", " ", "0", "1", "-1", "2", "-0.0", "1.5", "1e3", "٣", "²", "½", "0x10", "1_000", "2147483647",
    "2147483648", "4294967296", "9223372036854775807", "9223372036854775808", "9" * 5000, "1e308", "1e309",
    "1e-320", "nan", "-nan", "inf", "-inf", "None", "true", "auto", "yes", "seed", "\0", "a\0b", "a\nb", "\r",
    "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\x9b31m", "\ud800", "caf\udce9", "\u202ea", "ä/ö", "🎲", "a b",
    "%s%n{0}", "%(prog)s", "'", '"', "$(false)", "-", "--", "---", "=", ":", ",", ",,", ".", "..", "/", "~", "a:b",
    "x.py:f", ":f", "a:", "images:", "images:.", "table:/dev/null", "torchvision:", "torchvision:x", "os:getcwd",
    "no/such/file.pt", "/dev/null", "/dev/null/x", "/proc/self/mem", "/root", "/", "x" * 300, "x" * 100_000,
    "1," * 20_000 + "1", "0-999999999999", "0-999," * 5_000 + "5", "5-3", "1-2-3", "99999999999999999999,1,1",
    "0,0,0", "0.5,0.3,0.2", "64,16", "flip,flip", "a=b", "=b", "a=", "a=" + "(" * 5_000, "a=" + "-" * 50_000 + "1",
    "a=9**9**9", "s=1,2", "inner-lr=0.1,0.1", "seed=1,2", "n=2,3", "run-name=a,b", "shots=1,2", "k=" + "1," * 9_000,
    "learner-args=a=1,b=2", "oracle=yes,no", "oracle=1", "dataset=sinusoid,harmonic,omniglot", "compile=on,off",
)  # fmt: skip

# what is valid where a check says more than the kind does
FITTING: dict[Any, tuple[str, ...]] = {
    names.a_dataset: (*presets.DATASETS, "images:folder", "table:file.csv", "own.py:f", "package.module:f"),
    names.a_learner: (*presets.LEARNERS, "torchvision:resnet18", "own.py:f", "package.module:f"),
    names.a_loss: (*choices.LOSSES, "own.py:f"),
    names.column_names: ("y", "a,b", "task", "a , b"),
    names.augmentations: ("flip", "crop,rotate", "rotate,flip,crop"),
    names.one_or_three: ("1", "3"),
    names.three_shares: ("64,16,20", "1,0,1", "1,1,1"),
    flags.key_and_value: ("width=8", "a=1e3", "b=x", "c=[1,2]", "d=True"),
    flags.key_and_values: ("inner-lr=0.1,0.01", "s=1,2", "k=1,5", "first-order=yes", "algorithm=maml,anil",
                           "oracle=yes,no", "meta-lr=1e-3", "loss=mse,huber", "grad-clip=1,2", "n=2,5"),
    flags.seed_range: ("0", "1", "9223372036854775807"),
}  # fmt: skip
BY_NAME = {"seeds": ("0-2", "1,5", "7", "0,2-4")}
BY_KIND: dict[type, tuple[str, ...]] = {
    int: ("1", "2", "3", "5", "10", "20"),
    float: ("0.5", "0.01", "1", "2", "0", "0.9"),
    str: ("name", "b", "y"),
    Path: ("folder", "file.pt", "no/such", "."),
}


def fitting(name: str, flag: flags.Flag) -> st.SearchStrategy[str]:
    values = flag.choices or BY_NAME.get(name) or FITTING.get(flag.check) or BY_KIND[flag.kind]
    default = [str(flag.default)] if isinstance(flag.default, (int, float, str, Path)) else []
    return st.sampled_from([*values, *default])


odd = st.one_of(st.sampled_from(ODD), st.sampled_from(ODD), st.text(max_size=20), st.integers().map(str),
                st.floats().map(str))  # fmt: skip


def part(name: str, flag: flags.Flag, value: st.SearchStrategy[str]) -> st.SearchStrategy[list[str]]:
    """A flag with its argument, in all the forms it has."""
    spelled = st.sampled_from(flag.names)
    if flag.kind is bool:
        return st.sampled_from([[form] for n in flag.names for form in (n, n, f"--no-{n.lstrip('-')}")])
    if flag.kind is tuple:
        return st.builds(lambda n, v: [n, *v], spelled, st.lists(value, min_size=1, max_size=2))
    apart = st.builds(lambda n, v: [n, v], spelled, value)
    return st.one_of(
        apart, apart, st.builds(lambda n, v: [f"{n}{'=' * n.startswith('--')}{v}"], spelled, value)
    )


well_formed = st.one_of(
    [part(n, f, fitting(n, f) if f.kind is not bool else odd) for n, f in config.ALL_FLAGS.items()]
)
strange = st.one_of(
    st.one_of([part(n, f, odd) for n, f in config.ALL_FLAGS.items()]),
    st.builds(lambda n: [n], st.sampled_from(WORDS)),  # without its argument
    st.builds(lambda n, v: [f"{n}={v}"], st.sampled_from(WORDS), odd),  # of a switch, with one
    st.builds(lambda n, length: [n[: max(1, length)]], st.sampled_from(WORDS), st.integers(1, 12)),
    st.builds(lambda v: [v], odd),
)  # fmt: skip
context = st.sampled_from([[], ["--dataset", "omniglot"], ["--dataset", "images:x"], ["--dataset", "table:x.csv"],
                           ["--dataset", "own.py:f"], ["--dataset", "mini-imagenet"]])  # fmt: skip
lines = st.one_of(
    st.builds(lambda c, parts: c + sum(parts, []), context, st.lists(well_formed, max_size=6)),
    st.builds(lambda c, parts, s, more: c + sum([*parts, s, *more], []), context,
              st.lists(well_formed, max_size=3), strange, st.lists(well_formed, max_size=3)),
    st.builds(lambda parts: sum(parts, []), st.lists(strange, max_size=6)),
)  # fmt: skip


def fixed_budget(number: int) -> Any:
    """So many lines; in the suite always the same."""
    return settings(
        max_examples=number * TIMES, derandomize=TIMES == 1, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def check_message(said: str, line: list[str]) -> None:
    """One printable line, not a long one, that names a flag."""
    assert said.isprintable() or all(c.isprintable() or c.isspace() for c in said), (line, said)
    assert "\n" not in said and len(said) <= LONGEST, (line, said)
    assert re.search(r"(^|[ :(])--?[a-z]", said), (line, said)


@pytest.fixture(scope="module", autouse=True)
def _one_parser():
    """Made once: it takes longer than all else."""
    patch = pytest.MonkeyPatch()
    parser = config.build_parser()
    patch.setattr(config, "build_parser", lambda: parser)
    yield
    patch.undo()


@fixed_budget(3000)
@given(line=lines.filter(lambda line: not {"-h", "--help"} & set(line)))
def test_any_flags_are_settled_or_refused_in_one_line_that_names_a_flag(line):
    try:
        given_flags = config.parse(line)
        call = config.check_invocation(given_flags)
        if not members.members_of(call, given_flags) and call.load is None:
            config.resolve(given_flags)
    except UsageError as error:
        check_message(main.one_line(str(error)), line)
