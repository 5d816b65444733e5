"""What a user can be told in one line: what was expected, what was found, what to do."""

from __future__ import annotations


class AppoError(Exception):
    """A mistake in the input or a stopped run; the command line prints the message without a traceback."""


class ConfigurationError(AppoError, ValueError):
    """Options that contradict each other or have no effect together."""


class DataError(AppoError, ValueError):
    """A row, a file or a prompt that cannot be used."""


class SamplerError(AppoError, RuntimeError):
    """The sampling engine failed or cannot do what the configuration asks of it."""


class EngineFailure(SamplerError):
    """The engine broke or hangs; a fresh one may do what it was asked."""


class RanksStopped(SamplerError):
    """The sampler of one process failed for good; every process of the run raises this at the same place."""


class WeightSyncError(SamplerError):
    """The sampler does not hold the trainer's weights."""


class NonFiniteLossError(AppoError, ArithmeticError):
    """The loss or its gradient is NaN or infinite."""


class ToolBroken(AppoError, RuntimeError):
    """A tool cannot answer any call; the run stops rather than train on failures."""


class ToolFailure(Exception):
    """A tool could not answer; becomes a readable tool result, never a crash.

    Args:
        message: shown to the policy.
        kind: ``"error"``, ``"timeout"`` or ``"malformed"``.
    """

    def __init__(self, message: str, kind: str = "error") -> None:
        super().__init__(message)
        self.kind = kind
