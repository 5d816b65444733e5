"""The few calls to the C library that Python does not offer itself; each raises OSError as Python's own do."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_GET_SECCOMP = 21
PR_SET_SECCOMP = 22
PR_SET_NO_NEW_PRIVS = 38
PR_GET_NO_NEW_PRIVS = 39

_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
_CAPABILITY_VERSION = 0x20080522


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapabilityHalf(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def is_available() -> bool:
    """Whether this is Linux."""
    return _libc is not None


def unshare(flags: int) -> None:
    """Give this process namespaces of its own."""
    _check(_library().unshare(ctypes.c_int(flags)), "unshare")


def setns(fd: int, flags: int) -> None:
    """Enter the namespace that an open file stands for."""
    _check(_library().setns(ctypes.c_int(fd), ctypes.c_int(flags)), "setns")


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """``mount(2)``."""
    result = _library().mount(
        os.fsencode(source), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), options.encode()
    )
    _check(result, f"mount {target}")


def unmount(target: str, flags: int) -> None:
    """``umount2(2)``."""
    _check(_library().umount2(os.fsencode(target), ctypes.c_int(flags)), f"unmount {target}")


def process_option(option: int, value: int = 0, pointer: int = 0) -> int:
    """``prctl(option, value, pointer)``."""
    arguments = [ctypes.c_ulong(value) for value in (value, pointer, 0, 0)]
    result = _library().prctl(ctypes.c_int(option), *arguments)
    return _check(result, f"prctl {option}")


def system_call(name: str, number: int, *arguments: Any) -> int:
    """A system call by its number; integers are passed as 64 bits."""
    converted = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return _check(_library().syscall(ctypes.c_long(number), *converted), name)


def drop_capabilities() -> None:
    """Give up every privilege of this process; with no_new_privs set, none comes back."""
    header, halves = _CapabilityHeader(_CAPABILITY_VERSION, 0), (_CapabilityHalf * 2)()
    _check(_library().capset(ctypes.byref(header), halves), "capset")


def effective_capabilities() -> int:
    """The privileges in force, as bits."""
    header, halves = _CapabilityHeader(_CAPABILITY_VERSION, 0), (_CapabilityHalf * 2)()
    _check(_library().capget(ctypes.byref(header), halves), "capget")
    return halves[0].effective | halves[1].effective << 32


def _library() -> ctypes.CDLL:
    if _libc is None:
        raise OSError(f"not on {sys.platform}")
    return _libc


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result
