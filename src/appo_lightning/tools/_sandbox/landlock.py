"""Landlock: the kernel's access control that a process puts on itself, on open files, signals and traces.

Source: https://docs.kernel.org/userspace-api/landlock.html. What it does not control (``stat``, ``chmod``, ``utime``,
extended attributes, sockets by path) is left to the mount namespace, or to the filter of system calls.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterable

import libc
import syscalls

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_TRUNCATE = 1 << 14
_MAKE_CHAR, _MAKE_SOCK, _MAKE_BLOCK = 1 << 6, 1 << 9, 1 << 11
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE
_SCOPES = 0b11  # abstract sockets, signals
# The number of access rights that each version of the interface knows: files, then TCP.
_FILE_RIGHTS = (0, 13, 14, 15, 15, 16)
_NETWORK_RIGHTS = 0b11
_GET_VERSION = 1
_PATH_BENEATH = 1
MINIMUM = 3  # Linux 6.2: before, files could be emptied behind its back


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scopes", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("rights", ctypes.c_uint64), ("directory", ctypes.c_int32))


def version() -> int:
    """Version of the kernel's interface; 0: there is none."""
    try:
        return libc.system_call("landlock", _number("landlock_create_ruleset"), 0, 0, _GET_VERSION)
    except OSError:
        return 0


def restrict(readable: Iterable[str], writable: Iterable[str]) -> None:
    """Leave this process and what it starts these files only, for ever; needs no_new_privs.

    From version 6 on, signals and abstract sockets reach only what is restricted in the same way, too.

    Args:
        readable: files and directories that can be read and executed; those that do not exist are left out.
        writable: directories and devices that can be changed.

    Raises:
        OSError: the kernel has no Landlock, or refuses.
    """
    available = version()
    every = (1 << _FILE_RIGHTS[min(available, len(_FILE_RIGHTS) - 1)]) - 1
    attributes = _Ruleset(every, _NETWORK_RIGHTS if available >= 4 else 0, _SCOPES if available >= 6 else 0)
    size = 24 if available >= 6 else 16 if available >= 4 else 8
    ruleset = libc.system_call(
        "landlock_create_ruleset", _number("landlock_create_ruleset"), ctypes.byref(attributes), size, 0
    )
    try:
        for path in readable:
            _allow(ruleset, path, _READ)
        for path in writable:
            _allow(ruleset, path, every & ~(_MAKE_CHAR | _MAKE_BLOCK | _MAKE_SOCK))
        libc.system_call("landlock_restrict_self", _number("landlock_restrict_self"), ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            if not os.path.isdir(path):
                rights &= _OF_FILES
            rule = _PathBeneath(rights, descriptor)
            libc.system_call(
                "landlock_add_rule", _number("landlock_add_rule"), ruleset, _PATH_BENEATH, ctypes.byref(rule), 0
            )
        finally:
            os.close(descriptor)


def _number(name: str) -> int:
    machine = syscalls.machine()
    number = syscalls.number(name, machine) if machine else None
    if number is None:
        raise OSError("unknown machine")
    return number
