"""The contract of a place where interpreters run."""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from appo_lightning.tools._sandbox.limits import Limits
from appo_lightning.tools._sandbox.protections import Protections


@dataclass(frozen=True, slots=True)
class Needs:
    """What the tool asks of its interpreters."""

    limits: Limits
    timeout_s: float  # wall-clock limit of a call, which the tool keeps itself
    packages: bool  # whether installed packages can be imported
    preload: Sequence[str]  # modules imported before any session starts


class InterpreterServer(Protocol):
    """Gives out interpreters; started when it is first needed, and again after ``close``."""

    def start(self) -> Protections:
        """Make sure that it runs; what protects the trainer.

        Raises:
            ConfigurationError: it cannot run, or does not protect.
        """

    def connect(self) -> socket.socket:
        """A new interpreter, as the socket to it; returns at once. Closing the socket ends it."""

    def close(self) -> None:
        """End every interpreter. Safe to call twice."""


class PythonBackend(ABC):
    """A place for interpreters as a configuration names it."""

    @abstractmethod
    def serve(self, needs: Needs) -> InterpreterServer:
        """The server of one tool; starts nothing yet.

        Raises:
            ConfigurationError: this place cannot keep what is needed.
        """
