"""Curves have the laws of their papers, and every task is a function of split, seed, iteration and number."""

import math

import pytest
import torch
from conftest import task_options

from common.random import task_stream
from dataset import FAMILIES, GRID_POINTS, Custom, Harmonic, Sinusoid, SinusoidFrequency, SinusoidLine

MANY = range(20_000)


def uniform_within(values: torch.Tensor, low: float, high: float) -> bool:
    """Return whether values fill the range, with the mean in the middle (six standard errors)."""
    width = high - low
    inside = values.min() >= low and values.max() <= high
    filled = values.min() < low + 0.01 * width and values.max() > high - 0.01 * width
    error = width / math.sqrt(12 * values.numel())
    return bool(inside and filled and abs(values.mean() - (low + high) / 2) < 6 * error)


def test_sinusoid_is_finns():
    batch = Sinusoid(10, 15, dtype=torch.float64).sample("train", 0, 0, MANY)
    assert batch.support_x.shape == (20_000, 10, 1) and batch.query_y.shape == (20_000, 15, 1)
    assert uniform_within(batch.support_x, -5, 5) and uniform_within(batch.query_x, -5, 5)
    # a sin(x + phase) is linear in a cos(phase) and a sin(phase): solve for them, from the support
    design = torch.cat([batch.support_x.sin(), batch.support_x.cos()], 2)
    cosine, sine = torch.linalg.lstsq(design, batch.support_y).solution.squeeze(2).T
    amplitude, phase = torch.hypot(cosine, sine), torch.atan2(sine, cosine)
    assert uniform_within(amplitude, 0.1, 5) and uniform_within(phase, 0, math.pi)
    predicted = amplitude[:, None, None] * torch.sin(batch.query_x + phase[:, None, None])
    assert torch.allclose(predicted, batch.query_y, atol=1e-8)  # the query is of the same task


def test_the_frequency_varies_in_its_family_alone():
    family = SinusoidFrequency(50, 1, dtype=torch.float64)
    x, y, *_ = family.sample("train", 0, 0, MANY)
    stream = task_stream("train", 0, 0, MANY, family.device)
    amplitude, phase, frequency = family.parameters(stream.at("parameters"))
    assert uniform_within(frequency, 0.8, 1.2)
    assert torch.allclose(y[..., 0], amplitude * torch.sin(frequency * x[..., 0] + phase))


def test_sinusoid_line_mixes_both_kinds_evenly():
    batch = SinusoidLine(3, 3, dtype=torch.float64).sample("train", 0, 0, MANY)
    (x1, x2, x3), (y1, y2, y3) = (t.squeeze(2).T for t in (batch.support_x, batch.support_y))
    straight = ((y2 - y1) * (x3 - x1) - (y3 - y1) * (x2 - x1)).abs() < 1e-9
    assert abs(straight.double().mean() - 0.5) < 0.02
    slope = (y2 - y1)[straight] / (x2 - x1)[straight]
    assert uniform_within(slope, -3, 3) and uniform_within(y1[straight] - slope * x1[straight], -3, 3)


def test_harmonic_has_two_frequencies_and_inputs_around_the_tasks_mean():
    family, tasks = Harmonic(200, 1, dtype=torch.float64), range(5000)
    batch = family.sample("train", 0, 0, tasks)
    x, y = batch.support_x.squeeze(2), batch.support_y.squeeze(2)
    stream = task_stream("train", 0, 0, tasks, family.device)
    frequency, *_, mean = family.parameters(stream.at("parameters"))
    assert uniform_within(frequency, 5, 7) and uniform_within(mean, -4, 4)
    assert abs((x - mean).mean()) < 0.01 and abs((x - mean).std() - 1) < 0.01
    # each a sin(w x + b) is linear in a cos(b) and a sin(b): solve for the four, and look at them
    design = torch.stack([f(k * frequency * x) for k in (1, 2) for f in (torch.sin, torch.cos)], 2)
    solution = torch.linalg.lstsq(design, y[..., None]).solution
    assert torch.allclose((design @ solution).squeeze(2), y, atol=1e-8)
    for cosine, sine in solution.squeeze(2).T.view(2, 2, -1):
        assert abs((cosine**2 + sine**2).mean() - 1) < 0.1  # a is standard normal
        assert abs((cosine**2).mean() - (sine**2).mean()) < 0.1  # b has no preferred direction


@pytest.mark.parametrize("name", FAMILIES)
def test_noise_is_added_to_the_targets_alone_and_never_to_the_picture(name):
    families = [FAMILIES[name](20, 20, noise=noise, dtype=torch.float64) for noise in (0.0, 0.3)]
    clean, noisy = (family.sample("test", 0, 0, range(1000)) for family in families)
    assert torch.equal(clean.support_x, noisy.support_x)
    for noise in (noisy.support_y - clean.support_y, noisy.query_y - clean.query_y):
        assert abs(noise.mean()) < 0.02 and abs(noise.std() - 0.3) < 0.02
    drawn_clean, drawn = (family.sample_to_draw("test", 0, 3) for family in families)
    assert torch.equal(drawn_clean.query_y, drawn.query_y) and drawn.query_x.shape == (3, GRID_POINTS, 1)
    assert torch.equal(drawn.support_y, noisy.support_y[:3])
    assert (drawn.query_x.diff(dim=1) > 0).all()  # sorted


def test_an_oracle_adds_the_parameters_to_the_inputs():
    batch = Sinusoid(5, 5, oracle=True, dtype=torch.float64).sample("train", 0, 0, range(9))
    x, amplitude, phase = batch.query_x.split(1, 2)
    assert torch.equal(amplitude * torch.sin(x + phase), batch.query_y)


@pytest.mark.parametrize("name", FAMILIES)
def test_tasks_depend_on_split_seed_iteration_and_number_alone(name):
    family = FAMILIES[name](5, 5)
    batch = family.sample("train", 3, 7, range(10))
    part = family.sample("train", 3, torch.tensor(7), torch.arange(4, 6))
    assert all(torch.equal(a[4:6], b) for a, b in zip(batch, part, strict=True))
    for other in (("validation", 3, 7), ("test", 3, 7), ("train", 4, 7), ("train", 3, 8)):
        assert not (family.sample(*other, range(10)).support_x == batch.support_x).any()


def test_the_test_tasks_are_the_same_for_any_number_of_shots():
    few, many = (Sinusoid(5, 10).resized(shots).sample("test", 0, 0, range(5)) for shots in (5, 10))
    assert torch.equal(few.query_y, many.query_y)
    assert torch.equal(few.support_x, many.support_x[:, :5])


# ---- a user's sampler ------------------------------------------------------------------------


class Source:
    """Give zeros for as many tasks as seeds."""

    def __init__(self) -> None:
        self.asked = []

    def sample(self, split: str, seeds: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.asked.append((split, seeds.tolist()))
        return tuple(torch.zeros(len(seeds), 3, size) for size in (2, 1, 2, 1))


def test_a_users_tasks_are_sampled_by_distinct_seeds_and_training_ahead(monkeypatch):
    source = Source()
    monkeypatch.setattr("dataset.load_code", lambda *_: lambda: source)
    distribution = Custom(options=task_options("own.py:f"), shots=1)
    for iteration in (0, 1):
        assert distribution.sample("train", 5, iteration, range(4)).query_x.shape == (4, 3, 2)
    distribution.sample("test", 5, 0, range(4))
    distribution.prefetch.thread.shutdown(wait=True)
    assert sorted(split for split, _ in source.asked) == ["test", "train", "train", "train"]
    seeds = [seed for _, numbers in source.asked for seed in numbers]
    assert len(set(seeds)) == 16 and min(seeds) >= 0 and max(seeds) < 2**63
    assert distribution.kind == "other" and not distribution.classification
