"""A tool of your own: count the days between two dates."""

from __future__ import annotations

from datetime import date

from appo_lightning.errors import ToolFailure
from appo_lightning.tools.base import StatelessTool
from appo_lightning.types import Task


class DaysTool(StatelessTool):
    """Counts the days between two dates: ``<days>2024-02-01 2024-03-01</days>``.

    Args:
        inclusive: count both ends.
    """

    name = "days"
    description = "Counts the days between two dates, written as 2024-02-01 2024-03-01."
    timeout_s = 1.0

    def __init__(self, inclusive: bool = False) -> None:
        self.inclusive = inclusive

    def run(self, argument: str, task: Task) -> str:
        try:
            first, last = (date.fromisoformat(word) for word in argument.split())
        except ValueError:
            # Shown to the policy, which may try again; any other exception would be, too, but says less.
            raise ToolFailure(f"expected two dates as in 2024-02-01 2024-03-01, got {argument!r}") from None
        return str(abs((last - first).days) + self.inclusive)


if __name__ == "__main__":
    question = Task(id="trial", prompt_ids=[], references=("29",))
    tool = DaysTool()
    print(tool.run("2024-02-01 2024-03-01", question))
    try:
        tool.run("next Monday", question)
    except ToolFailure as failure:
        print(failure)
