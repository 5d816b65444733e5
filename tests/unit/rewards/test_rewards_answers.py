import pytest
from hypothesis import given
from hypothesis import strategies as st

from appo_lightning.rewards import answer_f1, normalise_answer


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Eiffel\tTower!", "eiffel tower"),
        ("a U.S. state", "us state"),
        ("\\frac{1}{2}", "frac12"),
        ("theatre", "theatre"),
        ("A", "a"),
        ("+", "+"),
        ("", ""),
    ],
)
def test_normalisation(text, normal):
    assert normalise_answer(text) == normal


def test_f1_counts_shared_words():
    # "city of paris" and "paris": precision 1/3, recall 1 -> 2/3 / (4/3)
    assert answer_f1("the city of Paris", ("Paris",)) == pytest.approx(0.5)
    # Words count as often as they stand: 1 of 2 and 1 of 1.
    assert answer_f1("Paris Paris", ("Paris",)) == pytest.approx(2 / 3)


def test_the_best_accepted_answer_counts():
    # "city of paris" and "city of light": 2 of 3 each.
    assert answer_f1("the city of Paris", ("Paris", "City of Light")) == pytest.approx(2 / 3)


def test_yes_and_no_are_never_half_right():
    assert answer_f1("no", ("no thanks",)) == 0.0
    assert answer_f1("yes of course", ("yes",)) == 0.0
    assert answer_f1("Yes.", ("yes",)) == 1.0


def test_the_letter_of_a_multiple_choice_is_an_answer():
    assert answer_f1("A", ("A",)) == 1.0
    assert answer_f1("B", ("A",)) == 0.0


def test_an_empty_prediction_earns_nothing():
    assert answer_f1("", ("Paris",)) == 0.0
    assert answer_f1("", ("",)) == 0.0


@given(prediction=st.text(max_size=60), references=st.lists(st.text(max_size=60), min_size=1, max_size=3))
def test_any_text_has_an_f1_between_0_and_1(prediction, references):
    value = answer_f1(prediction, references)
    assert 0.0 <= value <= 1.0
    assert value == answer_f1(prediction, references[::-1])


@given(text=st.text(max_size=60))
def test_an_answer_equals_itself(text):
    assert answer_f1(text, (text,)) == float(bool(normalise_answer(text)))


def test_wrong_references_are_refused():
    with pytest.raises(ValueError, match="references must hold at least one accepted answer, got none"):
        answer_f1("Paris", ())
    with pytest.raises(TypeError, match="references must be a sequence of answers, got the string 'Paris'"):
        answer_f1("Paris", "Paris")
