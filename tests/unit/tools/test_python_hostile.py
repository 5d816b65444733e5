"""PythonTool against code that means harm: each attempt is contained, the next call works, nothing stays behind.

Every attempt runs twice: with all walls, and without namespaces, as in most containers.
"""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from appo_lightning.errors import ToolFailure
from appo_lightning.types import Task
from helpers.sandboxes import WALLS, descendants, server_directory, server_pid, tool_with, wait_until

TASK = Task("task-0", [1], ("x",))
SECRET = "hunter2-is-my-secret"


@pytest.fixture(scope="module", params=WALLS)
def walls(request):
    return WALLS[request.param]


def make_tool(walls, timeout_s):
    limits = {"cpu_s": 2, "memory_mb": 256, "file_mb": 4, "scratch_mb": 8, "max_processes": 16}
    tool = tool_with(walls, timeout_s=timeout_s, warm_sessions=0, **limits)
    assert not tool.protections().missing
    return tool


@pytest.fixture(scope="module")
def tool(walls):
    tool = make_tool(walls, timeout_s=30)
    yield tool
    tool.close()


@pytest.fixture(scope="module")
def impatient_tool(walls):
    """For what never ends by itself."""
    tool = make_tool(walls, timeout_s=1)
    yield tool
    tool.close()


@pytest.fixture
def has_namespaces(tool):
    return tool.protections().children


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """What must stay untouched: a directory like a repository, and a process."""
    repository = tmp_path_factory.mktemp("outside") / "repository"
    (repository / ".git").mkdir(parents=True)
    (repository / "train.py").write_text(SECRET)
    (repository / "train.py").chmod(0o666)
    with subprocess.Popen(["sleep", "3000"]) as victim:
        yield repository, victim
        victim.kill()


@pytest.fixture(scope="module")
def neighbours(tool, impatient_tool):
    """A session of each tool that is there all the time."""
    sessions = {each: each.open(TASK) for each in (tool, impatient_tool)}
    for session in sessions.values():
        session.call("x = 1")
    return sessions


@pytest.fixture
def attempt(tool, outside, neighbours):
    """Runs code in a session of its own and says what came of it; then looks whether all is as before."""
    with attempts(tool, outside, neighbours[tool]) as run:
        yield run


@pytest.fixture
def endless_attempt(impatient_tool, outside, neighbours):
    with attempts(impatient_tool, outside, neighbours[impatient_tool]) as run:
        yield run


@contextlib.contextmanager
def attempts(tool, outside, neighbour):
    server, (repository, victim) = server_pid(tool), outside
    at_rest, directories = descendants(server), set(os.listdir(server_directory(tool)))
    session = tool.open(TASK)

    def run(code):
        scope = f"TRAINER, SERVER, VICTIM = {os.getpid()}, {server}, {victim.pid}\nREPO = {str(repository)!r}\n"
        try:
            outcome = session.call(scope + code)
        except ToolFailure as failure:
            outcome = str(failure)
        # The next call works, be it in the same interpreter or in a new one.
        assert session.call("1 + 1") == "2"
        return outcome

    yield run
    session.close()
    assert neighbour.call("x") == "1"
    assert wait_until(lambda: descendants(server) == at_rest)
    assert wait_until(lambda: set(os.listdir(server_directory(tool))) == directories)
    assert server_pid(tool) == server
    assert victim.poll() is None
    assert [path.name for path in sorted(repository.iterdir())] == [".git", "train.py"]
    assert (repository / "train.py").read_text() == SECRET


def says(outcome, words):
    return any(word in outcome for word in words)


# Too much


@pytest.mark.parametrize(
    "code",
    [
        "import os\nwhile True: os.fork()",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "import os\nfor _ in range(200):\n    if os.fork() == 0:\n        os.setsid()\n        while True: os.fork()",
        "import subprocess\nwhile True: subprocess.Popen(['sleep', '300'], start_new_session=True)",
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(300,)).start()",
    ],
)
def test_bombs_of_processes_and_threads_go_off_in_their_session(endless_attempt, impatient_tool, code):
    endless_attempt(code)
    assert len(descendants(server_pid(impatient_tool))) < 60


def test_the_limit_counts_the_processes_of_a_session(attempt, has_namespaces):
    count = (
        "import os\nn = 0\ntry:\n    while n < 100:\n"
        "        if os.fork() == 0: os.execv('/bin/sleep', ['sleep', '9'])\n        n += 1\nexcept OSError: pass\nn"
    )
    # 16 less the interpreter; without namespaces there are none.
    assert attempt(count) == ("15" if has_namespaces else "0")


@pytest.mark.parametrize(
    "code",
    [
        "x = []\nwhile True: x.append(bytearray(1 << 20))",
        "x = 'a' * 10**12",
        "import mmap\nx = [mmap.mmap(-1, 64 << 20) for _ in range(99)]",
        "x = 10 ** 10 ** 10",
    ],
)
def test_bombs_of_memory_go_off_in_their_process(endless_attempt, code):
    assert says(endless_attempt(code), ("MemoryError", "Cannot allocate", "TimeoutError"))


def test_the_processes_of_a_session_share_one_limit_on_memory(attempt, has_namespaces):
    outcome = attempt(
        "import os, time\nfor _ in range(4):\n    if os.fork() == 0:\n        x = b'x' * (90 << 20)\n"
        "        time.sleep(9)\ntime.sleep(0.9)"
    )
    assert outcome.startswith(
        "The interpreter ended (more than 256 MiB of memory)" if has_namespaces else "PermissionError"
    )


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("while True: pass", "TimeoutError: "),
        (
            "import time\nwhile True:\n    try: time.sleep(99)\n    except BaseException: pass",
            "TimeoutError: no result",
        ),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", "TimeoutError: no result"),
        (
            "import signal, time\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
            "    except (OSError, ValueError): pass\ntime.sleep(99)",
            "TimeoutError: no result",
        ),
        ("import itertools\nfor n in itertools.count(): print(n)", "TimeoutError: "),
        ("import os\nwhile True: os.write(1, b'x' * 65536)", "The interpreter ended (SIGXFSZ)|OSError: [Errno 27]"),
        ("print(10 ** 10 ** 5)", "ValueError: Exceeds the limit"),
        ("import sys; sys.set_int_max_str_digits(0); print(10 ** 10 ** 8)", "TimeoutError: |MemoryError"),
        ("def f(): f()\nf()", "RecursionError"),
        (
            "import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
            "The interpreter ended|MemoryError|TimeoutError",
        ),
        ("exec('x = ' + '[' * 10**6)", "MemoryError|SyntaxError|RecursionError|The interpreter ended"),
    ],
)
def test_what_never_ends_is_ended(endless_attempt, code, outcome):
    assert says(endless_attempt(code), outcome.split("|"))


@pytest.mark.parametrize(
    "code",
    [
        "n = 0\nwhile True:\n    open(f'f{n}', 'wb').write(bytes(1 << 20))\n    n += 1",
        "n = 0\nwhile True:\n    open(f'f{n}', 'wb').close()\n    n += 1",
        "open('f', 'wb').write(bytes(64 << 20))",
    ],
    ids=["many large files", "many empty files", "one large file"],
)
def test_the_disk_is_not_filled(endless_attempt, code):
    assert says(endless_attempt(code), ("No space left", "File too large", "8192, of files", "TimeoutError"))


# Out of bounds


@pytest.mark.parametrize(
    "code",
    [
        "print(open(f'{REPO}/train.py').read())",
        "import os; print(os.listdir(REPO))",
        "import os; print(os.listdir('/root'), os.listdir('/home'))",
        "import os; os.symlink(f'{REPO}/train.py', 'link'); print(open('link').read())",
        "import os; os.symlink(REPO, 'link'); print(os.listdir('link'))",
        "import os; os.link(f'{REPO}/train.py', 'link'); print(open('link').read())",
        "import os; os.rename(f'{REPO}/train.py', 'mine'); print(open('mine').read())",
        "import shutil; shutil.copy(f'{REPO}/train.py', 'copy')",
        "open(f'{REPO}/train.py', 'a').write('x')",
        "import os; os.open(f'{REPO}/train.py', os.O_RDONLY | os.O_TRUNC)",
        "open(f'{REPO}/new', 'w')",
        "import os; os.truncate(f'{REPO}/train.py', 0)",
        "import os; os.chmod(f'{REPO}/train.py', 0)",
        "import os; os.utime(f'{REPO}/train.py', (0, 0))",
        "import os; os.setxattr(f'{REPO}/train.py', 'user.mine', b'x')",
        "import os; os.mkdir(f'{REPO}/new')",
        "import os; os.mknod('device', 0o600 | 0o020000, os.makedev(1, 1)); open('device', 'rb').read(1)",
        "import ctypes; libc = ctypes.CDLL(None, use_errno=True)\n"
        "if libc.open(f'{REPO}/train.py'.encode(), 0) < 0: raise OSError(ctypes.get_errno(), 'open')",
        "import os; fd = os.open('/', os.O_PATH); os.open(REPO.lstrip('/') + '/train.py', os.O_RDONLY, dir_fd=fd)",
        "import os; os.open('/proc/self/root' + REPO + '/train.py', os.O_RDONLY)",
        "import os; os.open('/proc/1/root' + REPO + '/train.py', os.O_RDONLY)",
        "import os; os.chroot('/')",
        "open('/etc/passwd', 'a')",
        "open('/usr/lib/mine', 'w')",
        "import os; open(os.__file__, 'a')",
        "open('/proc/sys/kernel/core_pattern', 'w').write('|/tmp/mine')",
        "open('/dev/mem', 'rb')",
        "open('/dev/kmsg', 'w')",
        "open('/dev/tty', 'w')",
        "open('/dev/vda', 'rb')",
        "open('/proc/1/mem', 'rb+')",
        "print(open(f'/proc/{TRAINER}/environ').read())",
        "print(open(f'/proc/{SERVER}/environ').read())",
        "print(open('/proc/1/environ').read())",
    ],
)
def test_files_of_others_are_out_of_reach(attempt, code):
    outcome = attempt(code)
    assert outcome.startswith(
        ("PermissionError", "FileNotFoundError", "OSError: [Errno 30] Read", "OSError: [Errno 18] Inv")
    )
    assert SECRET not in outcome


def test_deleting_the_repository_deletes_nothing(attempt):
    assert attempt("import shutil; shutil.rmtree(REPO, ignore_errors=True)") == ""
    attempt("import subprocess; subprocess.run(['rm', '-rf', REPO, '/bin'])")


def test_nothing_of_the_trainer_is_found_in_any_process_list(attempt):
    search = (
        "import glob\nfound = []\nfor path in glob.glob('/proc/[0-9]*/*') + glob.glob('/proc/[0-9]*/task/*/*'):\n"
        "    try: found.append(open(path, 'rb').read(10**5))\n    except OSError: pass\n"
        "b'pytest' in b''.join(found)"
    )
    assert b"pytest" in Path("/proc/self/cmdline").read_bytes()
    assert attempt(search) == "False"


@pytest.mark.parametrize(
    "code",
    [
        "socket.socket(socket.AF_INET)",
        "socket.socket(socket.AF_INET6)",
        "socket.socket(socket.AF_INET, socket.SOCK_RAW)",
        "socket.socket(socket.AF_UNIX)",
        "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)",
        "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'x', ADDRESS)",
        "socket.socketpair()[0].connect(ADDRESS)",
        "socket.create_connection(('127.0.0.1', PORT))",
        "import urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{PORT}', timeout=1)",
    ],
)
def test_there_is_no_network(attempt, code):
    name = f"\0appo-test-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as local:
        local.bind(name)
        local.setblocking(False)
        listener.setblocking(False)
        outcome = attempt(f"import socket\nPORT, ADDRESS = {listener.getsockname()[1]}, {name!r}\n{code}")
        assert outcome.startswith(("PermissionError", "urllib.error.URLError"))
        with pytest.raises(BlockingIOError):
            listener.accept()
        with pytest.raises(BlockingIOError):
            local.recv(1)


@pytest.mark.parametrize(
    "code",
    [
        "os.kill(VICTIM, 9)",
        "os.kill(TRAINER, 0)",
        "os.kill(SERVER, 9)",
        "os.kill(os.getppid(), 9); os.kill(os.getppid(), signal.SIGSTOP)",
        "os.killpg(os.getpgid(os.getppid()), 9)",
        "os.kill(-1, 9)",
        "os.kill(-1, signal.SIGSTOP)",
        "os.kill(0, 9)",
        "import resource; resource.prlimit(VICTIM, resource.RLIMIT_CPU, (0, 0))",
        "os.sched_setaffinity(VICTIM, [0])",
        "os.setpriority(os.PRIO_USER, 0, 19)",
        "signal.pidfd_send_signal(os.pidfd_open(VICTIM), 9)",
        # The kernel sends a signal when the other end writes.
        "import fcntl; a, b = os.pipe(); fcntl.fcntl(a, 10, 9); fcntl.fcntl(a, fcntl.F_SETOWN, VICTIM)",
        "os.setuid(0)",
        "os.setresuid(65534, 65534, 65534)",
    ],
)
def test_processes_of_others_are_out_of_reach(attempt, code):
    attempt(f"import os, signal\n{code}")  # that the victim, the server and this test live is the claim


def test_privileges_and_limits_cannot_be_raised(attempt, has_namespaces):
    for code in (
        "resource.setrlimit(resource.RLIMIT_NOFILE, (10**5, 10**5))",
        "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "os.setresuid(0, 0, 0)" if has_namespaces else "os.setns(0)",
        "os.nice(-5)",
        "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))",
    ):
        outcome = attempt(f"import os, resource\n{code}")
        # 22: an ordinary user's session knows no user number but its own.
        assert outcome.startswith(("ValueError", "PermissionError", "AttributeError", "OSError: [Errno 22]"))


def test_dangerous_system_calls_are_refused_even_when_made_directly(attempt, has_namespaces):
    sandbox = Path(sys.modules["appo_lightning.tools._sandbox.client"].__file__).parent
    program = (
        f"import sys; sys.path.insert(0, {str(sandbox)!r})\nimport platform, seccomp, syscalls\n"
        f"names = (seccomp._REFUSED + ('' if {has_namespaces} else seccomp._REFUSED_WITHOUT_NAMESPACES)).split()\n"
        "print({name: syscalls.number(name, platform.machine()) for name in names})"
    )
    numbers = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    outcome = attempt(
        f"import ctypes, errno\nlibc = ctypes.CDLL(None, use_errno=True)\nnumbers = {numbers}\nlet_through = []\n"
        "for name, number in numbers.items():\n"
        "    if number is not None and (libc.syscall(number, -1, -1, -1, -1, -1, -1), ctypes.get_errno()) != (-1, 1):\n"
        "        let_through.append(name)\n"
        "let_through, len(numbers) > 90"
    )
    assert outcome == "([], True)"


@pytest.mark.parametrize("flag", ["0x10000000", "0x20000000", "0x00020000", "0x40000000"])
def test_new_namespaces_cannot_be_made(attempt, flag):
    code = "import ctypes, platform; libc = ctypes.CDLL(None, use_errno=True)\nx86 = platform.machine() == 'x86_64'\n"
    clone = f"(libc.syscall(56 if x86 else 220, {flag} | 17, 0, 0, 0, 0), ctypes.get_errno()), "
    clone3 = "(libc.syscall(435, 0, 0), ctypes.get_errno()), "
    newer = "(libc.syscall(9999, 0, 0), ctypes.get_errno())"
    # EPERM; and "no such call" for what a filter cannot look into, or does not know.
    assert attempt(code + clone + clone3 + newer) == "((-1, 1), (-1, 38), (-1, 38))"


# Nonsense


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("import os; _ = os.write(1, b'\\xff\\xfe caf\\xe9')", "\ufffd\ufffd caf\ufffd"),
        ("print('a\\0b')", "a\0b"),
        ("'\\ud800'", "'\\ud800'"),
        ("print('\\ud800')", "\\ud800"),
        ("\0", ("SyntaxError: source code string cannot", "ValueError: source code string cannot")),
        ("import os; os.closerange(0, 256)", "The interpreter ended (exit code 1)"),
        ("import os; os._exit(0)", "The interpreter ended (exit code 0)"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("import os; os.execv('/bin/true', ['true'])", "The interpreter ended (exit code 0)"),
        ("import os; os.abort()", "The interpreter ended (SIGABRT)"),
        ("import os; os.write(3, b'appo' + bytes(5) + b'\\xff' * 4)", "The interpreter ended (it wrote into its own"),
        (
            "import os, struct\nfor kind in (4, 5): os.write(3, struct.pack('!4sBII', b'appo', kind, 1, 0))",
            "",
        ),
        ("import os\nfor fd in range(5): os.dup2(os.open('/dev/zero', os.O_RDWR), fd)", "The interpreter ended"),
        ("import sys\nfor frame in sys._current_frames().values():\n    frame.f_back.f_back.f_locals.clear()", ""),
    ],
    ids=ascii,
)
def test_nonsense_is_answered(attempt, code, outcome):
    assert attempt(code).startswith(outcome)


def test_children_that_stay_behind_end_with_the_session(attempt, tool, has_namespaces):
    before = descendants(server_pid(tool))
    outcome = attempt(
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        os.setsid()\n"
        "        for fd in range(5): os.close(fd)\n        time.sleep(300)\n    os._exit(0)"
    )
    assert outcome == ("" if has_namespaces else "PermissionError: [Errno 1] Operation not permitted")
    if has_namespaces:
        # The interpreter, its first process, the daemon.
        assert wait_until(lambda: len(descendants(server_pid(tool)) - before) == 3)
