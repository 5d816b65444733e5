"""The first process of a session's process namespace: it waits, and when it ends the kernel ends the session."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from typing import NoReturn

import libc
import processes
from namespaces import SessionNamespaces

STATUS = struct.Struct("!i")  # how the interpreter ended, as waitpid() says it


def run(interpreter: Callable[[], NoReturn], lifeline: socket.socket, own: SessionNamespaces) -> NoReturn:
    """Start the interpreter, adopt what loses its parent, say how the interpreter ended.

    Args:
        interpreter: never returns.
        lifeline: to the server.
        own: namespaces of this session.
    """
    # A group of its own: signals to "my group" must not reach the server.
    os.setsid()
    own.mount()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        interpreter()
    # Nothing of it can be read or traced from inside.
    libc.process_option(libc.PR_SET_DUMPABLE, 0)
    libc.drop_capabilities()
    lifeline_fd = os.dup2(lifeline.detach(), 0, inheritable=False)
    processes.close_files_from(1)
    while True:
        ended, status = os.waitpid(-1, 0)
        if ended == pid:
            os.write(lifeline_fd, STATUS.pack(status))
            os._exit(0)
