"""Divide the examples drawn for a task into support and query, whose sizes may differ from task to task.

A task has the examples that it would have if its numbers were fixed; padding comes behind them. A group (a
class, or a task of a table) with fewer examples than a range asks for gives what it has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from common.random import Stream
from common.sizes import Size, Span


class Part(NamedTuple):
    """The support or the query sets of tasks, out of what was drawn for them."""

    drawn: Tensor  # [tasks, examples, ...]
    labels: Tensor  # int64 [tasks, examples]
    mask: Tensor | None = None  # bool [tasks, examples], False for padding, which repeats an example

    @classmethod
    def of_classes(cls, drawn: Tensor) -> Part:
        """Return all that was drawn of each class, `[tasks, ways, examples, ...]`."""
        tasks, ways, examples = drawn.shape[:3]
        labels = torch.arange(ways, device=drawn.device).repeat_interleave(examples)
        return cls(drawn.flatten(1, 2), labels.expand(tasks, -1))


@dataclass(frozen=True)
class DrawnSizes:
    """The numbers of a task's classes, and of support and query examples of each class."""

    ways: Span
    shots: Span
    queries: Span

    @classmethod
    def of(cls, ways: Size | None, shots: Size, queries: Size) -> DrawnSizes:
        """Return the sizes that flags give; a regression has one class."""
        return cls(Span.of(ways or 1), Span.of(shots), Span.of(queries))

    @property
    def varies(self) -> bool:
        return any(span.varies for span in (self.ways, self.shots, self.queries))

    @property
    def needed(self) -> int:
        """Return how many examples a group has to have."""
        return self.shots.least + self.queries.least

    def draw(self, words: Tensor, totals: Tensor, most: int) -> Tensor:
        """Return `most` different numbers below each of the totals `[...]`, in random order: `[..., most]`.

        The words are random and different: `[..., at least the largest total]`. If sizes vary, a smaller
        total gives all of its numbers; others that follow repeat one.
        """
        positions = torch.arange(words.shape[-1], device=words.device)
        ranked = words.masked_fill(positions >= totals[..., None], 1 << 32)  # above every word
        drawn = ranked.topk(min(most, len(positions)), largest=False).indices  # in the order of the words
        if not self.varies:
            return drawn
        column = torch.arange(most, device=words.device).clamp(max=drawn.shape[-1] - 1)
        return torch.minimum(drawn[..., column], totals[..., None] - 1)

    def draw_examples(self, words: Tensor, totals: Tensor) -> Tensor:
        """Return as many numbers below each of the totals as support and query may take."""
        return self.draw(words, totals, self.shots.most + self.queries.most)

    def divide(
        self,
        stream: Stream,
        drawn: Tensor,
        totals: Tensor,
        classes: Tensor | None = None,
        *,
        query_first: bool = False,
    ) -> tuple[Part, Part, Tensor | None]:
        """Return support, query, and the number of classes of each task, `[tasks]`, if it varies.

        Args:
            drawn: what was drawn of each class, `[tasks, ways, examples, ...]`.
            totals: how much each class has, `[tasks, ways]`.
            classes: how many classes each task has, `[tasks]`; None: enough.
            query_first: the query takes the first that were drawn, not the support.
        """
        if not self.varies:
            sizes = [self.shots.most, self.queries.most]
            parts = drawn.split(sizes[::-1] if query_first else sizes, 2)
            support, query = map(Part.of_classes, parts[::-1] if query_first else parts)
            return support, query, None
        ways = draw_number(stream.at("ways"), self.ways)
        ways = ways if classes is None else ways.minimum(classes)
        present = torch.arange(totals.shape[1], device=totals.device) < ways[:, None]
        shots = draw_number(stream.at("shots"), self.shots)[:, None].minimum(totals - self.queries.least)
        queries = draw_number(stream.at("queries"), self.queries)[:, None].minimum(totals - shots)
        start = torch.zeros_like(totals)
        support = _take(drawn, queries if query_first else start, shots * present, self.shots.most)
        query = _take(drawn, start if query_first else shots, queries * present, self.queries.most)
        if not (self.ways.varies or self.shots.varies):
            support = support._replace(mask=None)
        if not (self.ways.varies or self.queries.varies):
            query = query._replace(mask=None)
        return support, query, ways if self.ways.varies else None


def draw_number(stream: Stream, span: Span) -> Tensor:
    """Draw a whole number for each task, int64 `[tasks]`, evenly from a span."""
    return span.least + (stream.words(1)[:, 0] * (span.most - span.least + 1) >> 32)  # a word is below 2^32


def _take(drawn: Tensor, first: Tensor, count: Tensor, most: int) -> Part:
    """Take `count` of each class from `first` on, both `[tasks, ways]`, and of each at the most `most`."""
    ways, per_class = drawn.shape[1:3]
    position = torch.arange(per_class, device=drawn.device)
    chosen = (position >= first[..., None]) & (position < (first + count)[..., None])
    chosen, number = chosen.flatten(1), torch.arange(ways * per_class, device=drawn.device)
    # chosen ones first, in their order
    place = (chosen * len(number) - number).topk(ways * most).indices
    mask = torch.arange(place.shape[1], device=drawn.device) < chosen.sum(1, keepdim=True)
    place = place.where(mask, place[:, :1])
    tasks = torch.arange(len(drawn), device=drawn.device)[:, None]
    return Part(drawn.flatten(1, 2)[tasks, place], place // per_class, mask)
