"""What the benchmarks share: a policy to measure with, a clock, the file of figures."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any


def checkpoint_or_tiny(checkpoint: str | None, *, max_length: int = 1024) -> str:
    """The checkpoint; where none is given, a random policy of 0.1M parameters in a temporary directory."""
    if checkpoint is not None:
        return checkpoint
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from helpers.tiny import save_tiny

    directory = tempfile.mkdtemp()
    save_tiny(Path(directory), max_length=max_length)
    return directory


def seconds(action: Callable[[], Any]) -> float:
    """Wall clock of one call."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def write_figures(path: Path | None, figures: Any) -> None:
    """Write figures as JSON; nothing where no file is named."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=2) + "\n")


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the figures were measured on."""
    found: dict[str, Any] = {"cores": os.cpu_count(), "load_average": os.getloadavg()[0], "torch": version("torch")}
    if device != "cpu":
        import torch

        found["gpu"] = torch.cuda.get_device_name()
    return found
