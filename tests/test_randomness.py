"""Counter-based random numbers: addressable, and random."""

import math

import numpy as np
import torch

from common.random import Stream, mix

THOUSAND = range(1000)


def stream(seed=0, name="test", iteration=0, tasks=THOUSAND):
    return Stream.from_seed(seed).at(name).at(iteration).at(torch.tensor(list(tasks)))


def test_a_number_depends_on_where_it_is_used_and_on_nothing_else():
    whole = stream(tasks=range(10)).words(20)
    assert torch.equal(stream(tasks=[7, 3]).words(20), whole[[7, 3]])  # in any order or chunk
    assert torch.equal(stream(tasks=range(10)).words(5), whole[:, :5])
    others = [stream(seed=1), stream(seed=2**40), stream(name="tset"), stream(iteration=1)]
    for other in others:
        assert (other.words(20)[:10] == whole).float().mean() < 0.01


def test_mixer_is_a_bijection_and_stays_within_32_bits():
    for words in (torch.arange(2**20), 2**32 - 1 - torch.arange(2**20)):
        mixed = mix(words)
        assert len(mixed.unique()) == len(words)
        assert mixed.min() >= 0 and mixed.max() < 2**32
        assert mixed[12345] == mix(int(words[12345]))  # Python's unbounded integers agree


def test_words_are_uniform_bit_by_bit_and_independent():
    words = stream().words(1000)
    bits = ((words[..., None] >> torch.arange(32)) & 1).double()
    assert (bits.mean((0, 1)) - 0.5).abs().max() < 5 * 0.5 / 1000  # five standard errors
    uniform = stream().uniform(1000, 0.0, 1.0, torch.float64)
    counts, _ = np.histogram(uniform, 1000, (0.0, 1.0))
    chi_square = ((counts - 1000) ** 2 / 1000).sum()
    assert abs(chi_square - 999) < 5 * math.sqrt(2 * 999)
    for table in (uniform, uniform.T):  # between positions, and between tasks
        correlations = torch.corrcoef(table) - torch.eye(1000, dtype=torch.float64)
        assert correlations.abs().max() < 6 / math.sqrt(1000)


def test_consecutive_iterations_are_independent():
    draws = torch.stack(
        [stream(iteration=i, tasks=range(4)).uniform(4, 0, 1, torch.float64) for i in range(5000)]
    )
    draws = draws.flatten(1).T
    lagged = torch.corrcoef(torch.cat([draws[:, :-1], draws[:, 1:]])) - torch.eye(32, dtype=torch.float64)
    assert lagged.abs().max() < 5 / math.sqrt(5000)


def test_normal_has_the_moments_of_the_normal_distribution():
    z = stream().normal(1000, torch.float64).flatten()
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean().item() - moment) < 5 * math.sqrt(spread) / 1000
    assert z.isfinite().all()


def test_same_numbers_in_both_precisions():
    single, double = (stream().uniform(10, 0.0, 1.0, dtype) for dtype in (torch.float32, torch.float64))
    assert torch.equal(single.double(), double)


def test_distinct_draws_are_distinct_and_every_number_is_equally_likely():
    draws = stream(tasks=range(20_000)).distinct(5, 12)
    assert all(len(set(draw)) == 5 for draw in draws[:1000].tolist())
    counts = torch.bincount(draws[:, 0], minlength=12).double()
    expected = 20_000 / 12
    assert ((counts - expected) ** 2 / expected).sum() < 11 + 5 * math.sqrt(22)
