"""Compiled functions compute the same, are kept in a cache, and may fail without harm."""

import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import main
from commands import build
from commands.resolve import resolve
from common.batch import TaskBatch, TaskDistribution
from common.choices import Choices
from dataset import Sinusoid
from learners.batch_norm import BatchNorm
from learners.losses import LOSSES
from maml import MAML
from tasks.images import ImageSet, ImageTasks
from training import compiler, trainer
from training.adjoint import run_as_is
from training.checkpoint import load_checkpoint
from training.compiler import CompilationError, Compiler
from training.folders import LAST
from training.meta_gradients import make_meta_gradient
from training.step import TAIL, MetaStep, State, clip

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("compiled")


def active_compiler(cache: Path) -> Compiler:
    accelerate = Compiler(CPU, folder=cache)
    accelerate.active = True
    return accelerate


def small_network(*, norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    # a bias in front of batch norm has no gradient but rounding, which Adam would blow up
    layers = [nn.Linear(1, 8, bias=not norm), *[nn.BatchNorm1d(8)] * norm, nn.ReLU(), nn.Linear(8, 1)]
    return nn.Sequential(*layers).double()


def three_iterations(accelerate, maml: MAML, tasks: TaskDistribution, **training) -> tuple[State, State]:
    """Return the state before and after three iterations in float64."""
    settings = resolve({"dataset": "sinusoid"}).replace_settings(**training)
    step = MetaStep(maml, tasks, settings.training, {"seed": torch.tensor(5)}, accelerate=accelerate)
    vector = step.layout.flatten(maml.initial_parameters())
    zero, sums = torch.zeros_like(vector), vector.new_zeros(2 + tasks.classification + len(TAIL))
    running = step.statistics_layout.flatten(maml.initial_statistics()).to(vector)
    state = start = State(vector, zero, zero, torch.tensor(0), torch.tensor(0), sums, running)
    for iteration in range(3):
        state = step(state, iteration)
    return start, state


def three_on_sinusoids(accelerate, *, norm: bool = False, training: dict | None = None, **choices):
    maml = MAML(small_network(norm=norm), F.mse_loss, Choices(**{"inner_lr": 0.05, "steps": 2} | choices))
    options = dict(meta_batch_size=3, iterations=100, meta_lr=0.01, grad_clip=0.5, grad_clip_norm=0.3)
    tasks = Sinusoid(4, 3, dtype=torch.float64)
    return three_iterations(accelerate, maml, tasks, **options | (training or {}))


def assert_close_states(ours: State, theirs: State, tolerance: float) -> None:
    for field, a, b in zip(State._fields, ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=tolerance), field


WAYS = {
    "unrolled": dict(training=dict(engine="unrolled")),
    "multi-step": dict(
        objective="multi-step", norm_per_step=True, inner_rates="layer-step", norm=True,
        training=dict(msl_iterations=20, meta_lr_schedule="cosine", iterations=5, engine="adjoint"),
    ),
    "implicit": dict(meta_gradient="implicit", proximal=2.0, cg_steps=2, fast_weights="body"),
    "reptile": dict(
        meta_gradient="reptile", inner_optimizer="adam", inner_momentum=0.0, inner_batch=3,
        training=dict(meta_optimizer="sgd", meta_lr_schedule="linear", iterations=5),
    ),
    "element": dict(inner_rates="element", fast_weights="head", meta_gradient="first-order"),
    "ridge": dict(head_init="ridge", fast_weights="head", steps=0),
    "ridge with steps": dict(head_init="ridge", training=dict(engine="adjoint")),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [name if name == "unrolled" else pytest.param(name, marks=pytest.mark.slow) for name in WAYS]
)
def test_a_compiled_iteration_equals_the_uncompiled_one_and_is_found_again(name, cache):
    accelerate = active_compiler(cache)
    start, state = three_on_sinusoids(accelerate, **WAYS[name])
    assert accelerate.compiled == 1
    assert_close_states(state, three_on_sinusoids(run_as_is, **WAYS[name])[1], 1e-14)
    assert (state.parameters - start.parameters).abs().max() > 1e-4

    again = active_compiler(cache)  # as in another process: the same bits
    _, other = three_on_sinusoids(again, **WAYS[name])
    assert again.compiled == 0
    assert all(map(torch.equal, state, other))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ways", "shots", "tasks_at_once", "libraries", "choices"),
    [
        (3, 1, 2, 5, {"steps": 2}),  # sampling, update; step, query, step back
        ("2-3", "1-3", None, 1, {"head_init": "prototype", "steps": 0}),
    ],
)
def test_a_compiled_iteration_on_images_equals_the_uncompiled_one(
    ways, shots, tasks_at_once, libraries, choices, tmp_path
):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
    learner = nn.Sequential(*layers, nn.Flatten(), nn.Linear(36, 3)).double()
    options = dict(convolution="im2col", tasks_at_once=tasks_at_once)
    choices = Choices(**{"inner_lr": 0.4, "steps": 1, "adapt_norm": True} | choices)
    maml = MAML(learner, LOSSES["cross-entropy"], choices, **options)
    pixels = torch.randint(0, 256, (60, 1, 8, 8), dtype=torch.uint8)
    splits = {"train": torch.arange(12), "validation": torch.arange(0), "test": torch.arange(0)}
    images = ImageSet([str(c) for c in range(12)], torch.full([12], 5), splits, lambda: pixels, "images")
    sizes = dict(ways=ways, shots=shots, queries=2, quarter_turns=True, dtype=torch.float64)
    training = dict(meta_batch_size=4, iterations=9, engine="adjoint")
    accelerate, tasks = active_compiler(tmp_path), ImageTasks(images, **sizes)
    (_, ours), (_, theirs) = (
        three_iterations(fast, maml, tasks, **training) for fast in (accelerate, run_as_is)
    )
    assert accelerate.compiled == libraries
    assert_close_states(ours, theirs, 1e-12)


@pytest.mark.slow
def test_compiled_statistics_of_strokes_on_blank_paper_are_exact(tmp_path):
    torch.manual_seed(0)
    x = torch.where(torch.rand(20, 4, 28, 28) < 0.1, torch.rand(20, 4, 28, 28), 0.1)
    with torch.no_grad():
        norm = BatchNorm(nn.BatchNorm2d(4))
        exact = BatchNorm(nn.BatchNorm2d(4)).double()(x.double())
        assert (active_compiler(tmp_path)(norm)(x) - exact).abs().max() < 1e-5


def points() -> TaskBatch:
    """Return four tasks of three classes, two support examples and a query of each."""
    x, y = torch.randn(4, 9, 2, dtype=torch.float64), torch.arange(3).repeat(3).expand(4, -1)
    return TaskBatch(x[:, :6], y[:, :6], x[:, 6:], y[:, 6:])


@pytest.mark.parametrize(
    ("choices", "functions"),  # a step, its way back or products with the Hessian, and the query
    [
        ({}, 3),
        ({"meta_gradient": "implicit", "proximal": 2.0, "cg_steps": 2}, 3),
        ({"meta_gradient": "reptile"}, 2),
    ],
)
def test_steps_that_are_accelerated_one_by_one_share_their_functions(choices, functions):
    torch.manual_seed(0)
    learner = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    maml = MAML(learner, F.cross_entropy, Choices(inner_lr=0.4, steps=3, **choices))
    used = set()

    def record(function):
        def run(*arguments):
            leaves = pytree.tree_leaves(arguments)
            used.add((function, tuple(leaf.shape for leaf in leaves if isinstance(leaf, torch.Tensor))))
            return function(*arguments)

        return run

    batch, parameters = points(), maml.initial_parameters()
    plain = make_meta_gradient(maml, engine="adjoint")(parameters, batch)
    ours = make_meta_gradient(maml, engine="adjoint", accelerate=record)(parameters, batch)
    assert len(used) == functions
    torch.testing.assert_close(ours.gradients, plain.gradients, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("head_init", "real"),
    [
        *((head_init, False) for head_init in ("learned", "prototype", "ridge")),
        pytest.param("ridge", True, marks=pytest.mark.slow),
    ],
)
def test_accelerated_predictions_are_the_plain_ones(head_init, real, tmp_path):
    torch.manual_seed(0)
    learner = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    maml = MAML(learner, F.cross_entropy, Choices(inner_lr=0.4, steps=2, head_init=head_init))
    accelerate, made = active_compiler(tmp_path), []

    def faster(function):
        made.append(function)
        return accelerate.or_plain(function) if real else function

    batch, parameters, norms = points(), maml.initial_parameters(), ("transductive", "inductive")
    plain = maml.predictions(parameters, batch, 3, norms)
    fast = maml.with_options(accelerate=faster)
    for _ in range(2):  # made once
        for name, outputs in fast.predictions(parameters, batch, 3, norms).items():
            torch.testing.assert_close(outputs, plain[name], rtol=1e-12, atol=1e-12)
    functions = 2 + (head_init != "learned")  # a step, the predictions after it, and the computed head
    assert len(made) == functions and accelerate.compiled == functions * real
    with fast.use_rate(0.1), maml.use_rate(0.1):  # a rate is part of what was compiled
        slower = maml.predictions(parameters, batch, 3)["transductive"]
        torch.testing.assert_close(fast.predictions(parameters, batch, 3)["transductive"], slower)


def test_predictions_that_cannot_be_compiled_stay_plain_and_leave_the_step_compiled(cache, monkeypatch):
    def fail(*_):
        raise CompilationError("no")

    accelerate = active_compiler(cache)
    monkeypatch.setattr(Compiler, "_library", fail)
    double = accelerate.or_plain(lambda x: 2 * x)
    with pytest.warns(UserWarning, match="predictions are not compiled: no"):
        assert double(torch.ones(2)).tolist() == [2, 2]
    with warnings.catch_warnings(action="error"):  # said once
        assert double(torch.ones(3)).tolist() == [2, 2, 2]
    assert accelerate.active


def test_a_library_is_named_after_everything_that_it_depends_on(cache, monkeypatch):
    built: list[Path] = []
    monkeypatch.setattr(Compiler, "_build", lambda self, graph, tensors, options, path: built.append(path))
    monkeypatch.setattr(compiler, "load_library", lambda path, structure: lambda tensors: tensors)

    def name_of(function, options=None, x=torch.ones(2)):  # noqa: B008 (never written to)
        built.clear()
        active_compiler(cache)(function, options)(x)
        return built[0].name

    names = [
        name_of(lambda x: (x + 1,)),
        name_of(lambda x: (x + 2,)),
        name_of(lambda x: (x + 1,), {"realize_opcount_threshold": 5}),
        name_of(lambda x: (x + 1,), x=torch.ones(3)),
        name_of(lambda x: (x + 1,), x=torch.ones(2, dtype=torch.float64)),
        *(name_of(lambda x, c=c: (x + c,)) for c in (torch.ones(2), torch.zeros(2))),
    ]
    assert len(set(names)) == len(names)
    assert name_of(lambda x: (x + 1,)) == names[0]
    torch.set_num_threads(torch.get_num_threads() + 1)
    assert name_of(lambda x: (x + 1,)) not in names
    torch.set_num_threads(torch.get_num_threads() - 1)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert name_of(lambda x: (x + 1,)) not in names


def test_a_failed_compilation_says_why_and_leaves_nothing(tmp_path):
    def broken(x):
        raise ValueError("no\nat all")

    with pytest.raises(CompilationError, match=r"^no at all$"):
        active_compiler(tmp_path)(broken)(torch.ones(1))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_library_is_built_again(tmp_path, monkeypatch):
    built: list[Path] = []

    def build_archive(self, graph, tensors, options, path):
        built.append(path)
        with zipfile.ZipFile(path, "w") as file:
            file.writestr(zipfile.ZipInfo("model.so"), b"machine code")  # without the time

    monkeypatch.setattr(Compiler, "_build", build_archive)
    monkeypatch.setattr(compiler, "load_library", lambda path, structure: lambda tensors: tensors)

    def load() -> int:
        active_compiler(tmp_path)(lambda x: (x + 1,))(torch.ones(2))
        return len(built)

    assert load() == load() == 1
    whole = built[0].read_bytes()
    for number, damaged in enumerate((whole[:-9], b"", whole.replace(b"machine c", b"machine k")), 2):
        built[0].write_bytes(damaged)
        assert load() == number
        assert built[0].read_bytes() == whole


def test_a_full_disk_fails_the_compilation_and_not_the_process(tmp_path, monkeypatch):
    """PyTorch's writer of packages would abort: it is given memory, and the file is written here."""

    def full(path, write):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(torch._inductor, "aot_compile", lambda *_, **__: [])
    monkeypatch.setattr("torch._inductor.package.package_aoti", lambda package, files: package.write(b"code"))
    monkeypatch.setattr(compiler, "write_bytes", full)
    with pytest.raises(CompilationError, match="No space left on device"):
        active_compiler(tmp_path)(lambda x: (x + 1,))(torch.ones(2))


@pytest.mark.skipif(not hasattr(compiler.os, "geteuid"), reason="no owners")
def test_code_in_another_users_folder_is_not_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiler.cache_folder() == tmp_path / "maml" / "compiled"
    monkeypatch.setattr(compiler.os, "geteuid", lambda: 12345)
    accelerate = Compiler(CPU)
    accelerate.active = True
    with pytest.raises(CompilationError, match="XDG_CACHE_HOME"):
        accelerate(lambda x: (x + 1,))(torch.ones(1))


def test_clipping_is_that_of_torch():
    gradient = torch.tensor([3.0, -0.5, 10.0], dtype=torch.float64)
    theirs = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    theirs.grad = gradient.clone()
    nn.utils.clip_grad_value_([theirs], 4.0)
    nn.utils.clip_grad_norm_([theirs], 2.0)
    assert torch.allclose(clip(gradient, gradient.norm(), 4.0, 2.0), theirs.grad, rtol=1e-12)
    assert torch.equal(clip(gradient, gradient.norm(), None, 20.0), gradient)


# ---- runs -----------------------------------------------------------------------------------------

RUN = ["-k", "4", "--meta-batch-size", "3", "--iterations", "40", "--save-every", "10", "--val-every", "25"]


@pytest.fixture
def command(tmp_path, monkeypatch, cache):
    monkeypatch.setattr(compiler, "cache_folder", lambda: cache)
    monkeypatch.setattr(trainer, "UNCOMPILED", {False: 5, True: 3})
    return lambda *arguments: main.main([*map(str, arguments), "--checkpoint-path", str(tmp_path)])


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([w.flatten() for w in load_checkpoint(folder / LAST).parameters.values()])


@pytest.mark.slow
def test_a_compiled_run_resumes_to_the_bit_and_stays_compiled(command, tmp_path, capsys):
    flags = [*RUN, "--exact-from", 20]
    compiled = [*flags, "--compile", "on"]
    assert command(*compiled, "--run-name", "whole") == 0
    assert "ompiled" in capsys.readouterr().err
    for iterations in (3, 7, 20, 25, 40):  # the first ends before anything is compiled
        assert command(*compiled, "--iterations", iterations, "--run-name", "parts", "--resume") == 0
    assert torch.equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert load_checkpoint(tmp_path / "parts" / LAST).settings["compile"] == "on"
    assert main.main(["--load", str(tmp_path / "parts" / LAST), "--compile", "off"]) == 2
    assert "disagrees with the checkpoint" in capsys.readouterr().err
    assert command(*flags, "--compile", "off", "--run-name", "uncompiled") == 0
    assert torch.allclose(weights(tmp_path / "whole"), weights(tmp_path / "uncompiled"), atol=1e-5)


def test_a_run_compiles_at_the_same_iteration_however_long_it_is(command, monkeypatch, capsys):
    begun = []

    def compile_nothing(self) -> bool:
        begun.append(self.iteration)
        for run in self.runs:
            run.training = replace(run.training, compile="off")
        return True

    monkeypatch.setattr(trainer.Trainer, "_compile", compile_nothing)
    for iterations in (3, 5, 12):
        line = [*RUN, "--compile", "on", "--iterations", iterations, "--run-name", "run", "--resume"]
        assert command(*line) == 0
        assert ("the first 5 iterations of a run never are" in capsys.readouterr().err) is (iterations <= 5)
    assert begun == [5]


def test_without_a_working_compiler_a_run_says_so_and_continues_uncompiled(
    command, tmp_path, capsys, monkeypatch
):
    def fail(*arguments):
        raise RuntimeError("internal compiler error\nwith details")

    monkeypatch.setattr(Compiler, "_build", fail)
    monkeypatch.setattr(compiler, "cache_folder", lambda: tmp_path / "empty")
    (tmp_path / "empty").mkdir()
    short = [*RUN, "--compile", "on", "--iterations", 8]
    assert command(*short, "--run-name", "failed") == 0
    assert "internal compiler error with details\n" in capsys.readouterr().err
    monkeypatch.setenv("CXX", "/no/such/compiler")
    build.print_once.cache_clear()  # another test of this process may have said it
    assert command(*short, "--run-name", "none") == 0
    assert "needs a C++ compiler" in capsys.readouterr().err
    assert torch.equal(weights(tmp_path / "failed"), weights(tmp_path / "none"))
    assert load_checkpoint(tmp_path / "failed" / LAST).settings["compile"] == "off"
