"""How chat talks: with whom, and how it is answered."""

import re
from dataclasses import dataclass

from specforge_exp.config.checks import finite, minimums, only_with, up_to_one
from specforge_exp.errors import InputError


@dataclass
class ChatConfig:
    """python chat.py"""

    url: str | None = None
    """Base URL of an OpenAI-compatible server, e.g. http://127.0.0.1:30000/v1; its model and key as
    engine.served_name and engine.api_key say; `seed` and model.* are not sent. null: model.path, in
    this process."""
    draft: str = "auto"
    """auto: the run's export where there is one; true: that one, or an error; false (--no-draft):
    the target alone; or the folder of an export."""
    system: str = ""
    """The system message; empty: none."""
    temperature: float = 0.7
    """Sampling temperature; 0: greedy."""
    top_p: float = 1.0
    """Sample among the most likely tokens that reach this probability together; 1: off."""
    max_tokens: int = 1024
    """Most new tokens of one answer."""
    history: str | None = None
    """A file that keeps the lines typed, for the up arrow of later chats; null: of this one."""

    def __post_init__(self) -> None:
        self.draft = {"True": "true", "False": "false"}.get(self.draft, self.draft)
        finite("chat", self)
        minimums(self, "chat.", temperature=0, max_tokens=1)
        only_with(self, "chat.", self.url is None, "chat.url=null", "draft")
        up_to_one(self, "chat.", top_p="(0, 1]")
        if self.url is not None and not re.match("https?://.", self.url):
            raise InputError(
                f"chat.url={self.url} must begin with http:// or https://, and ends in /v1 mostly"
            )
