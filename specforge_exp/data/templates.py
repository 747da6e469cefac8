"""A chat template that renders the beginnings of one conversation, many times over.

transformers copies all messages for each rendering, and its sandbox asks for each attribute anew
whether it is safe: most of the time of a long conversation. Here the messages are copied once, by
transformers, and the verdicts are remembered; template, sandbox and arguments are the same.
"""

import json
from dataclasses import dataclass
from functools import cached_property, lru_cache
from inspect import signature
from typing import Any

from jinja2 import Template
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from specforge_exp.data.messages import Message
from specforge_exp.data.rendering import TODAY, on_day, refused, render

SEEN = "{{ messages | tojson }}"
"""A template that shows what templates see: what transformers makes of messages."""
METHODS = frozenset(dir(dict))
SAFE = {(str, name) for name in dir(str) if name[0] != "_" and "format" not in name} | {
    (LoopContext, name) for name in ("first", "last", "index", "index0", "length")
}
"""What the sandbox hands out as it is."""
SCALARS = (str, int, float, bool, type(None))
RENDER = PreTrainedTokenizerBase.apply_chat_template
COMPILE = vars(chat_template_utils).get("_compile_jinja_template")
"""Of transformers 5.17 to 5.24; None: of another one, which renders all by itself."""
NOT_OF_TEMPLATES = {*signature(RENDER).parameters, "messages", "conversations"} - {"tools"}
"""Names of arguments that mean something to transformers."""


class RememberingSandbox(ImmutableSandboxedEnvironment):
    """The same sandbox. What is safe depends on an object's type and the attribute's name alone."""

    verdicts: dict[tuple[type, str], bool] = {}  # noqa: RUF012 (for all of them)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """An attribute, or an item; an entry of a message is no attribute of a dict."""
        kind = type(obj)
        if (kind, attribute) in SAFE:
            return getattr(obj, attribute)
        if kind is not dict or attribute in METHODS:
            return super().getattr(obj, attribute)
        if attribute in obj:
            return obj[attribute]
        return self.undefined(obj=obj, name=attribute)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """As it was the first time."""
        key = type(obj), attr
        if key not in self.verdicts:
            self.verdicts[key] = super().is_safe_attribute(obj, attr, value)
        return self.verdicts[key]


@lru_cache
def compiled(template: str) -> Template:
    """A chat template, ready to run."""
    assert COMPILE is not None
    sandbox = COMPILE(template).environment.overlay()
    sandbox.__class__ = RememberingSandbox
    made: Template = sandbox.from_string(template)
    return made


@dataclass
class Renderings:
    """What a chat template makes of messages that come again and again."""

    tokenizer: Any
    messages: list[Message]
    kwargs: dict[str, Any]

    def text(self, messages: list[Message], prompt: bool = False) -> str:
        """What `render` returns, or `prompt_text` for a prompt; raises Unrenderable."""
        if not messages or not self.direct:
            asked = {"add_generation_prompt": True} if prompt else {}
            return render(self.tokenizer, messages, {**self.kwargs, **asked})
        try:
            seen = self.seen
            if new := [message for message in messages if id(message) not in seen]:
                seen = seen | self.as_seen(new)
            shown = [seen[id(message)] for message in messages]
            return self.template.render(
                self.arguments, messages=shown, add_generation_prompt=prompt
            )
        except Exception as error:  # templates raise whatever their author chose
            raise refused(error) from None

    @cached_property
    def direct(self) -> bool:
        """Whether a rendering is the template's alone: nothing else is asked of the tokenizer."""
        own = type(self.tokenizer).apply_chat_template is RENDER
        plain = all(type(value) in SCALARS for key, value in self.kwargs.items() if key != "tools")
        ours = own and plain and not NOT_OF_TEMPLATES & self.kwargs.keys()
        return ours and COMPILE is not None

    @cached_property
    def template(self) -> Template:
        """Compiled; told the day."""
        own = self.tokenizer.get_chat_template(tools=self.kwargs.get("tools"))
        return compiled(on_day(own, self.kwargs[TODAY]) if TODAY in self.kwargs else own)

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """What the template is given beside the messages."""
        named = {key: value for key, value in self.kwargs.items() if key != TODAY}
        return {**self.tokenizer.special_tokens_map, "documents": None, "tools": None, **named}

    @cached_property
    def seen(self) -> dict[int, Message]:
        """The messages of the conversation as templates see them."""
        return self.as_seen(self.messages)

    def as_seen(self, messages: list[Message]) -> dict[int, Message]:
        """Messages as templates see them, by place in memory; tools that are none are refused."""
        tools = self.kwargs.get("tools")
        text = RENDER(self.tokenizer, messages, tools, chat_template=SEEN, tokenize=False)
        return dict(zip(map(id, messages), json.loads(str(text)), strict=True))
