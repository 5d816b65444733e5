"""The words of the world: names that stand for nothing, so that nothing about them can be known beforehand."""

from __future__ import annotations

PEOPLE = tuple(
    head + tail
    for head in ("Ba", "De", "Ki", "Lo", "Mi", "Na", "Ru", "To")
    for tail in ("ko", "la", "mu", "na", "ra", "so", "vi", "zu")
)
CITIES = tuple(
    head + tail
    for head in ("Al", "Bren", "Cor", "Dun", "Fal", "Gar", "Hel", "Kes")
    for tail in ("burg", "dale", "mond", "ton")
)
PERSON_ATTRIBUTES = ("age", "height", "weight")
CITY_ATTRIBUTES = ("population", "area")
VALUES = range(10, 100)  # two digits: sums and differences stay within 0..198
LARGEST_NUMBER = 2 * (VALUES.stop - 1)

FILLERS = ("well", "so", "now", "hmm", "okay", "right", "then", "indeed")
PLANS = ("search", "compute", "answer")

TAGS = tuple(f"<{slash}{name}>" for name in ("think", "search", "python", "result", "answer") for slash in ("", "/"))

# Of JSON function calls, and of the chat template that shows the tools with their descriptions.
FUNCTION_TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_DESCRIPTIONS = "Finds documents that a query Runs Python code returns what it prints variables are kept calls"
FUNCTION_PIECES = (
    *('{"', "name", '":', ' "', "search", '",', "arguments", ' {"', "query", '"}}\n'),
    *("python", "code", ')"}}\n', '))"}}\n', "\n"),
    *(f" {word}" for word in _DESCRIPTIONS.split()),
)


def tokens_in_use() -> list[str]:
    """Every piece of world text that must be a single token, in a fixed order."""
    numbers = [str(number) for number in range(LARGEST_NUMBER + 1)]
    inside_sentences = (
        *PEOPLE,
        *CITIES,
        *PERSON_ATTRIBUTES,
        *CITY_ATTRIBUTES,
        *FILLERS,
        *PLANS,
        *("city", "the", "of", "is", "sum", "difference", "between", "and", "+", "-"),
    )
    sentence_starts = ("What", "The", "city", *PERSON_ATTRIBUTES, *CITY_ATTRIBUTES)
    code = ("print", "(abs", "))", "\\boxed", "system", "user", "assistant")
    return [*numbers, *(f" {word}" for word in inside_sentences), *sentence_starts, *code]
