"""Chat templates with tools, of the families that are in use, and some that cannot carry a rollout.

``QWEN25`` and ``QWEN3`` follow the templates that come with those models, without their longer instructions.
"""

from __future__ import annotations

import copy
import functools

from transformers import PreTrainedTokenizerFast

from helpers.tiny import build_tokenizer

_TOOLS = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- '# Tools\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
    {{- '\\n</tools>\\nReturn calls as <tool_call>\\n{"name": <name>, "arguments": <arguments>}\\n</tool_call>' }}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
"""
_RESULTS = """
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
_CALLS = """
        {%- for tool_call in message.tool_calls or [] %}
            {%- set call = tool_call.function %}
            {%- if content or not loop.first %}{{- '\\n' }}{%- endif %}
            {{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' + (call.arguments | tojson) }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
"""

QWEN25 = f"""{_TOOLS}
{{%- for message in messages %}}
    {{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}}
        {{{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}}}
    {{%- elif message.role == 'assistant' %}}
        {{%- set content = message.content %}}
        {{{{- '<|im_start|>assistant\\n' + content }}}}
{_CALLS}
{_RESULTS}"""

# Drops thoughts before the last question, keeps those of the tool loop that follows it; writes an empty thought into
# a last turn that has none.
QWEN3 = f"""{_TOOLS}
{{%- set ns = namespace(last_query=messages | length - 1, searching=true) %}}
{{%- for message in messages[::-1] %}}
    {{%- if ns.searching and message.role == 'user' %}}
        {{%- set ns.searching = false %}}
        {{%- set ns.last_query = messages | length - 1 - loop.index0 %}}
    {{%- endif %}}
{{%- endfor %}}
{{%- for message in messages %}}
    {{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}}
        {{{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}}}
    {{%- elif message.role == 'assistant' %}}
        {{%- set content = message.content %}}
        {{%- set thought = '' %}}
        {{%- if '</think>' in content %}}
            {{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}}
            {{%- set content = content.split('</think>')[-1].lstrip('\\n') %}}
        {{%- endif %}}
        {{{{- '<|im_start|>assistant\\n' }}}}
        {{%- if loop.index0 > ns.last_query and (loop.last or thought) %}}
            {{{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}}}
        {{%- endif %}}
        {{{{- content }}}}
{_CALLS}
{_RESULTS}"""

# Hermes: results come from the role "tool", each in its tags.
HERMES = QWEN25.replace("'<|im_start|>user' }}", "'<|im_start|>tool' }}")
# DeepSeek-R1 does this: no thought of an earlier turn is shown again.
DROPS_THOUGHTS = QWEN25.replace(
    "set content = message.content %}", "set content = message.content.split('</think>')[-1].lstrip('\\n') %}"
)
# Marks the thoughts of a turn when another follows.
REWRITES_TURNS = QWEN25.replace(
    "set content = message.content %}",
    "set content = message.content %}{%- if messages | length - loop.index > 1 %}"
    "{%- set content = message.content.replace('<think>', '<old>') %}{%- endif %}",
)
WRITES_CALLS_ANEW = QWEN25.replace("call.arguments | tojson", "call.arguments | tojson(indent=2)")
IGNORES_TOOLS = QWEN25.replace("{%- if tools %}", "{%- if false %}")
HIDES_RESULTS = QWEN25.replace("message.role == 'tool' %}", "message.role == 'never' %}")
QUOTES_RESULTS = QWEN25.replace(
    "+ message.content + '\\n</tool_response>'", "+ (message.content | tojson) + '\\n</tool_response>'"
)
NAMES_TOOLS = QWEN25.replace("'\\n<tool_response>\\n'", "'\\n<tool_response>\\n' + message.name + ': '")
WRITES_XML_CALLS = QWEN25.replace(
    """{"name": "' + call.name + '", "arguments": ' + (call.arguments | tojson)""",
    "<function=' + call.name + '>' + (call.arguments | tojson) + '</function>'",
)
OTHER_END_OF_TURN = QWEN25.replace("{{- '<|im_end|>\\n' }}", "{{- '<|endoftext|>\\n' }}")
RAISES = "{{- raise_exception('no tools, please') }}"


@functools.cache
def tool_tokenizer(template: str = QWEN3) -> PreTrainedTokenizerFast:
    """The tiny byte-level tokenizer with such a template; its tags are several tokens each."""
    tokenizer = copy.deepcopy(_plain_tokenizer())
    tokenizer.chat_template = template
    return tokenizer


@functools.cache
def _plain_tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()
