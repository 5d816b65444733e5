"""WebSearchTool against a real HTTP server with faults, and a cache that real processes share."""

import copy
import json
import logging
import multiprocessing
import threading
import time
import traceback
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from appo_lightning.cli import main
from appo_lightning.errors import ConfigurationError, DataError, ToolBroken, ToolFailure
from appo_lightning.tools import web
from appo_lightning.tools._store import AnswerStore
from appo_lightning.tools.web import SearchProvider, WebSearchTool, _retry_after
from appo_lightning.types import Task
from helpers.search_service import serving

TASK = Task("task-0", [1], ("x",))
KEY = "sk-test-4711"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("TEST_SEARCH_KEY", KEY)
    monkeypatch.setattr(web, "_FIRST_DELAY_S", 0.02)


@pytest.fixture
def service():
    with serving() as running:
        yield running


def provider_of(service, **options):
    asked = {"params": {"q": "{query}", "n": "{count}"}, "headers": {"X-Key": "{key}"}, "key": "TEST_SEARCH_KEY"}
    return SearchProvider(service.url, results="web.results", text="snippet", **{**asked, **options})


@pytest.fixture
def make(service, tmp_path, request):
    def make_tool(provider=None, **options):
        options = {"cache": str(tmp_path / "cache.sqlite"), "top_k": 2, "timeout_s": 5.0} | options
        tool = WebSearchTool(provider or provider_of(service), **options)
        request.addfinalizer(tool.close)
        return tool

    return make_tool


def ask(tool, query):
    return tool.open(TASK).call(query)


def test_a_query_is_sent_and_its_results_are_pages_without_markup(make, service):
    assert ask(make(), "who wrote  Emma?") == (
        "Page 1: who wrote Emma? & more: answer 1.0\nPage 2: who wrote Emma? & more: answer 1.1"
    )
    assert service.requests == [{"query": "who wrote Emma?", "count": "2", "key": KEY}]


def test_a_json_body_keeps_numbers_and_quotes(make, service):
    provider = provider_of(service, method="POST", params={}, body={"q": "{query}", "n": "{count}"})
    ask(make(provider), 'say "hi" {key}')
    assert service.requests == [{"query": 'say "hi" {key}', "count": 2, "key": KEY}]


def test_an_answer_is_remembered_by_this_run_and_the_next(make, service):
    first = make()
    answer = ask(first, "Emma")
    assert ask(first, " emma ") == answer
    first.close()
    assert ask(make(), "Emma") == answer
    assert len(service.requests) == 1
    assert first.take_counts() == {"lookups": 2, "hits": 1, "retries": 0}
    assert first.take_counts() == {}


def test_equal_queries_at_the_same_time_are_sent_once(make, service):
    tool, answers = make(), []
    service.faults = [0.2]
    threads = [threading.Thread(target=lambda: answers.append(ask(tool, "Emma"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 8
    assert len(set(answers)) == 1
    assert len(service.requests) == 1


@pytest.mark.parametrize(
    "fault", [(429, {}, b""), (500, {}, b"oops"), (503, {}, b""), (200, {}, b'{"web": '), 0.5], ids=str
)
def test_a_passing_fault_is_tried_again(make, service, fault):
    service.faults = [fault, fault]
    tool = make(request_timeout_s=0.2)
    assert ask(tool, "Emma").startswith("Page 1: Emma & more: answer 3.0")
    assert tool.take_counts()["retries"] == 2


def test_delays_grow(make, service, monkeypatch):
    monkeypatch.setattr(web, "_FIRST_DELAY_S", 0.1)
    service.faults = [(500, {}, b"")] * 3
    ask(make(), "Emma")
    pauses = [late - early for early, late in zip(service.times, service.times[1:], strict=False)]
    for pause, full in zip(pauses, (0.1, 0.2, 0.4), strict=True):
        assert pause >= full / 2


def test_retry_after_is_honoured(make, service):
    service.faults = [(429, {"Retry-After": "1"}, b"")]
    ask(make(), "Emma")
    assert 0.98 <= service.times[1] - service.times[0] < 1.5


def test_retry_after_may_be_a_date():
    assert 8 < _retry_after(format_datetime(datetime.now(UTC) + timedelta(seconds=10), usegmt=True)) <= 10
    assert [_retry_after(value) for value in (None, "", "soon", "-3", "2.5")] == [0, 0, 0, 0, 2.5]


def test_a_provider_that_wants_more_time_than_the_call_has_fails_at_once(make, service):
    service.faults = [(429, {"Retry-After": "60"}, b"")]
    started = time.monotonic()
    with pytest.raises(ToolFailure, match="the search failed: the provider answered 429"):
        ask(make(), "Emma")
    assert time.monotonic() - started < 1


def test_a_call_ends_within_its_time(make, service):
    service.faults = [0.6] * 5
    started = time.monotonic()
    with pytest.raises(ToolFailure, match="no answer within") as caught:
        ask(make(timeout_s=0.5), "Emma")
    assert caught.value.kind == "timeout"
    assert time.monotonic() - started < 0.8


def test_failures_are_not_remembered(make, service):
    service.faults = [(500, {}, b"")] * 2
    tool = make(max_attempts=2)
    with pytest.raises(ToolFailure, match="the provider answered 500"):
        ask(tool, "Emma")
    assert "answer 3.0" in ask(tool, "Emma")


def test_a_request_that_the_provider_refuses_is_not_repeated(make, service):
    service.faults = [(400, {}, b"not enough credits")]
    with pytest.raises(ToolFailure, match="the provider answered 400"):
        ask(make(), "Emma")
    assert len(service.requests) == 1


def test_a_wrong_key_stops_the_run(make, service):
    service.faults = [(401, {}, f"bad key {KEY}".encode())]
    with pytest.raises(ToolBroken, match="found status 401; check the key in the environment variable TEST_SEARCH_KEY"):
        ask(make(), "Emma")
    service.faults = [(403, {}, b"")]
    with pytest.raises(ToolBroken, match=r"found status 403; it may want a key: set provider.key"):
        ask(make(SearchProvider(service.url, params={"q": "{query}"})), "Emma")


def test_a_provider_that_only_fails_stops_the_run(make, service):
    service.faults = [(400, {}, b"")] * 4
    tool = make(give_up_after_s=0.2)
    for _ in range(3):
        with pytest.raises(ToolFailure):
            ask(tool, "Emma")
    time.sleep(0.25)
    with pytest.raises(ToolBroken, match=r"no search has succeeded for 0 s, the last: the provider answered 400"):
        ask(tool, "Emma")


def test_a_success_starts_the_patience_anew(make, service):
    service.faults = [(400, {}, b""), None, (400, {}, b"")]
    tool = make(give_up_after_s=0.1)
    with pytest.raises(ToolFailure):
        ask(tool, "Emma")
    ask(tool, "Emma")
    time.sleep(0.15)
    with pytest.raises(ToolFailure):
        ask(tool, "Persuasion")


def test_retry_after_holds_for_every_call(make, service):
    service.faults = [(429, {"Retry-After": "1"}, b"")]
    tool = make(max_attempts=1, timeout_s=3.0)
    with pytest.raises(ToolFailure, match="the provider answered 429"):
        ask(tool, "Emma")
    ask(tool, "Persuasion")
    assert service.times[1] - service.times[0] >= 0.98
    service.faults = [(429, {"Retry-After": "60"}, b"")]
    for message in ("the provider answered 429", r"the provider wants no requests for (59|60) s"):
        with pytest.raises(ToolFailure, match=message):
            ask(tool, "Mansfield Park")
    assert len(service.requests) == 3


def test_a_provider_that_is_gone(make, service):
    provider = SearchProvider("http://127.0.0.1:9/search", params={"q": "{query}"})
    with pytest.raises(ToolFailure, match=r"the search failed: no connection \(ConnectError\)"):
        ask(make(provider, max_attempts=2), "Emma")


def test_no_results_are_an_empty_answer(make, service):
    service.faults = [(200, {}, b'{"web": {"results": []}}')]
    assert ask(make(), "zebra") == ""


def test_a_wrong_path_to_the_results_is_told(make, service):
    with pytest.warns(UserWarning, match=r"search: no list at 'organic' in an answer.*it has \['web'\]"):
        assert ask(make(SearchProvider(service.url, params={"q": "{query}"}, results="organic")), "Emma") == ""


@pytest.mark.parametrize("query", ["", " \n", "\ud800"])
def test_odd_queries(make, service, query):
    assert ("answer" in ask(make(), query)) == bool(query.strip())


# --- offline ---------------------------------------------------------------------------------------------------------


def test_offline_answers_come_from_the_cache_alone_and_need_no_key(make, service, monkeypatch):
    answer = ask(make(), "Emma")
    monkeypatch.delenv("TEST_SEARCH_KEY")
    tool = make(offline=True)
    assert ask(tool, "Emma") == answer
    with pytest.raises(ToolFailure, match="no recorded answer for 'Persuasion'"):
        ask(tool, "Persuasion")
    assert len(service.requests) == 1


def test_offline_without_a_cache_stops_the_run(make, tmp_path):
    with pytest.raises(DataError, match=r"offline: expected recorded answers at .*none.sqlite, found no file"):
        make(offline=True, cache=str(tmp_path / "none.sqlite")).open(TASK)


def test_a_cache_that_is_no_database_is_one_line(make, tmp_path):
    (tmp_path / "notes.txt").write_text("not a database, but long enough to look at" * 100)
    with pytest.raises(DataError, match=r"expected a cache of answers at .*notes.txt, found: file is not a database"):
        make(cache=str(tmp_path / "notes.txt")).open(TASK)


# --- several processes -----------------------------------------------------------------------------------------------


def search_all(url, cache, queries, answers):
    service = type("Address", (), {"url": url})
    tool = WebSearchTool(provider_of(service), cache, top_k=2)
    answers.put({query: ask(tool, query) for query in queries})
    tool.close()


def test_processes_share_the_cache_and_the_first_answer_wins(make, service, tmp_path):
    cache, queries = str(tmp_path / "shared.sqlite"), [f"query {number}" for number in range(30)]
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = [context.Process(target=search_all, args=(service.url, cache, queries, answers)) for _ in range(4)]
    for process in processes:
        process.start()
    told = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    # The service gives every request another answer: equal ones come from the file.
    assert all(other == told[0] for other in told)
    assert len(AnswerStore(cache)) == 30
    assert 30 <= len(service.requests) < 4 * 30


def reserve_some(cache, count):
    store = AnswerStore(cache)
    for _ in range(count):
        time.sleep(store.reserve("provider", 0.02, 60.0))


def test_processes_keep_the_rate_limit_together(tmp_path):
    cache, started = str(tmp_path / "rate.sqlite"), time.monotonic()
    processes = [multiprocessing.get_context("fork").Process(target=reserve_some, args=(cache, 10)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert time.monotonic() - started >= 29 * 0.02  # 30 requests, 50 per second


def test_the_rate_limit_holds_and_does_not_make_calls_wait_for_ever(make, service):
    tool = make(requests_per_second=10.0)
    for number in range(5):
        ask(tool, f"query {number}")
    # From the second on: the first is late, because it makes the client.
    assert service.times[4] - service.times[1] >= 0.28
    slow = make(requests_per_second=0.01, timeout_s=0.5)
    ask(slow, "another query")
    with pytest.raises(ToolFailure, match="too many searches are waiting") as caught:
        ask(slow, "a query too many")
    assert caught.value.kind == "timeout"


# --- keys ------------------------------------------------------------------------------------------------------------


def test_the_key_is_nowhere(make, service, tmp_path, caplog, capfd):
    """Not in results, the cache, errors, tracebacks, logs, representations or pickles, with every logger turned on."""
    caplog.set_level(logging.DEBUG)
    for logger in ("httpx2", "httpcore2"):
        logging.getLogger(logger).setLevel(logging.DEBUG)
    in_address = provider_of(service, params={"q": "{query}", "k": "{key}"}, headers={"X-Key": "{key}"})
    tool = make(in_address, max_attempts=1, top_k=4, request_timeout_s=0.2)
    said = [
        ask(tool, "Emma"),
        repr(tool),
        repr(tool.provider),
        json.dumps(copy.deepcopy(tool).__getstate__(), default=repr),
    ]
    assert "asked with: ***" in said[0]
    service.faults = [(500, {}, KEY.encode()), (200, {}, KEY.encode()), 0.5, (401, {}, KEY.encode())]
    for number in range(4):
        with pytest.raises((ToolFailure, ToolBroken)) as caught:
            ask(tool, f"query {number}")
        said += traceback.format_exception(caught.value)
    tool.close()
    said += [caplog.text, *capfd.readouterr()]
    assert KEY not in "".join(said)
    for path in tmp_path.iterdir():
        assert KEY.encode() not in path.read_bytes(), path


def test_a_missing_key_stops_the_run_at_its_start(make, monkeypatch):
    monkeypatch.delenv("TEST_SEARCH_KEY")
    with pytest.raises(ConfigurationError, match="expected a key in the environment variable TEST_SEARCH_KEY"):
        make().open(TASK)


def test_a_key_in_the_config_is_refused_and_not_repeated():
    with pytest.raises(ConfigurationError, match="must be the NAME of an environment variable") as caught:
        SearchProvider("http://x", params={"q": "{query}", "k": "{key}"}, key=KEY)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"headers": {"X-API-KEY": KEY}}, "provider.headers.X-API-KEY must not hold a key itself"),
        ({"headers": {"authorization": f"Bearer {KEY}"}}, "provider.headers.authorization must not"),
        ({"params": {"q": "{query}", "apikey": KEY}}, "provider.params.apikey must not"),
        ({"method": "POST", "body": {"login": [{"accessToken": KEY}]}}, "provider.body.login.accessToken must not"),
        ({"method": "POST", "body": {"client_secret": {"value": KEY}}}, "provider.body.client_secret.value must not"),
        ({"url": f"https://user:{KEY}@x/search"}, "provider.url must hold no user and no password"),
        ({"url": f"https://{KEY}@x"}, "provider.url must hold no user and no password"),
        ({"url": f"https://user:{KEY}/1@x"}, "provider.url must hold no user and no password"),
        ({"url": f"https://x/search?lang=en&api_key={KEY}"}, "provider.url must not hold the value of 'api_key'"),
    ],
)
def test_a_key_written_down_is_refused_and_not_repeated(options, place):
    with pytest.raises(ConfigurationError) as caught:
        SearchProvider(**{"url": "http://x", "params": {"q": "{query}"}, **options})
    message = str(caught.value)
    assert message.startswith(place)
    assert message.endswith(
        "write {key} in provider.params, headers or body, and name the environment variable in provider.key"
    )
    assert KEY not in message


def test_a_key_written_down_stops_the_command_before_it_writes_anything(tmp_path, capfd):
    provider = {"url": "http://x", "params": {"q": "{query}"}, "headers": {"X-API-KEY": KEY}}
    tool = {"class_path": "WebSearchTool", "init_args": {"provider": provider, "cache": str(tmp_path / "web.sqlite")}}
    overlay = tmp_path / "web.yaml"
    overlay.write_text(json.dumps({"data": {"tools": [tool]}}))
    quickstart = Path(__file__).parents[3] / "configs" / "quickstart" / "appo.yaml"
    output = tmp_path / "run"
    assert main(["fit", "--config", str(quickstart), "--config", str(overlay), "--output_dir", str(output)]) != 0
    said = "".join(capfd.readouterr())
    assert "provider.headers.X-API-KEY must not hold a key itself" in said
    assert KEY not in said
    assert not output.exists()


def test_harmless_names_may_have_any_value():
    headers = {"Accept": "application/json", "User-Agent": "appo", "Content-Type": "text/x", "X-Author": "me"}
    body = {"q": "{query}", "keywords": "any", "token_limit": "500", "include_tokens": True, "X-Auth-Type": "none"}
    SearchProvider("https://[::1]:8080/@all/v1", method="POST", headers=headers, body=body)


def test_what_stands_in_the_address_is_filled_in_and_quoted():
    provider = SearchProvider("http://x/{key}/{query}/{count}", key="TEST_SEARCH_KEY")
    assert provider.request("a/b? {count}", 3)["url"] == f"http://x/{KEY}/a%2Fb%3F%20%7Bcount%7D/3"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "http://x?q={query}"}, r"provider.url must end before its '\?': put what stands behind into"),
        ({"params": {}}, "expected {query} in url, params or body"),
        ({"params": {"q": "{query}"}, "key": "A_KEY"}, "provider.key and {key} belong together"),
        ({"params": {"q": "{query}", "k": "{key}"}}, "provider.key and {key} belong together"),
        ({"body": {"q": "{query}"}}, "provider.body has no effect with GET"),
        ({"url": "search.example.com/v1?k=4711"}, r"must begin with http:// .* got 'search.example.com/v1'$"),
    ],
)
def test_providers_that_cannot_work_are_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        SearchProvider(**{"url": "http://x", **options})
