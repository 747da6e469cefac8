"""Any causal language model with the target's tokenizer as a draft (SGLang: STANDALONE, vLLM:
draft_model), distilled on the target's distributions over its own answers (DistillSpec, arXiv
2310.08461).

A row is a position p whose token and next token belong to one assistant turn; the draft's state
there is compared with the target's. What the draft sees at p + k is what it sees when its k tokens
stood, so products of acceptance rates along a turn are exactly those of serving.

Shape suffixes: T packed tokens, H hidden, K horizon, R rows, D draft vocabulary, V target
vocabulary.
"""

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from specforge_exp.causal.model import (
    Causal,
    choose_attention,
    needed_flops,
    new_model,
    without_dropout,
)
from specforge_exp.config import ModelConfig
from specforge_exp.config.causal import CausalConfig
from specforge_exp.drafts.draft import Draft
from specforge_exp.drafts.eagle3.chains import turn_masks
from specforge_exp.drafts.head_loss import Heads, head_and_loss
from specforge_exp.drafts.outcome import RowSums
from specforge_exp.drafts.replay import ReplayChains, counted_chains
from specforge_exp.drafts.rows import Chains, document_bounds
from specforge_exp.drafts.standalone.config import StandaloneConfig
from specforge_exp.drafts.standalone.decoder import StandaloneDecoder
from specforge_exp.drafts.standalone.replay import chain_states, proposals
from specforge_exp.drafts.weighting import weighted
from specforge_exp.errors import InputError
from specforge_exp.losses import Loss
from specforge_exp.target import Head, Target, take_dtype
from specforge_exp.target.anatomy import read_end
from specforge_exp.target.files import plain
from specforge_exp.target.head import Ending
from specforge_exp.training.batches import Batch, moved
from specforge_exp.training.objective import Outcome, Replay, Sample

log = logging.getLogger(__name__)


class NormedAlready:
    """In the place of a draft's norm: a model's last states come out normed."""

    def __call__(self, x: Tensor) -> Tensor:
        """As it is."""
        return x

    def backward(self, x: Tensor, gradient: Tensor) -> Tensor:
        """As it is."""
        return gradient


class Standalone(Draft[StandaloneConfig]):
    """A small model that drafts by itself."""

    draft_ids_D: Tensor

    def __init__(self, model: Any, target: Target) -> None:
        super().__init__()
        model.requires_grad_(True)
        without_dropout(model)
        self.causal = Causal(model, CausalConfig())
        rows, known = len(model.get_output_embeddings().weight), len(target.head_weight_VH)
        if rows > known:
            raise InputError(
                f"the draft has {rows} tokens, the target {known}: it must have the target's "
                "tokenizer, and no more rows in its head"
            )
        self.register_buffer("draft_ids_D", torch.arange(rows), persistent=False)

    @property
    def model(self) -> Any:
        """The model as transformers has it."""
        return self.causal.model

    @property
    def units(self) -> list[nn.Module]:
        """Its layers."""
        return self.causal.units

    @classmethod
    def new(
        cls, target: Target, cfg: StandaloneConfig, mapping: dict[str, Tensor], seed: int
    ) -> Self:
        """The model of `draft.path`, or a fresh one; fp32.

        Raises:
            InputError: it cannot be loaded, has another tokenizer, or a head that is more than
                products.
        """
        if cfg.path is not None:
            same_tokens(cfg.path, target.model.config._name_or_path)
        model = grown(small_model(target, cfg, seed), len(target.head_weight_VH))
        return cls(model, target).checked()

    @classmethod
    def restored(cls, target: Target, cfg: StandaloneConfig, tensors: dict[str, Tensor]) -> Self:
        """The draft of a checkpoint."""
        model = small_model(target, replace(cfg, init="random"), 0)
        names = {id(weight): name for name, weight in cls(model, target).named_parameters()}
        rows = len(tensors[names[id(model.get_output_embeddings().weight)]])
        draft = cls(grown(model, rows), target).checked()
        draft.load_state_dict(tensors)
        return draft

    def checked(self) -> Self:
        """Choose its attention; refuse what cannot be compared row by row or packed."""
        causal = self.causal
        if next(self.parameters()).is_meta:  # a process that is dealt its weights: as the first
            causal.take_attention(causal.model.config.get_text_config()._attn_implementation)
            return self
        _, head = read_end(self.model, causal.decoder)
        if head.ending != Ending() or head.bias_V is not None:
            kind = self.model.config.model_type
            raise InputError(
                f"a model of {kind} cannot be a stand-alone draft: its head scales, caps or adds"
            )
        try:
            name = choose_attention(self.model, causal.decoder, causal.cfg, torch.device("cpu"))
        except InputError as error:
            why = str(error).partition("; causal.")[0]  # an option of pretrain and sft
            raise InputError(
                f"draft.path: {why}, as a stand-alone draft is trained: take another model"
            ) from None
        causal.take_attention(name)
        return self

    @staticmethod
    def target_layers(cfg: StandaloneConfig, layers: int) -> list[int]:
        """None: it reads tokens."""
        return []

    @staticmethod
    def sglang_options(chain_length: int) -> dict[str, Any]:
        """SGLang's options for chains of this length; the folder of the draft comes to them."""
        return {
            "speculative_algorithm": "STANDALONE", "speculative_num_steps": chain_length,
            "speculative_eagle_topk": 1, "speculative_num_draft_tokens": chain_length + 1,
        }  # fmt: skip

    @staticmethod
    def vllm_options(chain_length: int) -> dict[str, Any]:
        """vLLM's configuration of speculation with chains of this length, but for the folder."""
        return {"method": "draft_model", "num_speculative_tokens": chain_length}

    @classmethod
    def load(cls, folder: Path, target: Target) -> Self:
        """A draft from an exported folder, in fp32, checked against its target."""
        same_tokens(str(folder), target.model.config._name_or_path)
        draft = cls(new_model(ModelConfig("draft", str(folder)), 0), target).checked()
        draft.model.eval()
        return draft

    def write(
        self,
        folder: Path,
        target: Target,
        target_path: str,
        dtype: torch.dtype,
        drafted: int | None = None,
    ) -> None:
        """Write a plain Hugging Face folder, with the target's tokenizer; the only layout of it."""
        model = copy.deepcopy(self.model)
        model.set_attn_implementation(target.text._attn_implementation)
        model.config.use_cache = True
        take_dtype(model, dtype)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(target_path, trust_remote_code=False).save_pretrained(folder)

    def decoder(self) -> StandaloneDecoder:
        """A decoder for one request."""
        return StandaloneDecoder(self.model, self.draft_ids_D)

    def denominators(self, cfg: StandaloneConfig, batch: Batch) -> Tensor:
        """Rows of a batch, [1]."""
        return torch.tensor([float(chains_of(batch).counts[0])], dtype=torch.float64)

    def objective(
        self, sample: Sample, target_head: Head, loss: Loss, cfg: StandaloneConfig, window_K: Tensor
    ) -> Outcome:
        """Compare it with the target at every row; as `Draft.objective`."""
        causal, device = self.causal, sample.ids_T.device
        self.model.train()
        if self.gradient_checkpointing and not self.model.is_gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        chains = chains_of(sample)
        with self.narrow(device):
            states_TH = causal.states(sample.ids_T, sample.lengths).to(self.compute_dtype)
        heads = self.heads(sample, target_head)
        scale_K = (1 / window_K.to(device).clamp(min=1)).float()
        outcome = head_and_loss(
            chains, [states_TH[moved(chains.slot_R, device) + 1]], heads,
            weighted(loss, scale_K, torch.ones_like(scale_K)),
            lambda sums: along_turns(sums, chains, cfg.horizon),
        )  # fmt: skip
        return replace(outcome, flops=outcome.flops + needed_flops(causal, sample.lengths, 0))

    def narrow(self, device: torch.device) -> torch.autocast:
        """Products in `compute_dtype`."""
        enabled = self.compute_dtype != torch.float32
        return torch.autocast(device.type, self.compute_dtype, enabled=enabled)

    def heads(self, sample: Sample, target_head: Head) -> Heads:
        """Both heads, and what the target's reads."""
        next_T = sample.ids_T.roll(-1).clamp(max=len(self.draft_ids_D) - 1)
        norm: Any = NormedAlready()
        return Heads(
            norm, self.model.get_output_embeddings().weight, self.draft_ids_D, target_head,
            sample.last_TH, next_T, self.host_ids_D,
        )  # fmt: skip

    def propose(
        self, sample: Sample, anchor_R: Tensor, steps: int, choose: Callable[[int, Tensor], Tensor]
    ) -> tuple[Tensor, float]:
        """As EAGLE-3's, over keys and values of its own."""
        tokens_KR = proposals(self, sample, anchor_R, steps, choose)
        read = [*sample.lengths, *[1] * ((steps - 1) * len(anchor_R))]
        head = 2.0 * self.model.get_output_embeddings().weight.numel() * tokens_KR.numel()
        return tokens_KR, head + needed_flops(self.causal, read, 0) / 3

    def replayed(
        self, cfg: StandaloneConfig, sample: Sample, replay: Replay
    ) -> tuple[ReplayChains, list[Tensor], float]:
        """Proposed chains as far as they count, their states after every step, and FLOP."""
        chains = counted_chains(sample.lengths, replay)
        proposed_P = replay.tokens_KR[:-1].flatten()
        states = chain_states(self, sample, replay, chains)
        read = [*sample.lengths, *[1] * len(proposed_P)]
        return chains, states, needed_flops(self.causal, read, 0)

    @torch.no_grad()
    def all_logits(self, cfg: StandaloneConfig, ids_1T: Tensor, aux_1TA: Tensor) -> Tensor:
        """Logits of every position, fp32, for comparisons."""
        states_TH = self.causal.states(ids_1T[0], [ids_1T.shape[1]])
        return F.linear(states_TH, self.model.get_output_embeddings().weight).float()


def small_model(target: Target, cfg: StandaloneConfig, seed: int) -> Any:
    """The draft's model, fp32; InputError when it cannot be made."""
    if cfg.path is not None and not cfg.config:
        return of_path(cfg.path, str(cfg.init), seed)
    source = target.text
    if cfg.path is not None:
        source = of_path(cfg.path, "random", seed).config
    config = copy.deepcopy(source)
    plain(config)
    unknown = [key for key in cfg.config if not hasattr(config, key)]
    if unknown:
        raise InputError(f"draft.config: {', '.join(unknown)} is not in a {config.model_type}'s")
    for key, value in cfg.config.items():
        setattr(config, key, value)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    torch.manual_seed(seed)
    try:
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=False
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"draft.config={cfg.config} makes no model: {error}") from None


def of_path(path: str, init: str, seed: int) -> Any:
    """`new_model` of draft.path."""
    try:
        return new_model(ModelConfig("draft", path, init=init), seed)
    except InputError as error:
        raise InputError(str(error).replace("model.path=", "draft.path=")) from None


def grown(model: Any, rows: int) -> Any:
    """With as many rows as the target, which engines want: the sizes of a family have one tokenizer
    and may have other numbers of unused rows (Qwen2.5-0.5B 151,936, Qwen2.5-7B 152,064)."""
    known = len(model.get_output_embeddings().weight)
    if known < rows:
        log.info("the draft's %d rows of tokens become %d, as the target's", known, rows)
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def same_tokens(path: str, target_path: str) -> None:
    """Refuse a draft with another tokenizer, as far as both have one."""
    try:
        own, targets = (
            AutoTokenizer.from_pretrained(p, trust_remote_code=False).get_vocab()
            for p in (path, target_path)
        )
    except Exception:  # a damaged tokenizer.json raises whatever it meets
        log.warning("%s and %s: their tokenizers cannot be compared", path, target_path)
        return
    if own != targets:
        other = next(t for t in {**targets, **own} if own.get(t) != targets.get(t))
        raise InputError(
            f"draft.path={path} has another tokenizer than the target (as in {other!r}); a "
            "stand-alone draft must have the target's"
        )


def chains_of(batch: Batch) -> Chains:
    """Slots before the positions whose token and next token belong to one assistant turn."""
    start_T, end_T = document_bounds(batch.lengths, batch.turns_T.device)
    (mask_T,) = turn_masks("inference", batch.turns_T, end_T, 1)
    slot_R = mask_T.nonzero()[:, 0]
    rows = [torch.ones(len(slot_R), dtype=torch.bool)]
    return Chains(start_T, end_T, batch.lengths, slot_R, [len(slot_R)], rows)


def along_turns(sums: RowSums, chains: Chains, horizon: int) -> RowSums:
    """Acceptance rates of `horizon` positions in a row, from every slot on, [K, R] each."""
    device, size = sums.alpha_KR.device, len(chains.end_T) + horizon
    alpha_T, counted_T = torch.zeros(size, device=device), torch.zeros(size, device=device).bool()
    slot_R = moved(chains.slot_R, device)
    alpha_T[slot_R], counted_T[slot_R] = sums.alpha_KR[0], sums.counted_KR[0]
    at_KR = slot_R + torch.arange(horizon, device=device)[:, None]
    return RowSums(alpha_T[at_KR], counted_T[at_KR])
