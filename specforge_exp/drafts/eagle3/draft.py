"""EAGLE-3 as the stages use it: made, trained, exported, loaded and asked to draft.

Shape suffixes: T tokens, H hidden, A three target hidden sizes, K steps, D draft vocabulary,
V target vocabulary.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from specforge_exp.drafts.eagle3 import training
from specforge_exp.drafts.eagle3.chains import make_chains, nothing_to_learn
from specforge_exp.drafts.eagle3.config import Eagle3Config, EagleConfig
from specforge_exp.drafts.eagle3.decoder import Eagle3Decoder
from specforge_exp.drafts.eagle3.export import (
    AUX,
    KEYS,
    as_speculators,
    check_export,
    export_config,
    exported_tensors,
    exported_variant,
    read_any,
    warn_of_unread,
)
from specforge_exp.drafts.eagle3.model import Eagle3Model
from specforge_exp.drafts.eagle3.unroll import Fed, unroll
from specforge_exp.drafts.folder import check_tensors
from specforge_exp.drafts.head_loss import Heads, head_and_loss
from specforge_exp.drafts.replay import ReplayChains, counted_chains, proposing_chains
from specforge_exp.drafts.rows import Chains
from specforge_exp.drafts.speculators import without_targets
from specforge_exp.drafts.start import copy_matching, start_at_the_end, start_random
from specforge_exp.errors import InputError
from specforge_exp.losses import Loss
from specforge_exp.target import Head, Target, draft_shape
from specforge_exp.training.batches import Batch, moved
from specforge_exp.training.objective import Outcome, Replay, Sample

if TYPE_CHECKING:
    from transformers import LlamaConfig

Options = TypeVar("Options", bound=EagleConfig)
"""The configuration of a kind."""


class Eagle(Eagle3Model[Options]):
    """What the drafts of this architecture share: made, exported, loaded, compared."""

    own: ClassVar[tuple[str, ...]] = ()
    """Entries of config.json that only this kind has."""

    sums_steps = True

    @classmethod
    def entries(cls, cfg: Options, vocabulary: int) -> dict[str, Any]:
        """The entries of `own`, for a target with so many tokens."""
        return {}

    def fed(self, cfg: Options) -> Fed:
        """What its steps are fed."""
        return Fed()

    @classmethod
    def new(cls, target: Target, cfg: Options, mapping: dict[str, Tensor], seed: int) -> Self:
        """A fresh draft in fp32; `cfg.start` says what it knows already."""
        torch.manual_seed(seed)
        config = draft_config(target.model.config, cfg)
        config.update(cls.entries(cfg, config.vocab_size))
        d2t, t2d = mapping["d2t"].clone(), mapping["t2d"].clone()
        draft = cls(config, target.embed_VH, d2t, t2d, cfg)
        start_random(draft)
        if cfg.start == "target":
            draft.not_copied = start_from_target(draft, target)
        return draft

    @staticmethod
    def target_layers(cfg: Options, layers: int) -> list[int]:
        """The layers (0-based) of a target that feed the draft unless model.aux_layers says so.

        Raises:
            InputError: the target has too few.
        """
        if layers < 7:
            raise InputError(
                f"the target has {layers} layers; the default auxiliary layers need at least 7. "
                "Name three with model.aux_layers=[a,b,c]"
            )
        return [1, layers // 2 - 1, layers - 4]

    @classmethod
    def load(cls, folder: Path, target: Target) -> Self:
        """A draft from an exported folder, in fp32, checked against its target.

        Raises:
            InputError: a file is missing or broken, a tensor is missing, superfluous or of the
                wrong shape, d2t and t2d disagree, or the draft was made for another target.
        """
        from transformers import LlamaConfig

        config, tensors = cls.opened(folder, len(target.layers))
        check_export(folder, config, target)
        for name, size in (("d2t", "draft_vocab_size"), ("t2d", "vocab_size")):
            if name not in tensors or tensors[name].shape != (config[size],):
                raise InputError(
                    f"{folder}: {name} is missing or is not {size}={config[size]} long"
                )
        variant = exported_variant(folder, config)
        llama = LlamaConfig(
            num_hidden_layers=variant.num_layers,
            **{key: config[key] for key in (*KEYS, *cls.own)},
        )
        draft = cls(llama, target.embed_VH, tensors["d2t"], tensors["t2d"], variant)
        tensors = without_targets(folder, tensors, draft.shared)
        check_tensors(folder, draft.state_dict(), tensors)
        draft.load_state_dict(tensors)
        return draft

    @classmethod
    def opened(cls, folder: Path, layers: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `export.read_any`."""
        return read_any(folder, cls.algorithm, cls.own, layers)

    @classmethod
    def declared(cls, config: dict[str, Any]) -> dict[str, Any]:
        """As `Draft.declared`."""
        options = vars(exported_variant(Path(), config))
        options |= {name: config[name] for name in ("draft_vocab_size", *cls.own)}
        layers = {"model.aux_layers": config["eagle_config"][AUX]}
        return {f"draft.{name}": value for name, value in options.items()} | layers

    @property
    def shared(self) -> dict[str, Tensor]:
        """The embeddings."""
        return {"embed_tokens.weight": self.embed_VH}

    def written(self, target: Target, target_path: str) -> dict[str, Any]:
        """config.json in Hugging Face's layout."""
        own = {name: getattr(self.config, name) for name in self.own}
        return export_config(self, target, target_path) | own

    def exported(self) -> dict[str, Tensor]:
        """See `exported_tensors`; says what an engine does not read."""
        warn_of_unread(self.variant)
        return exported_tensors(self)

    def respelt(
        self, config: dict[str, Any], tensors: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `as_speculators`."""
        return as_speculators(config, tensors, self.own)

    def states_and_heads(
        self, sample: Sample, target_head: Head, loss: Loss, cfg: Options, chains: Chains
    ) -> tuple[list[Tensor], Heads]:
        """What `head_and_loss` compares; arguments as in `Draft.objective`, and the rows."""
        if loss.cfg.lambda_hard and not bool(self.t2d.all()):
            raise InputError(
                "loss.lambda_hard compares with the text, whose tokens the draft must all know: "
                "it needs draft.draft_vocab_size=null"
            )
        states = unroll(self, chains, sample.ids_T, sample.aux_TA, self.fed(cfg))
        return states, self.heads(sample, target_head)

    def heads(self, sample: Sample, target_head: Head) -> Heads:
        """Both heads for a sample."""
        draft_id_V = self.t2d.cumsum(0) - 1
        next_T = draft_id_V[torch.cat([sample.ids_T[1:], sample.ids_T[:1]])].clamp(min=0)
        return Heads(
            self.norm, self.lm_head.weight, self.draft_ids_D, target_head, sample.last_TH, next_T,
            self.host_ids_D,
        )  # fmt: skip

    @torch.no_grad()
    def all_logits(self, cfg: Options, ids_1T: Tensor, aux_1TA: Tensor) -> Tensor:
        """Logits of every slot and step of one conversation, fp32, for comparisons."""
        everywhere_T = torch.ones(ids_1T.shape[1], dtype=torch.long)
        chains = make_chains("speculators", everywhere_T, [len(everywhere_T)], cfg.steps)
        states = unroll(self, chains, ids_1T[0], aux_1TA[0], self.fed(cfg))
        return torch.cat([self.lm_head(self.norm(state)) for state in states])


class Eagle3(Eagle[Eagle3Config]):
    """An EAGLE-3 draft."""

    algorithm: ClassVar[str] = "eagle3"

    @staticmethod
    def sglang_options(chain_length: int) -> dict[str, Any]:
        """SGLang's options for chains of this length; the folder of the draft comes to them."""
        return {
            "speculative_algorithm": "EAGLE3", "speculative_num_steps": chain_length,
            "speculative_eagle_topk": 1, "speculative_num_draft_tokens": chain_length + 1,
        }  # fmt: skip

    @staticmethod
    def vllm_options(chain_length: int) -> dict[str, Any]:
        """vLLM's configuration of speculation with chains of this length, but for the folder."""
        return {"method": "eagle3", "num_speculative_tokens": chain_length}

    def fed(self, cfg: Eagle3Config) -> Fed:
        """Its own states; the peer's windows stay where the chain began."""
        return Fed(windows_move=cfg.supervision != "speculators")

    def decoder(self) -> Eagle3Decoder:
        """A decoder for one request."""
        return Eagle3Decoder(self)

    @staticmethod
    def nothing_to_learn(cfg: Eagle3Config, turns_T: Tensor, lengths_B: Tensor) -> dict[str, int]:
        """See `chains.nothing_to_learn`."""
        return nothing_to_learn(cfg.supervision, turns_T, lengths_B)

    def denominators(self, cfg: Eagle3Config, batch: Batch) -> Tensor:
        """See `training.denominators`."""
        return training.denominators(cfg, batch)

    def objective(
        self,
        sample: Sample,
        target_head: Head,
        loss: Loss,
        cfg: Eagle3Config,
        window_K: Tensor,
    ) -> Outcome:
        """Unroll the draft over packed conversations and compare it with the target.

        The gradient of its head exists when this returns. The peers' ways to supervise use the
        peers' own terms with the loss's weights. Arguments as in `Draft.objective`.
        """
        chains = make_chains(cfg.supervision, sample.turns_T, sample.lengths, cfg.ttt_length)
        states, heads = self.states_and_heads(sample, target_head, loss, cfg, chains)
        window_K = window_K.to(sample.ids_T.device)
        tokens = len(sample.ids_T)
        weights = training.weighting(loss, cfg, window_K, tokens, None)
        if cfg.supervision == "specforge" and (loss.cfg.lambda_lk or loss.cfg.lambda_lk_alpha):
            with torch.no_grad():
                first = head_and_loss(chains, states, heads, weights)
            weights = training.weighting(loss, cfg, window_K, tokens, first)
        outcome = head_and_loss(chains, states, heads, weights)
        return replace(outcome, flops=outcome.flops + training.needed_flops(self, chains))

    @torch.no_grad()
    def propose(
        self, sample: Sample, anchor_R: Tensor, steps: int, choose: Callable[[int, Tensor], Tensor]
    ) -> tuple[Tensor, float]:
        """Chains of tokens [steps, R] after some positions of packed conversations, and FLOP.

        Args:
            sample: the conversations.
            anchor_R: the positions, on the CPU.
            steps: tokens of each chain.
            choose: (step, logits [R, D]) -> draft ids [R].
        """
        tokens: list[Tensor] = []

        def extend(step: int, state_RH: Tensor) -> Tensor:
            normed_RH = self.norm(state_RH)
            logits_RD = (normed_RH @ self.lm_head.weight.to(normed_RH.dtype).T).float()
            id_R = choose(step, logits_RD)
            tokens.append(id_R + self.d2t[id_R])
            return tokens[-1]

        chains = proposing_chains(sample.lengths, anchor_R, steps)
        unroll(self, chains, sample.ids_T, sample.aux_TA, Fed(extend=extend))
        head = 2.0 * self.lm_head.weight.numel() * steps * len(anchor_R)
        return torch.stack(tokens), head + training.needed_flops(self, chains) / 3

    def replayed(
        self, cfg: Eagle3Config, sample: Sample, replay: Replay
    ) -> tuple[ReplayChains, list[Tensor], float]:
        """Proposed chains as far as they count, their states after every step, and FLOP."""
        chains = counted_chains(sample.lengths, replay)
        proposed_P = moved(replay.tokens_KR[:-1].flatten(), sample.ids_T.device)
        states = unroll(self, chains, sample.ids_T, sample.aux_TA, Fed(more_P=proposed_P))
        return chains, states, training.needed_flops(self, chains)


def draft_config(target_config: Any, cfg: EagleConfig) -> "LlamaConfig":
    """Shapes of a draft for this target: Llama layers as wide as the target's.

    Raises:
        InputError: the draft's vocabulary is larger than the target's.
    """
    from transformers import LlamaConfig

    shape = draft_shape(target_config)
    return LlamaConfig(
        **shape,
        architectures=["LlamaForCausalLMEagle3"],
        target_hidden_size=shape["hidden_size"],
        num_hidden_layers=cfg.num_layers,
        draft_vocab_size=cfg.vocabulary(shape["vocab_size"]),
        pad_token_id=None,
    )


@torch.no_grad()
def start_from_target(draft: Eagle3Model[Any], target: Target) -> list[str]:
    """Begin where the target ends: the projections and norms of its last layers, its last norm and
    head, fed its highest captured state; returns what was not to be had: matrices whose half for
    the state stays random, norms that stay 1, biases.

    The embedding's half of the first layer stays random, its norm 1: the first steps teach them.
    The state's norm is the target's before attention. Queries and keys are left out where the
    target norms or rotates heads in another way. What scales the target's logits is multiplied into
    the head.
    """
    H, number = draft.config.hidden_size, len(draft.stack)
    if number > len(target.layers):
        raise InputError(
            f"draft.num_layers={number}, and the target has {len(target.layers)} layers to start "
            "from; draft.start=random needs none"
        )
    missing: list[str] = []
    for layer, weights in zip(draft.stack, target.last_layers(number), strict=True):
        state_norm = {"hidden_norm.weight": "input_layernorm.weight"}
        for name, weight in layer.named_parameters():
            if layer.first and name == "input_layernorm.weight":
                continue
            wide = name[10:16] in ("q_proj", "k_proj", "v_proj")
            own = weight[:, -H:] if wide else weight
            normed_heads = wide and name.replace("_proj", "_norm") in weights
            copied = not normed_heads and copy_matching(own, weights, state_norm.get(name, name))
            missing += [] if copied or name in missing else [name]
    missing += [name for name in ("input_norm", "fc_norm") if hasattr(draft, name)]
    missing += start_at_the_end(draft, target, weights)
    rows_DH = target.head.weight_VH[draft.draft_ids_D.to(target.device)]
    draft.lm_head.weight.copy_(rows_DH).mul_(target.head.scale)
    return missing
