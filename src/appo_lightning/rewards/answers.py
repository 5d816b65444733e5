"""How much of an accepted answer a prediction holds, word by word."""

from __future__ import annotations

import functools
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

CLOSED_ANSWERS = frozenset({"yes", "no", "noanswer"})  # right or wrong, never half right

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@functools.lru_cache  # rollouts of one question say the same, and are compared with the same
def normalise_answer(text: str) -> str:
    """Lower the case, drop ASCII punctuation and English articles, and join the words by single spaces.

    A step that would leave nothing is skipped: the "A" of a multiple choice is an answer, not an article.
    Source: SQuAD evaluation script; the exception is ours.
    """
    text = _unless_empty(lambda words: words.translate(_PUNCTUATION), text.lower())
    text = _unless_empty(lambda words: _ARTICLES.sub(" ", words), text)
    return " ".join(text.split())


def answer_f1(prediction: str, references: Sequence[str]) -> float:
    """Compare the words of a prediction with each accepted answer and keep the best F1.

    F1 = 2 · precision · recall / (precision + recall) over the multiset of normalised words
    Source: SQuAD and HotpotQA evaluation scripts: "yes", "no" and "noanswer" must match entirely.

    Args:
        prediction: any text.
        references: every accepted answer.

    Returns:
        A value in [0, 1]; 0 for an empty prediction.

    Raises:
        ValueError: there is no accepted answer.
        TypeError: references is one string; its characters are not answers.
    """
    if isinstance(references, str):
        raise TypeError(
            f"references must be a sequence of answers, got the string {references!r}: pass ({references!r},)"
        )
    if not references:
        raise ValueError("references must hold at least one accepted answer, got none: give the task its answer")
    words = normalise_answer(prediction)
    return max(_f1(words, normalise_answer(reference)) for reference in references)


def _f1(prediction: str, reference: str) -> float:
    if prediction == reference:
        return 1.0 if prediction else 0.0
    if not CLOSED_ANSWERS.isdisjoint((prediction, reference)):
        return 0.0
    predicted_words, reference_words = prediction.split(), reference.split()
    shared = (Counter(predicted_words) & Counter(reference_words)).total()
    if shared == 0:
        return 0.0
    precision, recall = shared / len(predicted_words), shared / len(reference_words)
    return 2 * precision * recall / (precision + recall)


def _unless_empty(step: Callable[[str], str], text: str) -> str:
    shorter = step(text)
    return shorter if shorter.strip() else text
