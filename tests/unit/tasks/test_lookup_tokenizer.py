import pytest
from hypothesis import given
from hypothesis import strategies as st

from appo_lightning.rollout.formats.hermes import HermesFormat
from appo_lightning.rollout.imitation import encode_demonstration
from appo_lightning.tasks.lookup import LookupDemonstrations, LookupTasks
from appo_lightning.tasks.lookup.tokenizer import build_tokenizer
from appo_lightning.tasks.lookup.vocabulary import CITIES, FILLERS, LARGEST_NUMBER, PEOPLE, TAGS
from appo_lightning.tools.python import PythonTool
from appo_lightning.tools.search import SearchTool

TOKENIZER = build_tokenizer()


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def pieces(text: str) -> list[str]:
    return [TOKENIZER.decode([i]) for i in encode(text)]


@pytest.mark.parametrize("name", [*PEOPLE, *CITIES, *FILLERS])
def test_every_word_after_a_space_is_one_token(name):
    assert len(encode(f" {name}")) == 1


def test_every_number_is_one_token():
    assert all(len(encode(str(number))) == 1 for number in range(LARGEST_NUMBER + 1))


@pytest.mark.parametrize("tag", TAGS)
def test_tags_are_single_tokens_and_stay_in_decoded_text(tag):
    ids = encode(f"a{tag}b")
    assert len(ids) == 3
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == f"a{tag}b"


def test_special_tokens_are_dropped_from_decoded_text():
    ids = encode("<|im_start|>a<|im_end|><|endoftext|>")
    assert len(ids) == 4
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "a"
    assert (TOKENIZER.eos_token, TOKENIZER.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_code_and_answers_split_as_planned():
    assert pieces("print(37 + 152)") == ["print", "(", "37", " +", " ", "152", ")"]
    assert pieces("print(abs(37 - 52))") == ["print", "(abs", "(", "37", " -", " ", "52", "))"]
    assert pieces("\\boxed{89}") == ["\\boxed", "{", "89", "}"]


@given(st.text())
def test_any_text_survives_a_round_trip(text):
    assert TOKENIZER.decode(encode(text)) == text


@pytest.mark.parametrize("text", ["żółw 日本 🙂", "a <think> b", "tabs\tand\r\nlines  ", "1234567", " .", "don 't"])
def test_awkward_text_survives_a_round_trip(text):
    assert TOKENIZER.decode(encode(text)) == text


def test_world_text_needs_no_byte_fallback():
    source = LookupDemonstrations(hops=[1, 1, 1, 1, 1])
    unknown = set()
    for i in range(200):
        text = TOKENIZER.apply_chat_template(source.demonstration(i).messages, tokenize=False)
        unknown |= {piece for piece in pieces(text + source.demonstration(i).response) if len(piece) == 1}
    # Single characters are punctuation, digits and the lone space before a number: no letters.
    assert not any(piece.isalpha() for piece in unknown)


def test_piecewise_encoding_equals_encoding_the_whole():
    source = LookupDemonstrations(hops=[1, 1, 1, 1, 1])
    for i in range(200):
        demonstration = source.demonstration(i)
        piecewise = [token for segment in demonstration.segments for token in encode(segment.text)]
        assert piecewise == encode(demonstration.response)


def test_prompts_and_demonstrations_are_short():
    source = LookupDemonstrations(hops=[0, 0, 0, 1])
    for i in range(100):
        demonstration = source.demonstration(i)
        prompt = TOKENIZER.apply_chat_template(demonstration.messages, add_generation_prompt=True, tokenize=False)
        assert len(encode(prompt + demonstration.response)) < 130


FUNCTIONS = build_tokenizer(function_calls=True)
TOOLS = [SearchTool(top_k=1), PythonTool()]


def test_function_calls_change_no_other_token():
    texts = [LookupDemonstrations().demonstration(i).response for i in range(50)]
    tags = [TOKENIZER.convert_ids_to_tokens(encode(text)) for text in texts]
    assert [FUNCTIONS.convert_ids_to_tokens(FUNCTIONS.encode(text, add_special_tokens=False)) for text in texts] == tags


def test_the_template_of_function_calls_carries_rollouts_and_shows_the_tools_in_few_tokens():
    syntax = HermesFormat().bind(FUNCTIONS, TOOLS)  # checks the template
    row = LookupTasks(size=1, hops=[1]).row(0)
    ids = FUNCTIONS.apply_chat_template(
        row.messages, tools=syntax.prompt_tools, add_generation_prompt=True, return_dict=False
    )
    text = FUNCTIONS.decode(ids)
    assert f"search {SearchTool.description}\npython {PythonTool.description}<|im_end|>" in text
    assert len(ids) < 80


def test_demonstrations_of_function_calls_need_no_byte_fallback():
    source, syntax = LookupDemonstrations(hops=[1, 1, 1, 1, 1]), HermesFormat().bind(FUNCTIONS, TOOLS)
    for i in range(100):
        row = encode_demonstration(source.demonstration(i), FUNCTIONS, syntax, max_length=4096)
        assert not any(len(piece) == 1 and piece.isalpha() for piece in map(FUNCTIONS.decode, row.token_ids))


def test_the_chat_template_opens_the_assistants_turn():
    row = LookupTasks(size=1, hops=[1]).row(0)
    text = TOKENIZER.apply_chat_template(
        [{"role": "system", "content": "S"}, *row.messages], add_generation_prompt=True, tokenize=False
    )
    question = row.messages[0]["content"]
    assert text == (f"<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
