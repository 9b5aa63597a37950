"""Your own learner and your own tasks, in one file: which motif is hidden in a sequence of tokens?

A learner is a function that returns an `nn.Module` with the given number of outputs. A dataset is a class
with one method, `sample`, that returns one task for each seed. Nothing here imports the tool.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# ---- learners ------------------------------------------------------------------------------------


class Transformer(nn.Module):
    """Map tokens, int64 `[examples, length]` up to `LONGEST`, to `[examples, outputs]` by their mean."""

    LONGEST = 64

    def __init__(
        self, outputs: int, tokens: int, width: int, layers: int, heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(tokens, width)
        self.positions = nn.Parameter(0.02 * torch.randn(self.LONGEST, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        features = self.tokens(x) + self.positions[: x.shape[1]]
        return self.head(self.encoder(features).mean(1))


class Recurrent(nn.Module):
    """Map tokens, int64 `[examples, length]`, to `[examples, outputs]`, read from the last state."""

    def __init__(
        self, outputs: int, tokens: int, width: int, layers: int, cell: type[nn.GRU | nn.LSTM]
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(tokens, width)
        self.cell = cell(width, width, layers, batch_first=True)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.cell(self.tokens(x))
        return self.head(states[:, -1])


def transformer(
    outputs: int, *, tokens: int = 12, width: int = 32, layers: int = 2, heads: int = 4, dropout: float = 0.0
) -> nn.Module:
    """Return a small transformer encoder."""
    return Transformer(outputs, tokens, width, layers, heads, dropout)


def gru(outputs: int, *, tokens: int = 12, width: int = 32, layers: int = 1, cell: str = "gru") -> nn.Module:
    """Return a recurrent network; `cell` is "gru" or "lstm"."""
    return Recurrent(outputs, tokens, width, layers, {"gru": nn.GRU, "lstm": nn.LSTM}[cell])


# ---- tasks ---------------------------------------------------------------------------------------


class Sequences:
    """Tasks whose classes each hide a motif, three tokens in a row, in sequences of random tokens.

    The motif starts anywhere, and wraps around at the end. 70 % of all motifs are for training, 10 % for
    validation and 20 % for the test, so no test motif is ever trained on.
    """

    MOTIF = 3

    def __init__(
        self, *, ways: int = 2, shots: int = 5, queries: int = 5, length: int = 8, tokens: int = 12
    ) -> None:
        if length < self.MOTIF:
            raise ValueError(f"a motif of {self.MOTIF} tokens does not fit into length {length}")
        self.ways = ways
        self.shots = shots
        self.queries = queries
        self.length = length
        self.tokens = tokens
        motifs = torch.cartesian_prod(*[torch.arange(tokens)] * self.MOTIF)
        motifs = motifs[torch.randperm(len(motifs), generator=torch.Generator().manual_seed(0))]
        train, validation = int(0.7 * len(motifs)), int(0.1 * len(motifs))
        parts = motifs.split([train, validation, len(motifs) - train - validation])
        self.motifs = dict(zip(("train", "validation", "test"), parts, strict=True))

    def sample(self, split: str, seeds: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return one task for each seed, int64 `[tasks]`: a function of the split and that seed alone.

        Returns:
            support_x, support_y: tokens `[tasks, ways * shots, length]`, labels `[tasks, ways * shots]`.
            query_x, query_y: the same with `ways * queries` examples.
        """
        tasks = torch.stack([self._task(split, seed) for seed in seeds.tolist()]).to(seeds.device)
        support, query = tasks.split([self.shots, self.queries], 2)
        return *self._examples(support), *self._examples(query)

    def _task(self, split: str, seed: int) -> Tensor:
        """Return the sequences of one task, `[ways, shots + queries, length]`."""
        generator = torch.Generator().manual_seed(seed)
        motifs = self.motifs[split]
        motifs = motifs[torch.randperm(len(motifs), generator=generator)[: self.ways]]
        shape = (self.ways, self.shots + self.queries)
        sequences = torch.randint(self.tokens, (*shape, self.length), generator=generator)
        start = torch.randint(self.length, (*shape, 1), generator=generator)
        positions = (start + torch.arange(self.MOTIF)) % self.length
        return sequences.scatter(2, positions, motifs[:, None].expand_as(positions))

    def _examples(self, sequences: Tensor) -> tuple[Tensor, Tensor]:
        tasks, ways, examples, _ = sequences.shape
        labels = torch.arange(ways, device=sequences.device).repeat_interleave(examples)
        return sequences.flatten(1, 2), labels.expand(tasks, -1)
