"""What lives as long as a run is kept from the garbage collector, and only so long."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from appo_lightning.callbacks import FrozenHeap


class Ring:
    """Garbage that only the collector finds."""

    def __init__(self) -> None:
        self.itself = self


@pytest.mark.parametrize("end", ["teardown", "on_exception"])
def test_the_heap_is_frozen_without_garbage_while_training(end: str) -> None:
    found, callback = gc.get_freeze_count(), FrozenHeap()
    trainer: Any = None
    Ring()
    callback.on_train_start(trainer, trainer)
    try:
        assert gc.get_freeze_count() > 10_000
        gc.unfreeze()
        assert not any(isinstance(thing, Ring) for thing in gc.get_objects())
        gc.freeze()
    finally:
        if end == "teardown":
            callback.teardown(trainer, trainer, "fit")
        else:
            callback.on_exception(trainer, trainer, ValueError())
    assert gc.get_freeze_count() <= found < 10_000  # Python 3.12 freezes some hundred objects itself
