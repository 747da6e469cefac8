"""A target's states and parts by themselves: which layers, in which order, and what is refused."""

import pytest
import torch
from conftest import small_target

from specforge_exp.target import Target


@torch.no_grad()
def test_states_stand_in_the_order_that_was_asked_for() -> None:
    target = small_target()
    ids_1T = torch.arange(12)[None]
    plain = target.model(ids_1T, output_hidden_states=True).hidden_states
    for layers in ([4, 1], [0], []):
        aux_1TA, last_1TH = Target(target.model, layers).features(ids_1T)
        assert aux_1TA.shape == (1, 12, 16 * len(layers))
        for aux_1TH, layer in zip(aux_1TA.split(16, -1), layers, strict=False):
            assert torch.equal(aux_1TH, plain[layer + 1])
        assert torch.equal(last_1TH, plain[-1])


def test_the_last_layers_are_the_last() -> None:
    target = small_target()
    for weights, layer in zip(target.last_layers(2), target.layers[-2:], strict=True):
        assert torch.equal(weights["self_attn.o_proj.weight"], layer.self_attn.o_proj.weight)


def test_without_its_layers_the_ends_stay() -> None:
    target = small_target()
    assert target.layers is not None
    hidden_NH = torch.rand(3, 16)
    before = target.head(hidden_NH), target.final_norm()[0]
    target = Target(target.model, [1])
    target.forget_layers()
    assert target.model.model.layers is None
    assert torch.equal(target.head(hidden_NH), before[0])
    assert torch.equal(target.final_norm()[0], before[1])


def test_tied_is_one_tensor() -> None:
    target = small_target()
    assert not target.tied
    target.model.lm_head.weight = target.model.get_input_embeddings().weight
    assert target.tied


def test_a_norm_that_is_not_found_is_ones() -> None:
    target = small_target()
    target.__dict__["end"] = None, target.head
    weight_H, same = target.final_norm()
    assert torch.equal(weight_H, torch.ones(16)) and not same


@pytest.mark.parametrize(("own", "taken"), [("sdpa", "documents"), ("eager", "documents_eager")])
def test_packed_texts_get_a_call_each_of_the_models_own_attention(own: str, taken: str) -> None:
    target = small_target()
    target.model.set_attn_implementation(own)
    target.take_packing()
    assert target.documents and target.text._attn_implementation == taken
