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
        candidates, sums, looked_at, threshold = self._gather(order, rest, count)
        for position in range(looked_at, len(order)):
            keep = sums + rest[position] >= threshold
            candidates, sums = candidates[keep], sums[keep]
            sums = sums + self._scores_of(order[position], candidates)
            threshold = max(threshold, _at_most_kth(sums, count))
        candidates = np.sort(candidates[sums >= threshold])
        totals = np.zeros(len(candidates), dtype=np.float32)
        for word in words:
            totals += self._scores_of(word, candidates)
        return candidates[np.argsort(-totals, kind="stable")[:count]].tolist()

    def _gather(
        self, order: Sequence[int], rest: NDArray[np.float64], count: int
    ) -> tuple[NDArray[np.int32], NDArray[np.float32], int, float]:
        """Every document that may be among the best, its sum so far, how many words that took, and a threshold."""
        sums = self._zeros()
        found: list[NDArray[np.int32]] = []
        threshold, looked_at = 0.0, 0
        while looked_at < len(order) and rest[looked_at] >= threshold:
            part = slice(self.starts[order[looked_at]], self.starts[order[looked_at] + 1])
            rows = self.rows[part]
            found.append(rows[sums[rows] == 0])
            sums[rows] += self.scores[part]
            looked_at += 1
            # No sum is larger than what these words add at most: below that the threshold cannot stop anything yet.
            if rest[0] - rest[looked_at] > rest[looked_at]:
                threshold = max(threshold, _at_most_kth(sums[rows], count))
        candidates = np.concatenate(found) if found else np.empty(0, dtype=np.int32)
        own = sums[candidates]
        sums[candidates] = 0
        return candidates, own, looked_at, max(threshold, _at_most_kth(own, count))

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


def _at_most_kth(sums: NDArray[np.float32], count: int) -> float:
    """A number that at least ``count`` of the sums reach; 0 where there are fewer sums."""
    if len(sums) < count:
        return 0.0
    groups = max(64, 8 * count)
    if len(sums) > 16 * groups:
        # The largest of each group are sums, too: fewer to order, and the best are rarely in one group.
        sums = sums[: len(sums) // groups * groups].reshape(groups, -1).max(axis=1)
    return float(np.partition(sums, len(sums) - count)[len(sums) - count]) * _SLACK
