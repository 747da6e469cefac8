"""Figures that others published, and which of them a measurement of ours may stand beside."""

from dataclasses import dataclass
from functools import cache
from typing import Any

from omegaconf import OmegaConf

from specforge_exp.config import REPOSITORY

FILE = REPOSITORY / "benchmarks" / "published.yaml"


@dataclass(frozen=True)
class Figure:
    """One published accepted length."""

    system: str
    """Who measured, with what."""
    model: str
    """The target's hub id."""
    method: str
    """Family of drafts, e.g. dflash."""
    setting: dict[str, Any]
    """See `setting_of`; what the source does not tell is `unknown`, the same as nothing."""
    data_set: str
    tau: Any
    """A number, a range of two, or None."""
    source: str


@cache  # a report asks for every run that it shows
def figures() -> list[Figure]:
    """All entries of benchmarks/published.yaml; none where the file is not at hand."""
    if not FILE.exists():
        return []
    entries: Any = OmegaConf.to_container(OmegaConf.load(FILE))
    return [
        Figure(
            data_set=data_set, tau=values.get("tau"),
            **{key: entry[key] for key in ("system", "model", "method", "setting", "source")},
        )
        for entry in entries
        for data_set, values in entry["figures"].items()
    ]  # fmt: skip


def setting_of(result: dict[str, Any]) -> dict[str, Any]:
    """What bench.json was measured with, in the words of published.yaml."""
    settings, draft = result["settings"], result["config"]["draft"]
    thinking = settings["thinking"]
    if thinking == "model":
        thinking = {True: "on", False: "off"}.get(
            result["config"]["model"]["chat_template_kwargs"].get("enable_thinking")
        )
    block, chain = draft.get("block_size"), settings["chain_length"]
    shape = f"block {block}" if block == chain + 1 else f"chain {chain}"
    own = {key: settings[key] for key in ("temperature", "max_tokens", "average", "turns")}
    return own | {"draft": shape, "thinking": thinking}


@dataclass(frozen=True)
class Beside:
    """A measurement of ours and a published one of the same setting."""

    ours: float
    low: float
    high: float
    prompts: int
    figure: Figure


def beside(result: dict[str, Any]) -> list[Beside]:
    """Published accepted lengths that bench.json's may stand beside.

    Those of the same target, family of drafts, data set (from the hub, not a sample) and every
    word of the setting. How many turns were asked matters to mt-bench only. Speed-ups depend on
    the machine and are not compared.
    """
    own, entries = setting_of(result), []
    for figure in figures():
        ours = result["datasets"].get(figure.data_set)
        keys = [key for key in own if key != "turns" or figure.data_set == "mt-bench"]
        if (
            ours is not None
            and ours["source"].startswith("hub:")
            and isinstance(figure.tau, float)
            and figure.model == result["target"]
            and figure.method == result["config"]["draft"]["name"]
            and all(figure.setting[key] == own[key] for key in keys)
        ):
            low, high = ours["accepted_length_ci95"] or (1.0, 1.0)
            length, prompts = float(ours["accepted_length"]), int(ours["prompts"])
            entries.append(Beside(length, low, high, prompts, figure))
    return entries


def same_setting(result: dict[str, Any]) -> list[str]:
    """Lines "ours / published" for bench.json's data sets; none where nothing is comparable."""
    lines = [
        f"  {b.figure.data_set}: {b.ours:.2f} ({b.low:.2f}-{b.high:.2f}, {b.prompts} prompts) / "
        f"{b.figure.tau:.2f} ({b.figure.system}, {b.figure.source})"
        for b in beside(result)
    ]
    return ["ours / published, same setting:", *lines] if lines else []
