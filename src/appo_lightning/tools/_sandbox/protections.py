"""What protects the trainer from its interpreters: said at start, and a reason to stop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_REMEDY = (
    "set allow_unsafe: true to run without, for code that you trust; or run the sandbox in a container "
    "(docs/security.md)"
)


@dataclass(frozen=True, slots=True)
class Protections:
    """What was tried at the start of the server, by a session like those that run a policy's code."""

    held: tuple[str, ...]  # protections that could not be got round
    missing: tuple[str, ...]  # those that could
    walls: tuple[str, ...]  # what they are made of
    children: bool  # whether sessions can start processes
    lacks: str  # why there are no namespaces, or ""
    where: str = ""  # in which container or service, or "": on this machine

    @classmethod
    def from_report(cls, report: Mapping[str, Any], lacks: str) -> Protections:
        """Read what the server reports."""
        held: dict[str, bool] = report["held"]
        return cls(
            held=tuple(name for name, holds in held.items() if holds),
            missing=tuple(name for name, holds in held.items() if not holds),
            walls=tuple(report["walls"]),
            children=report["children"],
            lacks=lacks,
        )

    @classmethod
    def from_service(cls, fields: Mapping[str, Any], where: str) -> Protections:
        """Read what a server elsewhere says about itself.

        Args:
            fields: its protections as a dictionary.
            where: it is.
        """
        lists = {name: tuple(fields[name]) for name in ("held", "missing", "walls")}
        return cls(**lists, children=fields["children"], lacks=fields["lacks"], where=where)

    @property
    def complete(self) -> bool:
        """Whether some protections hold and none is missing."""
        return bool(self.held) and not self.missing

    def line(self) -> str:
        """All of it on one line."""
        found = [f"tried and found to hold: {', '.join(self.held) or 'nothing'}"]
        if self.missing:
            found.append(f"MISSING: {', '.join(self.missing)}")
        if not self.children:
            found.append("sessions cannot start processes")
        place = f"{self.where}, " if self.where else ""
        return f"{place}{'; '.join(found)} (by {', '.join(self.walls)}{self._why()})"

    def refusal(self) -> str:
        """Why it cannot be used."""
        return (
            f"expected policy code behind walls, found missing: {', '.join(self.missing)} "
            f"(there are {', '.join(self.walls)}{self._why()}); {_REMEDY}"
        )

    def _why(self) -> str:
        return f"; no namespaces: {self.lacks}" if self.lacks else ""
