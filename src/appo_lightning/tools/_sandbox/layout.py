"""What of the trainer's machine an interpreter needs: Python, its packages, the system's libraries and programs."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

_SYSTEM = (
    "/bin",
    "/lib",
    "/lib32",
    "/lib64",
    "/usr/bin",
    "/usr/lib",
    "/usr/lib32",
    "/usr/lib64",
    "/usr/share/zoneinfo",
    "/etc/alternatives",
    "/etc/ld.so.cache",
    "/etc/localtime",
)
_PACKAGE_DIRECTORIES = ("site-packages", "dist-packages")


def clean_environment() -> dict[str, str]:
    """What an interpreter needs and nothing that the trainer knows."""
    environment = {
        "PATH": os.defpath,
        "LANG": "C.UTF-8",
        "USER": "sandbox",
        # The order of sets of texts should not change from run to run.
        "PYTHONHASHSEED": "0",
        # Numerical libraries start a thread per core otherwise: in every session.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    # Some installations find libpython only with it.
    if "LD_LIBRARY_PATH" in os.environ:
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    return environment


def package_directories() -> list[str]:
    """Directories of installed packages, in the order in which the trainer searches them."""
    found = [sysconfig.get_path(name) for name in ("purelib", "platlib")]
    found += [path for path in sys.path if Path(path).name in _PACKAGE_DIRECTORIES]
    return list(dict.fromkeys(found))


def readable_paths(packages: list[str]) -> list[str]:
    """Files and directories that an interpreter may read.

    Args:
        packages: directories of installed packages.
    """
    modules = [
        Path(sysconfig.get_path("stdlib")),
        Path(sysconfig.get_path("platstdlib", vars={"platbase": sys.base_exec_prefix})),
    ]
    found = [
        *_SYSTEM,
        *map(str, modules),
        # Beside the modules lie the libraries that some of them load.
        *(str(path.parent) for path in modules if path.parent.name in ("lib", "lib64")),
        sys.executable,
        os.path.realpath(sys.executable),
        f"{sys.prefix}/pyvenv.cfg",
        *packages,
        *os.environ.get("LD_LIBRARY_PATH", "").split(":"),
    ]
    return [path for path in dict.fromkeys(found) if os.path.isabs(path) and os.path.exists(path)]
