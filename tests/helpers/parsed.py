"""The ``appo`` command line up to the validated config: nothing is built, nothing runs."""

from __future__ import annotations

from appo_lightning.lightning_cli import AppoCLI


class ParsedOnly(AppoCLI):
    """``AppoCLI`` that stops after parsing; ``config`` holds what it understood."""

    def before_instantiate_classes(self) -> None: ...

    def instantiate_classes(self) -> None: ...

    def _set_seed(self) -> None: ...
