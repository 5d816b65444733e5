"""PythonTool: what policy code sees, what it does not, its limits, and junk."""

import os
import time
from pathlib import Path

import pytest

from appo_lightning.errors import ConfigurationError, ToolFailure
from appo_lightning.tools.python import PythonTool
from appo_lightning.types import Task
from helpers.sandboxes import failure_of, wait_until

TASK = Task("task-0", [1], ("x",))


def outcome_of(session, code):
    """The result, or the message of the failure: whichever the policy reads."""
    try:
        return session.call(code)
    except ToolFailure as failure:
        return str(failure)


# What code sees


@pytest.mark.parametrize(
    ("code", "result"),
    [
        ("print(37 + 52)", "89"),
        ("1+1", "2"),
        ("'a'", "'a'"),
        ("None", ""),
        ("x = 3", ""),
        ("", ""),
        ("# nothing", ""),
        ("for i in range(3):\n    print(i)", "0\n1\n2"),
        ("print('a')\n'b'", "a\n'b'"),
        ("print('wärme 温度')", "wärme 温度"),
        (" print(5) ", "5"),
        ("\n    a = 2\n    if a:\n        print(a)\n", "2"),
        ("import sys; print('out'); print('err', file=sys.stderr)", "out\nerr"),
        ("import os; _ = os.system('echo shell'); print('after')", "shell\nafter"),
        ("__name__", "'__main__'"),
        ("annotated: int = 3; print(__annotations__)", "{'annotated': <class 'int'>}"),
    ],
)
def test_the_result_is_what_was_printed_and_the_last_value(session, code, result):
    assert session.call(code) == result


def test_state_lives_across_the_calls_of_a_session(session):
    session.call("import math\ndef area(r):\n    return math.pi * r * r\nradius = 2")
    assert session.call("round(area(radius), 3)") == "12.566"
    session.call("radius += 1")
    assert session.call("radius") == "3"


def test_sessions_share_no_state(tool, session):
    session.call("x = 1; open('file', 'w').write('mine')")
    other = tool.open(TASK)
    assert str(failure_of(other, "x")) == "NameError: name 'x' is not defined"
    assert other.call("import os; os.listdir()") == "[]"
    other.close()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("1/0", "ZeroDivisionError: division by zero"),
        ("print('before')\n1/0", "before\nZeroDivisionError: division by zero"),
        ("x = ", "SyntaxError: invalid syntax (<python>, line 1)"),
        ("assert False", "AssertionError"),
        ("raise KeyError('k')", "KeyError: 'k'"),
        ("class Mine(Exception): pass\nraise Mine('m')", "Mine: m"),
        ("import decimal; decimal.Decimal('x')", "decimal.InvalidOperation: [<class 'decimal.ConversionSyntax'>]"),
        ("class Bad(Exception):\n    def __str__(self): 1/0\nraise Bad", "Bad: <its text cannot be shown>"),
        ("import sys; sys.exit('reason')", "SystemExit: reason"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("input()", "EOFError: EOF when reading a line"),
        ("def f(): f()\nf()", "RecursionError: maximum recursion depth exceeded"),
    ],
)
def test_an_exception_is_the_last_line_of_its_traceback(session, code, message):
    failure = failure_of(session, code)
    assert (str(failure), failure.kind) == (message, "error")
    assert session.call("'alive'") == "'alive'"


def test_a_failed_call_keeps_earlier_variables(session):
    session.call("x = 5")
    failure_of(session, "y = 6\n1/0")
    assert session.call("x, y") == "(5, 6)"


def test_exit_ends_the_call_and_keeps_the_state(session):
    session.call("x = 5")
    assert session.call("print('bye'); exit(); print('unreached')") == "bye"
    assert session.call("x") == "5"


def test_a_long_error_is_cut(session):
    assert len(str(failure_of(session, "raise ValueError('x' * 10**6)"))) < 1100


def test_long_output_is_cut_with_a_notice(make_tool):
    session = make_tool(max_output_chars=10).open(TASK)
    assert session.call("print('ä' * 10, end='')") == "ä" * 10
    assert session.call("print('ä' * 11, end='')") == "ä" * 10 + "\n[output cut after 10 characters]"
    assert str(failure_of(session, "print('x' * 99)\n1/0")) == (
        "x" * 10 + "\n[output cut after 10 characters]\nZeroDivisionError: division by zero"
    )
    assert session.call("'short'") == "'short'"


def test_random_numbers_are_the_same_in_every_session(tool, session):
    code = "import random; random.random()"
    other = tool.open(TASK)
    assert session.call(code) == other.call(code)
    assert session.call("random.random()") == other.call("random.random()")
    other.close()


def test_sets_of_texts_keep_their_order_from_run_to_run(make_tool):
    orders = {make_tool().open(TASK).call("set('abcdefgh')") for _ in range(2)}
    assert len(orders) == 1


def test_installed_packages_can_be_imported_or_not(make_tool, session):
    assert session.call("import numpy; int(numpy.arange(4).sum())") == "6"
    bare = make_tool(packages=False).open(TASK)
    assert "ModuleNotFoundError" in str(failure_of(bare, "import numpy"))


def test_packages_below_the_place_of_scratch_files_can_be_imported(make_tool, tmp_path, monkeypatch):
    """As in a virtual environment somewhere in /tmp."""
    packages = tmp_path / "site-packages"
    packages.mkdir()
    (packages / "beside_scratch.py").write_text("answer = 42\n")
    monkeypatch.syspath_prepend(str(packages))
    session = make_tool().open(TASK)
    assert session.call("import beside_scratch; beside_scratch.answer") == "42"
    session.call("import tempfile; file = tempfile.NamedTemporaryFile(); file.write(b'x'); open('own', 'w').close()")
    assert failure_of(session, f"open({str(packages / 'beside_scratch.py')!r}, 'w')")


def test_preloaded_modules_are_there_without_an_import_of_their_own(make_tool):
    session = make_tool(preload=["fractions"]).open(TASK)
    assert session.call("import sys; 'fractions' in sys.modules") == "True"
    assert session.call("fractions = sys.modules['fractions']; fractions.Fraction(1, 3)") == "Fraction(1, 3)"


# What code cannot see


def test_the_trainer_environment_is_not_inherited(make_tool, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    session = make_tool().open(TASK)
    environment = session.call("import os; print(dict(os.environ)); print(open('/proc/self/environ').read())")
    assert "hunter2" not in environment
    assert "SECRET_TOKEN" not in environment


def test_the_trainer_files_are_not_inherited(make_tool, tmp_path):
    with (tmp_path / "held").open("w") as held:
        os.set_inheritable(held.fileno(), True)
        session = make_tool().open(TASK)
        session.call("1")
        names = session.call(
            "import os\nfor fd in sorted(os.listdir('/proc/self/fd'), key=int):\n"
            "    try: print(fd, os.readlink('/proc/self/fd/' + fd))\n    except OSError: pass"
        ).splitlines()
    # Nothing to read, one file of output twice and once more for the interpreter, the channel.
    assert [line.split()[0] for line in names] == ["0", "1", "2", "3", "4"]
    assert "held" not in str(names)


def test_the_modules_of_the_sandbox_and_of_this_package_are_out_of_sight(session):
    assert session.call("import sys; [m for m in sys.modules if 'appo' in m or m in ('session', 'frames')]") == "[]"
    assert "ModuleNotFoundError" in str(failure_of(session, "import frames"))


def test_the_working_directory_is_private_and_starts_empty(tool, session):
    session.call("import os; os.makedirs('deep/er'); open('deep/er/file', 'w').write('x')")
    assert session.call("import tempfile; tempfile.gettempdir() == os.getcwd() == os.path.expanduser('~')") == "True"
    other = tool.open(TASK)
    assert other.call("import os; os.listdir()") == "[]"
    other.close()


def test_scratch_files_and_shared_memory_share_one_limit(make_tool):
    session = make_tool(scratch_mb=8, file_mb=6).open(TASK)
    session.call("open('file', 'wb').write(bytes(5 << 20))")
    assert "No space left" in str(failure_of(session, "open('/dev/shm/file', 'wb').write(bytes(5 << 20))"))
    session.call("import os; os.remove('file')")
    assert session.call("open('/dev/shm/file', 'wb').write(bytes(5 << 20))") == str(5 << 20)
    assert session.call("os.listdir(os.getcwd()), os.listdir('/dev/shm')") == "([], ['file'])"


def test_without_namespaces_the_working_directory_is_removed_with_everything_in_it(make_tool, tmp_path):
    (tmp_path / "kept").write_text("kept")
    session = make_tool(walls=("landlock", "seccomp")).open(TASK)
    directory = Path(session.call("import os; print(os.getcwd())"))
    session.call(f"os.symlink({str(tmp_path)!r}, 'elsewhere'); os.mkdir('closed', 0)")
    session.call("for _ in range(1050): os.mkdir('d'); os.chdir('d')")  # deeper than Python's stack
    assert (directory / "elsewhere").is_symlink()
    session.close()
    assert wait_until(lambda: not directory.exists())
    assert (tmp_path / "kept").exists()


# Limits


def test_a_call_that_takes_too_long_is_killed_and_says_that_the_state_is_lost(make_tool):
    session = make_tool(timeout_s=0.5).open(TASK)
    session.call("x = 1")
    start = time.monotonic()
    failure = failure_of(session, "while True: pass")
    assert 0.4 < time.monotonic() - start < 5
    assert failure.kind == "timeout"
    assert str(failure) == (
        "TimeoutError: no result within 0.5 s. The interpreter was restarted: its variables are lost."
    )
    assert str(failure_of(session, "x")) == "NameError: name 'x' is not defined"


def test_cpu_time_is_limited_call_by_call(make_tool):
    session = make_tool(timeout_s=30, cpu_s=1).open(TASK)
    burn = "import time\nend = time.process_time() + 0.7\nwhile time.process_time() < end: pass"
    for _ in range(2):
        session.call(burn)
    start = time.monotonic()
    failure = failure_of(session, "while True: pass")
    assert time.monotonic() - start < 15
    assert failure.kind == "timeout"
    assert "more than 1 s of CPU time" in str(failure)


def test_memory_is_limited(make_tool):
    session = make_tool(memory_mb=128).open(TASK)
    assert str(failure_of(session, "x = bytearray(200 << 20)")) == "MemoryError"
    assert session.call("len(bytearray(32 << 20))") == str(32 << 20)


def test_the_size_of_files_is_limited(make_tool):
    session = make_tool(file_mb=1).open(TASK)
    assert "File too large" in str(failure_of(session, "open('file', 'wb').write(bytes(2 << 20))"))


def test_open_files_are_limited(session):
    assert "Too many open files" in str(failure_of(session, "files = [open('/dev/null') for _ in range(1000)]"))


def test_a_flood_of_output_fills_no_memory(make_tool):
    session = make_tool(timeout_s=2, memory_mb=256, file_mb=2).open(TASK)
    assert session.call("for _ in range(200): print('x' * 10**6)").endswith("[output cut after 4000 characters]")
    assert session.call("import os; os.fstat(1).st_size <= 4 * 4000 + 1") == "True"
    # Programs write past Python: the limit on file sizes stops them.
    flooded = session.call("import subprocess; code = subprocess.run(['yes']).returncode; os.fstat(1).st_size, code")
    assert flooded.endswith("[output cut after 4000 characters]")
    assert session.call("code != 0") == "True"
    assert failure_of(session, "while True: print('x' * 1000)").kind == "timeout"


def test_new_privileges_and_core_dumps_are_off(session):
    status = session.call("print(open('/proc/self/status').read())")
    assert "NoNewPrivs:\t1" in status
    # The value that also keeps the kernel from starting a program for core dumps.
    assert session.call("import resource; resource.getrlimit(resource.RLIMIT_CORE)") == "(1, 1)"


# Junk


@pytest.mark.parametrize(
    "code",
    [
        "\x00",
        "print('a\x00b')",
        "x = '\ud800'",
        "\udcff",
        "print('\\ud800')",
        "print(chr(0))",
        "(" * 5000,
        "-" * 50_000 + "1",
        "import sys; sys.stdout = None; print(1)",
        "import sys; sys.stdout.close(); sys.stderr.close()",
        "import sys; sys.stdout = sys.stderr = sys.stdin = 3",
        "import os; os.close(0); os.close(1); os.close(2)",
        "del __builtins__",
        "import sys; sys.modules.clear()",
        "import builtins; builtins.__dict__.clear()",
        "import sys; sys.settrace(lambda *a: 1/0)",
        "import sys; sys.displayhook = None; 1",
        "raise BaseException",
        "raise SystemExit(BaseException)",
        "import signal; signal.raise_signal(signal.SIGINT)",
        "import os; os.chdir('/')",
        "import os; os.rmdir(os.getcwd())",
        "import threading; threading.Thread(target=lambda: 1/0).start()",
        "import gc; gc.collect()",
        "import resource; resource.setrlimit(resource.RLIMIT_CPU, (100, 100))",
        "import os\nif os.fork() == 0: print('copy')",
        "import os\nif os.fork() == 0: raise SystemExit",
        "import multiprocessing as m; p = m.get_context('fork').Process(target=print); p.start(); p.join()",
    ],
    ids=ascii,
)
def test_junk_gives_a_result_and_harms_nobody_else(tool, session, code):
    session.call("x = 1")
    vandal = tool.open(TASK)
    for attempt in (code, code, "print(1 + 1)"):
        assert isinstance(outcome_of(vandal, attempt), str)
    vandal.close()
    assert session.call("x") == "1"


@pytest.mark.parametrize(
    ("code", "how"),
    [
        ("import os; os._exit(3)", "exit code 3"),
        ("import os; os._exit(0)", "exit code 0"),
        ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
        ("import os; os.abort()", "SIGABRT"),
        ("import os; os.kill(os.getpid(), 9)", "SIGKILL"),
        ("import os; os.killpg(0, 9)", "SIGKILL"),
        ("import os; os.execv('/bin/true', ['true'])", "exit code 0"),
        ("import os; os.closerange(0, 64)", "exit code 1"),
        ("import os; os.write(3, b'x' * 1000)", "it wrote into its own channel"),
        ("import os; os.write(3, b'x'); os._exit(0)", "killed from outside"),
    ],
)
def test_an_interpreter_that_dies_is_reported_and_replaced(session, code, how):
    session.call("x = 1")
    failure = failure_of(session, code)
    if how != "killed from outside":
        assert str(failure) == f"The interpreter ended ({how}) and was restarted: its variables are lost."
    assert failure.kind == "error"
    assert str(failure_of(session, "x")) == "NameError: name 'x' is not defined"


def test_an_interpreter_that_dies_between_calls_is_reported_by_the_next(session):
    session.call("import threading, os; threading.Timer(0.05, os._exit, (7,)).start()")
    time.sleep(0.5)
    assert "exit code 7" in str(failure_of(session, "x = 1"))
    assert session.call("1") == "1"


def test_deep_recursion_without_python_limit_is_contained(make_tool):
    session = make_tool(timeout_s=1.5, memory_mb=128).open(TASK)
    failure_of(session, "import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf()")
    assert session.call("1") == "1"


def test_code_that_is_too_long_is_refused(session):
    failure = failure_of(session, "#" * 1_000_001)
    assert (failure.kind, "at most 1000000 characters" in str(failure)) == ("malformed", True)
    assert session.call("#" * 999_000 + "\n5") == "5"


@pytest.mark.parametrize(
    "options",
    [
        {"timeout_s": 0},
        {"timeout_s": float("inf")},
        {"cpu_s": 0},
        {"memory_mb": 1},
        {"max_output_chars": 0},
        {"file_mb": 0},
        {"scratch_mb": 0},
        {"max_processes": 0},
        {"warm_sessions": -1},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigurationError, match=f"^{next(iter(options))} must be"):
        PythonTool(**options)


def test_a_module_that_cannot_be_preloaded_stops_the_run(make_tool):
    tool = make_tool(preload=["no_such_module"])
    with pytest.raises(ConfigurationError, match=r"cannot import 'no_such_module' .*take it out of preload"):
        tool.open(TASK)
