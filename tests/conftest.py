"""Shared by all tests: the project's modules on the path, small data sets, and the real Omniglot."""

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pkgutil import resolve_name

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent

SHARES = {"train": 64, "validation": 16, "test": 20}

DRAWING = (
    *("training.run.Run.draw_examples", "training.run.learning_figure", "commands.sweep.learning_figure"),
    *("commands.evaluate.results_figure", "commands.evaluate.examples_figure"),
    *("commands.baselines.results_figure", "commands.baselines.fits_figure"),
    *("commands.compare.comparison_figure", "commands.adapt.predictions_figure"),
)

LONG_FILES = ("test_world.py", "test_sweep.py", "test_compiler.py", "test_learners.py", "test_runs.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, so that no worker is left alone with one at the end."""
    order = {name: number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="session")
def omniglot_root() -> Path:
    """Return the folder of the real Omniglot; skip its tests where there is none."""
    root = Path(os.environ.get("MAML_DATA_ROOT") or ROOT / "data")
    if not [*(root / "omniglot-py").glob("images_background*")]:
        pytest.skip("no Omniglot: set MAML_DATA_ROOT to the folder that holds omniglot-py/")
    return root


@pytest.fixture(scope="session")
def icons_root(tmp_path_factory) -> Path:
    """Return the folder that holds icons/, drawn if need be; skip its tests where that is not possible."""
    root = Path(os.environ.get("MAML_DATA_ROOT") or ROOT / "data")
    if not (root / "icons" / "icons.npz").exists():
        from common.files import lock_file

        root = tmp_path_factory.getbasetemp().parent / "icons-root"  # of all workers
        root.mkdir(exist_ok=True)
        with lock_file(root / ".lock"):
            if not (root / "icons" / "icons.npz").exists():
                script = [sys.executable, str(ROOT / "examples" / "icons.py"), "--data-root", str(root)]
                drawn = subprocess.run(script, capture_output=True, text=True)
                reason = drawn.stderr.rpartition("error: ")[2].strip()
                if drawn.returncode:
                    (pytest.skip if reason.startswith(("npm ", "resvg-py ")) else pytest.fail)(reason)
    return root


@pytest.fixture(scope="session", autouse=True)
def drawing() -> Iterator[dict[str, Callable]]:
    """Validate on four tasks and draw empty pictures, which is most of a short run; yield what draws.

    Commands in other processes do as they are told.
    """
    from training.options import TrainingOptions

    real = {name: resolve_name(name) for name in DRAWING}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TrainingOptions.__init__.__kwdefaults__, "val_tasks", 4)
        for name in real:
            patch.setattr(name, lambda *_, **__: Figure(figsize=(1, 1)))
        yield real


@pytest.fixture
def pictures(drawing, monkeypatch) -> None:
    """Draw real pictures."""
    for name, draw in drawing.items():
        monkeypatch.setattr(name, draw)


@pytest.fixture(autouse=True)
def _restore_threads():
    """Restore the number of threads, which a command line may have set."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def write_images(folder: Path, values: Sequence[int], suffix: str = ".png", side: int = 6) -> None:
    """Write one plain image for each grey value."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, value in enumerate(values):
        Image.new("L", (side, side), value).save(folder / f"{number:03}{suffix}")


def write_classes(folder: Path, classes: int, count: int = 3, prefix: str = "c", first: int = 0) -> None:
    """Write a folder of `count` plain images for each class; grey values count up from `first`."""
    for c in range(classes):
        write_images(folder / f"{prefix}{c:02}", [first + count * c + i for i in range(count)])


def write_noise(folder: Path, side: int, *parts: str) -> None:
    """Write three images of noise into each part of the folder, brighter from part to part."""
    generator = np.random.default_rng(0)
    for number, part in enumerate(parts):
        (folder / part).mkdir(parents=True)
        for image in range(3):
            pixels = generator.integers(0, min(90 * number + 60, 256), (side, side), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / part / f"{image}.png")


def class_names(images) -> dict[str, list[str]]:
    """Return the names of the classes of each split."""
    return {split: [images.names[c] for c in part.tolist()] for split, part in images.splits.items()}


def read_table(path: Path, columns=None, dtype: torch.dtype = torch.float64, **options: object):
    from tasks.tables import Columns, load_table

    options = {"classification": False, "shares": SHARES} | options
    return load_table(path, columns or Columns(), dtype, **options)


def task_options(dataset: str, **changes: object):
    """Return options of 1-shot tasks with one query; without other flags, of 6 x 6 grey images."""
    from tasks.options import TaskOptions

    sizes = dict(ways=None, shots=1, queries=1, image_size=6, channels=1, invert=False)
    return TaskOptions(dataset=dataset, **sizes | changes)


def build_tasks(
    dataset: str, data_root=Path(), *, dtype=torch.float32, for_test=False, scale_targets=True, **changes
):
    """Return the distribution of a dataset on the CPU; `changes` are those of `task_options`."""
    from dataset import build_distribution

    how = dict(device=torch.device("cpu"), dtype=dtype, for_test=for_test, scale_targets=scale_targets)
    return build_distribution(task_options(dataset, **changes), data_root=data_root, **how)


@contextmanager
def refused(message: str) -> Iterator[None]:
    """Expect a UsageError of one line that matches."""
    from common.errors import UsageError

    with pytest.raises(UsageError, match=message) as raised:
        yield
    assert "\n" not in str(raised.value)


@pytest.fixture
def refuse(capsys) -> Callable[..., str]:
    """Run a command line that is refused; return its one line on stderr."""
    from runs import command

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert command(*arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("main.py: error: ")
        return line

    return run


@pytest.fixture
def user_cache(tmp_path_factory, monkeypatch) -> Path:
    """Use a fresh cache folder instead of the one of whoever runs the tests."""
    folder = tmp_path_factory.mktemp("user-cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def shared_cache(tmp_path_factory, monkeypatch) -> None:
    """Use one cache folder for all tests, so that the real Omniglot is decoded once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "shared-cache"))


def write_part(folder: Path, part: str, alphabets: int, *, archive: bool) -> None:
    """Write a small half of Omniglot in the original layout: two characters an alphabet, 20 drawings."""
    paths = []
    for alphabet in range(alphabets):
        for character in range(2):
            for drawing in range(20):
                pixels = np.full((105, 105), True)
                pixels[5 * drawing : 5 * drawing + 5, : 10 * (alphabet + character + 1)] = False
                name = f"A{alphabet}/character{character:02}/{character:04}_{drawing:02}.png"
                paths.append(folder / part / name)
                paths[-1].parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(paths[-1])
    if archive:
        with zipfile.ZipFile(folder / f"{part}.zip", "w") as zipped:
            for path in paths:
                zipped.write(path, path.relative_to(folder))
                path.unlink()


@pytest.fixture
def small_omniglot(tmp_path, monkeypatch):
    """Write an Omniglot of twelve plus four characters: one half unpacked, the other as an archive."""
    monkeypatch.setattr("tasks.published.PARTS", {"images_background": 12, "images_evaluation": 4})
    sizes = {"train": 8, "validation": 2, "test": 6}
    monkeypatch.setattr("tasks.published.OMNIGLOT_CLASSES", {"random": sizes})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_part(tmp_path / "omniglot-py", "images_background", 6, archive=False)
    write_part(tmp_path / "omniglot-py", "images_evaluation", 2, archive=True)
    return tmp_path
