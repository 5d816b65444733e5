"""Which request gets a slot of the engine that has come free."""

from __future__ import annotations

import heapq
import math


class SlotQueue:
    """Requests that wait for a slot, at most one of each trajectory.

    Trajectories that have taken fewest turns go first, in their order: so all of them advance together, their tool
    calls overlap with generation, and no long one is left to the end. Only while the prefix cache has room for one
    more: after that, those that have begun go first, before the cache loses what they will ask for again.

    Args:
        num_slots: requests that the engine generates side by side; None: any number.
        cache_tokens: tokens that its prefix cache holds; None: any number.
    """

    def __init__(self, num_slots: int | None, cache_tokens: int | None) -> None:
        self._num_slots = num_slots or math.inf
        self._cache_tokens = cache_tokens or math.inf
        self._first: list[tuple[int, int]] = []  # heaps of (trajectory, tokens) and (turn, trajectory, tokens)
        self._later: list[tuple[int, int, int]] = []
        self._held: dict[int, int] = {}  # tokens of the trajectories that have begun; common prefixes count each time
        self._held_tokens = 0

    def __len__(self) -> int:
        return len(self._first) + len(self._later)

    def push(self, trajectory: int, *, turn: int, tokens: int) -> None:
        """Add the request of a trajectory.

        Args:
            trajectory: its number.
            turn: of the trajectory, counted from 1.
            tokens: of the request.
        """
        if turn == 1:
            heapq.heappush(self._first, (trajectory, tokens))
        else:
            heapq.heappush(self._later, (turn, trajectory, tokens))

    def pop(self, generating: int) -> int | None:
        """The trajectory whose request goes to the engine now; None: no slot is free, or none waits.

        Args:
            generating: requests that the engine has.
        """
        if generating >= self._num_slots or not len(self):
            return None
        has_room = self._first and self._held_tokens + self._first[0][1] <= self._cache_tokens
        if has_room or not self._later:
            trajectory, tokens = heapq.heappop(self._first)
        else:
            _, trajectory, tokens = heapq.heappop(self._later)
        self._hold(trajectory, tokens)
        return trajectory

    def finish(self, trajectory: int) -> None:
        """Its tokens are not needed any more."""
        self._hold(trajectory, 0)
        del self._held[trajectory]

    def _hold(self, trajectory: int, tokens: int) -> None:
        self._held_tokens += tokens - self._held.get(trajectory, 0)
        self._held[trajectory] = tokens
