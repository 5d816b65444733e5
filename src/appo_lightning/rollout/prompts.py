"""Chat messages to prompt ids, by the model's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from appo_lightning.errors import ConfigurationError, DataError
from appo_lightning.tokens import encode_text
from appo_lightning.types import Task, TaskRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def build_task(
    row: TaskRow,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int,
    tools: Sequence[dict[str, Any]] | None = None,
) -> Task:
    """Tokenise one question.

    Args:
        row: the question.
        tokenizer: must have a chat template.
        max_prompt_tokens: longest prompt.
        tools: schemas that the template shows; None: the row's messages say themselves which tools there are.

    Raises:
        ConfigurationError: the tokenizer has no chat template.
        DataError: the prompt is longer than the budget.
    """
    if tokenizer.chat_template is None:
        raise ConfigurationError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; use an instruction-tuned model, or set "
            "tokenizer.chat_template and save the tokenizer again"
        )
    text: Any = tokenizer.apply_chat_template(
        row.messages, tools=None if tools is None else list(tools), add_generation_prompt=True, tokenize=False
    )
    prompt_ids = encode_text(tokenizer, text)
    if len(prompt_ids) > max_prompt_tokens:
        raise DataError(
            f"task {row.id}: the prompt has {len(prompt_ids)} tokens, the budget is {max_prompt_tokens}; "
            "raise data.rollout.max_prompt_tokens or drop long rows"
        )
    question = next((m["content"] for m in reversed(row.messages) if m["role"] == "user"), "")
    return Task(row.id, prompt_ids, row.references, question=question, metadata=row.metadata)
