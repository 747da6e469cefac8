"""What differs between families is read from the model, and what cannot be read is refused."""

import ast
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from conftest import small_target
from families import BASE, FAMILIES, HEADS, YARN, longrope, save, tokens
from safetensors.torch import load_file, save_file

import specforge_exp
from specforge_exp.bench.speculative import Choice
from specforge_exp.config import Config, DraftConfig, ModelConfig
from specforge_exp.drafts.dflash.config import DFlashConfig
from specforge_exp.drafts.dflash.draft import DFlash
from specforge_exp.drafts.eagle3.config import Eagle3Config
from specforge_exp.drafts.eagle3.draft import Eagle3
from specforge_exp.drafts.teacher import make_teacher
from specforge_exp.drafts.vocabulary import vocabulary_mapping
from specforge_exp.errors import InputError
from specforge_exp.stages.preprocess import preprocess
from specforge_exp.stages.train import train
from specforge_exp.target import Target, check_length, draft_shape, load_target

CPU = torch.device("cpu")
EAGLE3 = Eagle3Config(name="e", draft_vocab_size=None)
DFLASH = DFlashConfig(name="d", start="target", block_size=4, num_layers=2, num_features=3)
Saved = Callable[[str], Path]
MULTIPLIERS = (
    "embedding_multiplier residual_multiplier attention_multiplier logits_scaling logit_scale"
).split()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Folder of a family, made once."""
    folders: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in folders:
            folders[family] = save(FAMILIES[family](), tmp_path_factory.mktemp("family"))
        return folders[family]

    return folder


def model_of(folder: Path, **options: Any) -> ModelConfig:
    return ModelConfig(name="t", path=str(folder), **options)


def loaded(folder: Path, kind: Any = Eagle3, draft: DraftConfig = EAGLE3) -> Target:
    feeds = partial(kind.target_layers, draft)
    return load_target(model_of(folder), CPU, feeds=feeds)


def copied(folder: Path, to: Path, **config: Any) -> Path:
    """A model folder with other values in its config.json."""
    to.mkdir(exist_ok=True)
    settings = json.loads((folder / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**settings, **config}))
    (to / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    return to


def read_by(cfg: Config, model: Path, tokenizer: Path) -> Path:
    """Tokens for another model, with the tokenizer of this one; its path."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (model / name).write_bytes((tokenizer / name).read_bytes())
    cfg.model.path, cfg.preprocess.force = str(model), True
    return preprocess(cfg)


@pytest.mark.parametrize(
    ("family", "scale", "softcap"),
    [("Granite 3", 1 / 8, None), ("Cohere 2", 0.25, None), ("Gemma 2", 1.0, 3.0)],
)
def test_the_heads_numbers_are_measured(
    saved: Saved, family: str, scale: float, softcap: float | None
) -> None:
    head = loaded(saved(family)).head
    assert (head.scale, head.softcap) == (scale, softcap)


@torch.no_grad()
@pytest.mark.parametrize("family", ["Granite 3", "Cohere 2"])
def test_every_multiplier_counts(saved: Saved, family: str, tmp_path: Path) -> None:
    """States, teacher and fresh drafts are those of transformers' own model; each one matters."""
    names = [n for n in MULTIPLIERS if n in json.loads((saved(family) / "config.json").read_text())]
    assert len(names) == {"Granite 3": 4, "Cohere 2": 1}[family]
    ids_1T = tokens(24)[None]
    target = loaded(saved(family))
    model = tf.AutoModelForCausalLM.from_pretrained(saved(family))
    plain = model(ids_1T, output_hidden_states=True)
    aux_1TA, last_1TH = target.features(ids_1T)
    fed = torch.cat([plain.hidden_states[layer + 1] for layer in target.aux_layers], -1)
    torch.testing.assert_close(aux_1TA, fed, rtol=1e-5, atol=1e-6)
    logits_TV = plain.logits[0]
    torch.testing.assert_close(target.head(last_1TH[0]), logits_TV, rtol=1e-5, atol=1e-6)
    teacher = make_teacher(target.head, last_1TH[0], torch.arange(len(target.head_weight_VH)))
    logp_TV = logits_TV.log_softmax(-1)
    rows = teacher.plain_rows(torch.arange(24))
    torch.testing.assert_close(rows.logp_ND, logp_TV, rtol=1e-5, atol=1e-5)
    size = logits_TV.shape[1]
    draft = Eagle3.new(target, EAGLE3, vocabulary_mapping(torch.ones(size), size), 0)
    served_TV = draft.lm_head(plain.hidden_states[-1][0])
    torch.testing.assert_close(served_TV, logits_TV, rtol=1e-5, atol=1e-5)
    ending_H = DFlash.new(target, DFLASH, {}, 0).norm.weight  # its head is the target's own
    torch.testing.assert_close(ending_H, target.final_norm()[0] * target.head.scale)
    for name in names:
        other = copied(saved(family), tmp_path, **{name: 1.0})
        changed = tf.AutoModelForCausalLM.from_pretrained(other)(ids_1T).logits[0]
        assert float((changed - logits_TV).norm() / logits_TV.norm()) > 0.01, name


def test_a_bias_of_the_head_counts() -> None:
    target = small_target()
    target.model.lm_head.bias = torch.nn.Parameter(torch.linspace(-3, 3, 64))
    ids_1T = torch.arange(12)[None]
    _, last_1TH = target.features(ids_1T)
    with torch.no_grad():
        torch.testing.assert_close(target.head(last_1TH), target.model(ids_1T).logits)
    torch.testing.assert_close(
        target.head.tile(last_1TH[0], slice(10, 20)), target.head(last_1TH[0])[:, 10:20]
    )


def test_a_head_that_cannot_be_reproduced_is_refused() -> None:
    target = small_target()
    target.model.lm_head.register_forward_hook(lambda _m, _i, logits: logits.roll(1, -1))
    with pytest.raises(InputError, match="the logits of qwen3 are not those of its last hidden"):
        _ = target.head


def test_padding_of_the_vocabulary_is_never_sampled() -> None:
    target = small_target()
    target.tokens = 50
    _, last_1TH = target.features(torch.arange(12)[None])
    logits_TV = target.head(last_1TH[0])
    assert logits_TV[:, :50].isfinite().all()
    choice = Choice(50.0, torch.Generator().manual_seed(0))
    assert max(choice(logits_TV[0]) for _ in range(300)) < 50


@pytest.mark.parametrize(
    ("rotary", "expected"),
    [
        ({"rope_type": "default", "rope_theta": 7e3}, {"rope_type": "default", "rope_theta": 7e3}),
        ({**YARN, "mscale": 0.7, "truncate": False}, YARN),
        (longrope(16), {"rope_type": "default", "rope_theta": 1e4}),
        (
            {"rope_type": "dynamic", "rope_theta": 5e4, "factor": 2.0},
            {"rope_type": "default", "rope_theta": 5e4},
        ),
        (
            {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "partial_rotary_factor": 0.5},
            {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        ),
    ],
)
def test_the_drafts_rotary_embedding(rotary: dict[str, Any], expected: dict[str, Any]) -> None:
    config = tf.LlamaConfig(**BASE, rope_parameters=rotary)
    assert draft_shape(config)["rope_parameters"] == expected


@pytest.mark.parametrize("family", ["GLM-4", "Gemma 3 (text)", "Phi-4-mini"])
def test_the_export_says_what_was_trained(saved: Saved, family: str, tmp_path: Path) -> None:
    target = loaded(saved(family))
    draft = Eagle3.new(target, EAGLE3, full_map(320), 0)
    draft.write(tmp_path, target, "x", torch.float32)
    config = json.loads((tmp_path / "config.json").read_text())
    assert 2 * len(draft.rotary.inv_freq) == config["head_dim"]
    assert "partial_rotary_factor" not in config["rope_parameters"]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    if family == "Gemma 3 (text)":  # that of the layers which see everything
        assert config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
        assert config["rope_theta"] == 1e6


def full_map(size: int) -> dict[str, torch.Tensor]:
    return vocabulary_mapping(torch.ones(size), size)


@pytest.mark.parametrize("family", ["Qwen3", "Gemma 2", "Nemotron", "Granite 3"])
def test_the_start_says_what_the_target_says(saved: Saved, family: str) -> None:
    """Fed the last layer's output, norm and head choose what the target chooses: 1 + w counts."""
    target = loaded(saved(family))
    draft = Eagle3.new(target, EAGLE3, full_map(320), 0)
    states: list[torch.Tensor] = []
    hook = target.layers[-1].register_forward_hook(
        lambda _m, _i, o: states.append(o[0] if isinstance(o, tuple) else o)
    )
    with torch.no_grad():
        served = target.model(tokens(40)[None]).logits
        hook.remove()
        ours = draft.lm_head(draft.norm(states[0]))
    agreement = float((served.argmax(-1) == ours.argmax(-1)).float().mean())
    assert agreement == 1.0 if family != "Nemotron" else agreement > 0.5  # subtracts the mean


NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")


def test_the_start_names_what_it_leaves_out(saved: Saved) -> None:
    """OLMo 2's norms stand behind attention and feed-forward block."""
    draft = DFlash.new(loaded(saved("OLMo 2"), DFlash, DFLASH), DFLASH, {}, 0)
    heads = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
    assert set(draft.not_copied) == {*NORMS, *heads}


def test_the_start_names_the_biases_it_leaves_out(saved: Saved) -> None:
    """Qwen2.5 adds biases to queries, keys and values; engines load a draft without any."""
    biases = {f"self_attn.{name}_proj.bias" for name in "qkv"}
    draft = Eagle3.new(loaded(saved("Qwen2.5")), EAGLE3, full_map(320), 0)
    assert set(draft.not_copied) == biases
    draft = DFlash.new(loaded(saved("Qwen2.5"), DFlash, DFLASH), DFLASH, {}, 0)
    assert biases < set(draft.not_copied)


@pytest.mark.parametrize(
    ("family", "added", "names"),
    [
        ("Llama 2", 0, NORMS),
        ("GLM-4", 0, NORMS),
        ("Qwen3-MoE", 0, NORMS),
        ("Gemma 2", 1, (NORMS[0], "pre_feedforward_layernorm.weight")),
    ],
)
def test_eagle3_starts_with_the_norms_of_the_last_layer(
    saved: Saved, family: str, added: int, names: tuple[str, str]
) -> None:
    """The state's norm is that before attention; each as an RMS norm multiplies by it."""
    target = loaded(saved(family))
    draft, theirs = Eagle3.new(target, EAGLE3, full_map(320), 0), target.layers[-1]
    for ours, name in zip(("hidden_norm", "post_attention_layernorm"), names, strict=True):
        weight = draft.midlayer.get_parameter(f"{ours}.weight").data
        torch.testing.assert_close(weight, added + theirs.get_parameter(name).data)
        assert float(weight.std()) > 0.01
        assert f"{ours}.weight" not in draft.not_copied
    assert bool((draft.midlayer.input_layernorm.weight == 1).all())


@pytest.mark.parametrize("family", ["OLMo 2", "Nemotron", "GPT-NeoX", "Cohere 2"])
def test_norms_of_another_kind_stay_1_and_are_named(saved: Saved, family: str) -> None:
    """Norms behind the parts; those that subtract the mean, with a bias or without."""
    draft = Eagle3.new(loaded(saved(family)), EAGLE3, full_map(320), 0)
    for ours in ("hidden_norm", "post_attention_layernorm"):
        assert bool((draft.midlayer.get_parameter(f"{ours}.weight") == 1).all())
        assert f"{ours}.weight" in draft.not_copied
    if family != "OLMo 2":
        draft = DFlash.new(loaded(saved(family), DFlash, DFLASH), DFLASH, {}, 0)
        assert set(NORMS) < set(draft.not_copied)


def test_norms_are_copied_where_they_mean_the_same(saved: Saved) -> None:
    """Gemma 2 has four norms a layer, all 1 + w; DFlash's stand before its two blocks."""
    target = loaded(saved("Gemma 2"), DFlash, DFLASH)
    layer, theirs = DFlash.new(target, DFLASH, {}, 0).layers[-1], target.layers[-1]
    for ours, name in (
        (layer.input_layernorm, "input_layernorm"),
        (layer.post_attention_layernorm, "pre_feedforward_layernorm"),
    ):
        torch.testing.assert_close(ours.weight.data, 1 + getattr(theirs, name).weight)


@pytest.mark.parametrize("missing", ["lm_head.weight", "model.layers.7.mlp.up_proj.weight"])
def test_missing_weights_are_named(saved: Saved, tmp_path: Path, missing: str) -> None:
    folder = copied(saved("Llama 2"), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights[missing]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"1 missing .*: {missing}"):
        loaded(folder)


def test_weights_that_are_cut_short_are_refused(saved: Saved, tmp_path: Path) -> None:
    folder = copied(saved("Llama 2"), tmp_path / "model")
    os.truncate(folder / "model.safetensors", 5000)
    with pytest.raises(InputError, match=r"cannot be loaded as a folder: .*header"):
        loaded(folder)
    with pytest.raises(InputError, match=r"config\.json is a file; a model is a folder"):
        loaded(folder / "config.json")


def test_weights_that_are_not_used_are_named(saved: Saved, tmp_path: Path) -> None:
    """A file of eight layers whose config.json says seven is another model."""
    folder = copied(saved("Llama 2"), tmp_path / "model", num_hidden_layers=7)
    with pytest.raises(InputError, match=r"9 not used: model\.layers\.7.*unused_weights=true"):
        loaded(folder)
    options = model_of(folder, unused_weights=True)
    assert len(load_target(options, CPU).layers) == 7


def test_weights_of_another_shape_are_named(saved: Saved, tmp_path: Path) -> None:
    folder = copied(saved("Llama 2"), tmp_path / "model", intermediate_size=80)
    with pytest.raises(InputError, match=r"24 of another shape: model\.layers\.0"):
        loaded(folder)


@pytest.mark.parametrize(
    ("details", "package"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, "optimum"),
        ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, "gptqmodel"),
        (
            {
                "quant_method": "compressed-tensors", "format": "float-quantized",
                "config_groups": {}, "quantization_status": "compressed",
            },
            "compressed-tensors",
        ),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    ],
)  # fmt: skip
def test_a_quantised_target_needs_its_package(
    saved: Saved, tmp_path: Path, details: dict[str, Any], package: str
) -> None:
    folder = copied(saved("Llama 2"), tmp_path / "model", quantization_config=details)
    with pytest.raises(InputError, match=f"(?s){package}.*quantised: {details['quant_method']}"):
        loaded(folder)


def test_code_of_others_is_never_run(saved: Saved, tmp_path: Path) -> None:
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    folder = copied(saved("Llama 2"), tmp_path / "model", model_type="own", auto_map=auto)
    (folder / "own.py").write_text("raise SystemExit('it ran')\n")
    with pytest.raises(InputError, match="trust_remote_code stays off"):
        loaded(folder)


def test_a_length_above_the_context_is_said(saved: Saved) -> None:
    model = model_of(saved("Llama 2"))
    assert check_length(model, 256) is None
    assert "above the 256 positions" in (check_length(model, 257) or "")


def test_a_length_at_which_the_rotation_changes_is_refused(saved: Saved) -> None:
    model = model_of(saved("Phi-4-mini"))
    assert check_length(model, 128) is None
    with pytest.raises(InputError, match=r"from 128 tokens on .*\(longrope\).*max_length=128"):
        check_length(model, 129)


def test_the_stages_say_that_the_context_is_shorter(
    cfg: Config, tokens: Path, saved: Saved, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny = Path(cfg.model.path)
    cfg.max_steps = 1
    short = copied(tiny, tmp_path / "short", max_position_embeddings=128)
    report = json.loads((read_by(cfg, short, tiny) / "report.json").read_text())
    assert any("above the 128 positions" in text for text in report["warnings"])
    caplog.clear()
    caplog.set_level("INFO")
    train(cfg)
    assert "above the 128 positions" in caplog.text
    (said,) = [text for text in caplog.messages if "not copied" in text]  # Qwen3 norms its heads
    assert said.endswith("same sense: self_attn.q_proj.weight, self_attn.k_proj.weight")
    switch = copied(tiny, tmp_path / "switch", rope_parameters=longrope(32))
    with pytest.raises(InputError, match="rotary embedding"):
        read_by(cfg, switch, tiny)


def test_what_bench_cannot_decode_is_refused_before_training(
    cfg: Config, tokens: Path, tmp_path: Path
) -> None:
    config = FAMILIES["Jamba"]()
    config.vocab_size = 1024
    cfg.max_steps, tiny = 1, Path(cfg.model.path)
    read_by(cfg, Path(save(config, tmp_path / "next")), tiny)
    with pytest.raises(InputError, match=r"jamba cannot be decoded .*its past kept"):
        train(cfg)
    cfg.engine.name = "sglang"  # bench asks a server, which can
    train(cfg)


def test_a_head_dimension_may_differ_from_the_width() -> None:
    config = tf.Qwen3Config(**{**HEADS, "head_dim": 32})
    shape = draft_shape(config)
    assert (shape["head_dim"], shape["hidden_size"], shape["num_key_value_heads"]) == (32, 64, 2)


def test_a_size_that_the_configuration_lacks_is_named() -> None:
    with pytest.raises(InputError, match=r"the target \(bloom\) has no max_position_embeddings"):
        draft_shape(tf.BloomConfig(vocab_size=64, hidden_size=16, n_head=2, n_layer=8))


def test_no_family_is_named_in_a_comparison() -> None:
    """What differs between families is read from the model: no test for a name anywhere."""
    kinds = {make().get_text_config().model_type for make in FAMILIES.values()}
    for path in Path(specforge_exp.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare | ast.Match):
                texts = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
                assert not texts & kinds, f"{path}:{node.lineno}"
