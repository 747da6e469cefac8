"""What every draft has: an objective that is called as a module, and a feed-forward block.

Shape suffixes: T packed tokens, B conversations, H hidden, K divisors, V target vocabulary.
"""

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specforge_exp.config import DraftConfig
from specforge_exp.drafts.folder import read_export, write_export
from specforge_exp.drafts.kernels.check import AttentionHeads, use_kernels
from specforge_exp.drafts.layers import narrowed_once
from specforge_exp.drafts.replay import replay_outcome
from specforge_exp.drafts.rows import number_in_each
from specforge_exp.drafts.speculators import speculators_layout
from specforge_exp.losses import Loss
from specforge_exp.sharding import gradient_of
from specforge_exp.target import Head, Target
from specforge_exp.training.objective import Outcome, Sample

Options = TypeVar("Options", bound=DraftConfig)
"""The draft's own configuration."""


class Draft(nn.Module, Generic[Options]):
    """A draft in training; a subclass has `objective`.

    One that onpolicy=replay can train (`replayed` of its options) also has
    `propose(sample, anchor_R, steps, choose)`, tokens [steps, R] after some positions, and FLOP;
    `replayed(cfg, sample, replay)`, chains, states of every step and FLOP; and `heads(sample,
    target_head)`.
    """

    optional: ClassVar[tuple[str, ...]] = ()
    """Parts, by the beginning of their weights' names, that a start may lack as a whole."""
    algorithm: ClassVar[str]
    """speculators' name of it, where that has it."""
    plain: ClassVar[Any] = None
    """The class of what it is without all of them; None: it has none."""
    sums_steps = False
    """Whether its loss is the sum of its steps' means; else the mean over all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.not_copied: list[str] = []  # of the target by a start that copies, by name
        self.gradient_checkpointing = False
        self.compute_dtype = torch.float32  # of training; weights and their gradients stay fp32

    @cached_property
    def host_ids_D(self) -> Tensor:
        """`draft_ids_D` on the CPU; a draft's vocabulary does not change."""
        ids_D: Any = self.draft_ids_D
        host_D: Tensor = ids_D.cpu()
        return host_D

    def trains_on(self, device: torch.device) -> None:
        """Move to where it trains: on CUDA in bfloat16 and by `kernels`, where those are usable."""
        self.to(device)
        self.compute_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        use_kernels(device, self.attention_heads)

    @property
    def attention_heads(self) -> AttentionHeads | None:
        """Of the attention that `kernels` compute; None: it is another's, or there is none."""
        names = "num_key_value_heads num_attention_heads head_dim".split()
        config = getattr(self, "config", None)
        M, N, E = (getattr(config, name, None) for name in names)
        return (M, N // M, E) if M and N and E else None

    @property
    def units(self) -> list[nn.Module]:
        """Its layers, as far as they are called as modules: a sharding gathers each by itself."""
        return []

    @classmethod
    def new(cls, target: Target, cfg: Options, mapping: dict[str, Tensor], seed: int) -> Self:
        """A fresh draft in fp32.

        Args:
            target: what it will draft for.
            cfg: its options.
            mapping: d2t and t2d, the draft's vocabulary; see `vocabulary`.
            seed: of its random weights.
        """
        raise NotImplementedError

    @classmethod
    def restored(cls, target: Target, cfg: Options, tensors: dict[str, Tensor]) -> Self:
        """The draft of a checkpoint, whose tensors hold the draft's vocabulary too."""
        draft = cls.new(target, cfg, tensors, 0)
        draft.load_state_dict(tensors)
        return draft

    @classmethod
    def opened(cls, folder: Path, layers: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """An exported folder of any layout: config.json as `written`, tensors by our names.

        Args:
            folder: of the draft.
            layers: of its target.

        Raises:
            InputError: a file or an entry is missing or broken, or says what is not known here.
        """
        return read_export(folder)

    @staticmethod
    def declared(config: dict[str, Any]) -> dict[str, Any]:
        """The options, by their keys, that a config.json as of `written` means."""
        return {}

    def written(self, target: Target, target_path: str) -> dict[str, Any]:
        """config.json in Hugging Face's layout."""
        return {}

    def exported(self) -> dict[str, Tensor]:
        """The tensors in that layout."""
        return self.state_dict()

    def respelt(
        self, config: dict[str, Any], tensors: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What speculators' configuration of it has of its own, and the tensors by its names."""
        raise NotImplementedError

    def write(
        self,
        folder: Path,
        target: Target,
        target_path: str,
        dtype: torch.dtype,
        drafted: int | None = None,
    ) -> None:
        """Write the folder that engines load.

        Args:
            folder: where to.
            target: the draft's.
            target_path: its name.
            dtype: of the weights there.
            drafted: in speculators' layout, for so many tokens a verification; None: in Hugging
                Face's.
        """
        config, tensors = self.written(target, target_path), self.exported()
        if drafted is not None:
            own, tensors = self.respelt(config, tensors)
            config = speculators_layout(config, own, self.algorithm, drafted, target)
        write_export(folder, config, tensors, dtype)

    @property
    def shared(self) -> dict[str, Tensor]:
        """What it reads of its target, by the names that exports of others have for it."""
        return {}

    def objective(
        self, sample: Sample, target_head: Head, loss: Loss, cfg: Options, window_K: Tensor
    ) -> Outcome:
        """Compare the draft with the target; gradients of some weights exist when this returns.

        Args:
            sample: packed conversations and the target's states.
            target_head: the target's.
            loss: what is compared.
            cfg: the draft's options.
            window_K: the divisors of the optimiser window: the sum of `denominators` over it.
        """
        raise NotImplementedError

    @staticmethod
    def nothing_to_learn(cfg: Options, turns_T: Tensor, lengths_B: Tensor) -> dict[str, int]:
        """How many of packed conversations with these turns train nothing, by reason."""
        empty_B = number_in_each(turns_T > 0, lengths_B) == 0
        return {"without a supervised token": int(empty_B.sum())}

    @narrowed_once()
    def forward(
        self, sample: Sample, target_head: Head, loss: Loss, cfg: Options, window_K: Tensor
    ) -> tuple[Tensor, Outcome]:
        """`objective`, called as a module so that the hooks of a sharding run; (loss, outcome).

        Gradients exist from the start: what is added to them must be the same tensors everywhere.
        """
        if torch.is_grad_enabled():
            for weight in self.parameters():
                gradient_of(weight)
        if loss.proposed is not None and sample.step < loss.proposed.start:
            loss = replace(loss, scale=1.0)
        on_text, measured = window_K[: cfg.steps], torch.is_grad_enabled() and loss.scale == 0
        with torch.set_grad_enabled(torch.is_grad_enabled() and not measured):
            outcome = self.objective(sample, target_head, loss, cfg, on_text)
        if measured:  # a third of what forward and backward need
            outcome = replace(outcome, flops=outcome.flops / 3)
        if sample.replay is not None and loss.proposed is not None:
            more = replay_outcome(self, sample, target_head, loss, cfg, window_K[cfg.steps :])
            outcome = replace(
                outcome, loss=outcome.loss + more.loss, sums=outcome.sums | more.sums,
                flops=outcome.flops + more.flops,
            )  # fmt: skip
        return outcome.loss, outcome


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden: int, size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, size, bias=False)
        self.up_proj = nn.Linear(hidden, size, bias=False)
        self.down_proj = nn.Linear(size, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out
