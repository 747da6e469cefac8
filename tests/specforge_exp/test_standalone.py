"""A small model as a draft: its loss is that of dense products, what it says is the target's."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import small_target
from families import FAMILIES, VOCABULARY, build
from test_train import metrics
from transformers import AutoModelForCausalLM

from specforge_exp import paths
from specforge_exp.bench.speculative import Decoding, generate, speculate
from specforge_exp.causal.model import needed_flops
from specforge_exp.config import Config, LossConfig, TrainerConfig
from specforge_exp.drafts.standalone import Standalone
from specforge_exp.drafts.standalone.config import StandaloneConfig
from specforge_exp.errors import InputError
from specforge_exp.losses import Loss, opd
from specforge_exp.stages.bench import bench
from specforge_exp.stages.export import export
from specforge_exp.stages.train import fingerprint_of, train
from specforge_exp.target import Target, load_target
from specforge_exp.training.objective import Sample

OPTIONS = StandaloneConfig(
    name="standalone", init="random", config={"num_hidden_layers": 2}, horizon=2
)


@pytest.fixture
def draft(random_target: Target) -> Standalone:
    return Standalone.new(random_target, OPTIONS, {}, 0)


def test_a_draft_with_fewer_unused_rows_gets_the_targets(cfg: Config, tmp_path: Path) -> None:
    """Engines want as many in both; the sizes of a family have one tokenizer and other numbers."""
    folder, small = tmp_path / "target", tmp_path / "small"
    model = AutoModelForCausalLM.from_pretrained(cfg.model.path)
    for place, rows in ((small, 1024), (folder, 1088)):
        shutil.copytree(cfg.model.path, place)
        model.resize_token_embeddings(rows)
        model.save_pretrained(place)
    target = load_target(replace(cfg.model, path=str(folder)), torch.device("cpu"))
    options = replace(OPTIONS, init="weights", config={}, path=str(small))
    draft = Standalone.new(target, options, {}, 0)
    weights = draft.state_dict()
    old = AutoModelForCausalLM.from_pretrained(small).get_input_embeddings().weight
    grown = draft.model.get_input_embeddings().weight
    assert len(draft.draft_ids_D) == len(grown) == 1088 and grown[:1024].equal(old)
    again = Standalone.restored(target, options, weights)
    assert all(w.equal(weights[name]) for name, w in again.state_dict().items())
    draft.write(tmp_path / "export", target, str(folder), torch.float32)
    assert json.loads((tmp_path / "export" / "config.json").read_text())["vocab_size"] == 1088
    before = {n: w[:1024] if len(w) == 1088 else w for n, w in weights.items()}  # an older run's
    assert len(Standalone.restored(target, options, before).draft_ids_D) == 1024


def test_loss_and_simulated_length_by_the_formulas(
    draft: Standalone, random_target: Target
) -> None:
    """Two conversations, packed; two turns in the first."""
    torch.manual_seed(3)
    lengths = [12, 9]
    turns_T = torch.tensor([0, 0, 1, 1, 1, 1, 0, 2, 2, 2, 2, 0] + [0] * 4 + [1] * 5)
    ids_T = torch.randint(0, 64, (21,))
    parts = [random_target.features(part[None])[1][0] for part in ids_T.split(lengths)]
    last_TH = torch.cat(parts)
    sample = Sample(ids_T, turns_T, [0, 1], lengths, 0, last_TH[:, :0], last_TH)
    loss = Loss(opd, LossConfig(name="x", lambda_ce=0.4, lambda_rkl=0.6, lambda_hard=0.3))
    window_K = draft.denominators(OPTIONS, sample)
    outcome = draft(sample, random_target.head, loss, OPTIONS, window_K)[1]
    outcome.loss.backward()
    found = {n: w.grad.clone() for n, w in draft.named_parameters()}
    draft.zero_grad()
    logq = torch.cat([draft.model(p[None]).logits[0] for p in ids_T.split(lengths)]).log_softmax(-1)
    logp = random_target.head(last_TH).log_softmax(-1)
    at = [t for t in range(20) if turns_T[t] and turns_T[t] == turns_T[t + 1] and t != 11]
    assert float(window_K) == len(at)
    ce = -(logp.exp() * logq).sum(-1)
    rkl = (logq.exp() * (logq - logp)).sum(-1)
    hard = -logq.gather(1, ids_T.roll(-1)[:, None])[:, 0]
    expected = (0.4 * ce + 0.6 * rkl + 0.3 * hard)[at].mean()
    expected.backward()
    assert outcome.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, weight in draft.named_parameters():
        torch.testing.assert_close(found[name], weight.grad, rtol=1e-3, atol=1e-6, msg=name)
    head = 6 * draft.model.lm_head.weight.numel() + 2 * random_target.head.weight_VH.numel()
    assert outcome.flops == needed_flops(draft.causal, lengths, 0) + head * len(at)
    alpha = torch.minimum(logq, logp).exp().sum(-1).tolist()
    pairs = [t for t in at if t + 1 in at]
    simulated = sum(1 + alpha[t] + alpha[t] * alpha[t + 1] for t in pairs)
    assert float(outcome.sums["length"]) == pytest.approx(simulated, rel=1e-5)
    assert int(outcome.sums["length_slots"]) == len(pairs)
    with torch.no_grad():
        by_conversation_B2 = draft(sample, random_target.head, loss, OPTIONS, window_K)[1].pairs_B2
    expected_2 = torch.tensor([simulated, len(pairs)], dtype=torch.float64)
    torch.testing.assert_close(by_conversation_B2.sum(0), expected_2, rtol=1e-5, atol=0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_drafts_for_itself_is_always_right(temperature: float) -> None:
    """With the target's weights all that it drafts is accepted: its cache follows what stood."""
    target = small_target()
    draft = Standalone.new(target, replace(OPTIONS, config={"num_hidden_layers": 8}), {}, 0)
    draft.model.load_state_dict(target.model.state_dict())
    decoding = Decoding(max_tokens=40, chain_length=4, temperature=temperature)
    generator = torch.Generator().manual_seed(0)
    answer = speculate(target, draft.decoder(), draft.draft_ids_D, [5, 9, 2], decoding, generator)
    assert set(answer.accepted) == {4} and len(answer.tokens) == 40


def test_another_model_changes_nothing(draft: Standalone, random_target: Target) -> None:
    """Some of its tokens are rejected, and leave its cache: it drafts what plain forwards say."""
    with torch.no_grad():  # near enough to the target to be right at times
        own = dict(draft.model.named_parameters())
        for name, weight in random_target.model.named_parameters():
            if name in own:
                own[name].copy_(weight)
    decoding = Decoding(max_tokens=30, chain_length=3)
    for prompt in ([5], [5, 9, 2], list(range(20))):
        answer = speculate(random_target, draft.decoder(), draft.draft_ids_D, prompt, decoding)
        assert answer.tokens == generate(random_target, prompt, decoding).tokens
    decoder, tokens = draft.decoder(), [5, 9, 2]
    decoder.begin(tokens[0])
    decoder.commit(torch.zeros(1, 0, 0), tokens[1:])
    for stood in (0, 1, 3, 2, 3):  # of three tokens, and one of the target's
        chain, found = decoder.propose(3, lambda logits: int(logits.argmax()))
        ids = torch.tensor([tokens + chain[:2]])
        expected = list(draft.model(ids).logits[0, -3:].detach())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        verified = [*chain[:stood], (chain[-1] + 1) % 64]
        decoder.commit(torch.zeros(1, 0, 0), verified)
        tokens += verified


def test_every_stage_takes_it(cfg: Config, tokens: Path) -> None:
    cfg.draft, cfg.max_steps = replace(OPTIONS, draft_vocab_size=512), 2
    cfg.trainer = TrainerConfig(batch_size=6, log_every=1, eval_every=99, save_every=99)
    cfg.bench = replace(cfg.bench, max_tokens=6, bootstrap=20)
    train(cfg)
    first, second, evaluation = metrics(cfg)
    assert 0 < second["loss"] < first["loss"] and evaluation["eval/simulated_length"] >= 1
    folder = export(cfg)
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 2
    assert bench(cfg) >= 1
    result = json.loads(paths.bench_file(cfg).read_text())
    assert all(figures["lossless"] for figures in result["datasets"].values())


def test_a_draft_of_a_quantised_targets_shape_is_plain(random_target: Target) -> None:
    """An engine would read its export's weights as packed ones."""
    target = copy.deepcopy(random_target)
    target.model.config.quantization_config = {"quant_method": "fp8"}
    draft = Standalone.new(target, OPTIONS, {}, 0)
    assert "quantization_config" not in draft.model.config.to_dict()


def test_what_does_not_fit_is_refused(random_target: Target) -> None:
    with pytest.raises(InputError, match=r"needs draft\.path"):
        StandaloneConfig(name="x", init="weights")
    for config, words in (
        ({"vocab_size": 80}, "the draft has 80 tokens, the target 64"),
        ({"num_layer": 2}, "draft.config: num_layer is not in a qwen3's"),
    ):
        with pytest.raises(InputError, match=words):
            Standalone.new(random_target, replace(OPTIONS, config=config), {}, 0)
    mixing = Standalone(build(FAMILIES["Qwen3-Next"]()), small_target(VOCABULARY))
    with pytest.raises(InputError, match=r"conversations apart .*is trained: take another model$"):
        mixing.checked()


def test_a_draft_path_that_is_no_model_is_named(random_target: Target, tmp_path: Path) -> None:
    """By its own option, and without a traceback for its tokenizer."""
    for name, content in (("tokenizer.json", "{}"), ("config.json", "null")):
        (tmp_path / name).write_text(content)
    options = replace(OPTIONS, init="weights", config={}, path=str(tmp_path))
    with pytest.raises(InputError, match=rf"^draft\.path={tmp_path} cannot be loaded"):
        Standalone.new(random_target, options, {}, 0)


def test_a_run_is_of_the_weights_it_began_with(cfg: Config, tokens: Path, tmp_path: Path) -> None:
    """Another model in the folder of draft.path is another training, as is its shape alone."""
    folder = tmp_path / "small"
    shutil.copytree(cfg.model.path, folder)
    cfg.draft = StandaloneConfig(name="standalone", path=str(folder))
    before = fingerprint_of(cfg, paths.tokens_dir(cfg))
    shape = replace(cfg, draft=replace(cfg.draft, init="random"))
    changes = fingerprint_of(shape, paths.tokens_dir(cfg)).changes(vars(before))
    assert changes == ["draft.init was None, now random"]
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    changes = fingerprint_of(cfg, paths.tokens_dir(cfg)).changes(vars(before))
    assert changes and "draft.path" in changes[0]
