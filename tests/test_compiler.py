"""Compiled functions compute what the functions do, are kept, and may fail without harm."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import main
from commands import config
from common.batch import TaskBatch
from common.optimizers import InnerOptimizer
from dataset import Sinusoid
from maml import MAML, as_it_is
from training import autotune, compiler
from training.checkpoint import LAST, load_checkpoint
from training.compiler import CompilationError, Compiler
from training.step import TAIL, FlatLayout, MetaStep, OuterLoop, State, adam, clipped

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("compiled")


def small_network(*, norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    # a bias in front of batch norm has no gradient but rounding, which Adam would blow up
    layers = [nn.Linear(1, 8, bias=not norm), *[nn.BatchNorm1d(8)] * norm, nn.ReLU(), nn.Linear(8, 1)]
    return nn.Sequential(*layers).double()


def iteration(
    accelerate, *, norm: bool = False, outer: dict | None = None, **options
) -> tuple[MetaStep, State]:
    maml = MAML(small_network(norm=norm), F.mse_loss, **{"inner_lr": 0.05, "steps": 2} | options)
    parameters, statistics = maml.initial_parameters(), maml.initial_statistics()
    layout = FlatLayout(parameters)
    step = MetaStep(
        maml,
        Sinusoid(4, 3, dtype=torch.float64),
        OuterLoop(0.01, **{"clip_value": 0.5, "clip_norm": 0.3} | (outer or {})),
        layout=layout,
        statistics_layout=FlatLayout(statistics) if statistics else None,
        member={"seed": torch.tensor(5)},
        tasks=3,
        accelerate=accelerate,
    )
    vector = layout.flatten(parameters)
    zero, sums = torch.zeros_like(vector), torch.zeros(2 + len(TAIL), dtype=torch.float64)
    running = FlatLayout(statistics).flatten(statistics) if statistics else zero[:0]
    return step, State(vector, zero, zero, torch.tensor(0), sums, running)


COMPILED_WAYS = {
    "unrolled": dict(engine="unrolled"),
    "adjoint": dict(engine="adjoint"),
    "implicit": dict(
        meta_gradient="implicit", optimizer=InnerOptimizer(0, proximal=2.0), cg_steps=2, fast_weights="body"
    ),
    "reptile": dict(
        meta_gradient="reptile", optimizer=InnerOptimizer(0, "adam", beta_1=0.0),
        outer=dict(optimizer="sgd", inner_batch=3, schedule="linear", iterations=5),
    ),
    "joint": dict(meta_gradient="joint"),
    "element": dict(inner_rates="element", fast_weights="head", first_order=True),
    "multi-step": dict(
        normalisation="per-step", norm_per_step=True, inner_rates="layer-step", norm=True, engine="adjoint",
        outer=dict(msl_iterations=20, schedule="cosine", iterations=5),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPILED_WAYS)
def test_the_compiled_iteration_is_the_iteration(name, cache):
    options = COMPILED_WAYS[name]
    accelerate = Compiler(CPU, folder=cache)
    accelerate.active = True
    step, state = iteration(accelerate, **options)
    plain_step, plain = iteration(as_it_is, **options)
    start = state
    for _ in range(3):
        state, plain = step(state), plain_step(plain)
    assert accelerate.compiled == 1
    for field, ours, theirs in zip(State._fields, state, plain, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-14), field
    assert (state.parameters - start.parameters).abs().max() > 1e-4
    assert name != "multi-step" or (state.statistics - start.statistics).abs().max() > 1e-4
    if name == "unrolled":  # a damaged library is built again
        file = max(cache.glob("*.pt2"), key=lambda path: path.stat().st_mtime)
        file.write_bytes(file.read_bytes()[:1000])
        mended = Compiler(CPU, folder=cache)
        mended.active = True
        iteration(mended, **options)[0](state)
        assert mended.compiled == 1
    # another process finds the library and gets the same bits from it
    again = Compiler(CPU, folder=cache)
    again.active = True
    step, other = iteration(again, **options)
    for _ in range(3):
        other = step(other)
    assert (again.compiled, again.loaded) == (0, 1)
    assert all(torch.equal(a, b) for a, b in zip(state, other, strict=True))


def test_compiled_parts_of_the_adjoint_engine_serve_every_number_of_steps(cache):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)
    ).double()
    images, labels = torch.rand(2, 3, 4, 1, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 0, 1])
    batch = TaskBatch(images[0], labels.expand(3, 4), images[1], labels.expand(3, 4))
    accelerate = Compiler(CPU, folder=cache)
    accelerate.active = True
    options = {"inner_lr": 0.1, "adapt_norm": False}
    ours = MAML(
        network, F.cross_entropy, engine="adjoint", convolution="im2col", accelerate=accelerate, **options
    )
    for steps in (3, 1, 5):
        ours.steps = steps
        theirs = MAML(network, F.cross_entropy, steps=steps, **options)
        parameters = theirs.initial_parameters()
        result = ours.meta_gradient(parameters, batch)
        expected = theirs.meta_gradient(parameters, batch)
        assert accelerate.compiled == 5  # first step, next step, query, and the way back through both
        assert torch.allclose(result.losses, expected.losses, rtol=1e-12)
        for name, gradient in expected.gradients.items():
            assert torch.allclose(result.gradients[name], gradient, rtol=1e-10, atol=1e-13), name


def test_a_compiled_function_follows_constants_threads_and_options(cache, monkeypatch):
    """Whatever a library depends on is in its name."""
    built = []
    monkeypatch.setattr(Compiler, "_build", lambda self, graph, tensors, options, path: built.append(path))

    def library(path, structure):
        if path not in built:
            raise RuntimeError("no such file")
        return lambda tensors: tensors

    monkeypatch.setattr(compiler, "Library", library)

    def name_of(function, options=None, x=torch.ones(2)):  # noqa: B008
        accelerate = Compiler(CPU, folder=cache)
        accelerate.active = True
        built.clear()
        accelerate(function, options)(x)
        return built[0].name

    constants = [torch.ones(2), torch.zeros(2)]
    names = [
        name_of(lambda x: (x + 1,)),
        name_of(lambda x: (x + 2,)),
        name_of(lambda x: (x + 1,), {"realize_opcount_threshold": 5}),
        name_of(lambda x: (x + 1,), x=torch.ones(3)),
        name_of(lambda x: (x + 1,), x=torch.ones(2, dtype=torch.float64)),
        *(name_of(lambda x, c=c: (x + c,)) for c in constants),
    ]
    assert len(set(names)) == len(names)
    assert name_of(lambda x: (x + 1,)) == names[0]
    torch.set_num_threads(torch.get_num_threads() + 1)
    assert name_of(lambda x: (x + 1,)) != names[0]


def test_adam_is_that_of_torch():
    torch.manual_seed(0)
    weight = torch.randn(7, dtype=torch.float64)
    theirs = weight.clone().requires_grad_()
    optimizer = torch.optim.Adam([theirs], lr=0.03)
    zero = torch.zeros_like(weight)
    state = State(weight, zero, zero, torch.tensor(0), torch.zeros(1), zero[:0])
    for _ in range(50):
        gradient = torch.randn(7, dtype=torch.float64)
        theirs.grad = gradient
        optimizer.step()
        state = adam(state, gradient, lr=0.03)
    assert torch.allclose(state.parameters, theirs, rtol=1e-12)
    assert state.iteration == 50


def test_clipping_is_that_of_torch():
    gradient = torch.tensor([3.0, -0.5, 10.0], dtype=torch.float64)
    theirs = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    theirs.grad = gradient.clone()
    nn.utils.clip_grad_value_([theirs], 4.0)
    nn.utils.clip_grad_norm_([theirs], 2.0)
    assert torch.allclose(clipped(gradient, gradient.norm(), 4.0, 2.0), theirs.grad, rtol=1e-12)
    assert torch.equal(clipped(gradient, gradient.norm(), None, 20.0), gradient)


# ---- runs -----------------------------------------------------------------------------------

RUN = ["-k", "4", "--meta-batch-size", "3", "--iterations", "40", "--save-every", "10", "--val-every", "25"]
COMPILED = [*RUN, "--compile", "on", "--compile-after", "15"]


@pytest.fixture
def command(tmp_path, monkeypatch, cache):
    monkeypatch.setattr(compiler, "cache_folder", lambda: cache)
    return lambda *arguments: main.main([*map(str, arguments), "--checkpoint-path", str(tmp_path)])


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([w.flatten() for w in load_checkpoint(folder / LAST).parameters.values()])


def test_a_compiled_run_goes_on_exactly_and_stays_compiled(command, tmp_path, capsys):
    assert command(*COMPILED, "--run-name", "whole") == 0
    assert "ompiled" in capsys.readouterr().err
    for iterations in (7, 22, 40):  # stops before and after the compiled code has taken over
        assert command(*COMPILED, "--iterations", iterations, "--run-name", "parts", "--resume") == 0
    assert torch.equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert load_checkpoint(tmp_path / "parts" / LAST).config.compile == "on"
    assert command("--load", tmp_path / "parts" / LAST, "--compile", "off") == 2
    assert "disagrees with the checkpoint" in capsys.readouterr().err
    assert command(*RUN, "--run-name", "uncompiled") == 0
    assert torch.allclose(weights(tmp_path / "whole"), weights(tmp_path / "uncompiled"), atol=1e-5)


def test_first_order_gives_way_to_exact_compiled_and_goes_on_exactly(command, tmp_path, capsys):
    annealed = [*COMPILED, "--compile-after", 5, "--exact-from", 20, "--iterations", 30]
    assert command(*annealed, "--run-name", "whole") == 0
    assert len(re.findall(r"Compiled in|Found compiled code", capsys.readouterr().err)) == 2
    for iterations in (12, 20, 25, 30):
        assert command(*annealed, "--iterations", iterations, "--run-name", "parts", "--resume") == 0
    assert torch.equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    uncompiled = [*annealed, "--compile", "off"]
    assert command(*uncompiled, "--run-name", "uncompiled") == 0
    assert torch.allclose(weights(tmp_path / "whole"), weights(tmp_path / "uncompiled"), atol=1e-5)
    first_order = [*RUN, "--iterations", 30, "--first-order"]
    assert command(*first_order, "--run-name", "first") == 0
    assert not torch.allclose(weights(tmp_path / "first"), weights(tmp_path / "uncompiled"), atol=1e-5)


def test_without_a_compiler_the_run_goes_on_uncompiled_and_says_so(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    assert command(*COMPILED, "--run-name", "none") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "compiler" in line]
    assert len(lines) == 1 and "uncompiled" in lines[0]
    assert load_checkpoint(tmp_path / "none" / LAST).config.compile == "off"


def test_a_compiler_that_fails_costs_nothing_but_the_speed(command, tmp_path, capsys, monkeypatch):
    def stumble(*arguments):
        raise RuntimeError("internal compiler error\nwith details")

    monkeypatch.setattr(Compiler, "_build", stumble)
    monkeypatch.setattr(compiler, "cache_folder", lambda: tmp_path / "empty")
    assert command(*COMPILED, "--run-name", "failed") == 0
    assert "the run goes on without: internal compiler error with details\n" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "failed" / LAST).config.compile == "off"
    assert command(*RUN, "--run-name", "uncompiled") == 0
    assert torch.equal(weights(tmp_path / "failed"), weights(tmp_path / "uncompiled"))


def test_what_a_killed_process_has_left_of_a_library_goes_when_it_is_built_again(tmp_path, monkeypatch):
    there = []

    def killed(exported, *, package_path, **options):
        there.append({path.name for path in tmp_path.iterdir() if path.is_dir()})
        Path(f"{Path(package_path).parent}-left").mkdir()
        raise RuntimeError("killed")

    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", killed)
    for _ in range(2):
        accelerate = Compiler(CPU, folder=tmp_path)
        accelerate.active = True
        with pytest.raises(CompilationError, match="killed"):
            accelerate(lambda x: (x + 1,))(torch.ones(2))
    assert [len(names) for names in there] == [1, 1]  # its own


def test_a_failed_compilation_says_why():
    accelerate = Compiler(CPU)
    accelerate.active = True

    def broken(x):
        raise ValueError("no")

    with pytest.raises(CompilationError, match=r"^no$"):
        accelerate(broken)(torch.ones(1))


def test_a_checkpoint_from_before_these_settings_loads_with_what_was_done_then():
    new = config.resolve({"iterations": 70_000})
    assert (new.compile, new.engine) == ("on", "unrolled")
    plain = config.config_to_plain(new)
    for name in ("compile", "compile_after", "engine", "convolution"):
        del plain[name]
    old = config.config_from_plain(plain)
    assert old.tasks_at_once is None
    assert old == dataclasses.replace(new, compile="off", compile_after=0)


# ---- --autotune -----------------------------------------------------------------------------


def test_autotune_keeps_the_fastest_of_what_is_left_open(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(autotune.time, "perf_counter", lambda: clock[0])
    costs = {("unrolled", "im2col"): 4, ("unrolled", "grouped"): 3, ("adjoint", "im2col"): 1}

    def make(candidate):
        key = candidate.engine, candidate.convolution
        if key not in costs:
            raise CompilationError("cannot")

        def iteration():
            clock[0] += costs[key]

        return iteration

    lines: list[str] = []
    settled = config.resolve({"dataset": "omniglot"})
    best = autotune.fastest(settled, {}, make, lines.append)
    assert (best.engine, best.convolution) == ("adjoint", "im2col")
    assert len(lines) == 4 and "not compiled" in lines[3]
    best = autotune.fastest(settled, {"engine": "unrolled"}, make, lines.append)
    assert best == dataclasses.replace(settled, convolution="grouped", tasks_at_once=None)
    assert len(lines) == 6


def test_autotuned_settings_are_those_of_the_run(command, tmp_path, capsys):
    line = [*RUN, "--iterations", "2", "--autotune", "--run-name", "tuned", "--dataset", "harmonic"]
    assert command(*line) == 0
    shown = capsys.readouterr().out
    assert shown.count("ms an iteration") == 2
    times = {e: float(re.search(rf"engine {e}: ([\d.]+) ms", shown)[1]) for e in ("unrolled", "adjoint")}
    saved = load_checkpoint(tmp_path / "tuned" / LAST).config
    assert saved.engine == min(times, key=times.__getitem__)
