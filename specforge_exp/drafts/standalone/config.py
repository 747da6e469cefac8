"""The options of a stand-alone draft."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from specforge_exp.config.checks import allow, minimums
from specforge_exp.config.choices import DraftConfig
from specforge_exp.errors import InputError


@dataclass
class StandaloneConfig(DraftConfig):
    """Which small model it is."""

    steps_option: ClassVar[str] = "horizon"
    replayed: ClassVar[bool] = True
    quiet: ClassVar[tuple[str, ...]] = ("draft_vocab_size",)
    defining: ClassVar[tuple[str, ...]] = ("path", "config")

    _target_: str = "specforge_exp.drafts.standalone.Standalone"
    """Dotted path of the draft's class."""
    path: str | None = None
    """Hub id or folder of a causal model with the target's tokenizer; null: the shape of the target
    itself, changed by `config`."""
    init: str | None = None
    """weights: those of `path`; random: its configuration alone; null: weights where there is a
    path."""
    config: dict[str, Any] = field(default_factory=dict)
    """init=random: entries of the configuration that differ; without a path by default
    num_hidden_layers: 4."""
    horizon: int = 7
    """Tokens after a slot that the simulated accepted length looks at, and that onpolicy=replay
    proposes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        minimums(self, "draft.", horizon=1)
        self.init = self.init or ("random" if self.path is None else "weights")
        allow(self, "draft.", init="weights random")
        if self.path is None and self.init == "random" and not self.config:
            self.config = {"num_hidden_layers": 4}
        if self.init == "weights" and (self.path is None or self.config):
            raise InputError(
                "draft.init=weights needs draft.path=<folder or hub id> and no draft.config; a new "
                "draft is draft.init=random with draft.config='{num_hidden_layers: 4}'"
            )

    def matters(self) -> dict[str, Any]:
        """As `DraftConfig.matters`, without an `init` that says what `path` says."""
        kept, usual = super().matters(), "random" if self.path is None else "weights"
        return kept if kept.pop("init") == usual else kept | {"init": self.init}

    @property
    def steps(self) -> int:
        """One: every position is trained on its next token."""
        return 1

    @property
    def replay_length(self) -> int:
        """The horizon: a chain of its own tokens may be of any length."""
        return self.horizon

    @property
    def origin(self) -> str | None:
        """The model of `path`."""
        return self.path

    @property
    def features(self) -> int:
        """None: it reads tokens."""
        return 0
