"""What EAGLE-3.1 changes: trained, served and exported alike; parity with the peer is in
test_parity."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_target
from exported import eagle3_logits
from proofs import losses_of_two_starts
from safetensors.torch import load_file, save_file
from test_eagle3 import CFG, LOSS, K, T, assert_same, conversation, divisors, gradients, packed
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from specforge_exp import paths
from specforge_exp.config import Config, TrainerConfig
from specforge_exp.drafts import layers
from specforge_exp.drafts.chain_attention import LayerStep
from specforge_exp.drafts.eagle3 import unroll as unroll_module
from specforge_exp.drafts.eagle3.chains import make_chains
from specforge_exp.drafts.eagle3.config import Eagle3Config
from specforge_exp.drafts.eagle3.draft import Eagle3
from specforge_exp.drafts.eagle3.unroll import unroll
from specforge_exp.drafts.vocabulary import vocabulary_mapping
from specforge_exp.errors import InputError
from specforge_exp.stages.bench import bench
from specforge_exp.stages.export import export
from specforge_exp.target import Target

ALL: dict[str, Any] = {
    "num_layers": 3, "fc_norm": True, "norm_before_residual": True, "norm_output": True,
    "sliding_window": 5, "full_attention_layers": [1],
}  # fmt: skip
VARIANTS: list[dict[str, Any]] = [
    {"norm_before_fc": True}, {"norm_output": True}, {"num_layers": 2}, {"sliding_window": 4}, ALL,
]  # fmt: skip
each_variant = pytest.mark.parametrize("options", VARIANTS, ids=lambda v: "+".join(v)[:30])


def variant(target: Target, options: dict[str, Any]) -> tuple[Eagle3, Eagle3Config]:
    """A draft of all 64 tokens whose norms are not all 1."""
    cfg = replace(CFG, draft_vocab_size=64, **options)
    draft = Eagle3.new(target, cfg, vocabulary_mapping(torch.ones(64), 64), seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in draft.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return draft, cfg


@each_variant
def test_every_norm_has_the_targets_epsilon(random_target: Target, options: dict[str, Any]) -> None:
    random_target.model.config.rms_norm_eps = 3e-4
    draft, _ = variant(random_target, options)
    norms = [part for part in draft.modules() if isinstance(part, layers.RMSNorm)]
    assert {norm.eps for norm in norms} == {3e-4}


@pytest.mark.parametrize("layers", [1, 3])
def test_flops_are_those_of_the_products(
    random_target: Target, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third of them below the head in the forward pass, but for attention's own, the last layer's
    keys and values where no row is, and the token that stands for those outside."""
    draft, cfg = variant(random_target, {"num_layers": layers})
    sample = packed(random_target, conversation(1), conversation(2))
    chains = make_chains("inference", sample.turns_T, sample.lengths, K)
    attn, last = draft.midlayer.self_attn, draft.stack[-1].self_attn
    width, wide = len(attn.q_proj.weight), draft.config.hidden_size

    def no_attention(turn: LayerStep, *_: Any) -> tuple[Tensor, None]:
        return torch.zeros(len(turn.angles[0]), width), None

    with monkeypatch.context() as without:
        without.setattr(unroll_module, "chain_attention", no_attention)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            unroll(draft, chains, sample.ids_T, sample.aux_TA)
    half = sum(len(w.weight) for w in (attn.q_proj, attn.k_proj, attn.v_proj)) * wide
    keys = 2 * len(last.k_proj.weight) * wide
    more = 2 * half + 2 * keys * (len(sample.ids_T) - chains.counts[0])
    below = 3 * (counter.get_total_flops() - more)
    found = draft.objective(sample, random_target.head, LOSS, cfg, divisors(sample))
    rows, head = chains.rows, 64 * wide
    above = 6 * head * len(rows.flat_Q) + 2 * head * len(rows.position_P)
    assert found.flops == below + above


@each_variant
def test_decoder_repeats_the_unroll(random_target: Target, options: dict[str, Any]) -> None:
    """A chain of the text's own tokens is chosen from the logits that training compares."""
    draft, _ = variant(random_target, options)
    sample = packed(random_target, conversation(0, [1] * T))
    carried = make_chains("inference", sample.turns_T, sample.lengths, K)
    with torch.no_grad():
        states = unroll(draft, carried, sample.ids_T, sample.aux_TA)
    aux, text = sample.aux_TA[None], sample.ids_T.tolist()
    for slot in (0, 3, T - K - 2):
        row, half = carried.slot_R.tolist().index(slot), slot // 2 + 1
        decoder = draft.decoder()
        decoder.commit(aux[:, :half], text[1 : half + 1])
        if half <= slot:  # what is drafted before is forgotten
            decoder.propose(K, lambda logits: int(logits.argmax()))
            decoder.commit(aux[:, half : slot + 1], text[half + 1 : slot + 2])
        following = iter(text[slot + 2 :])
        tokens, logits = decoder.propose(K, lambda _, rest=following: next(rest))
        assert tokens == text[slot + 2 : slot + 2 + K]
        for step in range(K):
            expected_D = draft.lm_head(draft.norm(states[step][row]))
            torch.testing.assert_close(logits[step], expected_D, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("in_order", [True, False])
@each_variant
def test_proposals_read_what_was_proposed(
    random_target: Target,
    options: dict[str, Any],
    in_order: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever is chosen, also beyond the text: the logits of packed chains are the decoder's; in
    the order of the formulas, and as a GPU adds up."""
    monkeypatch.setitem(layers.IN_ORDER, "cpu", in_order)
    draft, _ = variant(random_target, options)
    sample = packed(random_target, conversation(1), conversation(2))
    anchors, chosen_KR, seen = (4, T - 2, T + 6), torch.randint(0, 64, (K, 3)), list[Tensor]()

    def choose(step: int, logits_RD: Tensor) -> Tensor:
        seen.append(logits_RD)
        return chosen_KR[step]

    draft.propose(sample, torch.tensor(anchors), K, choose)
    for chain, anchor in enumerate(anchors):
        ids, aux = (x[anchor // T * T : anchor + 1] for x in (sample.ids_T, sample.aux_TA))
        decoder, rest = draft.decoder(), iter(chosen_KR[:, chain].tolist())
        decoder.commit(aux[None, :-1], ids[1:].tolist())
        _, logits = decoder.propose(K, lambda _, rest=rest: next(rest))
        found_KD = torch.stack(seen)[:, chain]
        torch.testing.assert_close(found_KD, torch.stack(logits), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", VARIANTS[2:], ids=lambda v: "+".join(v)[:30])
def test_packed_is_unpacked(options: dict[str, Any]) -> None:
    """Conversations in one forward or one after the other; checkpointed or not."""
    target = small_target()
    draft, cfg = variant(target, options)
    each = [conversation(1), conversation(2, [0, 1, 1, 1, 0]), conversation(3)]
    together = packed(target, *each)
    window = divisors(together, cfg)
    draft.objective(together, target.head, LOSS, cfg, window).loss.backward()
    expected = gradients(draft)
    for one in each:
        draft.objective(packed(target, one), target.head, LOSS, cfg, window).loss.backward()
    assert_same(gradients(draft), expected, 2e-5)
    draft.gradient_checkpointing = True
    draft.objective(together, target.head, LOSS, cfg, window).loss.backward()
    for name, gradient in gradients(draft).items():
        assert torch.equal(gradient, expected[name]), name


@each_variant
def test_an_engine_computes_the_same_of_the_export(
    random_target: Target, options: dict[str, Any], tmp_path: Path
) -> None:
    """The formulas of config.json and the tensors alone, and what `load` makes of them."""
    draft, cfg = variant(random_target, options)
    draft.write(tmp_path, random_target, "there", torch.float32)
    ids, aux = conversation(4)[0], torch.randn(T, draft.fc.weight.shape[1])
    decoder = draft.decoder()
    decoder.commit(aux[None, :-1], ids[1:].tolist())
    _, (logits_D,) = decoder.propose(1, lambda logits: int(logits.argmax()))
    theirs_D = eagle3_logits(tmp_path, random_target.embed_VH, ids[1:], aux[:-1])
    torch.testing.assert_close(logits_D, theirs_D, rtol=1e-4, atol=1e-4)
    loaded = Eagle3.load(tmp_path, random_target)
    assert loaded.variant.changes() == cfg.changes() == options
    equal = [x.all_logits(cfg, ids[None], aux[None]) for x in (draft, loaded)]
    assert torch.equal(*equal)


def test_what_an_export_says(
    random_target: Target, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Both engines' names; what SGLang does not read is said; an EAGLE-3 draft says nothing new."""
    caplog.set_level(logging.WARNING)
    draft, _ = variant(random_target, ALL)
    draft.write(tmp_path, random_target, "there", torch.float32)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_hidden_layers"] == 3 and config["sliding_window"] == 5
    assert config["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention"]
    assert config["fc_norm"] and config["norm_output"] and config["norm_before_residual"]
    assert "norm_before_fc" not in config
    assert "norm_before_residual and sliding_window and layer_types; SGLang" in caplog.text
    assert "vLLM 0.32 does not start with a draft of which some layers have a window" in caplog.text
    tensors = load_file(tmp_path / "model.safetensors")
    twins = [tensors[f"layers.2.{n}.weight"] for n in ("hidden_norm", "input_layernorm")]
    assert torch.equal(*twins)
    tensors["layers.2.hidden_norm.weight"] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"layers\.2\.hidden_norm\.weight is not"):
        Eagle3.load(tmp_path, random_target)
    (tmp_path / "config.json").write_text(json.dumps({**config, "layer_types": ["chunked"] * 3}))
    with pytest.raises(InputError, match="layer_types"):
        Eagle3.load(tmp_path, random_target)
    plain, _ = variant(random_target, {})
    caplog.clear()
    plain.write(tmp_path, random_target, "there", torch.float32)
    config = json.loads((tmp_path / "config.json").read_text())
    names = {"fc_norm", "norm_output", "norm_before_residual", "layer_types", "sliding_window"}
    assert not names & set(config) and not caplog.text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fc_norm": True, "norm_before_fc": True}, "draft.norm_before_fc=true and draft.fc_norm"),
        ({"sliding_window": 3}, "draft.ttt_length=4"),
        ({"full_attention_layers": [0]}, "needs draft.sliding_window"),
        ({"sliding_window": 9, "full_attention_layers": [0]}, "_layers=[0] names all layers"),
        ({"sliding_window": 9, "full_attention_layers": [1]}, "draft.num_layers=1"),
        ({"num_layers": 0}, "draft.num_layers"),
    ],
)
def test_what_no_engine_computes_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        replace(CFG, **options)
    assert words in str(caught.value)


def test_more_layers_than_the_target_has(random_target: Target) -> None:
    with pytest.raises(InputError, match=r"draft\.num_layers=99.*draft\.start=random"):
        variant(random_target, {"num_layers": 99})


def test_a_run_of_before_is_continued() -> None:
    """Options that change nothing are not in the fingerprint."""
    assert "fc_norm" not in CFG.matters() and CFG.matters()["ttt_length"] == K
    assert replace(CFG, fc_norm=True).matters() == {**CFG.matters(), "fc_norm": True}


@pytest.mark.slow
def test_every_stage_takes_it(cfg: Config, tokens: Path) -> None:
    """Trained, continued to the same losses, exported, reloaded and benched without loss."""
    cfg.draft = replace(cfg.draft, **{**ALL, "sliding_window": 16})
    cfg.max_steps, cfg.epochs = 3, 3
    cfg.trainer = TrainerConfig(batch_size=6, log_every=1, eval_every=99, save_every=1)
    cfg.bench = replace(cfg.bench, max_tokens=24, bootstrap=20)
    losses = losses_of_two_starts(cfg)
    assert losses[0] == losses[1] and len(losses[0]) >= 3
    export(cfg)
    assert bench(cfg) >= 1
    result = json.loads(paths.bench_file(cfg).read_text())
    assert all(figures["lossless"] for figures in result["datasets"].values())
