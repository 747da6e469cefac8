"""Options that do not go together, or lie beyond a bound, are refused by name; those before it are
taken."""

from dataclasses import replace
from typing import Any

import pytest
from test_conf import composed

from specforge_exp.config import Config, Source
from specforge_exp.config.onpolicy import ProposedTerms
from specforge_exp.errors import InputError

RAY, REPLAY = {"target.placement": "ray"}, {"onpolicy.name": "replay"}
VLLM = RAY | {"target.engine": "vllm"}
NOT_TOGETHER: list[tuple[dict[str, Any], str]] = [
    ({"target.shard": True, "target.cache": "memory"}, "target.shard=true needs target.cache="),
    ({"target.tp_size": 2}, "target.tp_size needs target.placement=ray and target.engine=vllm"),
    ({"target.python": "p"}, "target.python needs target.placement=ray and target.engine=vllm"),
    (RAY | {"target.args": {"a": 1}}, "target.args needs .* target.engine=vllm"),
    ({"target.engine": "vllm"}, "target.engine=vllm needs target.placement=ray"),
    (VLLM | {"target.args": {"served-model-name": "x"}}, "target.args.served-model-name is set"),
    (RAY | {"target.cache": "disk"}, "target.placement=ray needs target.cache=none or memory"),
    (RAY | {"target.shard": True}, "target.placement=ray and target.shard=true exclude"),
    (RAY | {"target.share": "sweep", "target.store": "mooncake"}, "needs target.store=ray"),
    (VLLM | {"target.profile": [1, 1]}, "target.profile is for target.engine=transformers"),
    *(
        ({f"target.{key}": value}, f"target.{key} needs target.placement=ray")
        for key, value in [
            ("workers", 2),
            ("dry_run", True),
            ("store", "mooncake"),
            ("share", "sweep"),
            ("alone", "workers"),
            ("profile", [1, 1]),
        ]
    ),
    *((RAY | {"target.profile": w}, "is not .start, calls") for w in ([1], [-1, 1], [1, 0])),
    *(
        (other | {"target.pack_tokens": 8}, f"target.pack_tokens=8 and target.{key}=.* exclude")
        for key, other in [
            ("cache", {"target.cache": "memory"}),
            ("shard", {"target.shard": True}),
            ("placement", RAY),
        ]
    ),
    *(
        (other | {"target.compile": True}, f"target.compile=true and target.{key}=.* exclude")
        for key, other in [
            ("pack_tokens", {"target.pack_tokens": 8}),
            ("engine", VLLM),
            ("shard", {"target.shard": True}),
        ]
    ),
    *(
        (other | REPLAY, f"onpolicy=replay needs {key}=")
        for key, other in [
            ("target.alone", RAY | {"target.alone": "workers"}),
            ("target.engine", VLLM),
            ("target.cache", {"target.cache": "disk"}),
            ("target.shard", {"target.shard": True}),
            ("target.share", RAY | {"target.share": "sweep"}),
            ("target.pack_tokens", {"target.pack_tokens": 8}),
            ("target.compile", {"target.compile": True}),
            ("trainer.shard", {"trainer.shard": True}),
        ]
    ),
    (RAY | {"onpolicy.name": "rollout"}, "onpolicy=rollout needs target.placement=inprocess"),
    (REPLAY | {"onpolicy.length": 8}, "onpolicy.length=8 is above the 7"),
    (
        {"onpolicy.accepted": ProposedTerms(), "onpolicy.rejected": ProposedTerms()},
        "at least one weight of onpolicy.accepted or .rejected",
    ),
    *(
        ({f"onpolicy.{key}": value}, f"onpolicy.{key}={value}")
        for key, value in [
            ("anchors", 0),
            ("max_tokens", 1),
            ("sync_every", 0),
            ("length", 0),
            ("errors", 1.1),
            ("errors", -0.1),
            ("decay", 0.0),
            ("decay", 1.1),
            ("weight", 0.0),
            ("budget", 0.0),
        ]
    ),
    (
        {"trainer.schedule": "wsd", "trainer.warmup_ratio": 0.6, "trainer.decay_ratio": 0.5},
        "leave no step between them",
    ),
    *(
        ({key: value}, key)
        for key, value in [
            ("trainer.warmup_ratio", 1.1),
            ("trainer.gpus", 3),
            ("trainer.gpus", "many"),
            ("trainer.clip", 0.0),
            ("trainer.profile", [1, 0]),
            ("trainer.dump", [0]),
            ("regen.top_p", 0.0),
            ("regen.top_p", 1.1),
            ("regen.repetition_penalty", 0.0),
            ("export.push", "name"),
            ("export.dry_run", True),
            ("export.format", "vllm"),
            ("bench.concurrency", 2),
            ("bench.verify", "confidence"),
            ("engine.urls", ["http://x/v1"]),
            ("engine.rate_limit", 0.0),
            ("data.split_eval", 1.0),
            ("loss.temperature", 0.0),
            ("run_name", "SWEEPS"),
            ("max_length", 8),
            ("objectives", []),
            ("objectives", ["alpha/7"]),
            ("model.aux_layers", [1, 2, 3, 4]),
            ("epochs", 0),
        ]
    ),
    *(
        ({"engine.name": "vllm"} | {key: value}, f"{key}=.* needs {what}, without which it changes")
        for key, value, what in [
            ("trainer.decay_ratio", 0.3, "trainer.schedule=wsd"),
            ("trainer.decay_shape", "cosine", "trainer.schedule=wsd"),
            ("export.private", False, "export.push=.*"),
            ("bench.verify_cost", 0.2, "bench.verify=confidence"),
            ("bench.samples", "shipped", "bench=standard or bench=zlab"),
            ("bench.only", ["none"], "bench=standard or bench=zlab"),
            ("bench.alone_url", "http://x/v1", "engine=openai"),
        ]
    ),
    ({"bench.alone": False}, "bench.alone=false needs engine=sglang or vllm"),
    (
        {"data.split_eval": 0.1, "data.eval": [Source("synthetic:eval", limit=1)]},
        "data.split_eval=0.1 needs data.eval=",
    ),
    *(
        ({"model.chat_template_kwargs": {name: True}}, f"model.chat_template_kwargs.{name} is set")
        for name in ("add_generation_prompt", "tools", "tokenize")
    ),
    ({"loss.lambda_ce": -1.0, "loss.lambda_rkl": 2.0}, "loss.lambda_ce=-1.0 must be at least 0"),
    ({"export.source": "x", "export.best": True}, "export.source=x is a draft"),
    ({"export.source": "x", "export.step": 1}, "export.source=x is a draft"),
    ({"engine.name": "openai"}, "engine=openai needs engine.urls="),
    ({"tracker.name": "trackio", "tracker.entity": "x"}, "tracker.entity is for tracker=wandb"),
]


def together(values: dict[str, Any]) -> Config:
    """A configuration with these values, checked as when it is made."""
    return changed(composed("lr=1e-4", "model=tiny", "max_length=64"), values)


def changed(cfg: Config, values: dict[str, Any]) -> Config:
    """This one with them."""
    parts: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        group, _, name = key.rpartition(".")
        parts.setdefault(group, {})[name] = value
    own = parts.pop("", {})
    groups = {group: replace(getattr(cfg, group), **more) for group, more in parts.items()}
    return replace(cfg, **own, **groups)


@pytest.mark.parametrize(("values", "message"), NOT_TOGETHER, ids=str)
def test_options_that_do_not_go_together(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        together(values)


def test_options_that_just_go_together() -> None:
    """The last value before each of those bounds."""
    for values in (
        VLLM | {"target.workers": 2, "target.tp_size": 3, "target.args": {"max_num_seqs": 1}},
        RAY | {"target.cache": "memory", "target.share": "sweep", "target.profile": [0, 1]},
        {"target.shard": True, "target.cache": "disk"}, {"target.pack_tokens": 8},
        RAY | REPLAY, {"engine.name": "vllm", "bench.alone": False},
        {"data.split_eval": 0.1, "data.eval": []},
        {"export.push": "x/y", "export.private": False}, {"export.source": "x"},
        {"engine.name": "openai", "engine.urls": ["http://x/v1"], "bench.alone_url": "http://y/v1"},
        REPLAY | {"onpolicy.length": 7, "onpolicy.errors": 1.0, "onpolicy.decay": 1.0},
        {"trainer.schedule": "wsd", "trainer.warmup_ratio": 0.5, "trainer.decay_ratio": 0.5},
        {"regen.top_p": 1.0, "regen.top_k": 0, "regen.temperature": 0.0, "max_length": 9},
        {"objectives": ["alpha/6", "gpu_hours"], "model.aux_layers": [1, 2, 3]},
    ):  # fmt: skip
        cfg = together(values)
        assert cfg.target.gpus == (6 if cfg.target.engine == "vllm" else 1)
    assert together(RAY | {"target.workers": 3}).target.own_gpus == 3
    for values in ({}, RAY | {"target.share": "sweep"}):
        assert together(values).target.own_gpus == 0
