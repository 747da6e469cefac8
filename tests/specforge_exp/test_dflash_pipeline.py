"""A DFlash draft through the stages, and what it earns on what it has learnt by heart."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import conversation_set
from exported import missing_code
from proofs import second_token_pvalue
from safetensors.torch import load_file
from test_dflash import CFG, LOSS, outcome, small_draft

from specforge_exp import paths
from specforge_exp.bench.speculative import Decoding, generate, speculate
from specforge_exp.config import Config, LossConfig
from specforge_exp.data import synthetic
from specforge_exp.data.chat import prompt_ids
from specforge_exp.data.conversations import asks_of
from specforge_exp.drafts.dflash.config import DFlashConfig
from specforge_exp.drafts.dflash.draft import DFlash
from specforge_exp.errors import InputError
from specforge_exp.losses import Loss, opd
from specforge_exp.stages import export as export_stage
from specforge_exp.stages.bench import bench
from specforge_exp.stages.export import export
from specforge_exp.stages.train import train
from specforge_exp.target import Target
from specforge_exp.training.batches import make_batch
from specforge_exp.training.objective import Sample

DRAFT = DFlashConfig(
    _target_="specforge_exp.drafts.dflash.DFlash", name="dflash", draft_vocab_size=512,
    start="random", block_size=6, num_layers=2, num_features=3, num_anchors=24, loss_gamma=4.0,
)  # fmt: skip


@pytest.fixture
def run(cfg: Config, tokens: Path) -> Config:
    cfg.max_steps = 3
    cfg.draft = DRAFT
    cfg.bench = replace(cfg.bench, chain_length=5, max_tokens=12, bootstrap=50)
    return cfg


def layer_shapes(config: dict[str, Any]) -> dict[str, list[int]]:
    """Names and shapes of one layer as published drafts have them."""
    H, F, E = (config[k] for k in ("hidden_size", "intermediate_size", "head_dim"))
    N, M = config["num_attention_heads"], config["num_key_value_heads"]
    return {
        "input_layernorm": [H], "post_attention_layernorm": [H],
        "self_attn.q_proj": [N * E, H], "self_attn.k_proj": [M * E, H],
        "self_attn.v_proj": [M * E, H], "self_attn.o_proj": [H, N * E],
        "self_attn.q_norm": [E], "self_attn.k_norm": [E],
        "mlp.gate_proj": [F, H], "mlp.up_proj": [F, H], "mlp.down_proj": [H, F],
    }  # fmt: skip


def test_train_export_bench(run: Config, tiny_target: Target) -> None:
    """R3, R4, R32: one pipeline for both drafts; the export has the documented layout."""
    run.draft = replace(DRAFT, num_layers=5)
    train(run)
    record = json.loads((paths.run_dir(run) / "run.json").read_text())
    assert {"loss", "ce", "alpha/4", "top1/0", "simulated_length"} <= set(record["evaluation"])
    folder = export(run)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "qwen3" and config["architectures"] == ["DFlashDraftModel"]
    assert config["num_hidden_layers"] == 5 and config["num_target_layers"] == 8
    assert config["dflash_config"] == {"mask_token_id": 1023, "target_layer_ids": [1, 3, 5]}
    assert missing_code(folder) == set()
    H = config["hidden_size"]
    expected = {"fc.weight": [H, 3 * H], "hidden_norm.weight": [H], "norm.weight": [H]}
    for layer in range(5):
        for name, shape in layer_shapes(config).items():
            expected[f"layers.{layer}.{name}.weight"] = shape
    tensors = load_file(folder / "model.safetensors")
    assert len(expected) == 58
    assert {name: list(value.shape) for name, value in tensors.items()} == expected
    assert bench(run) >= 1
    result = json.loads(paths.bench_file(run).read_text())
    assert all(found["lossless"] for found in result["datasets"].values())
    with pytest.raises(InputError, match="made for another target: its dflash_config"):
        DFlash.load(folder, Target(tiny_target.model, [0, 1, 2]))


def test_an_export_is_compared_by_so_many_logits_as_there_is_room_for(
    run: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block at each of 2,048 tokens had 20 GB of them for 151,936 tokens, three times."""
    lengths, own = [], DFlash.all_logits

    def seen(draft: DFlash, cfg: Any, ids_1T: Any, aux_1TA: Any) -> Any:
        lengths.append(ids_1T.shape[1])
        return own(draft, cfg, ids_1T, aux_1TA)

    run.max_steps = 1
    train(run)
    monkeypatch.setattr(DFlash, "all_logits", seen)
    monkeypatch.setattr(export_stage, "LOGITS", 20 * run.draft.steps * 1024)
    export(run)
    assert lengths == [20, 20, 20]


def test_quiet_options_do_not_matter(run: Config) -> None:
    train(run)
    train(replace(run, draft=replace(DRAFT, attention="merged", draft_vocab_size=99)))
    with pytest.raises(InputError, match=r"draft\.loss_gamma was 4\.0, now 3\.0"):
        train(replace(run, draft=replace(DRAFT, loss_gamma=3.0)))


def test_interrupted_training_goes_on(run: Config) -> None:
    """The anchors of a step depend on seed, epoch and conversation, not on what was before."""
    run.trainer = replace(run.trainer, log_every=1, save_every=2)
    run.max_steps = 4
    train(run)
    whole = (paths.run_dir(run) / "metrics.jsonl").read_text().splitlines()
    part = replace(run, run_name="part", max_steps=4)
    folder = paths.run_dir(part)
    paths.run_dir(run).rename(folder)
    (folder / "run.json").unlink()
    for name in ("step-000004", "step-000003"):
        for file in (folder / name).glob("*") if (folder / name).exists() else ():
            file.unlink()
        if (folder / name).exists():
            (folder / name).rmdir()
    train(part)
    again = (folder / "metrics.jsonl").read_text().splitlines()
    losses = [[json.loads(line).get("loss") for line in lines] for lines in (whole, again)]
    assert losses[0] == losses[1]


def test_greedy_output_is_the_targets_own(tiny_target: Target, tiny_tokenizer: Any) -> None:
    """8 prompts in fp32, with an untrained draft."""
    target = Target(tiny_target.model, [1, 3, 5])
    draft = DFlash.new(target, DRAFT, {}, 0)
    decoding = Decoding(max_tokens=24, chain_length=5, eos=frozenset({tiny_tokenizer.eos_token_id}))
    for record in synthetic.generate("bench", 8):
        prompt = prompt_ids(tiny_tokenizer, asks_of(record)[0], {})
        found = speculate(target, draft.decoder(), draft.draft_ids_D, prompt, decoding)
        assert found.tokens == generate(target, prompt, decoding).tokens


@pytest.mark.slow
def test_sampled_tokens_follow_the_target(random_target: Target) -> None:
    """The first verified token, over many runs, has the target's distribution (chi-square)."""
    draft = small_draft(random_target)
    assert second_token_pvalue(random_target, draft, 1500) > 1e-3


def test_one_conversation_by_heart(random_target: Target) -> None:
    """An answer of more than ten blocks, overfitted: nearly whole blocks are accepted."""
    prompt = [5, 9, 2, 33, 7]
    answer = generate(random_target, prompt, Decoding(max_tokens=60)).tokens
    ids, turns = prompt + answer, [0] * len(prompt) + [1] * len(answer)
    tokens = conversation_set([turns])
    tokens.shards[0].ids[:] = torch.tensor(ids)
    cfg = replace(CFG, num_anchors=99, num_layers=2)
    draft = DFlash.new(random_target, cfg, {}, 0)
    aux, last = random_target.features(torch.tensor([ids]))
    batch = make_batch(tokens, [0], torch.device("cpu"), draw=1)
    sample = Sample(**vars(batch), aux_TA=aux[0], last_TH=last[0])
    optimizer = torch.optim.AdamW(draft.parameters(), lr=1e-2)
    loss = LossConfig(name="hard", lambda_hard=1.0)
    for _ in range(150):
        window = draft.denominators(cfg, sample)
        draft.objective(sample, random_target.head, Loss(opd, loss), cfg, window).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    decoding = Decoding(max_tokens=len(answer), chain_length=4)
    found = speculate(random_target, draft.decoder(), draft.draft_ids_D, prompt, decoding)
    assert found.tokens == answer
    assert sum(found.gained) / len(found.gained) >= 0.9 * 5
    assert outcome(draft, random_target, sample, LOSS).loss.isfinite()
