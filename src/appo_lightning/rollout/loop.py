"""The tool loop: prefixes in, finished trajectories out, the engine busy while tools work.

Token-in/token-out: sampled ids are never re-tokenised; tool results enter as ids with ``sampled = False``. What comes
out is a function of (weights, task, seed), whatever the timing of tools, as long as no tool runs into its time limit.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from appo_lightning.errors import AppoError, ConfigurationError, EngineFailure
from appo_lightning.rollout.closer import Closer
from appo_lightning.rollout.episode import Answer, Episode, Prefix
from appo_lightning.rollout.formats.base import CallSyntax, ParsedCall
from appo_lightning.rollout.formats.tags import TagSyntax
from appo_lightning.rollout.limits import RolloutLimits
from appo_lightning.rollout.seeds import derive_seed
from appo_lightning.rollout.sessions import EpisodeSession
from appo_lightning.rollout.slots import SlotQueue
from appo_lightning.rollout.toolpool import ToolOutcome, ToolPool
from appo_lightning.rollout.watchdog import Watchdog
from appo_lightning.samplers.base import Completion, Sampler, SampleRequest
from appo_lightning.tokens import Decoder
from appo_lightning.tools.base import Tool
from appo_lightning.types import Task, ToolError, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SETTLE_S = 0.1  # so much longer a session may stay open that is over, and nobody is told


@dataclass(slots=True)
class LoopStatistics:
    """What the loop did, in tokens and seconds."""

    sampled_tokens: int = 0
    prompt_tokens: int = 0  # tokens of all requests before the sampled ones
    cached_tokens: int = 0  # of these, served from the prefix cache
    tool_calls: int = 0
    tool_seconds: float = 0.0  # summed over calls
    waiting_seconds: float = 0.0  # no request in the engine, tools running
    seconds: float = 0.0
    restarts: int = 0  # fresh engines
    late: int = 0  # rollouts that patience_s ended


class RolloutLoop:
    """Runs trajectories through a sampler and tools until all are finished.

    Args:
        sampler: started, holding the policy's weights.
        tools: by their names the policy calls them.
        tokenizer: the policy's.
        limits: budgets.
        restart: puts a fresh engine with the same weights into ``sampler``; None: an engine that breaks stops the run.
        syntax: how calls are written; None: the paper's tags.
    """

    def __init__(
        self,
        sampler: Sampler,
        tools: Sequence[Tool],
        tokenizer: PreTrainedTokenizerBase,
        limits: RolloutLimits,
        restart: Callable[[], None] | None = None,
        syntax: CallSyntax | None = None,
    ) -> None:
        self._restart_engine = restart
        self._sampler, self._limits = sampler, limits
        self._decode = Decoder(tokenizer, skip_special=True)
        self._tools = {tool.name: tool for tool in tools}
        if len(self._tools) < len(tools):
            raise ConfigurationError(f"tool names must differ, got {[tool.name for tool in tools]}")
        for tool in tools:
            if not math.isfinite(tool.timeout_s):
                raise ConfigurationError(f"tool {tool.name!r} must have a time limit, got timeout_s = {tool.timeout_s}")
        self._syntax = syntax or TagSyntax(tokenizer, list(self._tools))
        self._pool: ToolPool[Episode] = ToolPool(limits.tool_workers)
        self._closer = Closer()
        self._watchdog = Watchdog(limits.stall_timeout_s)
        self._opened = False  # every tool, once
        self.statistics = LoopStatistics()

    def run(
        self,
        prefixes: Sequence[Prefix],
        *,
        policy_version: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Trajectory]:
        """Finish every prefix.

        Args:
            prefixes: any number; those that the sampler has no slot for wait.
            policy_version: recorded in the trajectories.
            progress: called with (finished, total) some time after some finished, at most 10 times a second.

        Returns:
            Trajectories in the order of the prefixes.

        Raises:
            AppoError: the sampler failed, or a tool cannot work at all. No request or session stays open.
        """
        if prefixes and not self._opened:
            self._open_tools(prefixes[0].task)
        started = time.monotonic()
        episodes = [Episode(prefix, index) for index, prefix in enumerate(prefixes)]
        pool = self._pool
        waiting = SlotQueue(self._sampler.num_slots, self._sampler.cache_tokens)
        generating: dict[int, Episode] = {}
        ended: list[Episode] = []  # since the last ``settle``
        finished = restarts = 0
        settle_at = started + _SETTLE_S
        self._broken: EngineFailure | None = None
        patience = math.inf if self._limits.patience_s is None else self._limits.patience_s

        def advance(episode: Episode) -> None:
            self._advance(episode, pool, waiting)
            if episode.stop_reason is not None:
                waiting.finish(episode.index)
                ended.append(episode)

        def settle() -> None:
            """Once for all that ended in a while: each close wakes a thread, each report may draw a bar."""
            nonlocal finished, settle_at
            if ended:
                self._close(ended)
                finished += len(ended)
                ended.clear()
                if progress is not None:
                    progress(finished, len(episodes))
                settle_at = time.monotonic() + _SETTLE_S

        try:
            with self._watchdog.watching():
                for episode in episodes:
                    advance(episode)
                while generating or len(waiting) or len(pool):
                    if not generating:
                        self._watchdog.rest()
                    if generating or len(waiting):
                        if ended and time.monotonic() >= settle_at:
                            settle()
                        outcomes = pool.poll()
                    else:
                        settle()
                        outcomes, waited = self._wait_for_tools(pool, patience)
                        patience -= waited
                        if not outcomes:
                            self._leave_late(episodes)
                            break
                    for outcome in outcomes:
                        self._absorb_result(outcome)
                        advance(outcome.key)
                    while (index := waiting.pop(len(generating))) is not None:
                        generating[index] = episodes[index]
                        self._submit(episodes[index])
                    try:
                        completions = self._step() if generating else []
                    except EngineFailure as failure:
                        restarts += 1
                        self._restart(failure, restarts, generating)
                        self._watchdog.rest()
                        continue
                    for completion in completions:
                        episode = generating.pop(completion.id)
                        self._absorb_tokens(episode, completion)
                        advance(episode)
                settle()
            # While the last sessions are closed.
            trajectories = [self._trajectory(episode, policy_version) for episode in episodes]
        except BaseException:
            with suppress(Exception):  # an engine that broke may not even abort; what broke it is the error to tell
                self._sampler.abort(list(generating))
            raise
        finally:
            pool.abandon()
            self._close(episodes)
            self._closer.wait()
        self.statistics.seconds += time.monotonic() - started
        return trajectories

    # --- the engine --------------------------------------------------------------------------------------------------

    def _step(self) -> list[Completion]:
        if self._broken is not None:
            raise self._broken
        try:
            completions = self._watchdog.guard(self._sampler.step)
        except AppoError:
            raise
        except Exception as error:
            name = type(self._sampler).__name__
            raise EngineFailure(f"{name} failed to step: {type(error).__name__}: {error}") from error
        if completions:
            self._watchdog.rest()
        elif self._watchdog.due:
            self._watchdog.look(self._sampler.progress)
        return completions

    def _submit(self, episode: Episode) -> None:
        assert episode.request is not None
        try:
            self._sampler.submit(episode.request)
        except EngineFailure as failure:  # told at the next step, when every answer at hand is in its trajectory
            self._broken = failure

    def _restart(self, failure: EngineFailure, number: int, generating: dict[int, Episode]) -> None:
        """Ask a fresh engine what the broken one left unanswered: the seeds make the answers the same."""
        if self._restart_engine is None or number > self._limits.max_restarts:
            raise failure
        warnings.warn(
            f"{failure}; a fresh engine ({number} of at most {self._limits.max_restarts}) takes over "
            f"{len(generating)} requests",
            stacklevel=2,
        )
        self._broken = None
        self._restart_engine()
        self.statistics.restarts += 1
        for episode in generating.values():
            self._submit(episode)

    def take_statistics(self) -> LoopStatistics:
        """What happened since the last call."""
        taken, self.statistics = self.statistics, LoopStatistics()
        return taken

    # --- one episode ---------------------------------------------------------------------------------------------

    def _advance(self, episode: Episode, pool: ToolPool[Episode], waiting: SlotQueue) -> None:
        """Take the next step of an episode: call a tool, sample on, or finish."""
        while episode.stop_reason is None:
            if episode.unanswered or episode.answers:
                if self._start_next_call(episode, pool):
                    return
                self._append_results(episode)
                continue
            turn = self._syntax.read_turn(episode.turn_ids, episode.finish)
            if turn.over:
                episode.stop_reason = "eos"
            elif self._room(episode) < 1:
                episode.stop_reason = "length"
            elif not turn.calls:
                episode.request = self._request(episode, turn.stop)
                waiting.push(episode.index, turn=episode.turn, tokens=len(episode.request.token_ids))
                return
            elif self._no_calls_left(episode) and any(call.error == "limit" for call in episode.tool_calls):
                episode.stop_reason = "call_limit"
            else:
                episode.unanswered = list(turn.calls)

    def _room(self, episode: Episode) -> int:
        return self._limits.max_response_tokens - len(episode.response_ids)

    def _no_calls_left(self, episode: Episode) -> bool:
        return episode.num_calls >= self._limits.max_tool_calls

    def _request(self, episode: Episode, stop: tuple[str, ...]) -> SampleRequest:
        episode.turn += 1
        return SampleRequest(
            id=episode.index,
            token_ids=episode.prefix.task.prompt_ids + episode.response_ids,
            max_tokens=self._room(episode),
            seed=derive_seed(episode.prefix.seed, episode.turn),
            temperature=self._limits.temperature,
            top_p=self._limits.top_p,
            top_k=self._limits.top_k,
            min_p=self._limits.min_p,
            stop=stop,
        )

    def _absorb_tokens(self, episode: Episode, completion: Completion) -> None:
        self.statistics.prompt_tokens += len(episode.prefix.task.prompt_ids) + len(episode.response_ids)
        self.statistics.cached_tokens += completion.cached_tokens
        self.statistics.sampled_tokens += len(completion.token_ids)
        episode.response_ids += completion.token_ids
        episode.sampled += [True] * len(completion.token_ids)
        episode.logprobs += completion.logprobs
        episode.finish = completion.finish

    # --- tools -----------------------------------------------------------------------------------------------------

    def _start_next_call(self, episode: Episode, pool: ToolPool[Episode]) -> bool:
        """Answer the calls of the turn in their order up to one that needs its tool; False: all are answered."""
        while episode.unanswered:
            call = episode.unanswered.pop(0)
            if self._no_calls_left(episode):
                note = f"no tool calls left (limit {self._limits.max_tool_calls}); answer now"
                episode.answers.append(Answer(call.name, call.argument or "", note, "limit"))
            elif call.argument is None:
                episode.answers.append(Answer(call.name, "", f"malformed call: {call.problem}", "malformed"))
            else:
                self._start_call(episode, call, call.argument, pool)
                return True
        return False

    def _start_call(self, episode: Episode, call: ParsedCall, argument: str, pool: ToolPool[Episode]) -> None:
        session = episode.session(self._tools[call.name])
        episode.pending = call
        pool.submit(
            episode,
            lambda: self._answer(session, argument),
            interrupt=session.interrupt,
            timeout_s=session.timeout_s,
        )

    def _answer(self, session: EpisodeSession, argument: str) -> str:
        """Runs in a tool's thread, which encodes the answer too: the thread that generates has less to do."""
        answer = session.call(argument)
        if isinstance(answer, str):  # else the pool will complain
            self._syntax.prepare(answer.strip(), max_result_tokens=self._limits.max_result_tokens)
        return answer

    def _open_tools(self, task: Task) -> None:
        """Open a first session of each, which may start a server or read a file: no call should pay for that with its
        time, and a tool that cannot work stops the run before it begins.
        """
        self._opened = True
        for tool in self._tools.values():
            try:
                tool.open(task).close()
            except AppoError:
                raise
            except Exception:  # the call itself will meet it and tell the policy
                continue

    def _wait_for_tools(self, pool: ToolPool[Episode], patience: float) -> tuple[list[ToolOutcome[Episode]], float]:
        """What ended first, nothing if that took too long; and the seconds waited."""
        started = time.monotonic()
        outcomes = pool.poll(wait_s=patience)
        waited = time.monotonic() - started
        self.statistics.waiting_seconds += waited
        return outcomes, waited

    def _leave_late(self, episodes: Sequence[Episode]) -> None:
        for episode in episodes:
            if episode.stop_reason is None:
                episode.stop_reason = "late"
                self.statistics.late += 1

    def _absorb_result(self, outcome: ToolOutcome[Episode]) -> None:
        episode = outcome.key
        assert episode.pending is not None
        call, episode.pending = episode.pending, None
        text = outcome.text.strip()
        session = episode.session(self._tools[call.name])
        error: ToolError | None = None
        if outcome.failure is not None:
            kind = outcome.failure.kind
            error = kind if kind in ("timeout", "malformed") else "error"  # type: ignore[assignment]
            text = f"{error}: {text}" if error != "error" else text or "error"
            if error == "timeout":
                episode.give_up_session(call.name)
        elif not text:
            error, text = "empty", "no result"
        self.statistics.tool_calls += 1
        self.statistics.tool_seconds += outcome.seconds
        episode.answers.append(
            Answer(
                call.name,
                call.argument or "",
                text,
                error,
                outcome.seconds,
                digest="" if error == "timeout" else session.digest,  # a call given up may still be running
                state_matches=session.state_matches,
            )
        )

    def _append_results(self, episode: Episode) -> None:
        results = self._syntax.encode_results(
            [answer.text for answer in episode.answers],
            max_result_tokens=self._limits.max_result_tokens,
            room=self._room(episode),
        )
        episode.append_results(results)

    def _close(self, episodes: Sequence[Episode]) -> None:
        self._closer.submit(*(episode.close for episode in episodes if episode.has_sessions))

    def _trajectory(self, episode: Episode, policy_version: int) -> Trajectory:
        assert episode.stop_reason is not None
        return Trajectory(
            prompt_ids=episode.prefix.task.prompt_ids,
            response_ids=episode.response_ids,
            sampled=episode.sampled,
            behaviour_logprobs=episode.logprobs,
            tool_calls=episode.tool_calls,
            stop_reason=episode.stop_reason,
            policy_version=policy_version,
            response_text=self._decode(episode.response_ids),
        )
