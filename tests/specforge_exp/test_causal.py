"""The next-token objective: transformers' own loss and gradients, packed or not, in any layout."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import conversation_set, small_target
from families import ENTANGLED, FAMILIES, VOCABULARY, build, each_family
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from specforge_exp.causal import head as head_module
from specforge_exp.causal import training
from specforge_exp.causal.head import NextToken, next_token_loss
from specforge_exp.causal.model import (
    Causal,
    choose_attention,
    needed_flops,
    new_model,
    without_dropout,
)
from specforge_exp.causal.objective import CAUSAL, causal_lm
from specforge_exp.config import Config
from specforge_exp.config.causal import CausalConfig
from specforge_exp.errors import InputError
from specforge_exp.target.anatomy import read_end, visited
from specforge_exp.target.head import Ending
from specforge_exp.training.batches import Batch
from specforge_exp.training.checkpoint import METRICS
from specforge_exp.training.ranks import Ranks
from specforge_exp.training.running import check_held_out
from specforge_exp.training.tracking import best_step

CPU = torch.device("cpu")
LENGTHS = [40, 7, 1, 25, 60]
EPSILON = 1e-5
PARITY = Path(__file__).parents[1] / "parity" / "causal" / "trl_packed.npz"


def batch(vocabulary: int, lengths: list[int] = LENGTHS) -> Batch:
    """Random tokens, two turns in each conversation that has room for them."""
    torch.manual_seed(1)
    turns = []
    for length in lengths:
        turns_T = torch.zeros(length, dtype=torch.long)
        turns_T[2:5], turns_T[length // 2 :] = 1, 2
        turns.append(turns_T)
    ids_T = torch.randint(0, vocabulary, (sum(lengths),))
    return Batch(ids_T, torch.cat(turns), list(range(len(lengths))), lengths, 0)


def causal(model: Any, **options: Any) -> Causal:
    """The model in training, as `training.load_causal` makes it."""
    model.requires_grad_(True)
    without_dropout(model)
    made = Causal(model, CausalConfig(**options))
    head = read_end(model, made.decoder)[1]
    made.ending = head.ending
    made.take_attention(choose_attention(model, made.decoder, made.cfg, CPU))
    return made


def gradients(module: Any) -> dict[str, Tensor]:
    return {name: weight.grad.clone() for name, weight in module.named_parameters()}


def ours(made: Causal, packed: Batch) -> tuple[float, dict[str, Tensor]]:
    made.zero_grad()
    objective = causal_lm(made, CPU)
    outcome = objective.forward(packed, objective.denominators(packed))
    outcome.loss.backward()
    return outcome.loss.item(), gradients(made.model)


def theirs(model: Any, packed: Batch) -> tuple[float, dict[str, Tensor]]:
    """`labels=`, one conversation at a time, averaged over all predicted tokens."""
    model.zero_grad()
    ids, turns = packed.ids_T.split(packed.lengths), packed.turns_T.split(packed.lengths)
    labels = [torch.where(t > 0, i, -100) for i, t in zip(ids, turns, strict=True)]
    count = sum(int((label_T[1:] >= 0).sum()) for label_T in labels)
    total = 0.0
    for ids_T, label_T in zip(ids, labels, strict=True):
        if bool((label_T[1:] >= 0).any()):
            options = {"use_cache": False, "num_items_in_batch": count}
            loss = model(ids_T[None], labels=label_T[None], **options).loss
            loss.backward()
            total += loss.item()
    return total, gradients(model)


def assert_alike(ours: tuple[float, dict], theirs: tuple[float, dict]) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=EPSILON)
    norm = math.sqrt(sum(float(g.square().sum()) for g in theirs[1].values()))
    apart = math.sqrt(sum(float((ours[1][n] - g).square().sum()) for n, g in theirs[1].items()))
    assert set(ours[1]) == set(theirs[1]) and apart <= EPSILON * norm


PLAIN = ["Qwen3", "Gemma 2", "Cohere 2", "Granite 3", "gpt-oss", "GPT-NeoX", "Phi-4-mini"]


@pytest.mark.parametrize("family", PLAIN)
def test_loss_and_gradients_are_those_of_labels(family: str) -> None:
    """Soft caps, scales, biases, sinks and windows included."""
    model = build(FAMILIES[family]())
    packed = batch(VOCABULARY)
    expected = theirs(model.requires_grad_(True), packed)
    assert_alike(ours(causal(model), packed), expected)


def test_flash_attention_where_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not attention is measured all the same; without it, or where a model has none, the
    measured one stays, unless it was asked for."""
    cuda = torch.device("cuda")
    monkeypatch.setattr("specforge_exp.causal.model.is_flash_attn_2_available", lambda: True)

    def chosen(model: Any, **options: Any) -> str:
        made = Causal(model, CausalConfig(**options))
        return choose_attention(model, made.decoder, made.cfg, cuda)

    model = small_target().model
    assert chosen(model) == "documents"
    with pytest.raises(InputError, match=r"causal\.attention=flash_attention_2: "):
        chosen(model, attention="flash_attention_2")
    with pytest.raises(InputError, match="does not keep packed conversations apart"):
        chosen(build(FAMILIES["Qwen3-Next"]()))
    monkeypatch.setattr(model, "set_attn_implementation", lambda name: None)
    assert chosen(model) == "flash_attention_2"


def test_loss_and_gradients_are_those_of_trl() -> None:
    """Its SFTTrainer with packing; `python benchmarks/sft_step.py --record` made the arrays."""
    arrays = np.load(PARITY, allow_pickle=False)
    meta = json.loads(str(arrays["meta"]))
    chats = meta["chats"]
    model = LlamaForCausalLM(LlamaConfig(**meta["config"]))
    weights, expected = (
        {key[2:]: torch.from_numpy(arrays[key]) for key in arrays if key.startswith(kind)}
        for kind in ("w/", "g/")
    )
    model.load_state_dict(weights)
    ids_T, turns_T = (
        torch.tensor([number for chat in chats for number in chat[key]]) for key in ("ids", "mask")
    )
    lengths = [len(chat["ids"]) for chat in chats]
    packed = Batch(ids_T, turns_T, list(range(len(chats))), lengths, 0)
    assert_alike(ours(causal(model), packed), (meta["loss"], expected))


@each_family
def test_packed_is_unpacked_or_refused(family: str) -> None:
    """Conversations longer than the families' windows, too."""
    model, packed = build(FAMILIES[family]()), batch(VOCABULARY)
    if family in ENTANGLED:
        with pytest.raises(InputError, match="does not keep packed conversations apart"):
            causal(model)
        expected = theirs(model.requires_grad_(True), packed)
        assert_alike(ours(causal(model, packing=False), packed), expected)
        return
    made = causal(model)
    with torch.no_grad():
        states_TH = made.states(packed.ids_T, packed.lengths)
        alone = [made.states(part, [len(part)]) for part in packed.ids_T.split(packed.lengths)]
    assert float((states_TH - torch.cat(alone)).norm() / states_TH.norm()) <= EPSILON


@pytest.mark.parametrize("ending", [Ending(), Ending(0.5, 3.0)])
def test_the_head_is_what_autograd_finds(ending: Ending, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks and blocks, a bias, the z-loss."""
    for name, size in (("LOGITS", 64), ("BLOCK", 24)):
        monkeypatch.setitem(getattr(head_module, name), "cpu", size)
    torch.manual_seed(0)
    tensors = [torch.randn(*shape, requires_grad=True) for shape in ((10, 6), (12, 6), (12,))]
    labels_N, divisor = torch.randint(0, 12, (10,)), torch.tensor(7.0)
    loss, values = next_token_loss(*tensors, NextToken(labels_N, divisor, 0.1, ending))
    found = torch.autograd.grad(2 * loss, tensors)
    state_NH, weight_VH, bias_V = tensors
    logits_NV = ending.logits(state_NH @ weight_VH.T + bias_V)
    log_z_N = logits_NV.logsumexp(-1)
    nll_N = torch.nn.functional.cross_entropy(logits_NV, labels_N, reduction="none")
    expected = (nll_N + 0.1 * log_z_N**2).sum() / divisor
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(values["nll"], nll_N)
    assert values["top1"].tolist() == (logits_NV.argmax(-1) == labels_N).float().tolist()
    for ours, theirs in zip(found, torch.autograd.grad(2 * expected, tensors), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_mfu_counts_the_products_and_half_of_attention() -> None:
    """torch counts the products; the causal mask leaves half of the scores, n^2 / 2, of which torch
    counts as many as its kernel makes: none, or those that it makes twice, too."""
    model = small_target(vocabulary=320, hidden=64).model
    made = causal(model)
    packed = Batch(torch.arange(48) % 320, torch.ones(48, dtype=torch.long), [0], [48], 0)
    objective = causal_lm(made, CPU)
    with FlopCounterMode(display=False) as counter:
        outcome = objective.forward(packed, objective.denominators(packed))
        outcome.loss.backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(number for kind, number in counts.items() if "attention" not in str(kind))
    config = model.config
    scores = 12 * 48**2 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    added_in_place = 2 * 47 * model.lm_head.weight.numel()  # torch's counter leaves it out
    assert outcome.flops == pytest.approx(products + added_in_place + scores / 2)


def pairs(window: int) -> float:
    """Of tokens within a conversation; half of the one that each forms with itself."""
    return sum(min(at + 0.5, window) for length in LENGTHS for at in range(length))


@pytest.mark.parametrize("family", ["Gemma 2", "Qwen3-MoE", "gpt-oss"])
def test_flops_of_windows_and_of_experts(family: str) -> None:
    """A row has as many pairs as its window, a token two of four experts; no bias multiplies."""
    made = causal(build(FAMILIES[family]()))
    config = made.model.config
    shares = {3: 2 / 4, 2: 1.0, 1: 0.0}
    named = [pair for unit in made.units for pair in unit.named_parameters()]
    layers = sum(w.numel() * shares[w.dim()] for name, w in named if not name.endswith("bias"))
    products = layers * sum(LENGTHS) + 5 * made.model.lm_head.weight.numel()
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(made.units)
    width = {"sliding_attention": config.sliding_window, "full_attention": 999}
    seen = 2 * config.num_attention_heads * config.head_dim * sum(pairs(width[k]) for k in kinds)
    assert needed_flops(made, LENGTHS, 5) == pytest.approx(6 * (products + seen))


@pytest.mark.parametrize(("family", "attended"), [
    ("Mistral v0.3", 8 * (16 + 16) * pairs(32)),  # all layers have the window, none is named
    ("Qwen3.5", 2 * (16 + 16) * pairs(999)),  # two of eight layers attend
    ("DeepSeek-V3.2", 8 * (24 + 16) * pairs(12)),  # to twelve tokens each
])  # fmt: skip
def test_flops_of_attention_by_its_kind(family: str, attended: float) -> None:
    """Only layers that attend, by as many tokens as they see, and the sizes of keys and values."""
    made = causal(build(FAMILIES[family]()), packing=False)
    config = made.model.config.get_text_config()
    weights = sum(visited(unit, config) for unit in made.units) * sum(LENGTHS)
    attention = config.num_attention_heads * attended
    assert needed_flops(made, LENGTHS, 0) == pytest.approx(6 * (weights + attention))


def test_a_model_is_measured_before_ligers_kernels_are_in_it(
    cfg: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They run on a GPU alone, to which the model goes last."""
    measured, found = training.measured, []

    def measure(causal: Causal, device: torch.device) -> Any:
        found.append(measured(causal, device))
        return found[0]

    def patch(model: Any, wanted: str) -> None:
        assert found and wanted == "auto"
        raise InterruptedError

    monkeypatch.setattr(training, "measured", measure)
    monkeypatch.setattr(training, "patch", patch)
    with pytest.raises(InterruptedError):
        training.load_causal(cfg, torch.device("cuda"), Ranks())


def test_an_evaluation_is_its_formula() -> None:
    """Of all rows, and of each conversation; one without a predicted token has no part. With a
    biased head."""
    model = small_target().model
    head, model.lm_head = model.lm_head, torch.nn.Linear(16, 64)
    model.lm_head.weight = head.weight
    made = causal(model, z_loss=0.1)
    packed, objective = batch(64), causal_lm(made, CPU)
    divisor = objective.denominators(packed)
    with torch.no_grad():
        outcome = objective.forward(packed, divisor)
        nothing = objective.forward(objective.idle, torch.zeros(1))
    nll, top1, pairs = 0.0, 0.0, []
    for ids_T, turns_T in zip(
        *(x.split(LENGTHS) for x in (packed.ids_T, packed.turns_T)), strict=True
    ):
        logits_TV = made.model(ids_T[None]).logits[0, :-1].detach()[turns_T[1:] > 0]
        labels = ids_T[1:][turns_T[1:] > 0, None]
        own = -logits_TV.log_softmax(-1).gather(1, labels).sum()
        pairs.append([float(own + 0.1 * (logits_TV.logsumexp(-1) ** 2).sum()), len(labels)])
        nll, top1 = nll + float(own), top1 + int((logits_TV.argmax(-1) == labels[:, 0]).sum())
    rows = sum(count for _, count in pairs)
    assert float(divisor) == rows > 50 and 0 in [count for _, count in pairs]
    torch.testing.assert_close(outcome.pairs_B2, torch.tensor(pairs).double(), rtol=1e-5, atol=0)
    assert float(outcome.loss) == pytest.approx(sum(loss for loss, _ in pairs) / rows, rel=1e-5)
    assert CAUSAL.means(outcome.sums) == pytest.approx(
        {
            "nll": nll / rows, "perplexity": math.exp(nll / rows), "top1": top1 / rows,
            "supervised": rows,
        }, rel=1e-5,
    )  # fmt: skip
    assert CAUSAL.means(nothing.sums)["supervised"] == float(nothing.loss) == 0


def test_the_best_is_the_lowest_loss(tmp_path: Path) -> None:
    lines = [{"step": step, "eval/loss": loss} for step, loss in ((1, 2.0), (2, 1.0), (3, 3.0))]
    (tmp_path / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert best_step(tmp_path, CAUSAL) == 2


def test_a_model_is_made_of_weights_or_by_its_seed(cfg: Config, tmp_path: Path) -> None:
    """Without dropout, and of all its weights or none."""

    def norm(seed: int, **changes: Any) -> float:
        model = new_model(replace(cfg.model, **changes), seed)
        return sum(float(weight.square().sum()) for weight in model.parameters())

    random = [norm(seed, init="random") for seed in (1, 1, 2)]
    assert random[0] == random[1] != random[2] and norm(1) == norm(2) not in random
    folder = Path(shutil.copytree(cfg.model.path, tmp_path / "model"))
    config = json.loads((file := folder / "config.json").read_text())
    layers = config["num_hidden_layers"] + 1
    file.write_text(json.dumps(config | {"num_hidden_layers": layers, "layer_types": None}))
    with pytest.raises(InputError, match="layers"):
        new_model(replace(cfg.model, path=str(folder)), 0)


def test_no_number_follows_from_dropout() -> None:
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, attention_dropout=0.5,
    ))  # fmt: skip
    made = causal(model).train()
    first, again = (made.states(torch.arange(40), [25, 15]) for _ in range(2))
    assert first.equal(again)


def test_the_interval_is_of_conversations() -> None:
    """Sums over a resample's sums: near the mean's standard error times 1.96."""
    pairs = [[float(n % 3), 2.0] for n in range(60)]
    found = CAUSAL.intervals(pairs)
    half = 1.96 * float(np.std([loss for loss, _ in pairs])) / 2 / math.sqrt(60)
    assert found == pytest.approx({"loss_low": 0.5 - half, "loss_high": 0.5 + half}, abs=0.01)
    assert (CAUSAL.intervals(pairs), CAUSAL.intervals(pairs[:1])) == (found, {})
    unlike = CAUSAL.intervals([[1.0, 1.0], [0.0, 9.0]] * 30)  # 0.1 a token, 0.5 a conversation
    assert 0.05 < unlike["loss_low"] < 0.1 < unlike["loss_high"] < 0.2


def test_held_out_conversations_must_have_something_to_predict() -> None:
    """Without a predicted token the loss was 0, and such an evaluation the best."""
    check_held_out(Config(), conversation_set([[0, 0], [0, 1]]))
    with pytest.raises(InputError, match="no held-out conversation with a supervised token"):
        check_held_out(Config(), conversation_set([[0, 0, 0], [0, 0]]))
