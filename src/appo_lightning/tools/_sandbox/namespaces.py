"""Namespaces: the sessions' own view of users, processes, files and network, where almost nothing exists.

The server is the first process of one set of namespaces, every session has the first process of a set inside it. When
the first process of a process namespace ends, for whatever reason, the kernel kills all others in it, so a session
cannot leave a process behind, nor can the server. ``man 7 namespaces``, ``man 7 user_namespaces``.

Works without privileges where the system lets users make namespaces (Linux 5.14 or newer). When the trainer is root,
sessions run as user numbers that nobody else has.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import stat
from collections.abc import Sequence
from typing import NoReturn

import files
import libc
import syscalls
from watch import MAX_FILES

_SCRATCH, _OTHER_SCRATCH = "/tmp", "/scratch"
_SHARED_MEMORY = "/dev/shm"
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_DEVICE_LINKS = {
    "/dev/fd": "/proc/self/fd",
    "/dev/stdin": "/proc/self/fd/0",
    "/dev/stdout": "/proc/self/fd/1",
    "/dev/stderr": "/proc/self/fd/2",
}
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8
_MS_BIND, _MS_REC, _MS_PRIVATE = 1 << 12, 1 << 14, 1 << 18
_MNT_DETACH = 2
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_CHECK_TRAINER_S = 5.0

# First user number of sessions and how many, in the range of this machine or of a container with 65,536 numbers.
_USER_RANGES = ((1_900_000_000, 65_000), (60_000, 5_000))


class _MountAttributes(ctypes.Structure):
    _fields_ = (
        ("set", ctypes.c_uint64),
        ("clear", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("user_namespace", ctypes.c_uint64),
    )


def scratch_directory(readable: Sequence[str]) -> str:
    """Where sessions have their private files: a place that covers nothing of what they may read."""
    return _OTHER_SCRATCH if any(path.startswith(f"{_SCRATCH}/") for path in readable) else _SCRATCH


def enter(keep_open: Sequence[int], directory: str, readable: Sequence[str]) -> int:
    """Continue as the first process of new namespaces that show little; the process that calls waits for its end.

    Args:
        keep_open: files that only the new process keeps.
        directory: empty; what shows the new root while it is built. Removed at the end.
        readable: what the new root shows of the old one; read-only.

    Returns:
        How many users there are for sessions, each with a number of its own from 1 on; 0: sessions share the user of
        the trainer.

    Raises:
        OSError: this machine does not let the process make namespaces, or one of their parts.
    """
    users = _unshare_with_users(
        libc.CLONE_NEWUSER
        | libc.CLONE_NEWPID
        | libc.CLONE_NEWNET
        | libc.CLONE_NEWIPC
        | libc.CLONE_NEWUTS
        | libc.CLONE_NEWCGROUP
    )
    if first := os.fork():
        for fd in keep_open:
            os.close(fd)
        _wait_for(first, directory)
    libc.process_option(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
    libc.unshare(libc.CLONE_NEWNS)
    _change_root(directory, readable)
    socket.sethostname("sandbox")
    return users


class SessionNamespaces:
    """Makes the namespaces of sessions; held by the server.

    Args:
        scratch: directory of a session's private files.
        scratch_mb: MiB of them.
        users: see ``enter``.
    """

    def __init__(self, scratch: str, scratch_mb: int, users: int) -> None:
        self.scratch = scratch
        self._scratch_mb, self._users = scratch_mb, users
        self._own_processes = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        self._number = 0

    def fork(self) -> int:
        """``os.fork()`` whose child is the first process of a new process namespace."""
        self._number += 1
        libc.unshare(libc.CLONE_NEWPID)
        try:
            child = os.fork()
        except OSError:
            libc.setns(self._own_processes, libc.CLONE_NEWPID)
            raise
        if child:
            libc.setns(self._own_processes, libc.CLONE_NEWPID)
        return child

    def mount(self) -> None:
        """In the first process of a session: private files, and a list of its own processes only."""
        libc.unshare(libc.CLONE_NEWNS)
        libc.mount("proc", "/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
        user = self._user()
        options = f"mode=0700,uid={user},gid={user},size={self._scratch_mb}m,nr_inodes={MAX_FILES}"
        libc.mount("tmpfs", self.scratch, "tmpfs", _MS_NOSUID | _MS_NODEV, options)
        # Two directories of one file system: they share its size. The second covers what it lies in.
        for directory in (_SHARED_MEMORY, self.scratch):
            part = f"{self.scratch}/{os.path.basename(directory)}"
            os.mkdir(part, 0o700)
            os.chown(part, user, user)
            libc.mount(part, directory, flags=_MS_BIND)

    def change_user(self) -> None:
        """In a session: become a user who is nobody outside, and whose processes are counted apart."""
        if self._users:
            user = self._user()
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        else:
            user, group = os.getuid(), os.getgid()
            libc.unshare(libc.CLONE_NEWUSER)
            _write("/proc/self/uid_map", f"{user} {user} 1")
            _write("/proc/self/gid_map", f"{group} {group} 1")

    def _user(self) -> int:
        return 1 + self._number % self._users if self._users else os.getuid()


def _unshare_with_users(flags: int) -> int:
    """``unshare`` and give the new user namespace its numbers; how many there are for sessions."""
    user, group = os.getuid(), os.getgid()
    mapper = _Mapper() if user == 0 else None
    libc.unshare(flags)
    if mapper is not None and (users := mapper.finish()):
        return users
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{user} {user} 1")
    _write("/proc/self/gid_map", f"{group} {group} 1")
    return 0


class _Mapper:
    """A process that stays outside, where root may hand out any number: whoever made a namespace may not."""

    def __init__(self) -> None:
        target = os.getpid()
        reader, self._go = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._go)
            users = _hand_out_users(target) if os.read(reader, 1) else -1
            os._exit(users)
        os.close(reader)

    def finish(self) -> int:
        """Map the namespace that was made since; how many users it got, or 0."""
        os.write(self._go, b"g")
        os.close(self._go)
        _, status = os.waitpid(self._pid, 0)
        code = os.waitstatus_to_exitcode(status)
        return _USER_RANGES[code][1] if 0 <= code < len(_USER_RANGES) else 0


def _hand_out_users(target: int) -> int:
    for index, (first, count) in enumerate(_USER_RANGES):
        with contextlib.suppress(OSError):
            for kind in ("uid", "gid"):
                _write(f"/proc/{target}/{kind}_map", f"0 0 1\n1 {first} {count}")
            return index
    return len(_USER_RANGES)


def _wait_for(first: int, directory: str) -> NoReturn:
    """End as the first process does; by then, the kernel has ended all the others."""
    trainer = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    while (ended := os.waitpid(first, os.WNOHANG)) == (0, 0):
        if os.getppid() != trainer:
            os.kill(first, signal.SIGKILL)
        signal.sigtimedwait([signal.SIGCHLD], _CHECK_TRAINER_S)
    files.remove_tree(directory)
    os._exit(os.waitstatus_to_exitcode(ended[1]) & 0xFF)


def _change_root(directory: str, readable: Sequence[str]) -> None:
    """Make a root from parts of the old one, and leave that."""
    machine = syscalls.machine()
    if machine is None:
        raise OSError("the system calls of this kind of machine are not known")
    libc.mount("none", "/", flags=_MS_REC | _MS_PRIVATE)
    libc.mount("tmpfs", directory, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=0755,size=1m")
    os.umask(0o022)  # sessions may be other users than the trainer
    shown: list[str] = []
    for path in sorted({*readable, *map(os.path.realpath, readable), *DEVICES}):
        if os.path.exists(path) and not any(path.startswith(f"{parent}/") for parent in shown):
            _show(path, directory + path)
            shown.append(path)
    for path in ("/proc", scratch_directory(readable), _SHARED_MEMORY, "/etc"):
        os.makedirs(directory + path, exist_ok=True)
    for path, target in _DEVICE_LINKS.items():
        os.symlink(target, directory + path)
    libc.mount("proc", f"{directory}/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    os.chdir(directory)
    libc.system_call("pivot_root", _number("pivot_root", machine), b".", b".")
    libc.unmount(".", _MNT_DETACH)
    os.chdir("/")
    attributes = _MountAttributes(set=_MS_RDONLY | _MS_NOSUID)
    libc.system_call(
        "mount_setattr",
        _number("mount_setattr", machine),
        _AT_FDCWD,
        b"/",
        _AT_RECURSIVE,
        ctypes.byref(attributes),
        ctypes.sizeof(attributes),
    )


def _show(path: str, target: str) -> None:
    if stat.S_ISDIR(os.stat(path).st_mode):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        _write(target, "")
    libc.mount(os.path.realpath(path), target, flags=_MS_BIND | _MS_REC)


def _write(path: str, text: str) -> None:
    # Bytes, and at once: the files of the kernel take one write.
    with open(path, "wb", buffering=0) as file:
        file.write(text.encode())


def _number(name: str, machine: str) -> int:
    number = syscalls.number(name, machine)
    assert number is not None
    return number
