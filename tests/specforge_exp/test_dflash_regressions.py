"""R1 to R36: what a pull request with DFlash got wrong elsewhere, and which test keeps it out here.

    R1  R2   test_dflash.py::test_target_layers
        R2   test_captured_states_are_the_layers_outputs
        R3   test_an_export_of_other_shapes_is_refused
        R4   test_the_defaults_are_the_published_shape
    R4  R32  test_dflash_pipeline.py::test_train_export_bench
        R5   test_dflash.py::test_the_fast_path_is_the_dense_one
        R5   test_dflash_parity.py::test_concatenate_norm_rotate_is_the_peers_order
        R5   test_dflash.py::test_training_and_serving_give_the_same_logits
    R6  R8   test_dflash.py::test_slots_of_a_block_see_each_other_and_no_other_block
        R7   test_dflash.py::test_a_block_sees_nothing_from_its_anchor_on
        R9   test_what_does_not_count_changes_nothing
    R10 R11  test_dflash.py::test_anchors_and_labels
    R12 R15  test_dflash.py::test_anchors_and_labels
        R13  test_dflash.py::test_decay_starts_at_one
        R14  test_metrics_know_no_decay
        R16  test_dflash_flex.py::test_buckets_bound_the_shapes
        R17  test_dflash.py::test_nothing_to_learn_is_a_loss_of_zero
    R18 R19  test_dflash.py::test_anchors_and_labels
        R20  test_dflash_operations.py::test_both_drafts_log_the_same_keys
        R21  test_states_run_in_the_drafts_dtype
        R22  test_an_answer_that_is_cut_supervises_nothing_beyond_it
    R23 R24  test_dflash_operations.py::test_accumulating_adds_no_collective
        R25  test_dflash_operations.py::test_every_option_is_read
        R25  test_every_option_of_the_draft_matters  test_checkpointing_computes_layers_again
        R26  test_states_that_are_kept_are_nobodys_to_change
        R27  test_dflash_operations.py::test_a_resumed_run_keeps_its_schedule
        R27  test_resume.py::test_killed_at_random_steps
        R28  test_dflash_operations.py::test_what_a_container_writes_is_kept
        R28  test_resources.py::test_jobs_that_a_container_cannot_run
        R29  test_resources.py::test_jobs_that_write_one_place
        R29  test_sweep_counts.py::test_names_never_meet_and_stay
        R30  test_modal_durable.py::test_a_job_longer_than_an_attempt_continues
        R30  test_modal_machines.py::test_a_preempted_training_takes_the_same_steps
        R31  test_dflash_operations.py::test_the_oldest_checkpoints_go_first
        R31  test_train.py::test_the_best_checkpoint_is_kept
        R33  test_dflash_operations.py::test_one_number_says_when_it_is_evaluated
        R34  test_dflash_operations.py::test_a_server_that_does_not_listen_is_killed
        R34  test_dflash_operations.py::test_a_hub_that_stumbles_is_asked_again
        R35  test_dflash_operations.py::test_nothing_optional_is_imported
        R36  test_dflash_operations.py::test_no_file_holds_a_secret

R5's order is in `dense_dflash`: concatenate, norm the keys, rotate. R15 was about blocks padded
to a constant number; a conversation has at most num_anchors here. R24 wanted a unit per layer; the
draft is one unit, gathered once per window, since its layers are not called as modules. R33's
deadlock was that of trainer and target as two services which waited for each other; the target is
in the trainer's process here.
"""

import ast
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, conversation_set, small_target
from test_conf import composed
from test_dflash import CFG, LONG, outcome, small_draft
from test_eagle3 import conversation, gradients, packed

from specforge_exp.config import Config
from specforge_exp.data.blocks import fit
from specforge_exp.data.chat import Encoded
from specforge_exp.data.tokens import arrays_of
from specforge_exp.drafts.dflash import model
from specforge_exp.drafts.dflash.blocks import make_blocks
from specforge_exp.drafts.dflash.config import DFlashConfig
from specforge_exp.drafts.dflash.draft import DFlash
from specforge_exp.errors import InputError
from specforge_exp.target import Target
from specforge_exp.training.batches import make_batch
from specforge_exp.training.feature_cache import (
    from_disk,
    index_of,
    plan,
    shard_states,
    write_shard,
)
from specforge_exp.training.features import computed, remembered
from specforge_exp.training.objective import Outcome

CPU = torch.device("cpu")


@pytest.fixture
def target() -> Target:
    return small_target()


def test_captured_states_are_the_layers_outputs(target: Target) -> None:
    """R2: as many as the draft takes, none past the last layer, in any depth."""
    ids, _ = conversation(1, LONG)
    layers = DFlash.target_layers(CFG, 8)
    target = Target(target.model, layers)
    aux, _ = target.features(ids[None])
    hidden = target.model(ids[None], output_hidden_states=True).hidden_states
    torch.testing.assert_close(aux, torch.cat([hidden[layer + 1] for layer in layers], -1))
    assert aux.shape[-1] == small_draft(target).fc.in_features
    for depth in range(8, 65):
        for number in range(1, 6):
            found = DFlash.target_layers(replace(CFG, num_features=number), depth)
            assert len(set(found)) == number and min(found) >= 0 and max(found) + 1 <= depth - 1


@pytest.mark.parametrize(
    "key", ["hidden_size", "vocab_size", "num_target_layers", "dflash_config.target_layer_ids"]
)
def test_an_export_of_other_shapes_is_refused(target: Target, key: str, tmp_path: Path) -> None:
    """R3: by the name of what differs, before any weight is taken."""
    small_draft(target).write(tmp_path, target, "target", torch.float32)
    assert DFlash.load(tmp_path, target).config.hidden_size == target.embed_VH.shape[1]
    config = json.loads((tmp_path / "config.json").read_text())
    group, _, name = key.rpartition(".")
    node = config[group] if group else config
    node[name] = [0, 1, 2] if group else node[name] + 8
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"made for another target: its {key} is"):
        DFlash.load(tmp_path, target)


def test_the_defaults_are_the_published_shape(target: Target) -> None:
    """R4: five layers fed by five, whose queries and keys are normed."""
    cfg = composed("draft=dflash").draft
    assert (cfg.num_layers, cfg.num_features, cfg.block_size) == (5, 5, 16)
    target = Target(target.model, DFlash.target_layers(cfg, 8))
    names = [name for name, _ in DFlash.new(target, cfg, {}, 0).named_parameters()]
    for norm in ("q_norm", "k_norm"):
        assert sum(name.endswith(f"{norm}.weight") for name in names) == 5


def same(one: Outcome, other: Outcome) -> bool:
    """Loss and every sum, to the bit."""
    assert set(one.sums) == set(other.sums)
    return bool(one.loss == other.loss) and all(
        torch.equal(value, other.sums[name]) for name, value in one.sums.items()
    )


def test_what_does_not_count_changes_nothing(target: Target) -> None:
    """R9: neither a label outside the anchor's turn nor a conversation without blocks, in loss,
    metrics or gradient; what counts does."""
    draft = small_draft(target)
    ids, turns = conversation(1, LONG)
    sample = packed(target, (ids, turns))
    found = outcome(draft, target, sample)
    found.loss.backward()
    expected = gradients(draft)
    counts_T = (turns[:-1] > 0) & (turns[:-1] == turns[1:])
    for counted in (False, True):
        last_TH = sample.last_TH.clone()
        changed = torch.cat([counts_T == counted, torch.tensor([not counted])])
        last_TH[changed] += 1.0
        assert same(outcome(draft, target, replace(sample, last_TH=last_TH)), found) != counted
    draft.zero_grad()
    short = packed(target, (ids, turns), conversation(2, [0, 1, 1, 1]))
    together = outcome(draft, target, short)
    together.loss.backward()
    assert same(together, found)
    for name, gradient in gradients(draft).items():
        torch.testing.assert_close(gradient, expected[name])


def test_metrics_know_no_decay(target: Target) -> None:
    """R14: acceptance and accuracy count every label alike."""
    draft = small_draft(target)
    sample = packed(target, *(conversation(seed, LONG) for seed in range(8)))
    flat, steep = (
        outcome(draft, target, sample, cfg=replace(CFG, loss_gamma=gamma)) for gamma in (99.0, 0.5)
    )
    assert flat.loss != steep.loss
    assert all(torch.equal(value, steep.sums[name]) for name, value in flat.sums.items())
    assert (flat.sums["top1"] <= flat.sums["rows"]).all() and flat.sums["top1"].sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_run_in_the_drafts_dtype(target: Target, dtype: torch.dtype) -> None:
    """R21: whatever the target computes in; weights and gradients stay fp32, the direction too."""
    draft, sample = small_draft(target), packed(target, conversation(1, LONG))
    outcome(draft, target, sample).loss.backward()
    expected = gradients(draft)
    draft.compute_dtype = dtype
    blocks = make_blocks(CFG, sample)
    for other in (torch.float32, torch.bfloat16):
        states = draft.states(sample.ids_T, sample.aux_TA.to(other), blocks, 5)
        assert states.dtype == dtype
        found = outcome(draft, target, replace(sample, aux_TA=sample.aux_TA.to(other)))
        found.loss.backward()
        for name, gradient in gradients(draft).items():
            assert gradient.dtype == torch.float32
            flat, wanted = gradient.flatten(), expected[name].flatten()
            assert torch.cosine_similarity(flat, wanted, 0) > 0.98, name
    decoder = draft.decoder()
    decoder.commit(sample.aux_TA[None, :3].to(dtype), sample.ids_T[1:4].tolist())
    _, logits = decoder.propose(4, lambda row: int(row.argmax()))
    assert {row.dtype for row in logits} == {torch.float32}
    assert decoder.keys[0][0].dtype == draft.fc.weight.dtype


def test_an_answer_that_is_cut_supervises_nothing_beyond_it(cfg: Config) -> None:
    """R22: ids and turns end together, and the next conversation's turns are its own."""
    cfg.max_length = 7
    cut = fit(Encoded(list(range(12)), [(3, 6), (5, 11), (9, 12)]), cfg, Counter(), "long")
    assert len(cut.ids) == 7 and cut.spans == [(3, 6), (5, 7)]
    arrays = arrays_of([cut, Encoded([1, 2, 3], [(2, 3)])])
    assert arrays["ids"].shape == arrays["turns"].shape
    assert arrays["turns"].tolist() == [0, 0, 0, 1, 1, 2, 2, 0, 0, 1]


CHANGES: dict[str, Any] = {
    "block_size": 4, "num_layers": 1, "num_features": 2, "num_anchors": 3, "loss_gamma": 1.0,
    "min_loss_tokens": 99, "mask_token_id": 5, "start": "target",
}  # fmt: skip


def test_every_option_of_the_draft_matters(target: Target) -> None:
    """R25: each of them changes the loss of a fresh draft."""
    cfg = replace(CFG, name="a", num_features=3)
    assert set(cfg.matters()) == {"_target_", "name", *CHANGES}

    def loss(cfg: DFlashConfig) -> float:
        fed = Target(target.model, DFlash.target_layers(cfg, 8))
        draft = DFlash.new(fed, cfg, {}, 0)
        return float(outcome(draft, fed, packed(fed, conversation(1, LONG)), cfg=cfg).loss.detach())

    first = loss(cfg)
    assert first > 0 and loss(cfg) == first
    for name, value in CHANGES.items():
        assert loss(replace(cfg, **{name: value})) != first, name


def test_checkpointing_computes_layers_again(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R25: the option is not only accepted."""
    draft, sample = small_draft(target), packed(target, conversation(1, LONG))
    calls: list[int] = []
    step = model.DFlashLayer.forward
    monkeypatch.setattr(
        model.DFlashLayer, "forward", lambda *all_of: calls.append(1) or step(*all_of)
    )
    for again, expected in ((False, 2), (True, 4)):
        calls.clear()
        draft.gradient_checkpointing = again
        outcome(draft, target, sample).loss.backward()
        assert len(calls) == expected


@pytest.mark.parametrize("together", [[0], [0, 1]])
@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_states_that_are_kept_are_nobodys_to_change(
    target: Target, cache: str, together: list[int], tmp_path: Path
) -> None:
    """R26: what a step does to its states, alone or beside others, is not in the next epoch's."""
    tokens = conversation_set([[0, 1, 1, 1], [1] * 6])
    batch = make_batch(tokens, together, CPU, draw=1)
    lookup = remembered(computed(target.states))
    if cache == "disk":
        splits = {1: tokens}
        [shard] = shards = plan(splits, 99)
        states = shard_states(target.states, splits, shard)
        write_shard(tmp_path / "00000.safetensors", states, "")
        (tmp_path / "index.json").write_text(json.dumps(index_of(splits, shards)))
        lookup = from_disk(tmp_path, 3, target.embed_VH.shape[1])
    [first] = lookup.ask([batch])()
    kept = [states.clone() for states in first]
    for states in first:
        states.zero_()
    [second] = lookup.ask([batch])()
    assert all(torch.equal(a, b) for a, b in zip(kept, second, strict=True))
    assert all(states.any() for states in second)


def named(text: str) -> set[int]:
    """R's that a text names, "R10 to R12" being three."""
    found = {int(number) for number in re.findall(r"\bR(\d+)\b", text)}
    for first, last in re.findall(r"\bR(\d+) to R(\d+)\b", text):
        found |= set(range(int(first), int(last) + 1))
    return found


def test_the_table_is_true() -> None:
    """Every R has a row; the tests of a row exist, and their docstrings name it."""
    said: dict[tuple[str, str], set[int]] = {}
    for path in (REPOSITORY / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                said[path.name, node.name] = named(ast.get_docstring(node) or "")
    rows = re.findall(r"^ {4,8}((?:R\d+ +)+)(\S.*)$", str(__doc__), re.M)
    assert {number for row, _ in rows for number in named(row)} == set(range(1, 37))
    for row, tests in rows:
        for test in tests.split():
            file, _, name = test.rpartition("::")
            missing = named(row) - said[file or Path(__file__).name, name]
            assert not missing, f"{test} does not name R{missing}"
