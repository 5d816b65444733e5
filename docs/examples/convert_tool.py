"""A function as a tool: convert a length between units."""

from typing import Literal

METRES = {"m": 1.0, "km": 1000.0, "ft": 0.3048, "mi": 1609.344}
Unit = Literal["m", "km", "ft", "mi"]


def convert(length: float, unit: Unit, to: Unit = "m") -> float:
    """Converts a length from one unit to another.

    Args:
        length: the length.
        unit: its unit.
        to: the unit of the result.
    """
    return round(length * METRES[unit] / METRES[to], 6)


if __name__ == "__main__":
    from appo_lightning.errors import ToolFailure
    from appo_lightning.tools.function import FunctionTool
    from appo_lightning.types import Task

    tool = FunctionTool(convert)
    question = Task(id="trial", prompt_ids=[], references=())
    for argument in ('{"length": 26.2, "unit": "mi", "to": "km"}', '{"length": 3, "unit": "yd"}', "3 miles"):
        try:
            print(tool.run(argument, question))
        except ToolFailure as failure:
            print(failure)
