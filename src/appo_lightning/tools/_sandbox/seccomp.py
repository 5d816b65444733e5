"""A filter of system calls (seccomp): what a program of a policy never needs is refused by the kernel.

The filter lists what is refused, not what is allowed: the C library and packages of tomorrow keep working. Calls newer
than this file are refused as unknown, so that the list cannot be outrun. ``man 2 seccomp``,
https://docs.kernel.org/userspace-api/seccomp_filter.html.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import struct
import termios
from collections.abc import Sequence
from dataclasses import dataclass

import libc
import syscalls

_REFUSED = """
    socket connect bind listen accept accept4
    shmget shmat shmctl semget semctl semop semtimedop msgget msgsnd msgrcv msgctl mq_open mq_unlink mq_notify
    unshare setns
    mount umount2 pivot_root chroot move_mount open_tree fsopen fsconfig fsmount fspick mount_setattr statmount
    listmount swapon swapoff quotactl quotactl_fd acct name_to_handle_at open_by_handle_at fanotify_init fanotify_mark
    ptrace process_vm_readv process_vm_writev process_madvise process_mrelease kcmp pidfd_getfd pidfd_send_signal
    bpf perf_event_open userfaultfd io_uring_setup io_uring_enter io_uring_register
    add_key request_key keyctl lsm_set_self_attr
    init_module finit_module delete_module kexec_load kexec_file_load reboot syslog vhangup sync syncfs
    settimeofday clock_settime clock_adjtime adjtimex sethostname setdomainname
    iopl ioperm modify_ldt personality uselib ustat sysfs _sysctl nfsservctl lookup_dcookie
    memfd_create memfd_secret mbind set_mempolicy set_mempolicy_home_node migrate_pages move_pages vmsplice
    sched_setscheduler sched_setparam sched_setattr setpriority ioprio_set
"""
# Without namespaces the trainer's files and processes are in reach of calls that Landlock does not control, and a
# child could leave its session: there are no children, then, and no changes of attributes.
_REFUSED_WITHOUT_NAMESPACES = """
    fork vfork tkill inotify_add_watch
    chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat utime utimes utimensat futimesat
    setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr
"""
_SIGNALS_BY_PROCESS = ("kill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo")

_AF_UNIX, _SOCK_DGRAM, _SOCK_RAW, _SOCK_TYPES = 1, 2, 3, 0xF
_NEW_NAMESPACES = 0x7E020000  # CLONE_NEW*, but for that of time, which clone() does not know
_CLONE_THREAD = 0x00010000
_PR_SET_MM = 35
# Locks and signals of open files reach other processes.
_F_SETOWN, _F_SETSIG, _F_SETOWN_EX, _F_SETLEASE, _F_NOTIFY = 8, 10, 15, 1024, 1026
_HARMLESS_IOCTLS = (
    termios.TCGETS,
    termios.TIOCGWINSZ,
    termios.FIONREAD,
    termios.FIONBIO,
    termios.FIOCLEX,
    termios.FIONCLEX,
)

# The machine that runs filters: struct sock_filter {u16 code; u8 jt, jf; u32 k}.
_INSTRUCTION = struct.Struct("=HBBI")
_LOAD, _AND, _JUMP, _IF_EQUAL, _IF_GREATER, _RETURN = 0x20, 0x54, 0x05, 0x15, 0x25, 0x06
_NUMBER_AT, _MACHINE_AT, _ARGUMENTS_AT = 0, 4, 16  # struct seccomp_data
_ALLOW, _FAIL, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
_MODE_FILTER = 2


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


@dataclass(frozen=True, slots=True)
class _Rule:
    """Refuse a call by the low 32 bits of one of its arguments."""

    call: str
    argument: int
    values: Sequence[int]  # compared with argument & mask
    refuse: bool  # these values, or all others
    mask: int = 0xFFFFFFFF


@functools.cache
def build(only_process: int | None) -> bytes:
    """The filter as the kernel takes it.

    Args:
        only_process: None where the session may start processes, which needs namespaces around it. Otherwise the
            number of its process, the only one that it may signal.

    Raises:
        OSError: the numbers of this machine's system calls are not known.
    """
    machine = syscalls.machine()
    if machine is None:
        raise OSError("the system calls of this kind of machine are not known")
    code = [_op(_LOAD, _MACHINE_AT), _op(_IF_EQUAL, syscalls.AUDIT_ARCHITECTURES[machine], 1, 0)]
    code += [_op(_RETURN, _KILL_PROCESS), _op(_LOAD, _NUMBER_AT)]
    # Programs take "no such call" as the sign to use an older one.
    unknown = _op(_RETURN, _FAIL | errno.ENOSYS)
    code += [_op(_IF_GREATER, syscalls.LAST, 0, 1), unknown]  # those of the x32 interface, too: they start at 2^30
    clone3 = syscalls.number("clone3", machine)
    assert clone3 is not None
    code += [_op(_IF_EQUAL, clone3, 0, 1), unknown]  # its flags lie in memory, out of a filter's sight
    for name in (_REFUSED if only_process is None else _REFUSED + _REFUSED_WITHOUT_NAMESPACES).split():
        if (number := syscalls.number(name, machine)) is not None:
            code += [_op(_IF_EQUAL, number, 0, 1), _op(_RETURN, _FAIL | errno.EPERM)]
    for rule in _rules(only_process):
        code += _compiled(rule, machine)
    return b"".join([*code, _op(_RETURN, _ALLOW)])


def install(program: bytes) -> None:
    """Filter the calls of this process and what it starts, for ever; needs no_new_privs."""
    arguments = _Program(len(program) // _INSTRUCTION.size, program)
    libc.process_option(libc.PR_SET_SECCOMP, _MODE_FILTER, ctypes.addressof(arguments))


def _rules(only_process: int | None) -> list[_Rule]:
    rules = [
        _Rule("socketpair", 0, [_AF_UNIX], refuse=False),
        # A datagram socket can send to any address, whomever it is paired with.
        _Rule("socketpair", 1, [_SOCK_DGRAM, _SOCK_RAW], refuse=True, mask=_SOCK_TYPES),
        _Rule("clone", 0, [0], refuse=False, mask=_NEW_NAMESPACES),
        _Rule("prctl", 0, [libc.PR_SET_PDEATHSIG, _PR_SET_MM], refuse=True),
        _Rule("prlimit64", 0, [0], refuse=False),
        _Rule("sched_setaffinity", 0, [0], refuse=False),
        _Rule("fcntl", 1, [_F_SETOWN, _F_SETSIG, _F_SETOWN_EX, _F_SETLEASE, _F_NOTIFY], refuse=True),
        _Rule("ioctl", 1, _HARMLESS_IOCTLS, refuse=False),
    ]
    if only_process is not None:
        rules.append(_Rule("clone", 0, [_CLONE_THREAD], refuse=False, mask=_CLONE_THREAD))
        rules += [_Rule(name, 0, [only_process], refuse=False) for name in _SIGNALS_BY_PROCESS]
    return rules


def _compiled(rule: _Rule, machine: str) -> list[bytes]:
    number = syscalls.number(rule.call, machine)
    if number is None:
        return []
    body = [_op(_LOAD, _ARGUMENTS_AT + 8 * rule.argument), _op(_AND, rule.mask)]
    # A match jumps over the comparisons that are left and the instruction after them.
    for left, value in zip(range(len(rule.values), 0, -1), rule.values, strict=True):
        body.append(_op(_IF_EQUAL, value & 0xFFFFFFFF, left, 0))
    if rule.refuse:
        body.append(_op(_JUMP, 1))
    body += [_op(_RETURN, _FAIL | errno.EPERM), _op(_LOAD, _NUMBER_AT)]
    return [_op(_IF_EQUAL, number, 0, len(body)), *body]


def _op(code: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return _INSTRUCTION.pack(code, if_true, if_false, operand)


def is_available() -> bool:
    """Whether this kernel filters calls for this kind of machine."""
    if syscalls.machine() is None:
        return False
    try:
        libc.process_option(libc.PR_GET_SECCOMP)
    except OSError:
        return False
    return True
