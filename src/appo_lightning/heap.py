"""What the garbage collector looks at: the one place where the package freezes the heap and thaws it."""

from __future__ import annotations

import gc

_frozen = [False]


def freeze() -> None:
    """Collect, and look at nothing that exists now again until ``thaw``."""
    gc.collect()
    gc.freeze()
    _frozen[0] = True


def thaw() -> None:
    """Look at everything again."""
    gc.unfreeze()
    _frozen[0] = False


def collect_all() -> None:
    """Collect frozen objects too; what survives stays frozen if the heap was."""
    gc.unfreeze()
    gc.collect()
    restore()


def restore() -> None:
    """Undo what others did to the heap. Python 3.12 has frozen some objects itself, so a count tells nothing."""
    gc.unfreeze()
    if _frozen[0]:
        gc.freeze()
