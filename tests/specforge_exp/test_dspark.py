"""DSpark: its heads in training and serving, and what confidence saves without changing a word."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import conversation_set, small_target
from proofs import second_token_pvalue
from safetensors.torch import load_file, save_file
from test_conf import composed
from test_dflash import CFG as DFLASH
from test_dflash import LONG
from test_dflash_pipeline import DRAFT as DFLASH_RUN
from test_eagle3 import assert_same, conversation, gradients, packed
from torch.utils.flop_counter import FlopCounterMode

from specforge_exp import paths
from specforge_exp.bench.speculative import Decoding, generate, speculate
from specforge_exp.bench.table import table
from specforge_exp.config import Config, LossConfig
from specforge_exp.config.checks import typed
from specforge_exp.data import synthetic
from specforge_exp.data.chat import prompt_ids
from specforge_exp.data.conversations import asks_of
from specforge_exp.drafts.dflash.draft import DFlash
from specforge_exp.drafts.dspark.config import DSparkConfig
from specforge_exp.drafts.dspark.draft import DSpark
from specforge_exp.drafts.dspark.heads import MarkovHead
from specforge_exp.errors import InputError
from specforge_exp.losses import Loss, opd
from specforge_exp.stages.bench import bench
from specforge_exp.stages.export import export
from specforge_exp.stages.train import train
from specforge_exp.target import Target
from specforge_exp.training.batches import make_batch
from specforge_exp.training.initial import begin_with
from specforge_exp.training.objective import Outcome, Sample

CFG = DSparkConfig(
    name="dspark", draft_vocab_size=None, start="random", block_size=4, num_layers=2,
    num_features=3, num_anchors=6, min_loss_tokens=4, loss_gamma=3.0, markov_rank=8,
)  # fmt: skip
LOSS = LossConfig(name="dspark", lambda_hard=0.1, lambda_tv=0.9)
KINDS = ["vanilla", "gated", "rnn"]


@pytest.fixture
def target() -> Target:
    return small_target()


def small_draft(target: Target, cfg: DSparkConfig = CFG) -> DSpark:
    draft = DSpark.new(target, cfg, {}, seed=3)
    with torch.no_grad():
        for weight in draft.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return draft


def outcome(draft: DSpark, target: Target, sample: Sample, cfg: DSparkConfig = CFG) -> Outcome:
    window = draft.denominators(cfg, sample)
    return draft.objective(sample, target.head, Loss(opd, LOSS), cfg, window)


@pytest.mark.parametrize("from_anchor", [True, False])
def test_vllm_reads_what_the_anchor_says(target: Target, from_anchor: bool) -> None:
    """Beside dflash_config: inside it vLLM refuses that of any draft."""
    draft = small_draft(target, replace(CFG, sample_from_anchor=from_anchor))
    config = draft.written(target, "")
    assert config["sample_from_anchor"] is from_anchor
    assert "sample_from_anchor" not in config["dflash_config"]


@pytest.mark.parametrize("from_anchor", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_serving_is_training(target: Target, kind: str, from_anchor: bool, tmp_path: Path) -> None:
    """A decoder that picks the text's tokens has the training's logits and confidences, after a
    round trip."""
    cfg = replace(CFG, markov_head_type=kind, sample_from_anchor=from_anchor)
    draft = small_draft(target, cfg)
    ids, _ = conversation(4, LONG)
    aux, _ = target.features(ids[None])
    expected = draft.all_logits(cfg, ids[None], aux).unflatten(0, (-1, cfg.block_size))
    draft.write(tmp_path, target, "nowhere", torch.float32)
    loaded = DSpark.load(tmp_path, target)
    assert draft.confidence_head is not None and loaded.confidence_head is not None
    confidences: list[torch.Tensor] = []
    loaded.confidence_head.register_forward_hook(lambda *call: confidences.append(call[-1]))
    decoder = loaded.decoder()
    decoder.economise(0.0)
    decoder.commit(aux[:, :8], ids[1:9].tolist())
    text = iter(ids[9:].tolist())
    tokens, found = decoder.propose(cfg.steps, lambda row: next(text))
    assert tokens == ids[9 : 9 + cfg.steps].tolist()
    wanted = expected[7, draft.first_slot :]
    torch.testing.assert_close(torch.stack(found), wanted, rtol=1e-4, atol=1e-4)
    state_RSH = draft.every_state(cfg, ids[None], aux).unflatten(0, (-1, cfg.block_size))
    slots = draft.slots(state_RSH, ids, torch.arange(1, len(ids)))
    sure = draft.confidence_head(slots.hidden_RSH, slots.before_RSF)[7, draft.first_slot :]
    torch.testing.assert_close(torch.cat(confidences), sure.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weights", ["decay", "dpace"])
def test_the_loss_of_confidence_is_against_the_rates_that_are_reported(
    target: Target, weights: str
) -> None:
    """Its own gradient alone: weight 0 leaves the head without any, and all else as it is."""
    cfg = replace(CFG, position_weights=weights)
    draft, sample = small_draft(target, cfg), packed(target, conversation(1, LONG))
    assert draft.confidence_head is not None
    with torch.no_grad():  # a logit of 30 everywhere: its cross-entropy is 30 times what is missed
        draft.confidence_head.proj.weight.zero_()
        draft.confidence_head.proj.bias.fill_(30)
    with_it = outcome(draft, target, sample, cfg)
    with_it.loss.backward()
    assert gradients(draft)["confidence_head.proj.weight"].any()
    without = outcome(draft, target, sample, replace(cfg, confidence_weight=0.0))
    without.loss.backward()
    assert not gradients(draft)["confidence_head.proj.weight"].any()
    rows = with_it.sums["rows"]
    missed = rows - with_it.sums["alpha"]
    torch.testing.assert_close(with_it.sums["confidence"], 30 * missed)
    torch.testing.assert_close(with_it.sums["confidence_error"], missed)
    weight_K = torch.exp(-torch.arange(cfg.steps) / cfg.loss_gamma)
    expected = 30 * (weight_K * missed).sum() / (weight_K * rows).sum()
    torch.testing.assert_close(
        (with_it.loss - without.loss).detach(), expected.float(), rtol=1e-4, atol=1e-6
    )
    in_steps_K = weight_K if weights == "decay" else torch.ones(cfg.steps)
    torch.testing.assert_close((with_it.step_loss_K * in_steps_K).sum(), with_it.loss.detach())


@pytest.mark.parametrize("kind", KINDS)
def test_flops_of_the_tokens_before(target: Target, kind: str) -> None:
    """A third of them in the forward pass; to look a token up is none."""
    draft = small_draft(target, replace(CFG, markov_head_type=kind))
    head, hidden_RSH = draft.markov_head, torch.randn(5, 4, draft.config.hidden_size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        head.markov_w2(head.features(torch.randn(5, 4, 8), hidden_RSH))
    assert draft.head_flops(20) == 3 * counter.get_total_flops()
    sample = packed(target, conversation(1, LONG))
    found = outcome(draft, target, sample)
    plain = DFlash.objective(
        draft, sample, target.head, Loss(opd, LOSS), CFG, draft.denominators(CFG, sample)
    )
    assert found.flops - plain.flops == draft.head_flops(CFG.steps * int(found.sums["rows"][0]))


def test_tokens_before_make_no_gradient_as_large_as_the_vocabulary() -> None:
    """Their rows are added to the one that exists, as torch's own would be."""
    head, ids = MarkovHead(11, 4, 8, "vanilla"), torch.tensor([[3, 7, 3], [0, 3, 10]])
    weight, outer = head.markov_w1.weight, torch.randn(2, 3, 4)
    made: list[torch.Tensor | None] = []
    torch.nn.functional.embedding(ids, weight).backward(outer)
    expected, weight.grad = weight.grad, torch.ones_like(weight)
    weight.register_hook(made.append)
    head.embedded(ids, torch.float32).backward(outer)
    assert made == [None]
    assert expected is not None
    torch.testing.assert_close(weight.grad, 1 + expected)


def test_checkpointing_changes_no_number(target: Target) -> None:
    draft, sample = small_draft(target), packed(target, conversation(1, LONG))
    outcome(draft, target, sample).loss.backward()
    expected = gradients(draft)
    draft.gradient_checkpointing = True
    outcome(draft, target, sample).loss.backward()
    assert_same(gradients(draft), expected, rel=0)


@pytest.mark.parametrize("drafted", [None, 4], ids=["hugging face", "speculators"])
def test_a_start_from_dflash_is_that_draft(
    target: Target, cfg: Config, tmp_path: Path, drafted: int | None
) -> None:
    """To the bit, from either layout; what does not fit it is refused by the option's name."""
    first = DFlash.new(target, DFLASH, {}, seed=5)
    first.write(tmp_path, target, "nowhere", torch.float32, drafted)

    def begun(options: DSparkConfig) -> DSpark:
        run = replace(cfg, draft=options, trainer=replace(cfg.trainer, init=str(tmp_path)))
        draft = DSpark.new(target, options, {}, seed=9)
        begin_with(draft, run, target)
        return draft

    options = replace(CFG, sample_from_anchor=False, block_size=5)
    ids, _ = conversation(4, LONG)
    aux, _ = target.features(ids[None])
    ours, theirs = (d.all_logits(options, ids[None], aux) for d in (begun(options), first))
    assert torch.equal(ours, theirs)
    for name, value in {
        "sample_from_anchor": True, "num_layers": 3, "mask_token_id": 3, "block_size": 4,
        "sliding_window": 9,
    }.items():  # fmt: skip
        said = rf"draft\.{name}=(\w+), this draft has {typed(value)}; give draft\.{name}=\1"
        with pytest.raises(InputError, match=said):
            begun(replace(options, **{name: value}))
    part = {"markov_head.markov_w2.weight": torch.zeros(1024, 8)}
    save_file(first.state_dict() | part, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"has no markov_rank|is not dspark"):
        begun(options)


@pytest.mark.parametrize(
    "kind", ["vanilla", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])]
)
def test_one_conversation_by_heart(random_target: Target, kind: str, tmp_path: Path) -> None:
    """Overfitted and exported: nearly whole blocks are accepted, and confidence keeps them."""
    prompt = [5, 9, 2, 33, 7]
    answer = generate(random_target, prompt, Decoding(max_tokens=50)).tokens
    ids, turns = prompt + answer, [0] * len(prompt) + [1] * len(answer)
    tokens = conversation_set([turns])
    tokens.shards[0].ids[:] = torch.tensor(ids)
    cfg = replace(CFG, num_anchors=99, markov_head_type=kind)
    draft = DSpark.new(random_target, cfg, {}, 0)
    aux, last = random_target.features(torch.tensor([ids]))
    batch = make_batch(tokens, [0], torch.device("cpu"), draw=1)
    sample = Sample(**vars(batch), aux_TA=aux[0], last_TH=last[0])
    optimizer = torch.optim.AdamW(draft.parameters(), lr=1e-2)
    loss = LossConfig(name="hard", lambda_hard=1.0)
    for _ in range(120):
        window = draft.denominators(cfg, sample)
        draft.objective(sample, random_target.head, Loss(opd, loss), cfg, window).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    draft.write(tmp_path, random_target, "nowhere", torch.float32)
    loaded = DSpark.load(tmp_path, random_target)
    decoding = Decoding(max_tokens=len(answer), chain_length=cfg.steps)
    found = speculate(random_target, loaded.decoder(), loaded.draft_ids_D, prompt, decoding)
    assert found.tokens == answer
    assert sum(found.gained) / len(found.gained) >= 0.9 * (cfg.steps + 1)
    other = [40, 3, 21, 8]  # what it has not learnt
    trusting = replace(decoding, verify_cost=0.3, max_tokens=30)
    plain, saved = (
        speculate(random_target, loaded.decoder(), loaded.draft_ids_D, other, how)
        for how in (replace(trusting, verify_cost=None), trusting)
    )
    assert plain.tokens == saved.tokens
    assert max(plain.read) == cfg.steps + 1 and sum(saved.read) <= sum(plain.read)


@pytest.mark.slow
def test_greedy_output_is_the_targets_own(tiny_target: Target, tiny_tokenizer: Any) -> None:
    """50 prompts in fp32 with an untrained draft, whole blocks and by confidence in turn."""
    target = Target(tiny_target.model, [1, 3, 5])
    draft = DSpark.new(target, CFG, {}, 0)
    eos = frozenset({tiny_tokenizer.eos_token_id})
    for number, record in enumerate(synthetic.generate("bench", 50)):
        prompt = prompt_ids(tiny_tokenizer, asks_of(record)[0], {})
        decoding = Decoding(max_tokens=8, chain_length=4, eos=eos)
        if number % 2:
            decoding = replace(decoding, verify_cost=0.1)
        found = speculate(target, draft.decoder(), draft.draft_ids_D, prompt, decoding)
        assert found.tokens == generate(target, prompt, decoding).tokens


def test_a_chain_ends_where_it_would_not_pay(target: Target) -> None:
    """At the length with the most expected tokens per cost; free tokens are all verified."""
    draft = small_draft(target)
    ids, _ = conversation(4, LONG)
    aux, _ = target.features(ids[None])

    def drafted(cost: float | None) -> int:
        decoder = draft.decoder()
        if cost is not None:
            decoder.economise(cost)
        decoder.commit(aux[:, :8], ids[1:9].tolist())
        return len(decoder.propose(4, lambda row: int(row.argmax()))[0])

    assert drafted(None) == drafted(0.0) == 4
    assert draft.confidence_head is not None
    costs = [0.04, 0.1, 0.17, 0.3, 0.45, 0.7]
    for stands in (0.5, 0.8):  # every token's chance
        with torch.no_grad():
            draft.confidence_head.proj.weight.zero_()
            draft.confidence_head.proj.bias.fill_(math.log(stands / (1 - stands)))
        expected = [sum(stands**i for i in range(n + 1)) for n in range(5)]
        lengths = [max(range(5), key=lambda n: expected[n] / (1 + c * n)) for c in costs]
        assert [drafted(cost) for cost in costs] == lengths
        assert {1, 2, 3} <= set(lengths)


@pytest.mark.slow
def test_sampled_tokens_follow_the_target(random_target: Target) -> None:
    """By confidence, too, the second token has the target's distribution (chi-square)."""
    draft = small_draft(random_target)
    assert second_token_pvalue(random_target, draft, 700, verify_cost=0.25) > 1e-3


def test_every_stage_takes_it(cfg: Config, tokens: Path) -> None:
    """DFlash, DSpark from it, the export that vLLM reads, bench of all and by confidence."""
    cfg.max_steps, cfg.draft = 2, DFLASH_RUN
    cfg.bench = replace(cfg.bench, chain_length=5, max_tokens=8, bootstrap=20)
    train(cfg)
    export(cfg)
    shape = {k: v for k, v in vars(DFLASH_RUN).items() if k not in ("_target_", "name")}
    own = {"name": "dspark", "markov_rank": 8}
    run = replace(cfg, run_name="spark", draft=DSparkConfig(**shape | own), loss=LOSS)
    run.trainer = replace(cfg.trainer, init=cfg.run_name)
    train(run)
    record = json.loads((paths.run_dir(run) / "run.json").read_text())
    assert {"confidence", "confidence_error/0", "alpha/4"} <= set(record["evaluation"])
    folder = export(run)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen3DSparkModel"]
    assert config["target_layer_ids"] == config["dflash_config"]["target_layer_ids"] == [1, 3, 5]
    assert (config["markov_rank"], config["markov_head_type"]) == (8, "vanilla")
    assert (config["sample_from_anchor"], config["dspark_bonus_anchor"]) == (False, True)
    tensors = load_file(folder / "model.safetensors")
    V, H = 1024, config["hidden_size"]
    heads = {name: list(t.shape) for name, t in tensors.items() if "_head." in name}
    assert heads == {
        "markov_head.markov_w1.weight": [V, 8], "markov_head.markov_w2.weight": [V, 8],
        "confidence_head.proj.weight": [1, H + 8], "confidence_head.proj.bias": [1],
    }  # fmt: skip
    assert bench(run) >= 1
    every = json.loads(paths.bench_file(run).read_text())
    run.bench = replace(run.bench, verify="confidence", verify_cost=0.2, force=True)
    assert bench(run) >= 1
    some = json.loads(paths.bench_file(run).read_text())
    assert "verify=confidence): " in table(some, []) and "verify=all): " in table(every, [])
    for name, figures in some["datasets"].items():
        assert figures["lossless"] and every["datasets"][name]["lossless"]
        assert figures["verified_per_token"] < every["datasets"][name]["verified_per_token"]


@pytest.mark.slow
def test_its_loss_and_what_it_refuses() -> None:
    cfg = composed("draft=dspark")
    assert (cfg.loss.lambda_hard, cfg.loss.lambda_tv, cfg.draft.steps) == (0.1, 0.9, 7)
    assert composed("draft=dspark", "loss=full-opd").loss.name == "full-opd"
    assert composed("draft=dflash").loss.name == "baseline"
    assert composed("draft=dspark", "bench.verify=confidence").bench.verify_cost == 0.05
    for words, message in [
        (["draft=dflash", "bench.verify=confidence"], "has no confidence head"),
        (["draft=dspark", "draft.markov_head_type=gru"], "draft.markov_head_type"),
        *(
            (
                ["draft=dspark", "draft.enable_confidence_head=false", f"draft.{given}"],
                rf"draft\.{given} needs draft\.enable_confidence_head=true",
            )
            for given in ("confidence_weight=2.0", "confidence_head_with_markov=false")
        ),
        (["draft=dspark", "bench.chain_length=8"], "must not be above draft.block_size=7"),
        (["draft=dspark", "bench.verify=confidence", "engine=vllm"], "decides by itself"),
    ]:
        with pytest.raises(InputError, match=message):
            composed(*words)
