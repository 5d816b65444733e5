"""Measuring and removing what policy code left: any number of files, any depth, any name, any mode."""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
from collections.abc import Iterator

_LONGEST_PATH = 3000  # bytes; the kernel's limit is 4096
_TOO_DEEP = 1 << 60


def sizes(directory: str) -> Iterator[int]:
    """Bytes on disk of everything below a directory, which may change meanwhile; a very deep tree counts as huge."""
    waiting = [directory]
    while waiting:
        path = waiting.pop()
        if len(os.fsencode(path)) > _LONGEST_PATH:
            yield _TOO_DEEP
        with contextlib.suppress(OSError), os.scandir(path) as entries:
            for entry in entries:
                yield entry.stat(follow_symlinks=False).st_blocks * 512
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)


def remove_tree(directory: str) -> None:
    """Remove a directory with everything below; what cannot be removed stays.

    ``shutil.rmtree`` calls itself for each level, and a tree can be deeper than Python's stack.
    """
    # Names that nobody could have taken on purpose.
    top_names = map(f"{directory}/{secrets.token_hex(8)}-{{}}".format, itertools.count())
    waiting, emptied = [directory], []
    with contextlib.suppress(OSError):
        os.chmod(directory, 0o700)
    while waiting:
        path = waiting.pop()
        emptied.append(path)
        with contextlib.suppress(OSError), os.scandir(path) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if not entry.is_dir(follow_symlinks=False):
                        os.unlink(entry.path)
                        continue
                    os.chmod(entry.path, 0o700)
                    child = entry.path
                    if len(os.fsencode(child)) > _LONGEST_PATH:
                        child = next(top_names)  # short again
                        os.rename(entry.path, child)
                    waiting.append(child)
    for path in reversed(emptied):  # those inside come after those around them
        with contextlib.suppress(OSError):
            os.rmdir(path)
