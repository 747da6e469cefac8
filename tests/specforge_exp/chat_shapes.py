"""Shapes of the chat templates that people serve, in our own words.

A comment names the public template that a shape stands for. Where they differ from it they are
shorter: the same headers, ends, thoughts, calls and history, without dates and long texts.
"""

from dataclasses import dataclass, field
from typing import Any

TOJSON = "{'name': c.name, 'arguments': c.arguments} | tojson"


@dataclass(frozen=True)
class Shape:
    """A template with its tokenizer."""

    name: str
    template: str
    special: tuple[str, ...]
    """Added tokens."""
    eos: tuple[str, ...]
    """What a server stops at; the first is the tokenizer's."""
    spelling: str = "lines"
    """Its tokenizer: byte-level (lines, gpt2), or with a metaspace: first, always, normalizer."""
    kwargs: dict[str, Any] = field(default_factory=dict, hash=False)
    bos: str | None = None
    tools: bool = False
    """It shows tool calls."""
    thinks: str = "<think>"
    """What the model's thoughts begin with."""


def chatml(assistant: str, prompt: str = "", start: str = "", system: str = "") -> str:
    """<|im_start|>role, words, <|im_end|>; `assistant` is how an answer's words are shown."""
    return (
        "{%- set ns = namespace(last=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}"
        "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
        + start
        + "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}"
        "{%- if m.role == 'assistant' %}" + assistant + "{%- else %}{{- m.content }}{%- endif %}"
        "{{- '<|im_end|>\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}" + prompt + "{%- endif %}"
    )


CALLS = (
    "{%- for call in m.tool_calls or [] %}{%- set c = call.function %}"
    "{{- '\\n' if m.content or not loop.first else '' }}"
    "{{- '<tool_call>\\n' + (" + TOJSON + ") + '\\n</tool_call>' }}{%- endfor %}"
)
SPLIT = (
    "{%- set c = m.content %}{%- set r = m.reasoning_content or '' %}"
    "{%- if not r and '</think>' in c %}"
    "{%- set r = c.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{%- set c = c.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
)
QWEN3 = (
    SPLIT + "{%- if loop.index0 > ns.last and (loop.last or r) %}"
    "{{- '<think>\\n' + r.strip('\\n') + '\\n</think>\\n\\n' + c.lstrip('\\n') }}"
    "{%- else %}{{- c }}{%- endif %}" + CALLS
)
NO_THINK = "{%- if enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
IM = ("<|im_start|>", "<|im_end|>")
THINK = ("<think>", "</think>", "<tool_call>", "</tool_call>")
LLAMA3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def headed(call: str = "") -> str:
    """As Llama 3's: a header of two tokens, one token at the end, calls as the whole answer."""
    head = "'<|start_header_id|>{}<|end_header_id|>\\n\\n'"
    answer = "{{- m.content | trim + '<|eot_id|>' }}"
    shown = f"{{%- if m.tool_calls %}}{call}{{%- else %}}{answer}{{%- endif %}}" if call else answer
    return (
        "{{- bos_token }}{%- for m in messages %}"
        "{{- " + head.format("' + m.role + '") + " }}" + shown + "{%- endfor %}"
        "{%- if add_generation_prompt %}{{- " + head.format("assistant") + " }}{%- endif %}"
    )


def instructed(user: str, answer: str, call: str = "", system: str = "") -> str:
    """As Mistral's: no header before an answer, so that the generation prompt is empty."""
    called = (
        "{%- elif m.tool_calls %}" + call + "{%- elif m.role == 'tool' %}"
        "{{- '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}"
        if call
        else ""
    )
    return (
        "{{- bos_token }}{%- for m in messages %}{%- if m.role == 'system' %}" + system +
        "{%- elif m.role == 'user' %}" + user + called +
        "{%- elif m.role == 'assistant' %}" + answer + "{%- endif %}{%- endfor %}"
    )  # fmt: skip


MISTRAL_LAST = (
    "{{- bos_token }}{%- set ns = namespace(system='') %}{%- for m in messages %}"
    "{%- if m.role == 'system' %}{%- set ns.system = m.content + '\n\n' %}"
    "{%- elif m.role == 'user' %}"
    "{{- '[INST] ' + (ns.system if loop.last else '') + m.content + '[/INST]' }}"
    "{%- elif m.tool_calls %}CALL{%- elif m.role == 'tool' %}"
    "{{- '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}{%- elif m.role == 'assistant' %}"
    "{{- ' ' + m.content + eos_token }}{%- endif %}{%- endfor %}"
)
MISTRAL_CALL = (
    "{{- '[TOOL_CALLS][' }}{%- for call in m.tool_calls %}{%- set c = call.function %}{{- " + TOJSON
    + " }}{{- ', ' if not loop.last else ']' + eos_token }}{%- endfor %}"
)  # fmt: skip
INST = ("<s>", "</s>", "[INST]", "[/INST]")
MISTRAL = (*INST, "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
PLACED = "{{- '[INST]' + m.content + '[/INST]' }}"
SYSTEM = "{{- '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}"
AS_USER = "{{- '<<SYS>>\\n' + m.content + '\\n<</SYS>>\\n\\n' }}"
NO_SYSTEM = "{{- raise_exception('System role not supported') }}"
GEMMA = (
    "{{- bos_token }}{%- for m in messages %}"
    "{%- if m.role == 'system' %}" + NO_SYSTEM + "{%- endif %}"
    "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('roles must alternate') }}{%- endif %}"
    "{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}"
    "{{- m.content | trim + '<end_of_turn>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"
)
GEMMA4 = (
    "{{- bos_token }}{%- if enable_thinking or messages[0].role == 'system' %}"
    "{{- '<|turn>system\n' + ('<|think|>\n' if enable_thinking else '') }}"
    "{{- (messages[0].content if messages[0].role == 'system' else '') + '<turn|>\n' }}"
    "{%- endif %}{%- set ns = namespace(asked=-1, before='') %}{%- for m in messages %}"
    "{%- if m.role == 'user' %}{%- set ns.asked = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}"
    "{{- '<|turn>user\n' + m.content | trim + '<turn|>\n' }}{%- elif m.role == 'tool' %}"
    "{{- m.content + '<tool_response|>' }}{%- elif m.role == 'assistant' %}"
    "{{- '' if ns.before == 'tool' else '<|turn>model\n' }}{%- if m.tool_calls %}"
    "{%- if m.reasoning_content and loop.index0 > ns.asked %}"
    "{{- '<|channel>thought\n' + m.reasoning_content + '\n<channel|>' }}{%- endif %}"
    "{%- for call in m.tool_calls %}{%- set c = call.function %}"
    "{{- '<|tool_call>call:' + c.name + (c.arguments | tojson) + '<tool_call|>' }}{%- endfor %}"
    "{{- '<|tool_response>' }}{%- else %}{{- m.content | trim + '<turn|>\n' }}{%- endif %}"
    "{%- endif %}{%- set ns.before = m.role %}{%- endfor %}"
    "{%- if add_generation_prompt and ns.before != 'tool' %}{{- '<|turn>model\n' }}"
    "{{- '' if enable_thinking else '<|channel>thought\n<channel|>' }}{%- endif %}"
)
TURNS = (
    "<bos>", "<eos>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|tool_call>",
    "<tool_call|>", "<|tool_response>", "<tool_response|>", "<|think|>",
)  # fmt: skip
TURN_ENDS = ("<eos>", "<turn|>", "<|tool_response>")
HARMONY = (
    "{%- set ns = namespace(last=-1) %}{%- for m in messages %}"
    "{%- if m.role == 'assistant' and not m.tool_calls %}{%- set ns.last = loop.index0 %}"
    "{%- endif %}{%- endfor %}{%- for m in messages %}{%- if m.role == 'assistant' %}"
    "{%- if m.thinking and (loop.last or loop.index0 > ns.last) %}"
    "{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{%- endif %}"
    "{%- if m.tool_calls %}{%- set c = m.tool_calls[0].function %}"
    "{{- '<|start|>assistant<|channel|>commentary to=functions.' + c.name }}"
    "{{- ' <|constrain|>json<|message|>' + (c.arguments | tojson) + '<|call|>' }}{%- else %}"
    "{{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
    "{{- '<|return|>' if loop.last else '<|end|>' }}{%- endif %}"
    "{%- else %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"
)
CHANNELS = (
    "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>",
)  # fmt: skip
DEEP = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")


def deepseek(answer: str, prompt: str) -> str:
    """As DeepSeek's: roles without line breaks; `answer` comes after <｜Assistant｜>."""
    return (
        "{{- bos_token }}{%- for m in messages %}{%- if m.role == 'system' %}{{- m.content }}"
        "{%- elif m.role == 'user' %}{{- '<｜User｜>' + m.content }}"
        "{%- elif m.role == 'assistant' %}{%- set c = m.content %}"
        "{%- if '</think>' in c %}{%- set c = c.split('</think>')[-1] %}{%- endif %}"
        "{{- '<｜Assistant｜>' + "
        + answer
        + " + '<｜end▁of▁sentence｜>' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<｜Assistant｜>" + prompt + "' }}{%- endif %}"
    )


DEEPSEEK_V3 = (
    "{{- bos_token }}{%- for m in messages %}{%- if m.role == 'system' %}{{- m.content }}"
    "{%- elif m.role == 'user' %}{{- '<｜User｜>' + m.content }}"
    "{%- elif m.role == 'assistant' %}{{- '<｜Assistant｜>' + m.content }}"
    "{%- for call in m.tool_calls or [] %}{%- set c = call.function %}"
    "{{- '<｜tool▁call▁begin｜>' + c.name + '\\n' + (c.arguments | tojson) }}"
    "{{- '<｜tool▁call▁end｜>' }}{%- endfor %}{{- '<｜end▁of▁sentence｜>' }}"
    "{%- elif m.role == 'tool' %}{{- '<｜tool▁output▁begin｜>' + m.content }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<｜Assistant｜>' }}{%- endif %}"
)
DEEP_TOOLS = ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁output▁begin｜>")
GLM = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
GLM_END = ("<|endoftext|>", "<|user|>", "<|observation|>")
GLM_ROLES = (
    "{%- elif m.role == 'tool' %}{{- '<|observation|>\\n' + m.content }}"
    "{%- else %}{{- '<|' + m.role + '|>\\n' + m.content }}{%- endif %}{%- endfor %}"
)
GLM4 = (
    "{{- '[gMASK]<sop>' }}{%- for m in messages %}{%- if m.role == 'assistant' %}"
    "{%- if m.tool_calls %}{%- for call in m.tool_calls %}{%- set c = call.function %}"
    "{{- '<|assistant|>' + c.name + '\\n' + (c.arguments | tojson) }}{%- endfor %}"
    "{%- else %}{{- '<|assistant|>\\n' + m.content }}{%- endif %}" + GLM_ROLES +
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)  # fmt: skip
GLM45 = (
    "{{- '[gMASK]<sop>' }}{%- set ns = namespace(last=-1) %}{%- for m in messages %}"
    "{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- if m.role == 'assistant' %}{{- '<|assistant|>' }}" + SPLIT +
    "{%- if loop.index0 > ns.last and r %}{{- '\\n<think>' + r.strip() + '</think>' }}"
    "{%- else %}{{- '\\n<think></think>' }}{%- endif %}"
    "{%- if c.strip() %}{{- '\\n' + c.strip() }}{%- endif %}"
    "{%- for call in m.tool_calls or [] %}{%- set c = call.function %}"
    "{{- '\\n<tool_call>' + c.name + '\\n' + (c.arguments | tojson) + '\\n</tool_call>' }}"
    "{%- endfor %}" + GLM_ROLES +
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}"
    "{{- '\\n<think></think>' if enable_thinking is false else '' }}{%- endif %}"
)  # fmt: skip
GRANITE = (
    "{%- for m in messages %}{{- '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content }}"
    "{%- if m.tool_calls %}{{- '<|tool_call|>' + (m.tool_calls | tojson) }}{%- endif %}"
    "{{- '<|end_of_text|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}"
)
COHERE = (
    "{{- bos_token }}{%- for m in messages %}{{- '<|START_OF_TURN_TOKEN|>' }}"
    "{%- if m.role == 'assistant' %}"
    "{{- '<|CHATBOT_TOKEN|><|START_RESPONSE|>' + m.content + '<|END_RESPONSE|>' }}"
    "{%- else %}{{- '<|' + m.role.upper() + '_TOKEN|>' + m.content }}{%- endif %}"
    "{{- '<|END_OF_TURN_TOKEN|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{%- endif %}"
)
COHERE_TOKENS = (
    "<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>",
)  # fmt: skip
OLMO2 = (
    "{{- bos_token }}{%- for m in messages %}{{- '<|' + m.role + '|>\\n' + m.content }}"
    "{%- if m.role == 'assistant' %}{{- eos_token }}{%- if not loop.last %}{{- '\\n' }}{%- endif %}"
    "{%- else %}{{- '\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"
)
PHI = (
    "{%- for m in messages %}{{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"
)
PHI4 = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '<|im_sep|>' + m.content }}"
    "{{- '<|im_end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant<|im_sep|>' }}{%- endif %}"
)
KIMI = (
    "{%- for m in messages %}{{- '<|im_' + m.role + '|>' + m.role + '<|im_middle|>' + m.content }}"
    "{%- if m.tool_calls %}{{- '<|tool_calls_section_begin|>' }}{%- for call in m.tool_calls %}"
    "{{- 'functions.' + call.function.name + ':' + loop.index0 | string }}"
    "{{- call.function.arguments | tojson }}{%- endfor %}{%- endif %}{{- '<|im_end|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_assistant|>assistant<|im_middle|>' }}{%- endif %}"
)
KIMI_TOKENS = (
    "<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_tool|>", "<|im_middle|>",
    "<|im_end|>", "<|tool_calls_section_begin|>",
)  # fmt: skip
MINIMAX = (
    "{{- ']~!b[' }}{%- set ns = namespace(last=-1) %}{%- for m in messages %}"
    "{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}"
    "{{- ']~b]' + ('ai' if m.role == 'assistant' else m.role) + '\\n' }}"
    "{%- if m.role == 'assistant' %}" + SPLIT +
    "{%- if r and loop.index0 > ns.last %}{{- '<think>\\n' + r + '\\n</think>\\n\\n' }}{%- endif %}"
    "{{- c }}{%- else %}{{- m.content }}{%- endif %}{{- '[e~[\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- ']~b]ai\\n<think>\\n' }}{%- endif %}"
)  # fmt: skip
LLAMA_CALL = (
    "{%- if m.tool_calls | length != 1 %}"
    "{{- raise_exception('only single tool calls at once') }}{%- endif %}"
    "{%- set c = m.tool_calls[0].function %}"
    '{{- \'{"name": "\' + c.name + \'", "parameters": \' + (c.arguments | tojson) }}'
    "{{- '}<|eot_id|>' }}"
)
NEMOTRON = (
    "{%- for m in messages %}{{- '<extra_id_' + ('0' if m.role == 'system' else '1') + '>' }}"
    "{{- (m.role | capitalize) + '\\n' + m.content + '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<extra_id_1>Assistant\\n' }}{%- endif %}"
)
SEED = (
    "{%- for m in messages %}{{- '<seed:bos>' + m.role + '\\n' }}{%- if m.reasoning_content %}"
    "{{- '<seed:think>' + m.reasoning_content | trim + '</seed:think>\\n' }}{%- endif %}"
    "{{- m.content | trim + '<seed:eos>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<seed:bos>assistant\\n' }}{%- if thinking_budget == 0 %}"
    "{{- '<seed:think>\\nNone are left.\\n</seed:think>' }}{%- endif %}{%- endif %}"
)
SOLAR = (
    "{%- for m in messages %}{{- '<|begin|>' + m.role }}{%- if m.reasoning and loop.last %}"
    "{{- '<|think|>' + m.reasoning + '<|end|><|begin|>assistant' }}{%- endif %}"
    "{{- '<|content|>' + m.content + ('<|stop|>' if m.role == 'assistant' else '<|end|>') }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|begin|>assistant' }}{%- endif %}"
)
SHAPES = (
    # meta-llama/Llama-2-7b-chat-hf: a space before </s>, one <s> for each answer
    Shape("Llama 2", instructed(
        "{{- '[INST] ' + m.content + ' [/INST]' }}", "{{- ' ' + m.content + ' ' + eos_token }}",
        system=AS_USER), INST[:2], ("</s>",), "normalizer", bos="<s>"),
    # meta-llama/Meta-Llama-3-8B-Instruct
    Shape("Llama 3", headed(), LLAMA3, ("<|eot_id|>",), bos=LLAMA3[0]),
    # meta-llama/Llama-3.1-8B-Instruct and 3.3: one call at a time, its words are left out
    Shape("Llama 3.1", headed(LLAMA_CALL), (*LLAMA3, "<|eom_id|>"), ("<|eot_id|>", "<|eom_id|>"),
          bos=LLAMA3[0], tools=True),
    # Qwen/Qwen2.5-7B-Instruct
    Shape("Qwen2.5", chatml("{{- m.content }}" + CALLS), (*IM, *THINK[2:]), ("<|im_end|>",),
          tools=True),
    # Qwen/Qwen3-8B as served by default, and with enable_thinking=false
    Shape("Qwen3, thinking", chatml(QWEN3, NO_THINK), (*IM, *THINK), ("<|im_end|>",), tools=True),
    Shape("Qwen3, not thinking", chatml(QWEN3, NO_THINK), (*IM, *THINK), ("<|im_end|>",),
          kwargs={"enable_thinking": False}, tools=True),
    # Qwen/Qwen3-4B-Thinking-2507: the prompt opens the thoughts
    Shape("Qwen3-Thinking-2507", chatml(QWEN3, "{{- '<think>\\n' }}"), (*IM, *THINK),
          ("<|im_end|>",), tools=True),
    # mistralai/Mistral-7B-Instruct-v0.3: the space is the template's, the token with it is the
    # model's; the system's words stand before a question that is the last message: in prompts only
    Shape("Mistral v0.3", MISTRAL_LAST.replace("CALL", MISTRAL_CALL), MISTRAL, ("</s>",), "first",
          bos="<s>", tools=True),
    # mistralai/Mixtral-8x7B-Instruct-v0.1: the same with marks that are no tokens
    Shape("Mixtral", instructed("{{- ' [INST] ' + m.content + ' [/INST]' }}",
          "{{- ' ' + m.content + eos_token }}"), INST[:2], ("</s>",), "always", bos="<s>"),
    # mistralai/Mistral-Nemo-Instruct-2407: byte-level, no space
    Shape("Mistral Nemo", instructed(PLACED, "{{- m.content + eos_token }}", MISTRAL_CALL),
          MISTRAL, ("</s>",), bos="<s>", tools=True),
    # mistralai/Mistral-Small-24B-Instruct-2501
    Shape("Mistral Small", instructed(PLACED, "{{- m.content + eos_token }}", MISTRAL_CALL, SYSTEM),
          (*MISTRAL, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), ("</s>",), bos="<s>", tools=True),
    # mistralai/Magistral-Small-2509: its default system message names the marks of thoughts
    Shape("Magistral", "{%- set asked = 'Think first: [THINK]Your draft[/THINK]' %}" +
          instructed(PLACED, "{{- m.content + eos_token }}", MISTRAL_CALL, SYSTEM),
          (*MISTRAL, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[THINK]", "[/THINK]"), ("</s>",),
          bos="<s>", tools=True, thinks="[THINK]"),
    # google/gemma-2-9b-it, gemma-3: no system role
    Shape("Gemma", GEMMA, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
          ("<eos>", "<end_of_turn>"), bos="<bos>"),
    # google/gemma-4-31B-it: the prompt closes empty thoughts that no answer is shown with; what
    # the model thinks is shown before calls alone
    Shape("Gemma 4", GEMMA4, TURNS, TURN_ENDS, bos="<bos>", tools=True,
          thinks="<|channel>thought"),
    Shape("Gemma 4, thinking", GEMMA4, TURNS, TURN_ENDS, kwargs={"enable_thinking": True},
          bos="<bos>", tools=True, thinks="<|channel>thought"),
    # microsoft/Phi-3-mini-4k-instruct, Phi-4-mini: <|end|> is a token of its own
    Shape("Phi-3", PHI, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
          ("<|endoftext|>", "<|end|>"), "first"),
    # microsoft/phi-4
    Shape("Phi-4", PHI4, (*IM, "<|im_sep|>"), ("<|im_end|>",)),
    # openai/gpt-oss-20b: Harmony
    Shape("gpt-oss", HARMONY, CHANNELS, ("<|return|>", "<|call|>"), tools=True,
          thinks="<|channel|>analysis<|message|>"),
    # deepseek-ai/DeepSeek-V3-0324
    Shape("DeepSeek-V3", DEEPSEEK_V3, (*DEEP, *DEEP_TOOLS), DEEP[1:2], bos=DEEP[0], tools=True),
    # deepseek-ai/DeepSeek-R1-Distill-Qwen-7B: cuts all thoughts, its prompt opens them
    Shape("DeepSeek-R1-Distill", deepseek("c", "<think>\\n"), (*DEEP, *THINK[:2]), DEEP[1:2],
          bos=DEEP[0]),
    # deepseek-ai/DeepSeek-V3.1 with thinking=true and false
    Shape("DeepSeek-V3.1, thinking", deepseek("'</think>' + c", "<think>"), (*DEEP, *THINK[:2]),
          DEEP[1:2], bos=DEEP[0]),
    Shape("DeepSeek-V3.1", deepseek("'</think>' + c", "</think>"), (*DEEP, *THINK[:2]),
          DEEP[1:2], bos=DEEP[0]),
    # THUDM/GLM-4-9B-0414: the next role is the stop
    Shape("GLM-4", GLM4, (*GLM, "<|endoftext|>"), GLM_END, tools=True),
    # zai-org/GLM-4.5-Air: a line break before everything
    Shape("GLM-4.5", GLM45, (*GLM, *THINK, "<|endoftext|>"), GLM_END, tools=True),
    Shape("GLM-4.5, not thinking", GLM45, (*GLM, *THINK, "<|endoftext|>"), GLM_END,
          kwargs={"enable_thinking": False}, tools=True),
    # ibm-granite/granite-3.3-8b-instruct
    Shape("Granite 3", GRANITE, ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>",
          "<|tool_call|>"), ("<|end_of_text|>",), tools=True),
    # CohereLabs/c4ai-command-r7b-12-2024: the answer's own marks are the model's
    Shape("Cohere 2", COHERE, COHERE_TOKENS, ("<|END_OF_TURN_TOKEN|>",), bos="<BOS_TOKEN>"),
    # ByteDance-Seed/Seed-OSS-36B-Instruct, thinking_budget=0: its prompt thinks itself
    Shape("Seed-OSS", SEED, ("<seed:eos>",), ("<seed:eos>",), thinks="<seed:think>"),
    Shape("Seed-OSS at 0", SEED, ("<seed:eos>",), ("<seed:eos>",), kwargs={"thinking_budget": 0}),
    # upstage/Solar-Open-100B: reads `reasoning` alone, writes thoughts as a message of their own
    Shape("Solar Open", SOLAR, ("<|stop|>",), ("<|stop|>",), thinks="<|think|>"),
    # allenai/OLMo-2-1124-7B-Instruct: roles are words, the last answer ends without a line break
    Shape("OLMo 2", OLMO2, ("<|endoftext|>",), ("<|endoftext|>",), bos="<|endoftext|>"),
    # allenai/Olmo-3-7B-Instruct
    Shape("OLMo 3", chatml("{{- m.content }}"), (*IM, "<|endoftext|>"), ("<|im_end|>",)),
    # nvidia/Nemotron-Mini-4B-Instruct: the next role's mark is the stop
    Shape("Nemotron", NEMOTRON, ("<extra_id_0>", "<extra_id_1>", "</s>"), ("</s>", "<extra_id_1>")),
    # HuggingFaceTB/SmolLM2-135M-Instruct
    Shape("SmolLM2", chatml("{{- m.content }}"), IM, ("<|im_end|>",)),
    # HuggingFaceTB/SmolLM3-3B without thinking: every answer stands behind an empty think block
    Shape("SmolLM3, not thinking", chatml(
        "{%- if loop.last %}{{- '<think>\\n\\n</think>\\n' }}{%- endif %}{{- m.content }}",
        "{{- '<think>\\n\\n</think>\\n' }}"), (*IM, *THINK[:2]), ("<|im_end|>",)),
    # moonshotai/Kimi-K2-Instruct, Moonlight
    Shape("Kimi K2", KIMI, KIMI_TOKENS, ("<|im_end|>",), tools=True),
    # MiniMaxAI/MiniMax-M2
    Shape("MiniMax M2", MINIMAX, ("]~!b[", "]~b]", "[e~[", *THINK[:2]), ("[e~[",)),
    # lmsys/vicuna-7b-v1.5: words only, and a space that belongs to the prompt
    Shape("Vicuna", "{%- for m in messages %}{{- m.role | upper + ': ' + m.content }}"
          "{{- '</s>' if m.role == 'assistant' else ' ' }}{%- endfor %}"
          "{%- if add_generation_prompt %}{{- 'ASSISTANT: ' }}{%- endif %}", ("</s>",), ("</s>",)),
)  # fmt: skip
