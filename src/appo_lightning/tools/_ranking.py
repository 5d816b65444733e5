"""The best documents for a few words, without looking at all of them."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Sums of float32 in another order differ by less; a bound this much too low loses nothing.
_SLACK = 1.0 - 1e-5


class Postings:
    """Scores of documents by word, column by column.

    Args:
        rows: [P] documents of each word, ascending within a word.
        scores: [P] > 0, what the word adds to the score of the document.
        starts: [W + 1] where each word's part begins.
        num_documents: N.
        best: [W] largest score of each word; computed if not given.
    """

    def __init__(
        self,
        rows: NDArray[np.int32],
        scores: NDArray[np.float32],
        starts: NDArray[np.int64],
        num_documents: int,
        best: NDArray[np.float32] | None = None,
    ) -> None:
        self.rows, self.scores, self.starts = rows, scores, starts
        self.num_documents = num_documents
        self.best = best_of_each_word(scores, starts) if best is None else best
        self._scratch = threading.local()

    def top(self, words: Sequence[int], count: int) -> list[int]:
        """The documents with the largest sums of scores, best first; equal sums keep document order.

        Exactly what summing over all documents would give. Words are taken by their largest score; once those left
        cannot lift a new document above the ``count``-th best, they are only looked up for the candidates at hand.
        Source: MaxScore, Turtle and Flood (1995).

        Args:
            words: distinct; of a document's scores in float32, this is the order of the sum.
            count: of documents, at most: one that has none of the words is never returned.
        """
        order = sorted(words, key=lambda word: -self.best[word])
        # What the words from a position on can add at most.
        rest = np.append(np.cumsum([self.best[word] for word in order][::-1], dtype=np.float64)[::-1], 0.0)
        candidates, sums, looked_at = self._gather(order, rest, count)
        threshold = _kth(sums, count)
        for position in range(looked_at, len(order)):
            keep = sums + rest[position] >= threshold
            candidates, sums = candidates[keep], sums[keep]
            sums = sums + self._scores_of(order[position], candidates)
            threshold = max(threshold, _kth(sums, count))
        candidates = np.sort(candidates[sums >= threshold])
        totals = np.zeros(len(candidates), dtype=np.float32)
        for word in words:
            totals += self._scores_of(word, candidates)
        return candidates[np.argsort(-totals, kind="stable")[:count]].tolist()

    def _gather(
        self, order: Sequence[int], rest: NDArray[np.float64], count: int
    ) -> tuple[NDArray[np.int32], NDArray[np.float32], int]:
        """Every document that may be among the best, its sum so far, and how many words that took."""
        sums = self._zeros()
        found: list[NDArray[np.int32]] = [np.empty(0, dtype=np.int32)]
        total = 0
        looked_at = 0
        for looked_at, word in enumerate(order):
            # No sum can be larger than what the words so far add at most: the exact bound costs more to find.
            worthwhile = rest[0] - rest[looked_at] > rest[looked_at]
            if total >= count and worthwhile and rest[looked_at] < _kth(sums[np.concatenate(found)], count):
                break
            part = slice(self.starts[word], self.starts[word + 1])
            rows = self.rows[part]
            found.append(rows[sums[rows] == 0])
            sums[rows] += self.scores[part]
            total += len(found[-1])
        else:
            looked_at = len(order)
        candidates = np.concatenate(found)
        own = sums[candidates]
        sums[candidates] = 0
        return candidates, own, looked_at

    def _zeros(self) -> NDArray[np.float32]:
        """An array over all documents that is 0 again after each use: clearing it would cost more than a search."""
        if not hasattr(self._scratch, "sums"):
            self._scratch.sums = np.zeros(self.num_documents, dtype=np.float32)
        return self._scratch.sums

    def _scores_of(self, word: int, candidates: NDArray[np.int32]) -> NDArray[np.float32]:
        part = slice(self.starts[word], self.starts[word + 1])
        rows = self.rows[part]
        places = np.minimum(np.searchsorted(rows, candidates), len(rows) - 1)
        return np.where(rows[places] == candidates, self.scores[part][places], np.float32(0))


def best_of_each_word(scores: NDArray[np.float32], starts: NDArray[np.int64]) -> NDArray[np.float32]:
    """[W] the largest score of each word; every word has one."""
    return np.maximum.reduceat(scores, starts[:-1])


def _kth(sums: NDArray[np.float32], count: int) -> float:
    """A little less than the ``count``-th largest; 0 where there are fewer."""
    if len(sums) < count:
        return 0.0
    return float(np.partition(sums, len(sums) - count)[len(sums) - count]) * _SLACK
