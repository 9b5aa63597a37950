"""Any command line ends in success, or in one line and exit code 2; never in a traceback.

Lines are generated from the flags' declarations, so that a new flag is among them without more ado. The
suite takes a few of them, always the same; `MAML_FUZZ=20 pytest tests/test_flags_fuzz.py` twenty times as
many, others each time.
"""

from __future__ import annotations

import os
import re
import warnings
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import main
from commands import config, members, names, presets
from common import choices, errors
from common import options as flags
from common.errors import UsageError

TIMES = int(os.environ.get("MAML_FUZZ", "1"))
LONGEST = errors.LONGEST  # characters of a message
WORDS = sorted({name for flag in config.ALL_FLAGS.values() for name in flag.names})

# what no flag should stumble over, whatever its kind
ODD = (
    "", " ", "0", "1", "-1", "2", "-0.0", "1.5", "1e3", "٣", "²", "½", "0x10", "1_000", "2147483647",
    "2147483648", "4294967296", "9223372036854775807", "9223372036854775808", "9" * 5000, "1e308", "1e309",
    "1e-320", "nan", "-nan", "inf", "-inf", "None", "true", "auto", "yes", "seed", "\0", "a\0b", "a\nb", "\r",
    "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\x9b31m", "\ud800", "caf\udce9", "\u202ea", "ä/ö", "🎲", "a b",
    "%s%n{0}", "%(prog)s", "'", '"', "$(false)", "-", "--", "---", "=", ":", ",", ",,", ".", "..", "/", "~",
    "a:b",
    "x.py:f", ":f", "a:", "images:", "images:.", "table:/dev/null", "torchvision:", "torchvision:x",
    "os:getcwd",
    "no/such/file.pt", "/dev/null", "/dev/null/x", "/proc/self/mem", "/root", "/", "x" * 300, "x" * 100_000,
    "1," * 20_000 + "1", "0-999999999999", "0-999," * 5_000 + "5", "5-3", "1-2-3", "99999999999999999999,1,1",
    "0,0,0", "0.5,0.3,0.2", "64,16", "flip,flip", "a=b", "=b", "a=",
    "a=" + "(" * 5_000, "a=" + "-" * 50_000 + "1",
    "a=9**9**9", "s=1,2", "inner-lr=0.1,0.1", "seed=1,2", "n=2,3", "run-name=a,b", "shots=1,2",
    "k=" + "1," * 9_000,
    "learner-args=a=1,b=2", "oracle=yes,no", "oracle=1", "dataset=sinusoid,harmonic,omniglot",
    "compile=on,off",
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
BY_NAME = {"seeds": ("0-2", "1,5", "7", "0,2-4"), "compare": ("folder", "file.pt", "no/such", ".")}
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
context = st.sampled_from([[], ["--dataset", "omniglot"], ["--dataset", "images:x"],
                           ["--dataset", "table:x.csv"],
                           ["--dataset", "own.py:f"], ["--dataset", "mini-imagenet"]])  # fmt: skip
lines = st.one_of(
    st.builds(lambda c, parts: [*c, *chain(*parts)], context, st.lists(well_formed, max_size=6)),
    st.builds(lambda c, parts, s, more: [*c, *chain(*parts), *s, *chain(*more)], context,
              st.lists(well_formed, max_size=3), strange, st.lists(well_formed, max_size=3)),
    st.builds(lambda parts: [*chain(*parts)], st.lists(strange, max_size=6)),
)  # fmt: skip


def fixed_budget(number: int, *, shrink: bool = True) -> Any:
    """So many lines; in the suite always the same. `shrink`: take them again and again where one fails."""
    return settings(
        max_examples=number * TIMES, derandomize=TIMES == 1, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[phase for phase in Phase if shrink or phase is not Phase.shrink],
    )  # fmt: skip


def check_message(said: str, line: list[str]) -> None:
    """One printable line, and not a long one."""
    assert said.isprintable(), (line, said)
    assert 0 < len(said) <= LONGEST, (line, said)


@pytest.fixture(scope="module", autouse=True)
def _one_parser():
    """Made once: it takes longer than all else."""
    patch = pytest.MonkeyPatch()
    parser = config.build_parser()
    patch.setattr(config, "build_parser", lambda: parser)
    yield
    patch.undo()


@fixed_budget(2000)
@given(line=lines.filter(lambda line: not {"-h", "--help"} & set(line)))
def test_any_flags_are_settled_or_refused_in_one_line_that_names_a_flag(line):
    try:
        given_flags = config.parse(line)
        call = config.check_invocation(given_flags)
        if not members.members_of(call, given_flags) and call.load is None and not call.compare:
            config.resolve(given_flags)
    except UsageError as error:
        said = main.for_terminal(str(error))
        check_message(said, line)
        assert re.search(r"(^|[ :(])--?[a-z]", said), (line, said)


# ---- whole runs ----------------------------------------------------------------------------------

TINY = ["-k", "2", "-q", "2", "--meta-batch-size", "2", "--iterations", "3", "--val-every", "2",
        "--log-every", "2", "--eval-tasks", "3", "--compile", "off"]  # fmt: skip
IMAGES = ["--dataset", "images:images", "--image-size", "12", "--channels", "1", "-n", "2"]
DATA = (
    [], ["--dataset", "harmonic"], ["--dataset", "sinusoid-line"], ["--dataset", "sinusoid-frequency"],
    [*IMAGES, "--learner", "fc"], [*IMAGES, "--learner", "conv"], [*IMAGES, "--learner", "conv4"], IMAGES,
    ["--dataset", "table:rows.csv"],
    ["--dataset", "table:rows.csv", "--target-columns", "c", "-n", "2", "--input-columns", "x"],
    ["--dataset", "own.py:tasks", "--learner", "own.py:net"], ["--learner", "own.py:net"],
)  # fmt: skip
OWN = """
import torch

def net(outputs, width=4):
    return torch.nn.Sequential(torch.nn.LazyLinear(width), torch.nn.Tanh(), torch.nn.Linear(width, outputs))

def loss(outputs, targets):
    return (outputs - targets).abs().mean()

class tasks:
    def sample(self, split, seeds):
        x = torch.rand(len(seeds), 4, 2)
        return x[:, :2], x[:, :2, :1], x[:, 2:], x[:, 2:, :1]
"""
SIZES = ("shots", "queries", "ways", "meta_batch_size", "iterations", "log_every", "val_every", "eval_tasks",
         "dataset", "learner", "compile", "image_size", "channels")  # fmt: skip
ELSEWHERE = ("checkpoint_path", "data_root")  # where a test may write
SMALL: dict[type, tuple[str, ...]] = {
    int: ("1", "2", "3"), float: ("0.5", "0.01", "1e-320", "1e308", "0.9"),
    str: ("a", "y", "x", "c", "2", "0"),
}  # fmt: skip
SMALL_BY_NAME = {
    "loss": (*choices.LOSSES, "own.py:loss"), "learner_args": ("width=3", "width=0", "a=1"),
    "loss_args": ("delta=2", "x=1"),
    "dataset_args": ("a=1",), "seeds": ("0-1", "3"),
    "sweep": ("inner-lr=0.1,0.2", "s=1,2", "first-order=yes,no"),
    "augment": ("flip", "crop,rotate"),
    "eval_dataset": ("images:images", "table:rows.csv", "harmonic", "own.py:tasks"),
    "load": ("runs/sin/last.pt", "runs/sin/best.pt", "runs/img/best.pt", "runs/tab/last.pt", "runs/many",
             "runs/sin", "rows.csv", "no.pt"),
    "init_from": ("runs/sin/best.pt", "runs/img/last.pt", "runs/tab/last.pt", "images"),
    "compare": ("runs/sin", "runs/sin/last.pt", "runs/img", "runs/tab/best.pt", "runs/many", "no"),
    "adapt": ("mine.csv", "mine", "images", "no"), "save_weights": ("w.pt", "no/such/w.pt"),
    "out": ("results", "rows.csv"),
    "run_name": ("a", "b", "sin", "many"), "split_shares": ("1,1,1", "64,16,20"), "head": ("0", "4", "2"),
    "split_seed": ("0", "3"), "seed": ("0", "9223372036854775807"), "timeout": ("1",), "threads": ("1", "2"),
}  # fmt: skip
DOING = (
    [], [], [], ["--resume", "--run-name", "a"], ["--seeds", "0-1"], ["--eval"],
    ["--eval", "--load", "runs/sin/last.pt"],
    ["--eval", "--load", "runs/img/best.pt"], ["--eval", "--load", "runs/tab/best.pt"],
    ["--eval", "--load", "runs/many"],
    ["--load", "runs/sin/last.pt", "--iterations", "4"], ["--load", "runs/img/last.pt", "--iterations", "4"],
    ["--compare", "runs/sin", "runs/sin/last.pt"], ["--compare", "runs/many", "runs/sin", "--split", "test"],
    ["--init-from", "runs/sin/last.pt"], ["--adapt", "mine.csv", "--load", "runs/tab/last.pt"],
    ["--adapt", "mine", "--load", "runs/img/last.pt"],
)  # fmt: skip


if TIMES > 1:  # slow ones
    DATA += ([*IMAGES, "--learner", "torchvision:resnet18"],)
    DOING += (["--eval", "--baselines", "--load", "runs/sin/last.pt"],)


def small(name: str, flag: flags.Flag) -> st.SearchStrategy[list[str]]:
    values = flag.choices or SMALL_BY_NAME.get(name) or SMALL.get(flag.kind) or ("no",)
    return part(name, flag, st.sampled_from(values))


extras = st.one_of([small(n, f) for n, f in config.ALL_FLAGS.items() if n not in (*SIZES, *ELSEWHERE)])
algorithms = st.sampled_from([[], *(["--algorithm", name] for name in presets.ALGORITHMS)])


def a_run(doing: list[str], data: list[str], algorithm: list[str], more: list[list[str]]) -> list[str]:
    """With a checkpoint, its own data and sizes; else these."""
    own = [] if {"--load", "--compare"} & set(doing) else [*TINY, *data, *algorithm]
    if "--eval" in doing and not own:
        own = ["--eval-tasks", "3", "--eval-steps", "2"]
    if "--eval" in own + doing and "--compile" in own:
        own = own[: own.index("--compile")] + own[own.index("--compile") + 2 :]
    return [*own, *doing, *chain(*more)]


runs = st.builds(
    a_run, st.sampled_from(DOING), st.sampled_from(DATA), algorithms, st.lists(extras, max_size=3)
)


@pytest.fixture(scope="module")
def place(request, tmp_path_factory):
    """A folder with data, code and trained runs, to be copied for each command line."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("place")
    random = np.random.default_rng(0)

    def images(where: Path, number: int) -> None:
        where.mkdir(parents=True)
        for each in range(number):
            Image.fromarray(random.integers(0, 255, (12, 12), dtype=np.uint8)).save(where / f"{each}.png")

    for name in range(13):
        images(folder / "images" / f"class-{name:02}", 6)
    images(folder / "mine" / "support" / "a", 2)
    images(folder / "mine" / "support" / "b", 2)
    images(folder / "mine" / "query", 3)
    rows = [
        f"{task},{0.1 * row},{0.3 * row * task},{'ab'[row % 2]}" for task in range(9) for row in range(10)
    ]
    (folder / "rows.csv").write_text("\n".join(["task,x,y,c", *rows]))
    (folder / "mine.csv").write_text("x,y\n0.1,0.2\n0.2,0.1\n0.3,\n")
    (folder / "own.py").write_text(OWN)
    patch = pytest.MonkeyPatch()
    request.addfinalizer(patch.undo)
    patch.chdir(folder)
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    patch.setattr("training.trainer.VALIDATION_TASKS", 3)
    patch.setattr("training.tensorboard._wait_for_a_later_second", lambda folder: None)
    tiny = [*TINY, "--checkpoint-path", "runs"]
    assert main.main([*tiny, "--run-name", "sin"]) == 0
    assert main.main([*tiny, *IMAGES, "--learner", "conv", "--run-name", "img"]) == 0
    table = ["--dataset", "table:rows.csv", "--input-columns", "x"]
    assert main.main([*tiny, *table, "--run-name", "tab"]) == 0
    assert main.main([*tiny, "--seeds", "0-1", "--run-name", "many"]) == 0
    return folder


def what_is_there(folder: Path) -> dict[Path, bytes | None]:
    """Files with their contents, and folders."""
    return {
        path: path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if not {"cache", "__pycache__"} & set(path.relative_to(folder).parts)
    }


def restore(folder: Path, before: dict[Path, bytes | None]) -> None:
    for path in sorted(what_is_there(folder), reverse=True):
        if path not in before:
            path.rmdir() if path.is_dir() else path.unlink()
    for path, content in before.items():
        if content is not None and (not path.is_file() or path.read_bytes() != content):
            path.write_bytes(content)


BAR = re.compile(r"Preparing images|it/s\]|s/it\]|\?it|\d+it \[|^\s*\d+%")


@fixed_budget(12, shrink=False)
@given(line=runs)
def test_any_run_ends_well_or_in_one_line(line, place, capfd):
    before = what_is_there(place)
    capfd.readouterr()
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.resetwarnings()
            for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
                warnings.simplefilter("ignore", kind)  # as Python does
            where = [] if {"--load", "--compare"} & set(line) else ["--checkpoint-path", "runs"]
            code = main.main([*line, *where])
        said, errors = capfd.readouterr()
        after = what_is_there(place)
        new = {path: content for path, content in after.items() if path not in before}
        lines_said = [each for each in re.split(r"[\r\n]+", errors) if each.strip() and not BAR.search(each)]
        assert not warned, (line, [str(each.message) for each in warned])
        assert code in (0, 2), (line, errors)
        if code == 2:
            assert len(lines_said) == 1, (line, errors)
            check_message(lines_said[0].removeprefix("main.py: error: "), line)
            empty = [path for path in new if path.is_dir() and not any(path.iterdir())]
            assert not empty, (line, errors, empty)
            return
        assert all(e.startswith(("main.py: ", "The training loss is", "Training ")) for e in lines_said), (
            line,
            errors,
        )
        for written in re.findall(
            r"^(?:Written: |Test it: .*--load )(\S+?),?(?: and .*)?$", said, re.MULTILINE
        ):
            assert (place / written).is_file(), (line, written)
        for folder in {path.parent for path in new if path.name == "last.pt"}:
            assert (folder / "training.json").is_file(), (line, folder)
    finally:
        restore(place, before)
