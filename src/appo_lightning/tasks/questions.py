"""Plain questions with answers: the public benchmarks."""

from __future__ import annotations

import re
from typing import Any, ClassVar

from appo_lightning.tasks.files import FileTasks, UnusableRow, references_of
from appo_lightning.types import TaskRow

TAG_INSTRUCTIONS = (
    "You are a helpful assistant that can solve the given question step by step with the help of the wikipedia search "
    "tool and python interpreter tool. Given a question, you need to first think about the reasoning process in the "
    "mind and then provide the answer. During thinking, you can invoke the wikipedia search tool to search and python "
    "interpreter tool to calculate the math problem for fact information about specific topics if needed. The "
    "reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags respectively, and "
    "the search query and result are enclosed within <search> </search> and <result> </result> tags respectively. For "
    "example, <think> This is the reasoning process. </think> <search> search query here </search> <result> search "
    "result here </result> <think> This is the reasoning process. </think> <python> python code here </python> "
    "<result> python interpreter result here </result> <think> This is the reasoning process. </think> <answer> The "
    "final answer is \\[ \\boxed{answer here} \\] </answer>. In the last part of the answer, the final exact answer is "
    "enclosed within \\boxed{} with latex format."
)
"""The system prompt of the published training sets, with its two ``\\boxed`` mended."""

_QUESTIONS = ("question", "problem", "Question")
_ANSWERS = ("golden_answers", "answer", "Answer")
_WORKED_ANSWER = re.compile(r"(?:^|\n)#### *(.+?)\s*$")
_THOUSANDS = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")


class QuestionTasks(FileTasks):
    """The rows of a file with a question and its answers.

    The question is in ``question``, ``problem`` or ``Question``; the answer in ``golden_answers``, ``answer`` or
    ``Answer``, a text or a list of accepted ones. Of a worked solution that ends with ``#### n``, n is the answer, and
    2,125 is accepted as 2125 too. Other columns are kept as ``metadata["extra_info"]``.

    Args:
        path: a ``.jsonl`` or ``.parquet`` file.
        limit: use at most so many rows, after shuffling; None uses all.
        shuffle_seed: order of the rows; None keeps the order of the file.
        system_prompt: the system message; None or "" for none.

    Raises:
        ConfigurationError: limit is not positive.
        DataError: the file is missing, of an unknown kind or unreadable, lacks a column, or has no usable row.
    """

    required_columns: ClassVar[tuple[tuple[str, ...], ...]] = (_QUESTIONS, _ANSWERS)

    def __init__(
        self,
        path: str,
        *,
        limit: int | None = None,
        shuffle_seed: int | None = None,
        system_prompt: str | None = TAG_INSTRUCTIONS,
    ) -> None:
        self.system_prompt = system_prompt
        super().__init__(path, limit=limit, shuffle_seed=shuffle_seed)

    def _task(self, record: dict[str, Any], row_id: str) -> TaskRow:
        question = next((record[name] for name in _QUESTIONS if record.get(name)), None)
        if not isinstance(question, str) or not question.strip():
            raise UnusableRow("no question")
        answer = next((record[name] for name in _ANSWERS if record.get(name) not in (None, "", [])), None)
        messages = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        messages.append({"role": "user", "content": question})
        extra = {name: value for name, value in record.items() if name not in (*_QUESTIONS, *_ANSWERS)}
        metadata: dict[str, Any] = {"data_source": self._path.stem} | ({"extra_info": extra} if extra else {})
        return TaskRow(row_id, messages, references_of(_final_answer(answer)), metadata)


def _final_answer(answer: Any) -> Any:
    """The answer at the end of a worked solution; anything else unchanged."""
    if not isinstance(answer, str) or not (worked := _WORKED_ANSWER.search(answer)):
        return answer
    final = worked[1]
    return [final, final.replace(",", "")] if _THOUSANDS.fullmatch(final) else final
