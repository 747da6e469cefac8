"""What we say to SGLang and read of it, against the sources in its wheel, which need no GPU to be
read: the release of our image, and the newest one that this was tried with.

Its loaders run here for real, on our exports, with recorders in place of its layers.
"""

import ast
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from email import message_from_bytes
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, TINY
from engine_targets import DFLASH, EAGLE3, of_sglang
from packaging.requirements import Requirement
from safetensors.torch import load_file
from test_server_engine import ARGS
from transformers import AutoConfig
from wheels import wheel

from specforge_exp.config import EngineConfig
from specforge_exp.drafts.dflash.config import DFlashConfig
from specforge_exp.drafts.dflash.draft import DFlash
from specforge_exp.drafts.eagle3.config import Eagle3Config
from specforge_exp.drafts.eagle3.draft import Eagle3
from specforge_exp.drafts.engines import engines
from specforge_exp.drafts.vocabulary import vocabulary_mapping
from specforge_exp.serving import sglang
from specforge_exp.serving.command import Speculation, server_command
from specforge_exp.target import Target

pytestmark = pytest.mark.slow

PINNED = EngineConfig().image.rpartition(":v")[2]
NEWEST = "0.5.23"
MODELS, MANAGERS = "sglang/srt/models", "sglang/srt/managers"
ASKED = "sglang/srt/model_executor/model_runner_components/spec_aux_hidden_state.py"
LAYERS = "eagle_aux_hidden_state_layer_ids"
OLDER = {"spec_accept_histogram"}
"""Names of releases before these."""


@dataclass(frozen=True)
class Sources:
    """The sources in a wheel."""

    path: Path

    @cached_property
    def archive(self) -> zipfile.ZipFile:
        return zipfile.ZipFile(self.path)

    def text(self, name: str) -> str:
        return self.archive.read(name).decode()

    def tree(self, name: str) -> ast.Module:
        return ast.parse(self.text(name))

    def classes(self, name: str) -> dict[str, ast.ClassDef]:
        return {node.name: node for node in self.tree(name).body if isinstance(node, ast.ClassDef)}

    @cached_property
    def options(self) -> dict[str, str]:
        """Options of the server with their declarations; those that no command line takes are
        left out."""
        folder = "sglang/srt/arg_groups/fields/"
        found = {}
        for name in self.archive.namelist():
            if name.startswith(folder) and name.endswith(".py"):
                for node in ast.walk(self.tree(name)):
                    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                        found[node.target.id] = ast.unparse(node)
        return {name: said for name, said in found.items() if "no_cli=True" not in said}


@pytest.fixture(scope="module", params=sorted({PINNED, NEWEST}))
def sources(request: pytest.FixtureRequest) -> Sources:
    return Sources(wheel(f"sglang=={request.param}"))


def strings(node: ast.AST) -> set[str]:
    """All string constants."""
    constants = (n.value for n in ast.walk(node) if isinstance(n, ast.Constant))
    return {value for value in constants if isinstance(value, str)}


def attributes(node: ast.AST) -> set[str]:
    """What a class sets of itself."""
    return {
        n.attr
        for n in ast.walk(node)
        if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)
    }


def method(owner: ast.ClassDef, name: str, **known: Any) -> Any:
    """A method of theirs as a function; what it needs besides its arguments is in `known`."""
    function = next(n for n in owner.body if isinstance(n, ast.FunctionDef) and n.name == name)
    module = ast.Module([function], [])
    return run(module, known)[name]


def run(module: ast.Module, known: dict[str, Any]) -> dict[str, Any]:
    """Execute a module whose annotations are not evaluated."""
    future = ast.parse("from __future__ import annotations").body
    module = ast.fix_missing_locations(ast.Module([*future, *module.body], []))
    exec(compile(module, "sglang", "exec"), known)
    return known


def flags(command: list[str]) -> Iterator[tuple[str, str]]:
    """Options of a server's command line, with the word after each."""
    for word, following in pairwise([*command, ""]):
        if word.startswith("--"):
            yield word.removeprefix("--").replace("-", "_"), following


def test_the_server_has_our_options(sources: Sources) -> None:
    engine = EngineConfig(name="sglang", args=ARGS)
    algorithms = attributes_of_enum(sources)
    for kind in (Eagle3, DFlash):
        draft = Speculation("draft", kind.sglang_options(5))
        used = dict(flags(server_command(engine, "Qwen/Qwen3-8B", 2, 30001, draft)[3:]))
        assert {*draft.options, "speculative_draft_model_path"} <= {*used}
        assert {*used} <= {*sources.options}
        assert used["speculative_algorithm"] in algorithms
    assert {*sources.options} >= sglang.SIZES


def attributes_of_enum(sources: Sources) -> set[str]:
    """Names of SpeculativeAlgorithm."""
    body = sources.classes("sglang/srt/speculative/spec_info.py")["SpeculativeAlgorithm"].body
    return {
        target.id
        for node in body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def read_of(name: str) -> set[str]:
    """Keys that our client of SGLang reads of a dict of that name."""
    text = (REPOSITORY / "specforge_exp" / "bench" / "clients.py").read_text()
    body = text.partition("def sglang(")[2].partition("\ndef ")[0]
    return set(re.findall(rf'{name}(?:\.get\(|\[)"(\w+)"', body))


def test_its_answers_have_what_we_read(sources: Sources) -> None:
    """Counters, token ids and reasons in /generate; the pages that tell it from other servers."""
    answers = strings(sources.tree(f"{MANAGERS}/tokenizer_manager.py"))
    counters = read_of("meta")
    assert {"spec_verify_ct", "spec_correct_drafts_histogram", "completion_tokens"} <= counters
    assert counters - OLDER <= answers
    assert read_of("event") == {"meta_info", "output_ids"} <= answers
    pages = strings(sources.tree("sglang/srt/entrypoints/http_server.py"))
    assert {"/generate", "/health", "/model_info", "/v1/chat/completions"} <= pages
    asked = sources.classes(f"{MANAGERS}/io_struct.py")["GenerateReqInput"]
    sampling = sources.classes("sglang/srt/sampling/sampling_params.py")["SamplingParams"]
    assert {"input_ids", "sampling_params", "stream"} <= declared(asked)
    said = {"temperature", "max_new_tokens", "stop_token_ids", "sampling_seed"}
    assert said <= declared(sampling)
    assert '"sampling_seed": self.seed' in sources.text("sglang/srt/entrypoints/openai/protocol.py")
    batch = sources.text("sglang/srt/sampling/sampling_batch_info.py")
    assert "enable_deterministic_inference" in batch  # alone it looks at a request's seed


def declared(owner: ast.ClassDef) -> set[str]:
    """Fields of a class."""
    return {
        n.target.id
        for n in owner.body
        if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
    }


def layer_parts(*norms: str) -> set[str]:
    """Parameters of a decoder layer as SGLang fuses them."""
    linear = {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"}
    return linear | {*norms, "input_layernorm", "post_attention_layernorm"}


def loaded(load_weights: Any, place: Any, names: set[str], folder: Path) -> set[str]:
    """Which of `names` their loader fills from our export; every other tensor it has to know."""
    filled: set[str] = set()
    shapes = {"fc.weight": load_file(folder / "model.safetensors")["fc.weight"].shape}

    def parameter(name: str) -> Any:
        shape = shapes.get(name, ())
        return SimpleNamespace(weight_loader=lambda *_: filled.add(name), shape=shape)

    place.named_parameters = lambda: [(name, parameter(name)) for name in names]
    tensors = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        before = len(filled)
        load_weights(place, [(name, value)])
        fused = re.search(r"[qkv]_proj|gate_proj|up_proj", name)
        assert len(filled) > before or fused or name in ("d2t", "t2d"), name
    return filled


def test_an_eagle3_export_in_its_loader(
    sources: Sources, tiny_target: Target, tmp_path: Path
) -> None:
    """Every tensor finds its place and every place but the embeddings its tensor; d2t is read as
    offsets, and layers are numbered as in eagle_config."""
    counts_V = torch.arange(1024) % 7
    draft = Eagle3.new(
        tiny_target, Eagle3Config(draft_vocab_size=512), vocabulary_mapping(counts_V, 512), 0
    )
    draft.write(tmp_path, tiny_target, TINY.path, torch.float32)
    classes = sources.classes(f"{MODELS}/llama_eagle3.py")
    place = SimpleNamespace(hot_token_id=None)
    parts = layer_parts("hidden_norm")
    names = {f"model.layers.0.{part}.weight" for part in parts}
    names |= {"model.fc.weight", "model.norm.weight", "lm_head.weight"}
    mine = {"fc", "norm", "layers", "lm_head", "hidden_norm"}
    assert mine <= set().union(*map(attributes, classes.values()))
    llama = set().union(*map(attributes, sources.classes(f"{MODELS}/llama.py").values()))
    assert {word for part in parts for word in part.split(".")} - mine <= llama
    owner = classes["LlamaForCausalLMEagle3"]
    load_weights = method(owner, "load_weights", torch=torch, default_weight_loader=None)
    assert loaded(load_weights, place, names, tmp_path) == names
    assert place.hot_token_id.tolist() == draft.draft_ids_D.tolist()
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.architectures == ["LlamaForCausalLMEagle3"]
    asked = sources.tree(
        "sglang/srt/model_executor/model_runner_components/spec_aux_hidden_state.py"
    )
    assert {"eagle_config", *config.eagle_config} <= strings(asked)
    captured(sources, "set_eagle3_layers_to_capture", config.eagle_config[LAYERS], tiny_target)


def test_an_eagle31_export_in_its_loader(
    sources: Sources, tiny_target: Target, tmp_path: Path
) -> None:
    """Further layers and the norms before fc."""
    classes = sources.classes(f"{MODELS}/llama_eagle3.py")
    options = Eagle3Config(draft_vocab_size=512, num_layers=2, fc_norm=True, norm_output=True)
    mapping = vocabulary_mapping(torch.arange(1024) % 7, 512)
    Eagle3.new(tiny_target, options, mapping, 0).write(
        tmp_path, tiny_target, TINY.path, torch.float32
    )
    parts = layer_parts("hidden_norm")
    names = {f"model.layers.{layer}.{part}.weight" for layer in (0, 1) for part in parts}
    names |= {f"model.fc_norm.{part}.weight" for part in range(3)}
    names |= {"model.fc.weight", "model.norm.weight", "lm_head.weight"}
    owner = classes["LlamaForCausalLMEagle3"]
    load_weights = method(owner, "load_weights", torch=torch, default_weight_loader=None)
    assert loaded(load_weights, SimpleNamespace(), names, tmp_path) == names


def captured(sources: Sources, name: str, layer_ids: list[int], target: Target) -> None:
    """Its target captures before the layers that follow ours: their inputs are our outputs."""
    owner = sources.classes(f"{MODELS}/qwen3.py")["Qwen3ForCausalLM"]
    model = SimpleNamespace()
    place = SimpleNamespace(pp_group=SimpleNamespace(is_last_rank=True), model=model)
    method(owner, name)(place, layer_ids)
    assert layer_ids == list(target.aux_layers)
    assert model.layers_to_capture == [layer + 1 for layer in target.aux_layers]


def test_a_dflash_export_in_its_loader(
    sources: Sources, tiny_target: Target, tmp_path: Path
) -> None:
    """Likewise; and its own reader of the configuration finds ours."""
    options = DFlashConfig(start="random", block_size=6, num_layers=2, num_features=3)
    target = Target(tiny_target.model, [1, 3, 5])
    draft = DFlash.new(target, options, {}, 0)
    draft.write(tmp_path, target, TINY.path, torch.float32)
    owner = sources.classes(f"{MODELS}/dflash.py")["DFlashDraftModel"]
    place = SimpleNamespace(projector_type=None, is_nemotron_35_draft=False)
    parts = layer_parts("self_attn.q_norm", "self_attn.k_norm")
    names = {f"layers.{layer}.{part}.weight" for layer in (0, 1) for part in parts}
    names |= {"fc.weight", "hidden_norm.weight", "norm.weight"}
    every = set().union(*map(attributes, sources.classes(f"{MODELS}/dflash.py").values()))
    assert {word for name in names for word in name.split(".")} - {"weight", "0", "1"} <= every
    load_weights = method(owner, "load_weights", torch=torch, default_weight_loader=None)
    assert loaded(load_weights, place, names, tmp_path) == names
    config = AutoConfig.from_pretrained(tmp_path)
    found = reader_of_configurations(sources)(draft_hf_config=config)
    assert found.resolve_block_size(default=16) == 6 and found.require_num_layers() == 2
    assert found.num_target_layers == 8 and found.mask_token_id == draft.config.mask_token_id
    layer_ids = found.resolve_target_layer_ids(target_num_layers=8, draft_num_layers=2)
    captured(sources, "set_dflash_layers_to_capture", layer_ids, target)


def reader_of_configurations(sources: Sources) -> Any:
    """parse_dflash_draft_config and what stands beside it, without what needs kernels."""
    tree = sources.tree("sglang/srt/speculative/dflash_utils.py")

    def needs_none(node: ast.stmt) -> bool:
        if isinstance(node, ast.ImportFrom):
            return not (node.module or "").startswith(("sglang", "triton"))
        if isinstance(node, ast.Assign):
            return isinstance(node.value, ast.Constant)
        decorators = {ast.unparse(d) for d in getattr(node, "decorator_list", [])}
        known = isinstance(node, ast.FunctionDef | ast.ClassDef)
        return known and all(d.startswith("dataclass") for d in decorators)

    body = [
        n
        for n in tree.body
        if needs_none(n) and not (isinstance(n, ast.ImportFrom) and n.module == "__future__")
    ]
    known = run(ast.Module(body, []), {"__name__": __name__})
    return known["parse_dflash_draft_config"]


def test_its_pins_and_ours_exclude_each_other(sources: Sources) -> None:
    """Why it is no extra (pyproject.toml): beside it stand other versions than the tested ones;
    where this fails for the newest release, it can be one."""
    name = next(n for n in sources.archive.namelist() if n.endswith(".dist-info/METADATA"))
    lines = message_from_bytes(sources.archive.read(name)).get_all("Requires-Dist") or []
    theirs = {r.name: r for r in map(Requirement, lines) if r.marker is None}
    tested = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = {n: next(iter(theirs[n].specifier)).version for n in ("torch", "transformers")}
    assert {f"{name}=={version}" for name, version in pins.items()} - {*tested}, pins


def test_it_finds_the_parser_of_a_template(sources: Sources) -> None:
    """`sglang.READING`: what it makes of "auto" for templates whose marks are special tokens."""
    assert sglang.READING == {"reasoning_parser": "auto"}
    options = sources.text("sglang/srt/server_args.py")
    assert 'choices=["auto"] + reasoning_parser_choices' in options
    rules = sources.text("sglang/srt/parser/template_detection.py")
    reasoning = rules[rules.index("REASONING_PARSER_RULES") : rules.index("TOOL_CALL_PARSER_RULES")]
    assert 'value="gpt-oss", predicate=_is_gpt_oss' in reasoning and 'value="gemma4"' in reasoning


@pytest.mark.parametrize(("draft", "method"), [("eagle3", EAGLE3), ("dflash", DFLASH)])
def test_the_targets_that_it_reads_for_a_draft(draft: str, method: str) -> None:
    """What train and regen warn by is what its sources say."""
    (entry,) = [
        entry for entry in engines()
        if entry["engine"] == f"SGLang {NEWEST}" and draft in entry["drafts"]
    ]  # fmt: skip
    found = of_sglang(wheel(f"sglang=={NEWEST}"), method)["only"]
    assert entry["only"] == found and "LlamaForCausalLM" in found
