"""ChatTasks: the published format, its quirks, and files that are broken."""

import json
import logging
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from appo_lightning.errors import ConfigurationError, DataError
from appo_lightning.tasks.chat import ChatTasks
from appo_lightning.tasks.questions import TAG_INSTRUCTIONS


def a_record(question="Who?", answer="Ida", system="Be brief."):
    return {
        "data_source": "made_up",
        "prompt": [{"role": "system", "content": system}, {"role": "user", "content": question}],
        "ability": "qa",
        "reward_model": {"ground_truth": answer, "style": "rule"},
        "extra_info": {"index": 0},
    }


def a_jsonl_file(tmp_path, *records, name="rows.jsonl"):
    path = tmp_path / name
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def notices(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "appo_lightning"]


@pytest.mark.parametrize("name", ["train_10k", "hard_search_1k", "valid"])
def test_the_published_files_are_read_whole(sample_data, name, caplog):
    path = sample_data / "rl" / f"{name}.parquet"
    rows = pq.read_table(path).to_pylist()
    tasks = ChatTasks(str(path))
    answered = [number for number, row in enumerate(rows) if row["reward_model"]["ground_truth"].strip()]
    assert len(tasks) == len(answered) >= len(rows) - 1
    for index in (0, len(tasks) - 1):
        task, row = tasks.row(index), rows[answered[index]]
        assert task.id == f"{name}-{answered[index]}"
        assert [message["role"] for message in task.messages] == ["system", "user"]
        assert task.messages[1] == {"role": "user", "content": row["prompt"][1]["content"]}
        assert task.references == (row["reward_model"]["ground_truth"].strip(),)
        assert task.metadata["extra_info"] == row["extra_info"]
        assert ("ability" in task.metadata) == (row["ability"] is not None)


@pytest.mark.parametrize("name", ["train_10k", "hard_search_1k", "valid"])
def test_the_eaten_backslash_is_put_back_with_one_notice(sample_data, name, caplog):
    with caplog.at_level(logging.WARNING, "appo_lightning"):
        tasks = ChatTasks(str(sample_data / "rl" / f"{name}.parquet"))
        tasks.row(0), tasks.row(1)
    system = tasks.row(0).messages[0]["content"]
    assert system.count("\\boxed{") == 2
    assert "\x08" not in system
    repairs = [notice for notice in notices(caplog) if "boxed" in notice]
    assert len(repairs) == 1
    assert repairs[0].startswith(f"{name}.parquet: ")
    assert repairs[0].endswith(f"messages of {len(tasks)} rows")


def test_the_published_row_with_a_blank_answer_is_left_out_with_one_notice(sample_data, caplog):
    path = sample_data / "rl" / "train_10k.parquet"
    with caplog.at_level(logging.WARNING, "appo_lightning"):
        tasks = ChatTasks(str(path))
    rows = pq.read_metadata(path).num_rows
    left_out = [notice for notice in notices(caplog) if "left out" in notice]
    assert len(left_out) == 1
    assert f"left out 1 of {rows} rows" in left_out[0]
    assert "no answer (' ')" in left_out[0]
    assert len({tasks.row(index).id for index in range(len(tasks))}) == rows - 1


def test_a_clean_file_gives_no_notice(tmp_path, caplog):
    tasks = ChatTasks(a_jsonl_file(tmp_path, a_record(system="in \\boxed{} and \x08 alone")))
    assert tasks.row(0).messages[0]["content"] == "in \\boxed{} and \x08 alone"
    assert not notices(caplog)


def test_jsonl_and_parquet_give_the_same_tasks(tmp_path):
    records = [a_record("Wer?", "Ida Voß"), a_record("Où?", "Lund 温度")]
    lines = a_jsonl_file(tmp_path, records[0], "", records[1])
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "rows.parquet")
    from_lines, from_table = ChatTasks(lines), ChatTasks(str(tmp_path / "rows.parquet"))
    assert [from_lines.row(i) for i in range(2)] == [from_table.row(i) for i in range(2)]
    assert from_lines.row(1).id == "rows-1"


def test_a_list_of_answers_gives_every_reference_once(tmp_path):
    path = a_jsonl_file(tmp_path, a_record(answer=["NYC", "New York", "NYC", ""]), a_record(answer=4))
    tasks = ChatTasks(path)
    assert tasks.row(0).references == ("NYC", "New York")
    assert tasks.row(1).references == ("4",)


def test_the_system_prompt_can_be_replaced_added_or_removed(tmp_path):
    without_system = a_record() | {"prompt": [{"role": "user", "content": "Who?"}]}
    path = a_jsonl_file(tmp_path, a_record(), without_system)
    question = {"role": "user", "content": "Who?"}
    replaced = ChatTasks(path, system_prompt="New.")
    for index in range(2):
        assert replaced.row(index).messages == [{"role": "system", "content": "New."}, question]
    assert ChatTasks(path, system_prompt="").row(0).messages == [question]
    assert ChatTasks(path).row(0).messages[0]["content"] == "Be brief."


def test_no_repair_is_reported_for_a_system_prompt_that_is_replaced(sample_data, caplog):
    ChatTasks(str(sample_data / "rl" / "valid.parquet"), system_prompt=TAG_INSTRUCTIONS)
    assert not notices(caplog)


def test_shuffling_is_stable_and_ids_belong_to_file_rows(tmp_path):
    path = a_jsonl_file(tmp_path, *(a_record(answer=str(number)) for number in range(20)))
    first, again, other = (ChatTasks(path, shuffle_seed=seed) for seed in (1, 1, 2))
    ids = [first.row(i).id for i in range(20)]
    assert ids == [again.row(i).id for i in range(20)]
    assert ids != [other.row(i).id for i in range(20)]
    assert sorted(ids) == sorted(f"rows-{number}" for number in range(20))
    for index in range(20):
        assert first.row(index).id == f"rows-{first.row(index).references[0]}"


def test_the_limit_takes_the_first_rows_of_the_order(tmp_path):
    path = a_jsonl_file(tmp_path, *(a_record(answer=str(number)) for number in range(20)))
    limited, whole = ChatTasks(path, limit=5, shuffle_seed=1), ChatTasks(path, shuffle_seed=1)
    assert [limited.row(i) for i in range(len(limited))] == [whole.row(i) for i in range(5)]
    assert len(ChatTasks(path, limit=100)) == 20


@pytest.mark.parametrize("index", [-1, 1])
def test_a_row_outside_the_source_is_an_error(tmp_path, index):
    with pytest.raises(IndexError, match=f"row {index} of 1"):
        ChatTasks(a_jsonl_file(tmp_path, a_record())).row(index)


def test_a_source_travels_to_worker_processes(sample_data, tmp_path):
    for path in (str(sample_data / "rl" / "valid.parquet"), a_jsonl_file(tmp_path, a_record())):
        tasks = ChatTasks(path)
        assert pickle.loads(pickle.dumps(tasks)).row(0) == tasks.row(0)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (a_record() | {"prompt": None}, "no prompt"),
        (a_record() | {"prompt": []}, "no prompt"),
        (a_record() | {"prompt": "Who?"}, "no list of chat messages"),
        (a_record() | {"prompt": [{"role": "king", "content": "Who?"}]}, "no list of chat messages"),
        (a_record() | {"prompt": [{"role": "user", "content": None}]}, "a user message without text"),
        (a_record() | {"prompt": [{"role": "system", "content": "Be brief."}]}, "no question in the prompt"),
        (a_record(question=" "), "no question in the prompt"),
        (a_record() | {"reward_model": None}, "no reward_model"),
        (a_record() | {"reward_model": {}}, "no answer (None)"),
        (a_record(answer=" "), "no answer (' ')"),
        (a_record(answer=[]), "no answer ([])"),
        ("{not json", "not JSON"),
        ("[1]", "a JSON list instead of an object"),
    ],
)
def test_unusable_rows_are_left_out_with_one_notice(tmp_path, caplog, broken, reason):
    path = a_jsonl_file(tmp_path, a_record(answer="first"), broken, a_record(answer="last"), broken)
    tasks = ChatTasks(path)
    assert [tasks.row(index).references for index in range(len(tasks))] == [("first",), ("last",)]
    assert tasks.row(1).id == "rows-2"
    (notice,) = notices(caplog)
    assert notice.startswith("rows.jsonl: left out 2 of 4 rows that cannot be used (the first is row 1: ")
    assert reason in notice


def test_a_file_without_a_usable_row_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"found 2 rows and none usable \(row 0: no answer \(''\)\); correct the file"):
        ChatTasks(a_jsonl_file(tmp_path, a_record(answer=""), a_record(answer="")))


@pytest.mark.parametrize("column", ["prompt", "reward_model"])
def test_a_missing_column_is_named(tmp_path, column):
    record = {name: value for name, value in a_record().items() if name != column}
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "rows.parquet")
    for path in (a_jsonl_file(tmp_path, record), str(tmp_path / "rows.parquet")):
        with pytest.raises(DataError, match=rf"expected a column '{column}', found \['ability', .*; rename"):
            ChatTasks(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nowhere.jsonl", None, "expected questions at .*nowhere.jsonl, found no file; correct the path"),
        ("rows.csv", b"a,b", r"expected a file that ends in \.parquet or \.jsonl, got '.*rows.csv'"),
        ("rows.jsonl", b"\n \n", "expected at least one row, found none"),
        ("rows.jsonl", b"\xff\xfe{", "none usable|expected a column"),
        ("rows.parquet", b"not parquet", "expected a parquet file, found one that cannot be read"),
        ("rows.parquet", b"", "expected a parquet file, found one that cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_clear_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        ChatTasks(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_limit_below_one_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="limit must be at least 1 or null for all rows, got 0"):
        ChatTasks(a_jsonl_file(tmp_path, a_record()), limit=0)
