"""P-EAGLE: what is drawn, that training and serving see the same states, and the stages."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_eagle3
import torch
from conftest import conversation_set
from exported import eagle3_states
from exported import read as exported_read
from proofs import losses_of_two_starts, second_token_pvalue
from safetensors.torch import load_file
from test_eagle3 import LOSS, assert_same, conversation, gradients, packed
from test_third_draft import toy as composed
from torch import Tensor

from specforge_exp import paths
from specforge_exp.bench.served import server_of
from specforge_exp.bench.speculative import Decoding, generate, speculate
from specforge_exp.config import Config, EngineConfig, LossConfig, TrainerConfig
from specforge_exp.data import synthetic
from specforge_exp.data.chat import prompt_ids
from specforge_exp.data.conversations import asks_of
from specforge_exp.drafts.eagle3.draft import Eagle3
from specforge_exp.drafts.eagle3.training import needed_flops
from specforge_exp.drafts.eagle3.unroll import unroll
from specforge_exp.drafts.peagle.config import PEagleConfig
from specforge_exp.drafts.peagle.draft import PEagle
from specforge_exp.drafts.peagle.rows import make_chains, make_masks
from specforge_exp.drafts.vocabulary import vocabulary_mapping
from specforge_exp.errors import InputError
from specforge_exp.losses import Loss, opd
from specforge_exp.stages.bench import bench
from specforge_exp.stages.export import export
from specforge_exp.target import Target
from specforge_exp.training.batches import Batch, make_batch
from specforge_exp.training.objective import Sample

K, T, V = 4, 14, 64
CFG = PEagleConfig(name="peagle", draft_vocab_size=V, num_depths=K, num_layers=2)
WHOLE = replace(CFG, down_sample_ratio=1.0)
"""As much is drawn as there can be."""
WINDOW = replace(WHOLE, sliding_window=5, full_attention_layers=[1], fc_norm=True)


def small_draft(target: Target, cfg: PEagleConfig = CFG) -> PEagle:
    """Norms that are not 1, a mask that is not nothing."""
    mapping = vocabulary_mapping(torch.ones(V), cfg.draft_vocab_size or V)
    draft = PEagle.new(target, cfg, mapping, seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in draft.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return draft


def batch_of(turns: list[int], draw: int = 0, number: int = 0) -> Batch:
    turns_T = torch.tensor(turns)
    return Batch(turns_T, turns_T, [number], [len(turns)], draw)


def test_so_many_are_drawn_at_each_depth() -> None:
    """(n - d) * max(ratio**d, least) of n, chains whole, none that serving does not reach."""
    cfg = PEagleConfig(name="p", num_depths=6, down_sample_ratio=0.9, down_sample_ratio_min=0.7)
    turns = [1] * 102 + [0] * 9 + [2] * 3
    masks = make_masks(cfg, batch_of(turns))
    seeds = 100 + 2  # a turn's first token is no guess
    assert masks[0].nonzero()[:, 0].tolist() == [*range(100), 110, 111]
    sizes = [int((seeds - d) * max(0.9**d, 0.7)) for d in range(1, 6)]
    assert [int(mask.sum()) for mask in masks[1:]] == sizes
    for depth in range(1, 6):
        assert not (masks[depth] & ~masks[depth - 1]).any()
        for slot in masks[depth].nonzero()[:, 0].tolist():
            assert turns[slot + 1] == turns[slot + 2 + depth] > 0
    few = make_masks(replace(cfg, max_anchors=20), batch_of(turns))
    assert torch.equal(few[0], masks[0])
    assert [int(mask.sum()) for mask in few[1:4]] == [
        int((20 - d) * max(0.9**d, 0.7)) for d in range(1, 4)
    ]


def test_it_is_drawn_by_epoch_and_conversation() -> None:
    """The same after an interruption and in any packing, another in every epoch."""
    turns = [1] * 44
    first = make_masks(CFG, batch_of(turns, 7, 3))
    assert all(map(torch.equal, first, make_masks(CFG, batch_of(turns, 7, 3))))
    for other in (batch_of(turns, 8, 3), batch_of(turns, 7, 4)):
        assert not torch.equal(first[1], make_masks(CFG, other)[1])
    turns_T = torch.tensor([*turns[:9], *turns])
    together = make_masks(CFG, Batch(turns_T, turns_T, [5, 3], [9, 44], 7))
    assert all(torch.equal(a[9:], b) for a, b in zip(together, first, strict=True))


def test_rows_of_the_peer() -> None:
    """speculators counts by the mask of the token that the teacher stands at: a chain may begin
    at the prompt's last token."""
    cfg = replace(WHOLE, supervision="speculators")
    masks = [m.nonzero()[:, 0].tolist() for m in make_masks(cfg, batch_of([0, 0, 0, 1, 1, 1]))]
    assert masks[0] == [2, 3, 4]
    assert set(masks[1]) <= {1, 2, 3} and len(masks[1]) == 2
    chains = make_chains(cfg, batch_of([0, 0, 0, 1, 1, 1]))
    assert [int(mask.sum()) for mask in chains.supervised] == [len(mask) for mask in masks]


def dense(draft: PEagle, ids_T: Tensor, aux_TA: Tensor, slot: int) -> Tensor:
    """States [K, H] that guess the tokens after slot + 1, as its definition reads: verified slots
    and masked ones, causal, one forward of all."""
    tokens = read_tokens(draft, ids_T, slot)
    mask_1A = draft.mask_hidden.view(1, -1).expand(K - 1, -1)
    state = draft.fc(draft.read(torch.cat([aux_TA[: slot + 1], mask_1A])))[None]
    S = state.shape[1]
    at_SS = torch.arange(S)[:, None] - torch.arange(S)
    for number, window in enumerate(draft.variant.windows):
        q, k, v = draft.project(tokens[None], state, torch.arange(S)[None], number)
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
        hidden = (at_SS < 0) | (at_SS >= (window or S))
        scores = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf)
        out = (torch.softmax(scores, -1) @ v).transpose(0, 1).flatten(1)
        state = draft.finish(state, out[None], number)
    return state[0, slot:]


def read_tokens(draft: PEagle, ids_T: Tensor, slot: int) -> Tensor:
    mask = torch.full((K - 1,), draft.config.mask_token_id)
    return torch.cat([ids_T[1 : slot + 2], mask])


@pytest.mark.parametrize("cfg", [WHOLE, WINDOW, replace(WHOLE, num_layers=1)])
def test_training_and_decoder_are_the_definition(random_target: Target, cfg: PEagleConfig) -> None:
    """Every state of a training forward, and every logit that a chain is chosen from."""
    draft = small_draft(random_target, cfg)
    sample = packed(random_target, conversation(0, [1] * T), conversation(3, [1] * 5))
    chains = make_chains(cfg, sample)
    with torch.no_grad():
        states = unroll(draft, chains, sample.ids_T, sample.aux_TA, draft.fed(cfg))
        compared = 0
        for slot in range(T - 1):
            expected_KH = dense(draft, sample.ids_T[:T], sample.aux_TA[:T], slot)
            row = chains.slot_R.tolist().index(slot) if slot in chains.slot_R else None
            for depth in range(K):
                if row is not None and row < chains.counts[depth]:
                    compared += 1
                    torch.testing.assert_close(
                        states[depth][row], expected_KH[depth], rtol=1e-4, atol=1e-5
                    )
            half, aux, text = slot // 2 + 1, sample.aux_TA[None, :T], sample.ids_T.tolist()
            decoder = draft.decoder()
            decoder.commit(aux[:, :half], text[1 : half + 1])
            if half <= slot:
                decoder.propose(3, lambda logits: int(logits.argmax()))
                decoder.commit(aux[:, half : slot + 1], text[half + 1 : slot + 2])
            _, logits = decoder.propose(K, lambda logits: int(logits.argmax()))
            expected_KD = draft.lm_head(draft.norm(expected_KH))
            torch.testing.assert_close(torch.stack(logits), expected_KD, rtol=1e-4, atol=1e-4)
    assert compared > 30


@pytest.mark.parametrize("kind", [PEagle, Eagle3])
def test_what_is_proposed_are_the_targets_tokens(kind: Any, random_target: Target) -> None:
    """By a draft that knows every third of them."""
    cfg = replace(CFG if kind is PEagle else test_eagle3.CFG, draft_vocab_size=22)
    mapping = vocabulary_mapping((torch.arange(V) % 3 == 0).float(), 22)
    draft = kind.new(random_target, cfg, mapping, seed=3)
    sample = packed(random_target, conversation(0, [1] * T))
    decoder = draft.decoder()
    decoder.commit(sample.aux_TA[None, :5], sample.ids_T[1:6].tolist())
    tokens, logits = decoder.propose(K, lambda logits_D: int(logits_D.argmax()))
    assert tokens == [3 * int(logits_D.argmax()) for logits_D in logits] != [0] * K


def test_gradients_are_autograds(random_target: Target) -> None:
    """Cross-entropy of two packed conversations by plain operations; checkpointed, too."""
    cfg = replace(WINDOW, depth_decay=0.8)
    draft = small_draft(random_target, cfg)
    each = [conversation(1), conversation(2, [0, 1, 1, 1, 1, 0])]
    sample = packed(random_target, *each)
    window = draft.denominators(cfg, sample)
    loss = Loss(opd, LossConfig(name="ce", lambda_ce=1.0))
    chains = make_chains(cfg, sample)
    decay = 0.8 ** torch.arange(K)
    total, first = torch.zeros(()), 0
    for ids, _ in each:
        span = slice(first, first + len(ids))
        first += len(ids)
        for slot in range(len(ids) - 1):
            at = span.start + slot
            if at not in chains.slot_R:
                continue
            row = chains.slot_R.tolist().index(at)
            states_KH = dense(draft, ids, sample.aux_TA[span], slot)
            for depth in range(K):
                if row < chains.counts[depth] and chains.supervised[depth][row]:
                    logq = draft.lm_head(draft.norm(states_KH[depth])).log_softmax(-1)
                    last = sample.last_TH[at + 1 + depth]
                    p = torch.softmax(random_target.head(last[None])[0].float(), -1)
                    total = total - decay[depth] * (p * logq).sum()
    total = total / (decay * window).sum().float()
    total.backward()
    expected = gradients(draft)
    assert float(expected["mask_hidden"].abs().max()) > 0
    for checkpointing in (False, True):
        draft.gradient_checkpointing = checkpointing
        found = draft.objective(sample, random_target.head, loss, cfg, window)
        found.loss.backward()
        torch.testing.assert_close(found.loss, total.detach(), rtol=1e-5, atol=0)
        assert_same(gradients(draft), expected, 2e-5)
    # As EAGLE-3's, but for the state's half of the first layer, which masked rows share.
    attn, head = draft.midlayer.self_attn, V * draft.config.hidden_size
    half = sum(w.weight.numel() for w in (attn.q_proj, attn.k_proj, attn.v_proj)) // 2
    below = needed_flops(draft, chains) - 6 * half * sum(chains.counts[1:])
    above = 6 * head * len(chains.rows.flat_Q) + 2 * head * len(chains.rows.position_P)
    assert found.flops == below + above


def test_packed_is_unpacked(random_target: Target) -> None:
    draft = small_draft(random_target)
    each = [conversation(1), conversation(2, [0, 1, 1, 0]), conversation(3)]
    together = packed(random_target, *each)
    window = draft.denominators(CFG, together)
    draft.objective(together, random_target.head, LOSS, CFG, window).loss.backward()
    expected = gradients(draft)
    for number, one in enumerate(each):
        alone = replace(packed(random_target, one), numbers=[number])
        draft.objective(alone, random_target.head, LOSS, CFG, window).loss.backward()
    assert_same(gradients(draft), expected, 2e-5)


def test_what_an_engine_computes_of_the_export(random_target: Target, tmp_path: Path) -> None:
    """The formulas of config.json and the tensors: masked positions are fed the mask's token and
    state; the folder has what vLLM's parallel drafting reads."""
    draft = small_draft(random_target, WINDOW)
    draft.write(tmp_path, random_target, "there", torch.float32)
    config, tensors = exported_read(tmp_path)
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["mask_token_id"] == V - 1 and tensors["mask_hidden"].shape[:2] == (1, 1)
    sample = packed(random_target, conversation(0, [1] * T))
    aux_TA, text = sample.aux_TA[:-1], sample.ids_T[1:]
    decoder = draft.decoder()
    decoder.commit(aux_TA[None], text.tolist())
    _, logits = decoder.propose(K, lambda logits: int(logits.argmax()))
    embed_VH, mask_1A = random_target.embed_VH, tensors["mask_hidden"].view(1, -1)
    read = torch.cat([text, torch.tensor([config["mask_token_id"]] * (K - 1))])
    states_SH = eagle3_states(
        tmp_path, embed_VH[read], torch.cat([aux_TA, mask_1A.expand(K - 1, -1)])
    )
    theirs_KD = states_SH[-K:] @ tensors["lm_head.weight"].T
    torch.testing.assert_close(torch.stack(logits), theirs_KD, rtol=1e-4, atol=1e-4)
    loaded = PEagle.load(tmp_path, random_target)
    assert loaded.state_dict().keys() == draft.state_dict().keys()
    ids_1T, aux_1TA = sample.ids_T[None], sample.aux_TA[None]
    assert torch.equal(*(x.all_logits(WINDOW, ids_1T, aux_1TA) for x in (draft, loaded)))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("draft.num_depths=0", "draft.num_depths"),
        ("draft.down_sample_ratio=0", "draft.down_sample_ratio=0"),
        ("+draft.norm_output=true", "draft.norm_output=true"),
        ("draft.supervision=specforge", "inference, speculators"),
        ("bench.chain_length=9", "draft.num_depths=8"),
        ("draft.sliding_window=4", "draft.num_depths=8"),
        ("draft.ttt_length=3", "draft.ttt_length is not an option"),
        ("max_length=9", "draft.num_depths=8; it needs 10 tokens"),
    ],
)
def test_what_it_does_not_have_is_refused_by_name(override: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        composed("draft=peagle", override)
    assert words in str(caught.value)


def test_a_mask_that_is_no_token(random_target: Target) -> None:
    with pytest.raises(InputError, match=r"draft\.mask_token_id=64.*0\.\.63"):
        small_draft(random_target, replace(CFG, mask_token_id=64))


@pytest.mark.slow
def test_every_stage_takes_it(cfg: Config, tokens: Path) -> None:
    """Trained, continued to the same losses, exported, reloaded and benched without loss."""
    cfg.draft = replace(composed("draft=peagle"), draft_vocab_size=512, num_layers=2, num_depths=5)
    cfg.max_steps, cfg.epochs = 3, 3
    cfg.trainer = TrainerConfig(batch_size=6, log_every=1, eval_every=99, save_every=1)
    cfg.bench = replace(cfg.bench, max_tokens=12, bootstrap=20)
    losses = losses_of_two_starts(cfg)
    assert losses[0] == losses[1] and len(losses[0]) >= 3
    evaluation = json.loads((paths.run_dir(cfg) / "run.json").read_text())["evaluation"]
    assert {"loss", "alpha/4", "simulated_length"} <= set(evaluation)
    tensors = load_file(export(cfg) / "model.safetensors")
    assert {"mask_hidden", "layers.1.hidden_norm.weight", "d2t"} <= set(tensors)
    assert bench(cfg) >= 1
    result = json.loads(paths.bench_file(cfg).read_text())
    assert all(figures["lossless"] for figures in result["datasets"].values())
    assert result["settings"]["chain_length"] == 5


@pytest.mark.slow
def test_greedy_output_is_the_targets_own(tiny_target: Target, tiny_tokenizer: Any) -> None:
    """50 prompts in fp32, with an untrained draft."""
    cfg = replace(CFG, draft_vocab_size=None, num_depths=5)
    identity = vocabulary_mapping(torch.ones(len(tiny_target.embed_VH)), len(tiny_target.embed_VH))
    draft = PEagle.new(tiny_target, cfg, identity, 0)
    decoding = Decoding(max_tokens=12, chain_length=5, eos=frozenset({tiny_tokenizer.eos_token_id}))
    for record in synthetic.generate("bench", 50):
        prompt = prompt_ids(tiny_tokenizer, asks_of(record)[0], {})
        found = speculate(tiny_target, draft.decoder(), draft.draft_ids_D, prompt, decoding)
        assert found.tokens == generate(tiny_target, prompt, decoding).tokens


@pytest.mark.slow
def test_sampled_tokens_follow_the_target(random_target: Target) -> None:
    """The first verified token, over many runs, has the target's distribution (chi-square)."""
    draft = small_draft(random_target, replace(CFG, draft_vocab_size=40, num_layers=1))
    assert second_token_pvalue(random_target, draft, 1200) > 1e-3


@pytest.mark.slow
def test_one_conversation_by_heart(random_target: Target, tmp_path: Path) -> None:
    """Overfitted, exported and decoded: nearly whole chains are accepted."""
    prompt = [5, 9, 33, 2, 41, 7]
    answer = generate(random_target, prompt, Decoding(max_tokens=60)).tokens
    tokens = conversation_set([[0] * len(prompt) + [1] * len(answer)])
    batch = make_batch(tokens, [0], torch.device("cpu"), 0)
    ids_T = torch.tensor([*prompt, *answer])
    aux_1TA, last_1TH = random_target.features(ids_T[None])
    cfg = replace(WHOLE, num_depths=5)
    draft = PEagle.new(random_target, cfg, vocabulary_mapping(torch.ones(V), V), 0)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=5e-3)
    loss = Loss(opd, LossConfig(name="hard", lambda_hard=1.0))
    sample = Sample(ids_T, batch.turns_T, batch.numbers, batch.lengths, 0, aux_1TA[0], last_1TH[0])
    window = draft.denominators(cfg, sample)
    for _ in range(250):
        optimizer.zero_grad()
        draft.objective(sample, random_target.head, loss, cfg, window).loss.backward()
        optimizer.step()
    draft.write(tmp_path, random_target, "there", torch.float32)
    served = PEagle.load(tmp_path, random_target)
    decoding = Decoding(max_tokens=60, chain_length=5)
    found = speculate(random_target, served.decoder(), served.draft_ids_D, prompt, decoding)
    assert found.tokens == answer
    assert sum(found.gained) / len(found.gained) >= 0.9 * 6


@pytest.mark.parametrize("name", ["peagle", "dspark"])
def test_what_sglang_does_not_serve_is_refused(name: str, cfg: Config, tmp_path: Path) -> None:
    cfg.draft = composed(f"draft={name}")
    cfg.engine = EngineConfig(name="sglang", command=["true"])
    with pytest.raises(InputError, match=f"engine=sglang does not serve draft={name}"):
        server_of(cfg, False, tmp_path)


def test_vllm_drafts_in_parallel() -> None:
    assert PEagle.vllm_options(5) == {
        "method": "eagle3", "num_speculative_tokens": 5, "parallel_drafting": True,
    }  # fmt: skip
