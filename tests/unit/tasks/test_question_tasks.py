"""QuestionTasks: every spelling that the public benchmarks use."""

import json

import pytest

from appo_lightning.errors import DataError
from appo_lightning.tasks.questions import TAG_INSTRUCTIONS, QuestionTasks

BENCHMARKS = ["2wiki", "aime24", "bamboogle", "gsm8k", "hotpotqa", "math500", "webwalker"]


def a_file(tmp_path, *records):
    path = tmp_path / "bench.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_is_read_whole(sample_data, name, caplog):
    path = sample_data / "benchmarks" / f"{name}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    tasks = QuestionTasks(str(path))
    assert len(tasks) == len(lines)
    assert not caplog.records
    first, record = tasks.row(0), json.loads(lines[0])
    assert first.id == f"{name}-0"
    assert first.metadata["data_source"] == name
    assert first.messages == [
        {"role": "system", "content": TAG_INSTRUCTIONS},
        {"role": "user", "content": record.get("question") or record["problem"]},
    ]
    assert all(all(task.references) for task in map(tasks.row, range(len(tasks))))


def test_gsm8k_answers_are_what_follows_the_marks(sample_data):
    path = sample_data / "benchmarks" / "gsm8k.jsonl"
    tasks = QuestionTasks(str(path))
    for index, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        final = json.loads(line)["answer"].split("####")[-1].strip()
        expected = (final, final.replace(",", "")) if "," in final else (final,)
        assert tasks.row(index).references == expected


def test_lists_of_aliases_are_kept_whole(sample_data):
    path = sample_data / "benchmarks" / "2wiki.jsonl"
    aliases = json.loads(path.read_text(encoding="utf-8").splitlines()[0])["answer"]
    assert QuestionTasks(str(path)).row(0).references == tuple(aliases)
    assert len(aliases) > 1


@pytest.mark.parametrize(
    ("record", "references"),
    [
        ({"question": "Q", "answer": "a"}, ("a",)),
        ({"problem": "Q", "answer": "055"}, ("055",)),
        ({"Question": "Q", "golden_answers": ["a", "b"]}, ("a", "b")),
        ({"question": "Q", "answer": 7}, ("7",)),
        ({"question": "Q", "answer": 0}, ("0",)),
        ({"question": "Q", "golden_answers": [], "answer": "a"}, ("a",)),
        ({"question": "Q", "answer": "steps\n#### -2,125"}, ("-2,125", "-2125")),
        ({"question": "Q", "answer": "#### 1,2"}, ("1,2",)),
        ({"question": "Q", "answer": "C#### is no mark"}, ("C#### is no mark",)),
        ({"question": "Q", "answer": "#### 3\n#### 4"}, ("4",)),
    ],
)
def test_spellings_of_question_and_answer(tmp_path, record, references):
    row = QuestionTasks(a_file(tmp_path, record)).row(0)
    assert row.messages[-1] == {"role": "user", "content": "Q"}
    assert row.references == references


def test_other_columns_are_kept(tmp_path):
    row = QuestionTasks(a_file(tmp_path, {"question": "Q", "answer": "a", "info": {"lang": "en"}})).row(0)
    assert row.metadata == {"data_source": "bench", "extra_info": {"info": {"lang": "en"}}}


@pytest.mark.parametrize("system_prompt", [None, ""])
def test_the_system_prompt_can_be_left_out(tmp_path, system_prompt):
    path = a_file(tmp_path, {"question": "Q", "answer": "a"})
    assert QuestionTasks(path, system_prompt=system_prompt).row(0).messages == [{"role": "user", "content": "Q"}]
    assert QuestionTasks(path, system_prompt="S").row(0).messages[0] == {"role": "system", "content": "S"}


def test_rows_without_question_or_answer_are_left_out(tmp_path, caplog):
    path = a_file(
        tmp_path, {"question": "", "answer": "a"}, {"question": "Q", "answer": None}, {"question": "Q", "answer": "a"}
    )
    assert [QuestionTasks(path).row(0).id] == ["bench-2"]
    assert "left out 2 of 3 rows that cannot be used (the first is row 0: no question)" in caplog.text


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        ({"query": "Q", "answer": "a"}, "'question' or 'problem' or 'Question'"),
        ({"question": "Q", "label": "a"}, "'golden_answers' or 'answer' or 'Answer'"),
    ],
)
def test_a_missing_column_lists_the_accepted_names(tmp_path, record, wanted):
    with pytest.raises(DataError, match=f"expected a column {wanted}, found"):
        QuestionTasks(a_file(tmp_path, record))


def test_the_default_instructions_name_every_tag():
    for tag in ("think", "search", "python", "result", "answer"):
        assert f"<{tag}>" in TAG_INSTRUCTIONS
    assert "\\boxed{answer here}" in TAG_INSTRUCTIONS
