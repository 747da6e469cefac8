"""A model of transformers as what the training loop trains: loaded, checked, laid on processes.

Its weights stay fp32, its products run in `compute_dtype`. Nothing here knows a family: layers,
head and scale are found as `target.anatomy` finds them, packing is measured.

Shape suffixes: T packed tokens, N predicted rows, H hidden, V vocabulary, K divisors, B
conversations.
"""

import logging
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import is_flash_attn_2_available

from specforge_exp.causal.head import NextToken, Values, next_token_loss
from specforge_exp.config import ModelConfig
from specforge_exp.config.causal import CausalConfig
from specforge_exp.drafts.rows import number_in_each
from specforge_exp.errors import InputError
from specforge_exp.sharding import save_shared_once
from specforge_exp.target import packing
from specforge_exp.target.anatomy import find_layers, one_line, visited
from specforge_exp.target.files import model_config, not_loadable, plain, quantised
from specforge_exp.target.head import Ending
from specforge_exp.target.loading import check_weights, from_files, no_bars_in_logs
from specforge_exp.target.shape import each_layer
from specforge_exp.training.batches import Batch, moved
from specforge_exp.training.objective import Outcome

log = logging.getLogger(__name__)

FLASH = "flash_attention_2"


class Causal(nn.Module):
    """A causal language model and its next-token loss."""

    def __init__(self, model: Any, cfg: CausalConfig) -> None:
        super().__init__()
        self.model, self.cfg = model, cfg
        self.ending = Ending()
        self.documents = False  # whether its attention is `packing.by_document`
        self.compute_dtype = torch.float32
        save_shared_once(self)

    @cached_property
    def decoder(self) -> Any:
        """What turns tokens into states."""
        return find_layers(self.model)[0]

    @cached_property
    def units(self) -> list[nn.Module]:
        """Its layers: a sharding gathers each by itself."""
        decoder, name = find_layers(self.model)
        return list(getattr(decoder, name))

    def take_attention(self, name: str) -> None:
        """Use an attention that transformers or `packing` has by this name."""
        packing.register()
        self.model.set_attn_implementation(name)
        self.documents = name in packing.NAMES.values()

    def states(self, ids_T: Tensor, lengths: list[int]) -> Tensor:
        """Post-norm last states of packed conversations, [T, H]."""
        if self.cfg.packing:
            return packing.last_states(self.decoder, ids_T, lengths, self.documents)
        parts = [
            packing.last_states(self.decoder, part, [len(part)], self.documents)
            for part in ids_T.split(lengths)
        ]
        return torch.cat(parts)

    def forward(self, batch: Batch, window_K: Tensor) -> tuple[Tensor, Outcome]:
        """A share of the window's loss, as a tensor for the hooks of a sharding, and all of it.

        Args:
            batch: packed conversations.
            window_K: the predicted tokens of the optimiser window.
        """
        device = batch.ids_T.device
        at_N = moved(predicted(batch).nonzero()[:, 0], device)
        enabled = self.compute_dtype != torch.float32
        with torch.autocast(device.type, self.compute_dtype, enabled=enabled):
            states_TH = self.states(batch.ids_T, batch.lengths)
        labels_N, z_loss = batch.ids_T[at_N + 1], self.cfg.z_loss
        divisor = window_K[0].to(device).clamp(min=1)
        head = self.model.get_output_embeddings()
        loss, values = next_token_loss(
            states_TH[at_N].to(self.compute_dtype), head.weight, getattr(head, "bias", None),
            NextToken(labels_N, divisor, z_loss, self.ending),
        )  # fmt: skip
        pairs_B2 = None if torch.is_grad_enabled() else by_conversation(values, batch, z_loss)
        sums = {name: values[name].sum()[None] for name in ("nll", "top1")}
        sums["rows"] = torch.full((1,), float(len(at_N)), device=device)
        flops = needed_flops(self, batch.lengths, len(at_N))
        return loss, Outcome(loss, loss.detach()[None], sums, pairs_B2, flops)


def predicted(batch: Batch) -> Tensor:
    """Whether a position's next token is supervised and of the same conversation, on the CPU; [T]
    bool."""
    counts_T = torch.zeros_like(batch.turns_T, dtype=torch.bool)
    counts_T[:-1] = batch.turns_T[1:] > 0
    counts_T[torch.tensor(batch.lengths).cumsum(0) - 1] = False
    return counts_T


def by_conversation(values: Values, batch: Batch, z_loss: float) -> Tensor:
    """Of each conversation the sum of its losses and its predicted tokens; [B, 2] float64."""
    counts_T = predicted(batch)
    loss_T = torch.zeros(len(counts_T), dtype=torch.float64)
    loss_T[counts_T] = (values["nll"] + z_loss * values["squared"]).double().cpu()
    sums_B = torch.stack([part.sum() for part in loss_T.split(batch.lengths)])
    counts_B = number_in_each(counts_T, torch.tensor(batch.lengths))
    return torch.stack([sums_B, counts_B.double()], 1)


WITHOUT_PAIRS = ("linear_attention", "conv", "moe", "mlp")
"""Kinds of layers whose tokens attend to none other; what a recurrence multiplies is left out."""
SEEN = {
    "sliding_attention": "sliding_window",
    "hybrid_sliding": "sliding_window",
    "indexed_attention": "index_topk",
}
"""The entry that says how many tokens a query of such a layer sees at most."""


def needed_flops(causal: Causal, lengths: list[int], rows: int) -> float:
    """FLOP of forward and backward: 6 per weight and use, of experts as many as a token visits;
    scores and their sums for the pairs that the causal mask leaves, within a layer's window.
    Nothing for what is computed twice.
    """
    config = causal.model.config.get_text_config()
    layers = sum(visited(unit, config) for unit in causal.units)
    head: int = causal.model.get_output_embeddings().weight.numel()
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * len(causal.units)
    attention = 0.0
    for kind, layer in zip(kinds, each_layer(config), strict=True):
        if kind in WITHOUT_PAIRS:
            continue
        size = getattr(layer, "head_dim", None) or config.hidden_size // layer.num_attention_heads
        sizes = [getattr(layer, name, None) or size for name in ("qk_head_dim", "v_head_dim")]
        seen = SEEN.get(kind)
        width = (getattr(layer, seen, None) if seen else None) or max(lengths)
        pairs = sum(n * min(n, width) - min(n, width) ** 2 / 2 for n in lengths)
        attention += 6.0 * pairs * layer.num_attention_heads * sum(sizes)
    return 6.0 * (layers * sum(lengths) + head * rows) + attention


def new_model(cfg: ModelConfig, seed: int) -> Any:
    """From its weights, or, with model.init=random, from its configuration alone; fp32."""
    no_bars_in_logs()
    config = model_config(cfg)
    if cfg.init == "weights":
        if packed := quantised(config):
            raise InputError(
                f"model.path={cfg.path} cannot be trained{packed}; name the model it was made of"
            )
        options = {"dtype": torch.float32, "output_loading_info": True}
        model, report = from_files(cfg, torch.device("cpu"), options)
        check_weights(cfg, report)
        return model
    plain(config)
    torch.manual_seed(seed)
    try:
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=False
        )
    except (ValueError, KeyError) as error:
        raise InputError(not_loadable(cfg, error)) from None


def without_dropout(model: nn.Module) -> None:
    """A step's numbers follow from its tokens alone."""
    for module in model.modules():
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def patch(model: Any, wanted: str) -> None:
    """Liger's kernels in place of the model's norms and feed-forward blocks, where installed."""
    if find_spec("liger_kernel") is None:
        if wanted == "on":
            raise InputError("causal.liger=on needs: pip install 'specforge-exp[liger]'")
        log.info("Liger kernels are not installed (extra liger); the model runs its own")
        return
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=model)
    log.info("Liger kernels are used where they know the parts of %s", model.config.model_type)


def choose_attention(model: Any, decoder: Any, cfg: CausalConfig, device: torch.device) -> str:
    """The attention that a model gets.

    It is on the CPU still, where flash attention does not run: there another one says whether what
    is not attention keeps packed conversations apart.

    Raises:
        InputError: packed conversations see each other with every attention that may be used, or
            it does not take the one that is asked for.
    """
    packing.register()
    own: str = model.config.get_text_config()._attn_implementation
    mine, asked = packing.NAMES.get(own, own), cfg.attention == FLASH
    several = [mine, own] if cfg.packing else [own]
    measured = {"auto": several, FLASH: several, "documents": [mine]}
    names = measured.get(cfg.attention, [cfg.attention])
    if not cfg.packing:
        model.set_attn_implementation(names[0])
    elif (found := packing.first_that_follows(model, decoder, names)) is None:
        raise InputError(
            f"{model.config.model_type} does not keep packed conversations apart (attention: "
            f"{', '.join(names)}); causal.packing=false runs them one by one"
        )
    else:
        names = [found]
    if asked or (cfg.attention == "auto" and device.type == "cuda" and is_flash_attn_2_available()):
        try:
            model.set_attn_implementation(FLASH)
        except packing.FAILURES as error:
            if asked:
                raise InputError(f"causal.attention={FLASH}: {one_line(error)}") from None
        else:
            return FLASH
    return names[0]
