"""The walls around PythonTool: what is said about them, when they are refused, and that their parts are right."""

import ast
import ctypes
import ctypes.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from appo_lightning.errors import ConfigurationError
from appo_lightning.tools._sandbox import client, files, layout
from appo_lightning.tools.python import PythonTool
from appo_lightning.types import Task
from helpers.sandboxes import WALLS

TASK = Task("task-0", [1], ("x",))
EVERYTHING = (
    "no network",
    "no files of others to read",
    "no files to write but its own",
    "no other processes in reach",
    "no privileges",
    "a limit on processes",
)
SANDBOX = Path(client.__file__).parent


def run_inside(program):
    """Run a program as the interpreters' own modules run: by their plain names."""
    program = f"import sys; sys.path.insert(0, {str(SANDBOX)!r})\n{program}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


# What is said


@pytest.mark.parametrize("walls", WALLS.values(), ids=list(WALLS))
def test_every_protection_is_tried_and_holds(make_tool, walls):
    found = make_tool(walls).protections()
    assert (found.held, found.missing) == (EVERYTHING, ())


def test_the_protections_are_said_once_on_one_line(make_tool, capfd):
    tool = make_tool()
    tool.open(TASK)
    tool.open(TASK)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("python tool: tried and found to hold: no network, no files of others to read, ")
    assert line.endswith("system call filter, resource limits)")


def test_only_the_first_rank_speaks(make_tool, capfd, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    make_tool().open(TASK)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("walls", "missing"),
    [
        # The filter alone leaves the files; nothing at all leaves only that privileges are dropped.
        (["seccomp"], ("no files of others to read", "no files to write but its own")),
        (["landlock"], ("no network", "a limit on processes")),
        ([], tuple(name for name in EVERYTHING if name != "no privileges")),
    ],
)
def test_a_missing_protection_stops_the_run_unless_allowed(make_tool, capfd, walls, missing):
    with pytest.raises(ConfigurationError) as refused:
        make_tool(walls).open(TASK)
    assert f"found missing: {', '.join(missing)} (" in str(refused.value)
    assert "set allow_unsafe: true" in str(refused.value)
    assert "\n" not in str(refused.value)
    tool = make_tool(walls, allow_unsafe=True)
    session = tool.open(TASK)
    assert session.call("1 + 1") == "2"
    session.close()
    assert tool.protections().missing == missing
    assert f"MISSING: {', '.join(missing)}" in capfd.readouterr().err


def test_where_namespaces_are_kept_from_users_the_other_walls_do_and_the_reason_is_said(make_tool):
    # As a system does it that forbids user namespaces: the server cannot make any inside of this one.
    program = (
        "import sys\nfrom appo_lightning.tools.python import PythonTool\nfrom appo_lightning.types import Task\n"
        "open('/proc/sys/user/max_user_namespaces', 'w').write('0')\n"
        "tool = PythonTool()\nprint(tool.open(Task('t', [1], ('x',))).call('1 + 1'), tool.protections())\ntool.close()"
    )
    command = ["unshare", "--user", "--map-root-user", "--mount-proc", "--pid", "--fork", sys.executable, "-c", program]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("no unshare program")
    if done.stderr.startswith("unshare: "):
        pytest.skip("this machine keeps namespaces from users")
    assert done.stdout.startswith("2 Protections(held=('no network', "), done.stderr
    assert "missing=()" in done.stdout
    assert "children=False, lacks='[Errno 28] unshare: No space left on device'" in done.stdout


def test_an_ordinary_user_gets_the_same_walls(tmp_path):
    if os.getuid() != 0:
        pytest.skip("this test is run by an ordinary user: so are all others")
    if not Path("/usr/bin/python3").exists():
        pytest.skip("no interpreter that another user could run")
    # A copy that others may read, without what needs packages.
    package = tmp_path / "appo_lightning"
    subprocess.run(["cp", "-r", str(SANDBOX.parents[1]), str(package)], check=True)
    program = (
        "from appo_lightning.tools.python import PythonTool\nfrom appo_lightning.types import Task\nimport os\n"
        "tool = PythonTool()\nsession = tool.open(Task('t', [1], ('x',)))\n"
        "print(os.getuid(), session.call('1 + 1'), tool.protections())\ntool.close()"
    )
    for path in [tmp_path, *tmp_path.parents]:
        if path == Path("/tmp"):
            break
        path.chmod(0o755)
    command = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups", "/usr/bin/python3", "-B", "-c", program]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    except FileNotFoundError:
        pytest.skip("no setpriv program")
    if "SyntaxError" in done.stderr or "ImportError" in done.stderr:
        pytest.skip("the system's Python is too old")
    assert done.stdout.startswith("54321 2 Protections(held=('no network', "), done.stderr
    assert "missing=()" in done.stdout


COPIES_ITSELF = """
import ctypes, errno, os, sys
libc = ctypes.CDLL(None, use_errno=True)
USERS, MOUNTS = 0x10000000, 0x00020000
def outcome(result):
    return "done" if result == 0 else errno.errorcode[ctypes.get_errno()]
found = {
    "join": outcome(libc.setns(os.open("/proc/self/ns/mnt", os.O_RDONLY), 0)),
    "mounts": outcome(libc.unshare(MOUNTS)),
}
reader, writer = os.pipe()
if (copy := os.fork()) == 0:
    found["users, mounts"] = outcome(libc.unshare(USERS | MOUNTS))
    found["mount there"] = outcome(libc.mount(b"none", b"/tmp", b"tmpfs", 0, None))
    os.write(writer, repr(found).encode())
    os._exit(0)
os.waitpid(copy, 0)
print(os.read(reader, 1000).decode())
"""


@pytest.mark.parametrize(
    ("walls", "in_its_own"),
    [
        (["namespaces", "landlock", "seccomp"], ("EPERM", "EPERM")),
        (["namespaces", "landlock"], ("done", "EPERM")),
        (["namespaces"], ("done", "done")),  # so it is Landlock that refuses above
    ],
    ids=["all", "no filter", "namespaces alone"],
)
def test_a_copy_of_a_session_gets_no_mounts_of_its_own(make_tool, walls, in_its_own):
    """Why a branch repeats calls: a forked interpreter would share the files of its root (docs/design.md)."""
    tool = make_tool(walls, allow_unsafe=True)
    if not any("mount" in wall for wall in tool.protections().walls):
        pytest.skip("this machine keeps namespaces from users")
    found = ast.literal_eval(tool.open(TASK).call(COPIES_ITSELF))
    assert found == {"join": "EPERM", "mounts": "EPERM", "users, mounts": in_its_own[0], "mount there": in_its_own[1]}


# Parts


def test_the_numbers_of_system_calls_are_those_of_libseccomp():
    library = ctypes.util.find_library("seccomp")
    if library is None:
        pytest.skip("no libseccomp to compare with")
    resolve = ctypes.CDLL(library).seccomp_syscall_resolve_name_arch
    resolve.argtypes = [ctypes.c_uint32, ctypes.c_char_p]
    ours = json.loads(
        run_inside("import json, syscalls; print(json.dumps([syscalls._NUMBERS, syscalls.AUDIT_ARCHITECTURES]))")
    )
    compared = 0
    for name, numbers in ours[0].items():
        for architecture, number in zip(ours[1].values(), numbers, strict=True):
            theirs = resolve(architecture, name.encode())
            if theirs != -1:  # newer than this libseccomp
                assert number == (theirs if theirs >= 0 else None), name
                compared += 1
    assert compared > 200


@pytest.mark.parametrize("children", [True, False])
def test_a_filter_lets_through_what_is_not_listed_and_looks_at_arguments(children):
    """The filter's program run by hand, on calls as the kernel would show them."""
    if platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip("no numbers for this machine")
    code = run_inside(f"import seccomp; print(seccomp.build({None if children else 77}).hex())")
    numbers = json.loads(run_inside("import json, syscalls; print(json.dumps(syscalls._NUMBERS))"))
    machine = {"x86_64": 0, "aarch64": 1}[platform.machine()]
    architecture = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[platform.machine()]

    def verdict(call, *arguments, architecture=architecture):
        number = numbers[call][machine] if isinstance(call, str) else call
        return run_filter(bytes.fromhex(code), number, architecture, arguments)

    allow, refused, unknown, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
    assert verdict(63 if machine else 0) == allow  # read
    assert verdict("mount") == verdict("socket", 2) == verdict("ptrace") == refused
    assert verdict("clone3") == verdict(463) == verdict(0x40000000 + 39) == unknown
    assert verdict("mount", architecture=0x40000003) == kill  # 32-bit calls have other numbers
    assert verdict("ioctl", 0, 0x5401) == allow  # is this a terminal?
    assert verdict("ioctl", 0, 0x5412) == refused  # type into it
    assert verdict("fcntl", 0, 1) == allow
    assert verdict("fcntl", 0, 8) == refused
    assert verdict("socketpair", 1, 1) == verdict("socketpair", 1, 1 | 0o2000000) == allow
    assert verdict("socketpair", 1, 2) == verdict("socketpair", 2, 1) == refused
    assert verdict("prlimit64", 0) == allow
    assert verdict("prlimit64", 5) == refused
    assert verdict("clone", 0x10000000) == refused  # a user namespace
    assert verdict("clone", 0x003D0F00) == allow  # a thread
    assert verdict("clone", 17) == (allow if children else refused)  # a process
    assert verdict("kill", 77) == allow
    assert verdict("kill", 78) == (allow if children else refused)


def run_filter(code, number, architecture, arguments):
    words = {0: number, 4: architecture, **{16 + 8 * i: value for i, value in enumerate(arguments)}}
    accumulator = position = 0
    while True:
        instruction = code[8 * position : 8 * position + 8]
        operation = int.from_bytes(instruction[:2], sys.byteorder)
        if_true, if_false = instruction[2], instruction[3]
        operand = int.from_bytes(instruction[4:], sys.byteorder)
        position += 1
        if operation == 0x20:
            accumulator = words.get(operand, 0)
        elif operation == 0x54:
            accumulator &= operand
        elif operation == 0x05:
            position += operand
        elif operation in (0x15, 0x25):
            matches = accumulator == operand if operation == 0x15 else accumulator > operand
            position += if_true if matches else if_false
        else:
            assert operation == 0x06
            return operand


def test_a_tree_of_any_shape_is_removed_and_links_are_not_followed(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("kept")
    tree = tmp_path / "tree"
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "a" / "b" / "file").write_text("x")
    (tree / "a" / ".removing-0").mkdir()
    (tree / "link").symlink_to(tmp_path / "kept")
    os.mkfifo(tree / "a" / "pipe")
    (tree / "a" / "b").chmod(0)
    here = os.getcwd()
    try:
        os.chdir(tree)
        for _ in range(1200):
            os.mkdir("d")
            os.chdir("d")
    finally:
        os.chdir(here)
    files.remove_tree(str(tree))
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept" / "file").read_text() == "kept"


def test_interpreters_see_python_and_the_system_but_no_home_and_no_project():
    paths = layout.readable_paths(layout.package_directories())
    project, home = Path(__file__).parents[3], Path.home()
    assert sys.executable in paths
    assert all(Path(path) not in (project, *project.parents, home, *home.parents) for path in paths)
    assert str(project / "src") not in paths


def test_a_copy_of_a_tool_keeps_its_walls_option():
    assert PythonTool(allow_unsafe=True).__getstate__()["allow_unsafe"] is True
