"""What vLLM keeps of a request's tokens while it runs: no text, no ids or ranks of other tokens."""

from __future__ import annotations

from typing import Any

from appo_lightning.samplers._common import StopStrings


class StopDetector:
    """Takes the place of a request's detokenizer: vLLM's would decode every token of the request."""

    def __init__(self, stop: StopStrings) -> None:
        self._stop = stop
        self.token_ids: list[int] = []

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids

    def num_output_tokens(self) -> int:
        return len(self.token_ids)

    def update(self, new_token_ids: list[int], stop_terminated: bool) -> str | None:
        for token in new_token_ids:
            self.token_ids.append(token)
            if completed := self._stop.completed_by_last(self.token_ids):
                return completed
        return None

    def get_next_output_text(self, finished: bool, delta: bool) -> str:
        return ""


class SampledLogprobs:
    """Takes the place of a request's log-prob processor: one number per sampled token.

    vLLM's adds them up, and keeps ids, ranks and texts beside them: five lists that grow with each token.
    """

    prompt_logprobs = prompt_token_id_logprobs = cumulative_logprob = None

    def __init__(self) -> None:
        self.logprobs: list[float] = []

    def update_from_output(self, output: Any) -> None:
        if output.new_logprobs is not None:
            self.logprobs += output.new_logprobs.logprobs[:, 0].tolist()  # the sampled token comes first
