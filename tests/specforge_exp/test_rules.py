"""How answers are asked for: the run's options, and the model's own where they are null."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import GenerationConfig

from specforge_exp.bench.asking import asking_of
from specforge_exp.config import Config
from specforge_exp.data.chat import Unrenderable
from specforge_exp.errors import InputError
from specforge_exp.generation.engine import Sampling
from specforge_exp.generation.rules import rules_of, sampling_of, warn_of_end
from specforge_exp.stages import regen as stage
from specforge_exp.target import load_tokenizer


def test_the_models_own_sampling(cfg: Config, tmp_path: Path) -> None:
    """Null means the generation config of the model; what is given wins."""
    cfg.regen.temperature = None
    own = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    own |= {"repetition_penalty": 1.05, "max_new_tokens": 3}  # the last is the run's alone
    cfg.model.path = str(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(own))
    most = cfg.regen.max_tokens
    assert sampling_of(cfg) == Sampling(0.6, 0.95, 20, 0.0, most, repetition_penalty=1.05)
    cfg.regen.temperature, cfg.regen.top_k, cfg.regen.top_p = 0.0, 0, 1.0
    cfg.regen.repetition_penalty = 1.0
    off = ("top_k", "repetition_penalty")
    assert sampling_of(cfg) == Sampling(0.0, 1.0, 0, 0.0, most, off=off)
    cfg.regen.temperature = None
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": False}))
    assert sampling_of(cfg).temperature == 0.0
    cfg.regen.samples_per_prompt = 2
    with pytest.raises(InputError, match="at temperature 0 all"):
        sampling_of(cfg)
    cfg.regen.samples_per_prompt = 1
    for said, temperature in (({}, 1.0), ({"temperature": 0.6}, 0.6)):  # as servers take it
        (tmp_path / "generation_config.json").write_text(json.dumps(said))
        assert sampling_of(cfg).temperature == temperature
    (tmp_path / "generation_config.json").write_text(json.dumps(own | {"min_p": 0.05}))
    cfg.regen.temperature, cfg.regen.top_p, cfg.regen.top_k = 0.9, 0.5, 7
    cfg.regen.repetition_penalty = 1.2
    assert sampling_of(cfg) == Sampling(0.9, 0.5, 7, 0.05, most, repetition_penalty=1.2)


def test_answers_that_no_server_ends_are_told_before_they_are_paid_for(
    cfg: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_end(cfg)
    assert caplog.text == ""
    folder = shutil.copytree(cfg.model.path, tmp_path / "base")
    (folder / "generation_config.json").write_text('{"eos_token_id": 0}')
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["eos_token"] = "<|endoftext|>"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    cfg.model.path = str(folder)
    warn_of_end(cfg)
    assert (
        "ends answers with <|im_end|>, at which a server of this model does not stop" in caplog.text
    )


def test_what_a_run_asks_by(cfg: Config) -> None:
    """The options of the run, and what each record says of its origin."""
    cfg.model.chat_template_kwargs, cfg.engine.retries = {"a": 1}, 3
    cfg.seed, cfg.regen.truncated, cfg.regen.temperature = 5, "drop", 0.5
    for thinking, more in (("model", {}), ("on", True), ("kept", True), ("off", False)):
        cfg.regen.thinking = thinking
        found = rules_of(cfg)
        enabled = more if more == {} else {"enable_thinking": more}
        assert found.template_kwargs == {"a": 1, **enabled} and found.thinking == thinking
    asked = {name: vars(found.sampling)[name] for name in ("top_p", "top_k", "max_tokens")}
    assert cfg.regen.top_p is None and None not in asked.values()
    assert {name: found.made_by[name] for name in asked} == asked
    assert (found.seed, found.truncated, found.attempts) == (5, "drop", 4)
    assert (found.max_length, found.sampling) == (cfg.max_length, sampling_of(cfg))
    assert found.made_by["temperature"] == 0.5 and "repetition_penalty" not in found.made_by
    assert (found.made_by["seed"], found.made_by["model"]) == (5, cfg.model.path)
    cfg.regen.temperature, cfg.regen.repetition_penalty = 0.0, 1.5
    cfg.engine = replace(cfg.engine, name="openai", urls=["http://x/v1"], served_name="x")
    greedy = rules_of(cfg)
    assert (greedy.attempts, greedy.made_by["repetition_penalty"]) == (1, 1.5)
    assert greedy.made_by["served_name"] == "x"


def test_several_answers_are_sampled(cfg: Config) -> None:
    """At temperature 0 they would be one answer, several times."""
    cfg.regen.temperature, cfg.regen.samples_per_prompt = 0.0, 2
    with pytest.raises(InputError, match=r"regen\.samples_per_prompt=2: at temperature 0 all"):
        sampling_of(cfg)
    cfg.regen.temperature = 0.1
    assert sampling_of(cfg).temperature == 0.1


def test_thinking_that_a_template_does_not_know(
    cfg: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said, of regen and of bench; nothing is where the switch is known."""
    cfg.regen.thinking, cfg.bench.thinking = "on", "off"

    def said() -> list[str]:
        caplog.clear()
        rules_of(cfg)
        asking_of(cfg, load_tokenizer(cfg.model), None)
        return [message.split(" changes no prompt")[0] for message in caplog.messages]

    assert said() == ["regen.thinking=on", "bench.thinking=off"]
    own = tmp_path / "own"
    shutil.copytree(cfg.model.path, own)
    (own / "chat_template.jinja").write_text("{{ enable_thinking }}{{ messages[0].content }}")
    cfg.model.path = str(own)
    assert not said()


def test_what_is_counted_is_what_is_asked(cfg: Config, tmp_path: Path) -> None:
    """Tools, thoughts and the options of the template are part of a prompt."""
    own = tmp_path / "own"
    shutil.copytree(cfg.model.path, own)
    (own / "chat_template.jinja").write_text(
        "{{ tools or '' }}{{ flag }}{% for m in messages %}{{ m.content }}"
        "{{ m.reasoning_content }}{% endfor %}"
    )
    cfg.model.path, lengths = str(own), []
    message = {"role": "assistant", "content": "word " * 9}
    for thoughts, flag, tools in (
        ("", "", []),
        ("one two three", "", []),
        ("", "four five six", []),
        ("", "", [{"type": "function"}]),
    ):
        cfg.model.chat_template_kwargs = {"flag": flag}
        count = rules_of(cfg).count
        assert count is not None
        lengths.append(count({"tools": tools}, [{**message, "reasoning": thoughts}]))
    assert min(lengths[1:]) > lengths[0] > 9


def test_what_the_model_would_say_of_sampling_is_not_guessed(
    cfg: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its files are nowhere, what is null must be given, and a server is told what is off."""
    monkeypatch.setattr(
        GenerationConfig,
        "from_pretrained",
        classmethod(lambda *_: (_ for _ in ()).throw(OSError())),
    )
    cfg.model.path = "nobody/nothing"
    with pytest.raises(InputError, match=r"regen\.top_p=\.\.\. regen\.top_k=\.\.\. regen.rep"):
        sampling_of(cfg)
    cfg.regen.dry_run = True
    assert "top_p unknown, top_k unknown" in stage.describe(cfg, [])
    cfg.regen.top_p, cfg.regen.top_k, cfg.regen.repetition_penalty = 0.9, 0, 1.0
    assert sampling_of(cfg).off == ("top_k", "repetition_penalty", "min_p")
    assert "temperature 0.7, top_p 0.9, top_k 0" in stage.describe(cfg, [])
    cfg.model.path = str(tmp_path)  # a folder says that there is none
    assert sampling_of(cfg).off == ()


def test_a_template_that_refuses_is_no_end_of_the_run(cfg: Config, tmp_path: Path) -> None:
    """Also where tokens are counted first, which is done of long conversations alone."""
    refusing = tmp_path / "refusing"
    shutil.copytree(cfg.model.path, refusing)
    (refusing / "chat_template.jinja").write_text("{{ raise_exception('not this one') }}")
    cfg.model.path = str(refusing)
    count = rules_of(cfg).count
    assert count is not None
    with pytest.raises(Unrenderable, match="not this one"):  # what `regenerate` writes down
        count({}, [{"role": "user", "content": "word " * 400}])
