"""Exports in both layouts: the same draft, read by its own package, and runs made of either."""

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from conftest import TINY
from safetensors.torch import load_file
from test_conf import composed

from specforge_exp import paths
from specforge_exp.config import Config, DraftConfig, draft_config_class, locate
from specforge_exp.drafts.eagle3.export import AUX
from specforge_exp.drafts.folder import usual_entries
from specforge_exp.drafts.vocabulary import vocabulary_mapping
from specforge_exp.errors import InputError
from specforge_exp.stages.bench import bench
from specforge_exp.stages.export import export
from specforge_exp.stages.train import train
from specforge_exp.target import Target

ROOT = Path(__file__).resolve().parents[2]
KINDS: dict[str, dict[str, Any]] = {
    "eagle3": {"_target_": "Eagle3", "draft_vocab_size": 512, "norm_before_residual": True},
    "whole": {"_target_": "Eagle3", "draft_vocab_size": None},
    "eagle31": {
        "_target_": "Eagle3", "draft_vocab_size": 512, "num_layers": 3, "fc_norm": True,
        "norm_output": True, "sliding_window": 16, "full_attention_layers": [1],
    },
    "peagle": {
        "_target_": "PEagle", "draft_vocab_size": 512, "num_layers": 2, "num_depths": 4,
        "norm_before_fc": True, "mask_token_id": 7,
    },
    "dflash": {"_target_": "DFlash", "block_size": 6, "num_layers": 2, "num_features": 3},
    "sliding": {
        "_target_": "DFlash", "block_size": 6, "num_layers": 2, "num_features": 2,
        "sliding_window": 16, "full_attention_indices": [1], "sliding_window_non_causal": True,
        "mask_token_id": 9, "window": "block", "sample_from_anchor": True,
    },
    "dspark": {
        "_target_": "DSpark", "block_size": 5, "num_layers": 2, "num_features": 3,
        "markov_rank": 8, "markov_head_type": "gated", "confidence_head_with_markov": False,
    },
}  # fmt: skip
kinds = pytest.mark.parametrize("name", KINDS)
PARTIAL = {name for name, own in KINDS.items() if own.get("draft_vocab_size")}
"""Those that say some of the target's tokens."""


def options_of(name: str) -> DraftConfig:
    own = dict(KINDS[name])
    cls = own.pop("_target_")
    dotted = f"specforge_exp.drafts.{cls.lower()}.{cls}"
    return draft_config_class(dotted)(_target_=dotted, name=name, **own)


def draft_of(name: str, target: Target) -> tuple[Any, Target]:
    """A draft with numbers everywhere, and the target as it feeds it."""
    cfg = options_of(name)
    kind = locate(cfg._target_)
    fed = Target(target.model, kind.target_layers(cfg, len(target.layers)))
    size = min(cfg.draft_vocab_size or 1024, 1024)
    counts = (torch.arange(1024) % 2).flip(0) if size < 1024 else torch.ones(1024)
    draft = kind.new(fed, cfg, vocabulary_mapping(counts, size), 3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in draft.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return draft, fed


def same_weights(one: Any, other: Any) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(ours[n].equal(theirs[n]) for n in ours)


@kinds
def test_both_layouts_are_the_same_draft(name: str, tiny_target: Target, tmp_path: Path) -> None:
    """Written, read, and written again in the other: the bytes of the weights are the same."""
    draft, target = draft_of(name, tiny_target)
    first: dict[Any, Path] = {}
    for drafted in (None, 4):
        folder = first[drafted] = tmp_path / f"{drafted}"
        folder.mkdir()
        draft.write(folder, target, TINY.path, torch.float32, drafted)
        loaded = type(draft).load(folder, target)
        assert same_weights(draft, loaded)
        said = [type(d).declared(d.written(target, "")) for d in (draft, loaded)]
        assert said[0] == said[1]
        for option, value in KINDS[name].items():
            found = said[0].get(f"draft.{option}", value)
            assert found == (1024 if value is None else value)
        for again in (None, 4):
            other = tmp_path / f"{drafted}-{again}"
            other.mkdir()
            loaded.write(other, target, TINY.path, torch.float32, again)
    for drafted, again in [(None, 4), (4, None), (4, 4), (None, None)]:
        for file in ("model.safetensors", "config.json"):
            found = (tmp_path / f"{drafted}-{again}" / file).read_bytes()
            assert found == (first[again] / file).read_bytes(), (file, drafted, again)
    config = json.loads((first[4] / "config.json").read_text())
    flat, layer = json.loads((first[None] / "config.json").read_text()), "transformer_layer_config"
    for entry in ("head_dim", "num_key_value_heads", "rope_parameters", "max_position_embeddings"):
        assert config[layer][entry] == flat[entry]
    how = config["speculators_config"]
    assert config["speculators_model_type"] == how["algorithm"] == type(draft).algorithm
    assert how["proposal_methods"] == [
        {
            "proposal_type": "greedy", "speculative_tokens": 4, "verifier_accept_k": 1,
            "accept_tolerance": 0.0,
        }
    ]  # fmt: skip
    for folder in first.values():  # with d2t vLLM does not start where the vocabulary is whole
        assert ("d2t" in load_file(folder / "model.safetensors")) == (name in PARTIAL)
    assert how["verifier"] == {"name_or_path": TINY.path, "architectures": ["Qwen3ForCausalLM"]}


@pytest.mark.parametrize("windows", [None, "some", "all"])
@pytest.mark.parametrize("non_causal", [False, True])
def test_vllm_reads_whose_slots_see_all(
    windows: str | None,
    non_causal: bool,
    tiny_target: Target,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In speculators' layout vLLM takes one word for all layers: it is right wherever layers are of
    one kind, and a warning where it is not."""
    own: dict[str, Any] = {"block_size": 6, "num_layers": 2, "num_features": 2}
    if windows:
        own |= {"sliding_window": 16, "sliding_window_non_causal": non_causal}
        own |= {"full_attention_indices": [1]} if windows == "some" else {}
    cls = draft_config_class("specforge_exp.drafts.dflash.DFlash")
    cfg = cls(_target_="specforge_exp.drafts.dflash.DFlash", name="dflash", **own)
    kind = locate(cfg._target_)
    target = Target(tiny_target.model, kind.target_layers(cfg, len(tiny_target.layers)))
    draft = kind.new(target, cfg, vocabulary_mapping(torch.ones(1024), 1024), 3)
    draft.write(tmp_path, target, TINY.path, torch.float32, 4)
    config = json.loads((tmp_path / "config.json").read_text())
    layers = config["transformer_layer_config"]["layer_types"]
    causal = [layer == "sliding_attention" and not non_causal for layer in layers]
    in_vllm = [not config["sliding_window_non_causal"]] * len(layers)
    assert (in_vllm != causal) == ("would draft worse" in caplog.text)
    assert (in_vllm != causal) == (windows == "some" and not non_causal)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
CHANGES: list[tuple[str, str, Callable[[dict[str, Any]], Any], str]] = [
    ("eagle3", "sglang", lambda c: c.pop("hidden_size"), "has no hidden_size"),
    ("eagle3", "sglang", lambda c: c.update(attention_bias=True), "attention_bias=True is not"),
    ("eagle3", "sglang", lambda c: c.update(hidden_act="gelu"), "hidden_act=gelu is not silu"),
    (
        "eagle3", "sglang", lambda c: c.update(eagle_aux_hidden_state_layer_ids=[1, 3, 5]),
        "by which vLLM feeds the draft",
    ),
    ("eagle3", "sglang", lambda c: c.update(mask_token_id=7), "mask_token_id=7 is not known"),
    (
        "eagle3", "sglang",
        lambda c: (c.pop(AUX), c["eagle_config"].update({AUX: [0, 2, 4]})),
        r"its auxiliary layers is \[0, 2, 4\]",
    ),
    ("eagle3", "speculators", lambda c: c.pop("norm_before_residual"), "no norm_before_residual"),
    ("eagle3", "speculators", lambda c: c.update(speculators_model_type="mtp"), "is not eagle3"),
    ("peagle", "sglang", lambda c: c.update(mask_token_id=None), "has no mask_token_id"),
    ("dflash", "sglang", lambda c: c["dflash_config"].pop("mask_token_id"), "no dflash_config"),
    ("dflash", "sglang", lambda c: c["dflash_config"].update(x=1), "dflash_config.x=1 is"),
    ("dflash", "speculators", lambda c: c.update(draft_vocab_size=64), "draft_vocab_size=64 is"),
    (
        "sliding", "speculators", lambda c: c.pop("sliding_window_non_causal"),
        "has no sliding_window_non_causal",
    ),
    ("dflash", "speculators", lambda c: c.update(markov_rank=8), "markov_rank=8 is not known"),
    ("dspark", "speculators", lambda c: c.pop("sample_from_anchor"), "has no sample_from_anchor"),
    ("dspark", "sglang", lambda c: c.pop("markov_rank"), "has no markov_rank"),
    ("eagle3", "sglang", lambda c: c.update(is_neox_style=False), "is_neox_style=False is not"),
    ("eagle3", "sglang", lambda c: c.update(is_causal=False), "is_causal=False is not known"),
    (
        "dflash", "sglang", lambda c: c.update(rope_is_neox_style=False),
        "rope_is_neox_style=False is not",
    ),
    ("dflash", "sglang", lambda c: c.update(is_causal=True), "is_causal or dflash_config.causal"),
    ("dflash", "sglang", lambda c: c["dflash_config"].update(causal=True), "slots see those after"),
    ("sliding", "sglang", lambda c: c.pop("use_sliding_window"), "use_sliding_window is not true"),
    ("sliding", "sglang", lambda c: c.update(sliding_window=None), "sliding_window has none"),
    (
        "dflash", "sglang", lambda c: c["dflash_config"].update(target_layer_ids=[0, 2, 4]),
        r"dflash_config.target_layer_ids is \[0, 2, 4\]",
    ),
    (
        "dflash", "sglang", lambda c: c.update(layer_types=["chunked_attention"] * 2),
        "does not say which of num_hidden_layers=2 layers",
    ),
    (
        "eagle3", "sglang", lambda c: c.update(rope_scaling={"type": "linear", "factor": 2.0}),
        "are two rotary embeddings",
    ),
    (
        "eagle3", "sglang",
        lambda c: c["rope_parameters"].update(rope_type="dynamic", factor=2.0), "known: default",
    ),
    (
        "dflash", "sglang", lambda c: c["rope_parameters"].update(partial_rotary_factor=0.5),
        "of whole heads",
    ),
    (
        "dflash", "speculators",
        lambda c: c["transformer_layer_config"].update(
            rope_parameters={"full_attention": {"rope_theta": 1e6}}
        ),
        "the same in all layers",
    ),
    *(
        (name, "sglang", lambda c, more=more: c["rope_parameters"].update(more), "known: default")
        for name, more in [
            ("eagle3", YARN | {"attention_factor": 1.0}), ("dflash", YARN | {"attn_factor": 0.5}),
            ("eagle3", {"rope_dim": 8}), ("dflash", {"type": "linear", "factor": 2.0}),
        ]
    ),
    (
        "eagle3", "sglang", lambda c: c["rope_parameters"].update(rope_type="yarn"),
        "has no factor, original_max_position_embeddings$",
    ),
    (
        "dflash", "sglang", lambda c: c["rope_parameters"].update(rope_type="llama3", factor=8.0),
        "has no low_freq_factor, high_freq_factor, original_max_position_embeddings$",
    ),
    (
        "eagle3", "sglang", lambda c: c["eagle_config"].update(use_mtp_layernorm=True),
        "eagle_config.use_mtp_layernorm=True; EAGLE-3 has False$",
    ),
    (
        "eagle3", "sglang", lambda c: c["eagle_config"].update(use_aux_hidden_state=False),
        "eagle_config.use_aux_hidden_state=False; EAGLE-3 has True$",
    ),
    (
        "eagle3", "sglang", lambda c: c["eagle_config"].update(parallel_draft_step=2),
        "eagle_config.parallel_draft_step=2; EAGLE-3 has 1$",
    ),
    *(
        (name, "sglang", lambda c, entry=entry: c.update({entry: 2000}), f"its {entry} is 2000, ")
        for name, entry in [
            ("eagle3", "vocab_size"), ("eagle3", "target_hidden_size"), ("dflash", "vocab_size"),
            ("dflash", "hidden_size"), ("dflash", "num_target_layers"),
        ]
    ),
    ("peagle", "sglang", lambda c: c.update(ptd_token_id=8), "are not one token"),
    ("peagle", "sglang", lambda c: c.update(mask_token_id=1024), "none of the tokens 0..1023$"),
    ("dspark", "speculators", lambda c: c.update(mask_token_id="7"), "is not a token"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "layout", "change", "message"), CHANGES, ids=range(len(CHANGES)))
def test_what_cannot_be_read_is_refused(
    name: str,
    layout: str,
    change: Callable[[dict[str, Any]], Any],
    message: str,
    tiny_target: Target,
    tmp_path: Path,
) -> None:
    """By one line that names the entry."""
    draft, target = draft_of(name, tiny_target)
    draft.write(tmp_path, target, TINY.path, torch.float32, 4 if layout == "speculators" else None)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))
    with pytest.raises(InputError, match=message) as error:
        type(draft).load(tmp_path, target)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("eagle3", "speculators"),
        ("dspark", "sglang"),
        pytest.param("eagle3", "sglang", marks=pytest.mark.slow),
        pytest.param("dspark", "speculators", marks=pytest.mark.slow),
    ],
)
def test_an_export_becomes_a_run(
    cfg: Config, tokens: Path, name: str, layout: str, tmp_path: Path
) -> None:
    """from=: bit-equal weights in the other layout, the same tau, and a start for a training."""
    cfg = replace(cfg, run_name="first", max_steps=2, draft=options_of(name))
    cfg.bench = replace(cfg.bench, max_tokens=8, bootstrap=20)
    cfg.export = replace(cfg.export, format=layout)
    train(cfg)
    source = export(cfg)
    tau = bench(cfg)
    other = {"sglang": "speculators", "speculators": "auto"}[layout]
    made = replace(
        cfg, run_name="made", export=replace(cfg.export, source=str(source), format=other)
    )
    second = export(made)
    assert export(made) == second
    assert bench(replace(made, export=replace(cfg.export, source=None))) == tau
    back = replace(made, run_name="back", export=replace(made.export, source=str(second)))
    back.export.format = layout
    third = export(back)
    for file in ("model.safetensors", "config.json"):
        assert (third / file).read_bytes() == (source / file).read_bytes()
    trainer = replace(cfg.trainer, init="made", dump=[1])
    on = replace(cfg, run_name="on", max_steps=1, trainer=trainer)
    train(on)
    dumped = load_file(paths.run_dir(on) / "dump" / "step-000001-rank0.safetensors")
    exported = load_file(source / "model.safetensors")
    assert dumped["draft.fc.weight"].equal(exported["fc.weight"].float())
    with pytest.raises(InputError, match=r"holds checkpoints; give from="):
        export(replace(made, run_name="first"))
    with pytest.raises(InputError, match=r"no folder or hub id of a draft"):
        export(replace(made, export=replace(made.export, source=str(tmp_path)), run_name="none"))
    again = replace(cfg, export=replace(cfg.export, format=other))
    with pytest.raises(InputError, match=r"layout was .*2.*, now .*2"):
        export(again)


def test_options_and_what_they_refuse() -> None:
    assert composed("draft=dspark", "export.format=speculators").export.format == "speculators"
    for words, message in [
        (["draft=standalone", "export.format=speculators"], "choose one of: auto, sglang"),
        (
            ["draft=peagle", "draft.fc_norm=true", "export.format=speculators"],
            "no engine reads draft=peagle",
        ),
        (["export.source=x", "export.best=true"], "is a draft that is there already"),
    ]:
        with pytest.raises(InputError, match=message):
            composed(*words)


PEERS = os.environ.get("SPECFORGE_PEERS_PYTHON", "")


@pytest.mark.skipif(not PEERS, reason="SPECFORGE_PEERS_PYTHON is not set")
@kinds
def test_its_own_package_reads_it(name: str, tiny_target: Target, tmp_path: Path) -> None:
    """speculators loads it without a key that is missing or left over, and has these weights."""
    draft, target = draft_of(name, tiny_target)
    draft.write(tmp_path, target, TINY.path, torch.float32, 4)
    command = [PEERS, "-m", "peers.speculators_load", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT / "benchmarks", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["algorithm"] == type(draft).algorithm and said["differ"] == []
    assert said["tensors"] == len(load_file(tmp_path / "model.safetensors"))


def test_from_is_an_option_of_export_alone(tmp_path: Path) -> None:
    """As it is typed: the short form reaches the stage, and nothing is left behind."""
    words = ["from=nowhere/at-all/x", "model=tiny", f"paths.checkpoints={tmp_path}/runs"]
    for script, message in [
        ("export", "error: from=nowhere/at-all/x is no folder or hub id of a draft"),
        ("bench", "error: from is not an option"),
    ]:
        done = warm.run([str(ROOT / f"{script}.py"), *words], tmp_path)
        assert done.returncode == 1 and message in done.stderr, done.stderr
    assert not (tmp_path / "runs").exists()


def test_the_base_of_a_rotary_embedding_may_stand_beside_it() -> None:
    """As transformers reads it; else it would be 10,000."""
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "rope_theta": 1e6}
    for rope in ({"rope_type": "linear", "factor": 2.0}, {"rope_type": "default"}):
        for name in ("rope_parameters", "rope_scaling"):
            read = usual_entries(Path(), {**sizes, name: rope})
            assert read["rope_parameters"] == {"rope_theta": 1e6, **rope}
    read = usual_entries(Path(), {**sizes, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert read["rope_parameters"] == {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0}
    assert (read["num_key_value_heads"], read["head_dim"], read["num_hidden_layers"]) == (2, 4, 1)
