"""A sampler that answers from a script, and tools that misbehave in one way each."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from appo_lightning.errors import SamplerError, ToolFailure
from appo_lightning.rewards.base import Reward, Score
from appo_lightning.samplers.base import Completion, Sampler, SampleRequest
from appo_lightning.tools.base import StatelessTool, Tool, ToolSession
from appo_lightning.types import Task, ToolCall, Trajectory
from helpers.tiny import EOS, build_tokenizer

# (text so far, seed) -> what to say next, as text or as token ids
Script = Callable[[str, int], str | list[int]]

CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + ' ' + message['content'] + '<|im_end|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant ' }}{%- endif %}"
)


@functools.cache
def scripted_tokenizer() -> PreTrainedTokenizerBase:
    """The tiny byte-level tokenizer, with a chat template. Its tags are several tokens each, as Qwen's are."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def ids_of(text: str) -> list[int]:
    return scripted_tokenizer().encode(text, add_special_tokens=False)


def text_of(ids: Sequence[int]) -> str:
    return str(scripted_tokenizer().decode(list(ids)))


def make_task(name: str = "t", **metadata: object) -> Task:
    return Task(name, ids_of(f"{name}?"), ("7",), dict(metadata))


def logprob_of(token: int) -> float:
    """The log-prob that ``ScriptedSampler`` gives a token: a different number for (nearly) every id."""
    return -(token + 1) / 1024


def after(replies: Mapping[str, str | list[int]]) -> Script:
    """A script by the end of the text so far; the longest key that fits answers, and "" always fits."""
    by_length = sorted(replies, key=len, reverse=True)

    def reply(text: str, seed: int) -> str | list[int]:
        return replies[next(key for key in by_length if text.endswith(key))]

    return reply


class ScriptedSampler(Sampler):
    """Keeps the contract of a sampler, with a script in place of weights.

    Args:
        script: what to say.
        steps: of a request until its answer is complete; ties finish in the order of ``submit``.
        fail_at_step: the step, counted from 1, that raises.
        step_s: wall clock of one step.
        slots: requests that it takes side by side; None: any number.
    """

    def __init__(
        self,
        script: Script,
        *,
        steps: Callable[[SampleRequest], int] = lambda request: 1,
        fail_at_step: int | None = None,
        step_s: float = 0.0,
        slots: int | None = None,
    ) -> None:
        self._slots = slots
        self._script, self._steps, self._fail_at_step, self._step_s = script, steps, fail_at_step, step_s
        self._tokenizer = scripted_tokenizer()
        self._due: dict[int, tuple[int, SampleRequest]] = {}
        self._step = 0
        self.requests: list[SampleRequest] = []  # in the order of submit
        self.completions: list[Completion] = []  # in the order of return
        self.aborted: list[int] = []

    def start(self, checkpoint: str, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> None:
        pass

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        pass

    def submit(self, request: SampleRequest) -> None:
        assert request.max_tokens >= 1
        assert request.token_ids
        assert request.id not in self._due
        assert self._slots is None or len(self._due) < self._slots
        self.requests.append(request)
        self._due[request.id] = (self._step + self._steps(request), request)

    def step(self) -> list[Completion]:
        self._step += 1
        time.sleep(self._step_s)
        if self._step == self._fail_at_step:
            raise SamplerError("the engine died")
        ready = [request for due, request in self._due.values() if due <= self._step]
        for request in ready:
            del self._due[request.id]
        completions = [self._complete(request) for request in ready]
        self.completions += completions
        return completions

    def abort(self, ids: Sequence[int]) -> None:
        self.aborted += [i for i in ids if self._due.pop(i, None) is not None]

    @property
    def num_slots(self) -> int | None:
        return self._slots

    @property
    def num_unfinished(self) -> int:
        return len(self._due)

    def _complete(self, request: SampleRequest) -> Completion:
        said = self._script(str(self._tokenizer.decode(request.token_ids)), request.seed)
        ids = self._tokenizer.encode(said, add_special_tokens=False) if isinstance(said, str) else list(said)
        assert ids, "a completion has at least one token"
        kept: list[int] = []
        for token in ids[: request.max_tokens]:
            kept.append(token)
            text = str(self._tokenizer.decode(kept))
            if any(stop in text for stop in request.stop):
                return self._completion(request, kept, "stop")
            if token == self._tokenizer.eos_token_id:
                return self._completion(request, kept, "eos")
        if len(kept) < request.max_tokens and len(kept) == len(ids):
            raise AssertionError(f"the script must end with {EOS} or a stop string, or fill the budget: {said!r}")
        return self._completion(request, kept, "length")

    def _completion(self, request: SampleRequest, ids: list[int], finish: str) -> Completion:
        return Completion(request.id, ids, [logprob_of(token) for token in ids], finish)  # type: ignore[arg-type]


class EchoTool(StatelessTool):
    """Answers with its argument, after a wait that may depend on it."""

    def __init__(self, name: str = "search", *, seconds: Callable[[str], float] = lambda argument: 0.0) -> None:
        self.name, self._seconds = name, seconds
        self.calls: list[str] = []

    def run(self, argument: str, task: Task) -> str:
        self.calls.append(argument)
        time.sleep(self._seconds(argument))
        return f"[{argument}]"


class FixedTool(StatelessTool):
    """Answers with the same thing, or raises it."""

    def __init__(self, answer: object, name: str = "search") -> None:
        self.name, self._answer = name, answer

    def run(self, argument: str, task: Task) -> str:
        if isinstance(self._answer, BaseException):
            raise self._answer
        return self._answer  # type: ignore[return-value]


class HangingTool(Tool):
    """Calls named "hang" never return by themselves; ``interrupts`` says whether ``interrupt`` ends them."""

    def __init__(self, name: str = "search", *, timeout_s: float = 0.1, interrupts: bool = True) -> None:
        self.name, self.timeout_s, self.interrupts = name, timeout_s, interrupts
        self.release = threading.Event()  # ends every call
        self.sessions: list[_HangingSession] = []

    def open(self, task: Task) -> ToolSession:
        self.sessions.append(_HangingSession(self))
        return self.sessions[-1]


class _HangingSession(ToolSession):
    def __init__(self, tool: HangingTool) -> None:
        self._tool, self._interrupted = tool, threading.Event()
        self.calls: list[str] = []
        self.busy = self.closed = self.closed_while_busy = False

    def call(self, argument: str) -> str:
        self.calls.append(argument)
        self.busy = True
        while argument == "hang" and not self._interrupted.is_set() and not self._tool.release.wait(0.005):
            pass
        self.busy = False
        return f"late {argument}" if argument == "hang" else f"[{argument}]"

    def interrupt(self) -> None:
        if self._tool.interrupts:
            self._interrupted.set()

    def close(self) -> None:
        self.closed, self.closed_while_busy = True, self.closed_while_busy or self.busy


class VariableTool(Tool):
    """Variables like an interpreter's: "x=1" sets, "x" reads, "del" fails and sets ``deleted``, "hang" hangs."""

    stateful = True

    def __init__(self, name: str = "python", *, timeout_s: float = 5.0) -> None:
        self.name, self.timeout_s = name, timeout_s
        self.sessions: list[_VariableSession] = []

    def open(self, task: Task) -> ToolSession:
        self.sessions.append(_VariableSession())
        return self.sessions[-1]

    @property
    def used(self) -> list[_VariableSession]:
        """Sessions that were called."""
        return [session for session in self.sessions if session.calls]


class _VariableSession(ToolSession):
    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.calls: list[str] = []
        self.closed = False
        self._interrupted = threading.Event()

    def call(self, argument: str) -> str:
        assert not self.closed
        self.calls.append(argument)
        if argument == "hang":
            self._interrupted.wait(10)
        if argument == "del":
            self.values["deleted"] = "yes"
            raise ValueError("cannot delete")
        name, assigned, value = argument.partition("=")
        if assigned:
            self.values[name] = value
        return self.values.get(name, f"no {name}")

    def interrupt(self) -> None:
        self._interrupted.set()

    def close(self) -> None:
        self.closed = True


class LengthReward(Reward):
    """One point per character of the response: every text has its own reward, more or less."""

    def score(self, task: Task, response_text: str) -> Score:
        return Score(float(len(response_text)), "7" in response_text, {"sevens": float(response_text.count("7"))})


def rolled_out(
    response: str | Sequence[tuple[str, bool]],
    *,
    prompt: str = "t?",
    reward: float | None = None,
    tool_calls: Sequence[ToolCall] = (),
) -> Trajectory:
    """A finished trajectory from text, or from (text, sampled) pieces; log-probs as ``ScriptedSampler`` gives them."""
    pieces = [(response, True)] if isinstance(response, str) else list(response)
    ids = [(token, sampled) for text, sampled in pieces for token in ids_of(text)]
    return Trajectory(
        prompt_ids=ids_of(prompt),
        response_ids=[token for token, _ in ids],
        sampled=[sampled for _, sampled in ids],
        behaviour_logprobs=[logprob_of(token) if sampled else 0.0 for token, sampled in ids],
        tool_calls=list(tool_calls),
        stop_reason="eos",
        policy_version=3,
        response_text="".join(text for text, _ in pieces),
        reward=reward,
        success=None if reward is None else reward > 0,
    )


def failing(message: str, kind: str = "error") -> ToolFailure:
    return ToolFailure(message, kind)
