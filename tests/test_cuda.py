"""On a CUDA GPU: the CPU's meta-gradient, also from a recorded graph, and checkpoints that serve anywhere.

`python benchmarks/gpu.py` runs these tests and measures; without a GPU they are skipped.
"""

import json
from pathlib import Path

import pytest
import torch
from harness import write_images
from runs import command
from tool import Assembly, CudaGraph, assemble

GPU = "cuda"
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA GPU here"),
]
TASKS = {
    "curves": ["--dataset", "sinusoid", "-k", "5", "-q", "5"],
    "images": ["-n", "3", "-k", "1", "-q", "2", "--image-size", "28", "--channels", "1", "--learner", "conv"],
}
SMALL = ["-s", "2", "--inner-lr", "0.1", "--meta-batch-size", "4", "--compile", "off"]


@pytest.fixture(scope="module")
def flags_of(tmp_path_factory):
    """Return the flags of a kind of tasks; its images are noise."""
    folder = tmp_path_factory.mktemp("noise") / "images"
    write_images(folder, 20, 4, 28)
    source = {"curves": [], "images": ["--dataset", f"images:{folder}", "--quarter-turns", "--adapt-norm"]}
    return lambda kind: [*source[kind], *TASKS[kind], *SMALL]


def meta_gradient(run: Assembly) -> torch.Tensor:
    """Return the first iteration's; Adam's first moment is a tenth of it."""
    run.advance(1)
    return 10 * run.trainer.state.exp_avg.cpu()


@pytest.mark.parametrize("engine", ["unrolled", "adjoint"])
@pytest.mark.parametrize("kind", TASKS)
def test_the_meta_gradient_is_that_of_the_cpu(kind, engine, flags_of):
    flags = [*flags_of(kind), "--precision", "float64", "--engine", engine]
    ours, theirs = (meta_gradient(assemble([*flags, "--device", device])) for device in (GPU, "cpu"))
    assert theirs.norm() > 0
    assert (ours - theirs).norm() < 1e-9 * theirs.norm()


@pytest.mark.parametrize("engine", ["unrolled", "adjoint"])
@pytest.mark.parametrize("kind", TASKS)
def test_a_recorded_graph_gives_the_bits_of_kernels_launched_one_by_one(kind, engine, flags_of):
    trainer = assemble([*flags_of(kind), "--device", GPU, "--engine", engine]).trainer
    start = launched = replayed = trainer.state
    graph = CudaGraph(trainer.plain_step, start)
    for iteration in range(5):
        launched, replayed = trainer.plain_step(launched, iteration), graph(replayed)
        assert all(torch.equal(a, b) for a, b in zip(launched, replayed, strict=True)), iteration
    again, first = graph(start), trainer.plain_step(start, 0)  # from another state than its last one
    assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@pytest.mark.parametrize("kind", TASKS)
def test_a_run_of_the_gpu_is_evaluated_on_the_cpu(kind, flags_of, tmp_path):
    line = [*flags_of(kind), "--device", GPU, "--iterations", 8, "--val-every", 4]
    assert command(*line, "--checkpoint-path", tmp_path, "--run-name", "run") == 0
    losses = {}
    for device in (GPU, "cpu"):
        out: Path = tmp_path / device
        test = ["--eval-tasks", 6, "--eval-steps", 2, "--device", device, "--out", out]
        assert command("--eval", "--load", tmp_path / "run", *test) == 0
        (file,) = out.glob("*.json")
        losses[device] = [row["loss"] for row in json.loads(file.read_text())["per_step"]]
    assert losses[GPU] == pytest.approx(losses["cpu"], rel=1e-3)
