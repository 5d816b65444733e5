"""Claims about chat templates: what stands around tool results, and which templates are refused, with the remedy."""

from __future__ import annotations

import pytest

from appo_lightning.errors import ConfigurationError
from appo_lightning.rollout.formats.hermes import HermesFormat
from appo_lightning.rollout.formats.template import ResultFrame, check_history_is_kept, find_result_frame
from helpers import chat_templates as templates
from helpers.chat_templates import tool_tokenizer
from helpers.scripted import EchoTool, scripted_tokenizer
from helpers.tiny import build_tokenizer

QWEN_FRAME = ResultFrame(
    opening="\n<|im_start|>user\n<tool_response>\n",
    between="\n</tool_response>\n<tool_response>\n",
    closing="\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
)


@pytest.mark.parametrize("template", [templates.QWEN25, templates.QWEN3], ids=["qwen2.5", "qwen3"])
def test_what_stands_around_results_is_found_by_rendering(template):
    assert find_result_frame(tool_tokenizer(template)) == QWEN_FRAME


def test_another_role_for_results_is_found_too():
    frame = find_result_frame(tool_tokenizer(templates.HERMES))
    assert frame.opening == "\n<|im_start|>tool\n<tool_response>\n"


def test_a_generation_prompt_that_opens_a_thought_belongs_to_the_frame():
    template = templates.QWEN25.replace("assistant\\n' }}{%- endif", "assistant\\n<think>\\n' }}{%- endif")
    assert find_result_frame(tool_tokenizer(template)).closing.endswith("<|im_start|>assistant\n<think>\n")


@pytest.mark.parametrize("template", [templates.QWEN25, templates.QWEN3, templates.HERMES])
def test_templates_that_keep_the_tool_loop_are_accepted(template):
    check_history_is_kept(tool_tokenizer(template))
    HermesFormat().bind(tool_tokenizer(template), [EchoTool()])


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("DROPS_THOUGHTS", "expected earlier thoughts to stay in the history, found them dropped"),
        ("REWRITES_TURNS", "found earlier text changed by it"),
        ("WRITES_CALLS_ANEW", "expected the arguments of a call to stay as they were written, found "),
    ],
)
def test_a_template_that_rewrites_history_is_refused_and_can_be_allowed(template, found):
    tokenizer = tool_tokenizer(getattr(templates, template))
    with pytest.raises(ConfigurationError, match=found) as refusal:
        HermesFormat().bind(tokenizer, [EchoTool()])
    assert "allow_rewritten_history: true" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    allowed = HermesFormat(allow_rewritten_history=True).bind(tokenizer, [EchoTool()])
    assert allowed.prompt_tools


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("IGNORES_TOOLS", "expected a chat template that shows tools to the model, found one that ignores them"),
        ("HIDES_RESULTS", "shows tool results as they are, found them missing or changed"),
        ("QUOTES_RESULTS", "shows tool results as they are, found them missing or changed"),
        ("NAMES_TOOLS", "the same text around every result, found one that tells the tool"),
        ("WRITES_XML_CALLS", "a chat template that writes calls as <tool_call>{"),
        (
            "OTHER_END_OF_TURN",
            "end with the tokenizer's EOS token '<|im_end|>', found '<|endoftext|>",
        ),
        ("RAISES", "found TemplateError: no tools, please"),
    ],
)
@pytest.mark.parametrize("allow", [False, True])
def test_a_template_that_cannot_carry_the_format_is_refused_whatever_is_allowed(template, found, allow):
    with pytest.raises(ConfigurationError) as refusal:
        HermesFormat(allow_rewritten_history=allow).bind(tool_tokenizer(getattr(templates, template)), [EchoTool()])
    assert found in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_template_without_tools_is_refused():
    with pytest.raises(ConfigurationError, match=r"ignores them; leave data\.call_format out"):
        HermesFormat().bind(scripted_tokenizer(), [EchoTool()])


def test_a_tokenizer_without_a_template_is_refused():
    with pytest.raises(ConfigurationError, match="expected a chat template, found none"):
        HermesFormat().bind(build_tokenizer(), [EchoTool()])


def test_the_format_without_tools_is_refused():
    with pytest.raises(ConfigurationError, match=r"shows the tools of data\.tools to the model, found none"):
        HermesFormat().bind(tool_tokenizer(), [])
