"""Where the parts of a target are, seen from its modules and one small forward; nothing is named.

Shape suffixes: B batch, T tokens, N rows, H hidden, S size of a norm, V vocabulary.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from specforge_exp.errors import InputError, first_line
from specforge_exp.sharding import whole
from specforge_exp.target.head import Head, fit_head
from specforge_exp.target.shape import rotates_alike

PLAIN = (torch.float32, torch.float16, torch.bfloat16)
OF_OUTPUT = {field.name for field in fields(BaseModelOutputWithPast)}
CACHE = "cache" if "cache" in OF_OUTPUT else "past_key_values"
"""The argument of a forward for keys and values of before. transformers renamed it in 5.24, and a
forward may take a name that it does not know without a word, as if there were nothing before."""
VISITS = ("num_experts_per_tok", "top_k_experts")
"""How configurations call the number of experts that a token visits."""


def find_layers(model: Any) -> tuple[Any, str]:
    """The module that turns tokens into last states, and the name of its list of layers.

    It holds the input embeddings and as many layers as the configuration says, wherever it stands:
    in a model of text, within a model of pictures too.

    Raises:
        InputError: there is no such module.
    """
    embeddings = model.get_input_embeddings()
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        children = dict(module.named_children())
        if any(child is embeddings for child in children.values()):
            for name, child in children.items():
                if isinstance(child, nn.ModuleList) and len(child) == count:
                    return module, name
    raise InputError(
        f"{model.config.model_type} ({type(model).__name__}) has no list of {count} layers beside "
        "its embeddings, so the states that feed a draft are not to be found"
    )


def visited(module: nn.Module, text: Any) -> float:
    """Numbers in a module's matrices that a token is multiplied with: of experts, which lie in one
    tensor, as many as it visits."""
    visits = next((number for name in VISITS if (number := getattr(text, name, None))), None)
    number = 0.0
    for name, weight in module.named_parameters():
        experts = weight.dim() == 3 and weight.shape[1] > 1  # a channel's convolution has 1
        share = visits / len(weight) if experts and visits else 1.0
        multiplies = weight.dim() > 1 and not name.endswith("bias")  # experts' have two
        number += weight.numel() * share if multiplies else 0
    return number


@contextmanager
def outputs_of(modules: dict[Any, nn.Module]) -> Iterator[dict[Any, Any]]:
    """What these modules give in the forwards of this block."""
    outputs: dict[Any, Any] = {}

    def keep(key: Any) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            outputs[key] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [module.register_forward_hook(keep(key)) for key, module in modules.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def few_tokens(model: Any) -> Tensor:
    """[1, 8] tokens spread over the vocabulary."""
    size = model.config.get_text_config().vocab_size
    ids_T: Tensor = torch.arange(1, 9, device=model.device) * (size // 9 or 1) % size
    return ids_T[None]


@torch.no_grad()
def read_end(model: Any, decoder: Any) -> tuple[Any, Head]:
    """The norm before the head, and the head, measured on a few tokens.

    Raises:
        InputError: the model does not run on tokens alone, or its logits cannot be reproduced.
    """
    kind = model.config.model_type
    children = dict(decoder.named_children())
    try:
        with outputs_of({"": decoder, **children}) as outputs:
            served_BTV = model(few_tokens(model), use_cache=False).logits
        last_BTH = outputs.pop("")["last_hidden_state"]
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{kind} cannot be run on tokens alone: {one_line(error)}") from None
    if served_BTV.shape[:-1] != last_BTH.shape[:-1]:
        raise InputError(f"{kind} is no model of next tokens: its logits are not one row a token")
    module = model.get_output_embeddings()
    weight = getattr(module, "weight", None)
    if weight is None or weight.dtype not in PLAIN:
        raise InputError(f"{kind} has no head of plain numbers: {type(module).__name__}")
    bias = getattr(module, "bias", None)
    norms = [name for name, output in outputs.items() if output is last_BTH]
    text = model.config.get_text_config()
    parts = whole(weight), None if bias is None else whole(bias)
    head = fit_head(*parts, last_BTH[0].to(weight.dtype), served_BTV[0], text)
    return children[norms[-1]] if norms else None, head


def one_line(error: Exception) -> str:
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {first_line(error)}"


@torch.no_grad()
def norm_weight(norm: Any, size: int) -> tuple[Tensor, bool] | None:
    """w of the norm x / rms(x) * w that comes nearest, and whether it is the same; None: none does.

    Measured on a vector of mean 0 and mean square 1, for a norm may multiply by its weight, by
    1 + weight or by nothing, subtract the mean, or add a bias.
    """
    if norm is None:
        return None
    own = getattr(norm, "weight", None)
    like = next(iter(norm.parameters()), torch.empty(0))
    vector_S = torch.ones(size, dtype=like.dtype, device=like.device)
    vector_S[1::2] = -1
    try:
        up_S, down_S, mean_S = (norm(x[None])[0] for x in (vector_S, -vector_S, vector_S.abs()))
    except (AttributeError, RuntimeError, TypeError):
        return None
    weight_S, bias_S = vector_S * (up_S - down_S) / 2, (up_S + down_S) / 2
    same = not bias_S.any() and torch.allclose(mean_S, weight_S, rtol=0.05, atol=1e-3)
    if own is not None and own.shape == weight_S.shape:
        for exact_S in (whole(own), 1 + whole(own)):
            if torch.allclose(exact_S, weight_S, rtol=1e-2, atol=1e-3):
                return exact_S, same
    return weight_S, same


@torch.no_grad()
def layer_weights(model: Any, decoder: Any, layer: Any) -> dict[str, Tensor]:
    """Plain weights of a layer, named as in Llama, as far as they mean what they mean there.

    The part that runs first is the attention, the one that runs last the feed-forward block.
    Input_layernorm is the norm whose output the first reads, post_attention_layernorm the one of
    the second, as an RMS norm multiplies by them; norms behind a part have no name there, nor have
    those that subtract a mean or add a bias. Projections of queries and keys that the
    target rotates otherwise than a draft are left out.
    """
    children = dict(layer.named_children())
    large = {
        name for name, child in children.items() if any(p.dim() > 1 for p in child.parameters())
    }
    fed: dict[str, list[Tensor]] = {}

    def reads(name: str) -> Any:
        def hook(_module: Any, inputs: Any, keywords: Any) -> None:
            fed[name] = [x for x in (*inputs, *keywords.values()) if isinstance(x, Tensor)]

        return hook

    handles = [
        children[name].register_forward_pre_hook(reads(name), with_kwargs=True) for name in large
    ]
    small = {name: child for name, child in children.items() if name not in large}
    with outputs_of(small) as outputs:
        decoder(few_tokens(model), use_cache=False)
    for handle in handles:
        handle.remove()
    if len(fed) != 2:
        return {}
    weights: dict[str, Tensor] = {}
    size = model.config.get_text_config().hidden_size
    places = zip(
        fed, ("self_attn", "mlp"), ("input_layernorm", "post_attention_layernorm"), strict=True
    )
    for name, part, norm in places:
        weights |= {f"{part}.{key}": value for key, value in part_weights(children[name]).items()}
        before = [key for key, output in outputs.items() if any(output is x for x in fed[name])]
        measured = norm_weight(children[before[-1]], size) if before else None
        if measured is not None and measured[1]:
            weights[f"{norm}.weight"] = measured[0]
    if not rotates_halves(model, children[next(iter(fed))]):
        for name in ("q_proj", "k_proj", "q_norm", "k_norm"):
            weights.pop(f"self_attn.{name}.weight", None)
    return weights


def part_weights(part: nn.Module) -> dict[str, Tensor]:
    """Weights of plain numbers by name; those of norms as an RMS norm multiplies by them."""
    weights = {n: whole(w) for n, w in part.named_parameters() if w.dtype in PLAIN}
    for name, child in part.named_children():
        own = getattr(child, "weight", None)
        if own is not None and own.dim() == 1:
            measured = norm_weight(child, len(own))
            if measured is not None:
                weights[f"{name}.weight"] = measured[0]
    return weights


def rotates_halves(model: Any, attention: nn.Module) -> bool:
    """Whether it rotates whole heads, the first half of each with the second, as a draft does."""
    rotate = getattr(sys.modules[type(attention).__module__], "rotate_half", None)
    if rotate is None or not rotates_alike(model.config.get_text_config()):
        return False
    halves: bool = rotate(torch.arange(4.0)).tolist() == [-2.0, -3.0, 0.0, 1.0]
    return halves
