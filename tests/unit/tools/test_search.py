"""SearchTool: what it finds, in which order, and what it says when it cannot."""

import copy
import json
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from appo_lightning.errors import ConfigurationError, DataError
from appo_lightning.tools.corpus import Corpus, normalise_query, split_pages, words_of
from appo_lightning.tools.search import SearchTool
from appo_lightning.types import Task

CASTLE = [
    "The castle of Arden is in the north.",
    "The mayor of Arden is called Ida Voss.",
    "Ida Voss was born in the year 1903 in Lund.",
    "The castle of Brill is in the south.",
    "The lighthouse of Lund is red.",
]


def a_task(documents=None, task_id="task-0"):
    return Task(task_id, [1], ("x",), {} if documents is None else {"documents": documents})


def search(tool, query, task=None):
    session = tool.open(task or a_task())
    try:
        return session.call(query)
    finally:
        session.close()


def a_corpus_file(tmp_path, *records):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def test_the_document_with_the_most_matching_rare_words_comes_first():
    # "of" is in four documents, "castle" in two, "brill" in one.
    assert search(SearchTool(top_k=1), "castle of Brill", a_task(CASTLE)) == CASTLE[3]
    assert search(SearchTool(top_k=1), "When was Ida Voss born?", a_task(CASTLE)) == CASTLE[2]


def test_several_results_are_numbered_pages():
    result = search(SearchTool(top_k=2), "Ida Voss born", a_task(CASTLE))
    assert result == f"Page 1: {CASTLE[2]}\nPage 2: {CASTLE[1]}"


def test_a_document_that_shares_no_word_is_never_shown():
    assert search(SearchTool(top_k=5), "lighthouse", a_task(CASTLE)) == f"Page 1: {CASTLE[4]}"
    assert search(SearchTool(), "zebra", a_task(CASTLE)) == ""


@pytest.mark.parametrize("query", ["", "  \n", "?!…", "\x00", "\ud800"])
def test_a_query_without_words_finds_nothing(query):
    assert search(SearchTool(), query, a_task(CASTLE)) == ""


def test_equal_scores_keep_document_order():
    twins = ["red lamp", "green door", "red lamp", "red lamp"]
    assert Corpus(twins, k1=1.5, b=0.75).rank("red", top_k=3) == [0, 2, 3]


def test_a_word_in_every_document_still_finds_them():
    # The classic idf is negative here and would rank a match below a miss.
    assert Corpus(["red lamp", "red door"], k1=1.5, b=0.75).rank("red lamp", top_k=2) == [0, 1]


def test_repeating_a_word_does_not_change_the_ranking():
    corpus = Corpus(CASTLE, k1=1.5, b=0.75)
    assert corpus.rank("castle castle castle Brill", 5) == corpus.rank("castle Brill", 5)


@pytest.mark.parametrize("documents", [[], [""], ["…", ""], ["", "red lamp"]])
def test_empty_documents_are_searched_without_error(documents):
    assert search(SearchTool(top_k=1), "lamp", a_task(documents)) == ("red lamp" if "red lamp" in documents else "")


def test_each_episode_sees_its_own_documents_only():
    tool = SearchTool(top_k=1)
    first, second = a_task(["The key is red."], "a"), a_task(["The key is green."], "b")
    assert [search(tool, "key", task) for task in (first, second, first)] == [
        "The key is red.",
        "The key is green.",
        "The key is red.",
    ]


def test_an_episode_with_the_same_id_and_other_documents_is_not_mixed_up():
    tool = SearchTool(top_k=1)
    assert search(tool, "key", a_task(["The key is red."])) == "The key is red."
    assert search(tool, "key", a_task(["The key is green."])) == "The key is green."


def test_the_memory_for_episodes_is_bounded(monkeypatch):
    monkeypatch.setattr("appo_lightning.tools.search._REMEMBERED_TASKS", 3)
    tool = SearchTool(top_k=1)
    for number in range(10):
        assert search(tool, "key", a_task([f"The key is {number}."], f"t{number}")) == f"The key is {number}."
    assert list(tool._episodes) == ["t7", "t8", "t9"]


def test_many_threads_share_one_tool():
    tool = SearchTool(top_k=1)
    wrong = []

    def ask(number):
        for turn in range(20):
            label = (number * 7 + turn) % 13
            if search(tool, "key", a_task([f"The key is {label}."], f"t{label}")) != f"The key is {label}.":
                wrong.append(label)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_jsonl_corpus_shows_titles(tmp_path):
    path = a_corpus_file(tmp_path, {"text": "A red lamp."}, {"title": "Lund", "text": "A city in Sweden."})
    assert search(SearchTool(path), "lund city") == "Page 1: Lund: A city in Sweden."


def test_the_fields_of_a_jsonl_corpus_can_be_named(tmp_path):
    path = a_corpus_file(tmp_path, {"contents": "A red lamp.", "name": "Lamp"})
    tool = SearchTool(path, top_k=1, text_field="contents", title_field="name")
    assert search(tool, "red") == "Lamp: A red lamp."


def test_the_documents_of_an_episode_take_the_place_of_the_corpus(tmp_path):
    tool = SearchTool(a_corpus_file(tmp_path, {"text": "A red lamp."}), top_k=1)
    assert search(tool, "red", a_task(["A red door."])) == "A red door."
    assert search(tool, "lamp", a_task(["A red door."])) == ""


def test_long_documents_are_cut_between_words():
    assert search(SearchTool(top_k=1, max_chars=12), "red", a_task(["A red lamp in the hall."])) == "A red lamp …"


def test_a_recorded_query_gets_its_recorded_answer(sample_data):
    path = sample_data / "search" / "search_cache.json"
    cache = json.loads(path.read_text(encoding="utf-8"))
    tool = SearchTool(str(path), top_k=1)
    query = "Amy Smart film debut Campfire Tales"
    assert search(tool, query) == cache[query]
    assert search(tool, f"  search query: {query.upper()}? \n") == cache[query]
    prefixed = next(key for key in cache if key.startswith("search query: What nationality"))
    assert search(tool, prefixed.removeprefix("search query: ")) == cache[prefixed]


def test_a_recorded_search_without_results_is_empty(sample_data):
    path = sample_data / "search" / "search_cache.json"
    cache = json.loads(path.read_text(encoding="utf-8"))
    query = next(key for key, answer in cache.items() if answer.startswith("No search results"))
    assert search(SearchTool(str(path)), query) == ""


def test_an_unrecorded_query_is_ranked_over_all_snippets(sample_data):
    path = sample_data / "search" / "search_cache.json"
    result = search(SearchTool(str(path), top_k=3), "campfire tales 1997 anthology horror")
    assert result.startswith("Page 1: ")
    assert "Campfire Tales" in split_pages(result)[0]
    assert len(split_pages(result)) <= 3


def test_recorded_queries_are_counted(tmp_path):
    path = tmp_path / "search_cache.json"
    path.write_text(json.dumps({"red lamp": "Page 1: a lamp", "nothing": "No search results"}))
    tool = SearchTool(str(path))
    assert tool.take_counts() == {}
    search(tool, "lamp")
    assert tool.take_counts() == {"lookups": 1, "hits": 0}
    for query in ("red lamp", "Red  LAMP?", "nothing", "blue lamp"):
        search(tool, query)
    search(tool, "castle", a_task(CASTLE))  # looks nothing up
    assert copy.deepcopy(tool).take_counts() == {}
    assert tool.take_counts() == {"lookups": 4, "hits": 3}
    assert tool.take_counts() == {}


@pytest.fixture
def restless_threads():
    """Threads that take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("restless_threads")
def test_no_query_of_parallel_rollouts_goes_uncounted(tmp_path):
    path = tmp_path / "search_cache.json"
    path.write_text(json.dumps({"red lamp": "Page 1: a lamp"}))
    tool = SearchTool(str(path))
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: search(tool, "red lamp"), range(8000)))
    assert tool.take_counts() == {"lookups": 8000, "hits": 8000}


def test_a_corpus_of_documents_has_no_hits_to_count(tmp_path):
    tool = SearchTool(a_corpus_file(tmp_path, {"text": "red lamp"}))
    search(tool, "lamp")
    assert tool.take_counts() == {}


def test_bm25s_prints_nothing(sample_data, capfd):
    search(SearchTool(str(sample_data / "search" / "search_cache.json")), "lighthouse")
    search(SearchTool(), "castle", a_task(CASTLE))
    assert capfd.readouterr() == ("", "")


def test_a_copied_tool_still_searches():
    tool = SearchTool(top_k=1)
    search(tool, "castle", a_task(CASTLE))
    for twin in (copy.deepcopy(tool), pickle.loads(pickle.dumps(tool))):
        assert search(twin, "Brill", a_task(CASTLE)) == CASTLE[3]


def test_a_missing_corpus_is_reported_when_the_tool_is_made(tmp_path):
    with pytest.raises(DataError, match=r"expected a corpus at .*nowhere.jsonl, found no file; correct the path"):
        SearchTool(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(DataError, match=r"must end in \.jsonl .* got '.*corpus.txt'"):
        SearchTool(str(tmp_path / "corpus.txt"))


def test_a_tool_with_nothing_to_search_says_so_when_opened():
    with pytest.raises(DataError, match=r"expected a corpus or .* found neither; set the tool's corpus"):
        SearchTool().open(a_task())


@pytest.mark.parametrize("documents", ["one text", [1, 2], {"a": "b"}])
def test_documents_that_are_no_list_of_texts_are_refused(documents):
    with pytest.raises(DataError, match="must be a list of texts"):
        SearchTool().open(a_task(documents))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("corpus.jsonl", '{"text": "a"}\n{"contents": "b"}\n', r"line 2: expected the document under 'text'"),
        ("corpus.jsonl", '{"text": "a"}\nnot json\n', "line 2: expected a JSON object, found text that is not JSON"),
        ("corpus.jsonl", "\n\n", "found none; give a corpus that is not empty"),
        ("cache.json", "[1, 2]", "expected a JSON object, found a list"),
        ("cache.json", '{"query": 3}', "expected texts by query, found int"),
        ("cache.json", "{}", "found none; give a search cache that is not empty"),
    ],
)
def test_a_broken_corpus_is_one_clear_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        SearchTool(str(path)).open(a_task())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{"top_k": 0}, {"max_chars": 0}, {"k1": -1.0}, {"b": 1.5}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigurationError, match=f"{next(iter(options))}.*got"):
        SearchTool(**options)


def test_words_ignore_case_accents_and_punctuation():
    assert words_of("Özerov's  FILM—(1921)") == ["ozerov", "s", "film", "1921"]


def test_recorded_queries_are_compared_without_case_spacing_and_prefix():
    assert normalise_query(' Search query:  Who  WROTE "Emma"? ') == 'who wrote "emma'


def test_an_index_leaves_jax_alone() -> None:
    """Where it is installed bm25s would have it compute something, and JAX would take most of the GPU."""
    script = (
        "import sys, types\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        assert not name.startswith('jax'), name\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from appo_lightning.tools.corpus import Corpus\n"
        "print(len(Corpus(['one word', 'two sheep'], k1=1.5, b=0.75).rank('sheep', 1)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr
