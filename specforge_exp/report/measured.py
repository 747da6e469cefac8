"""How bench measured an accepted length: what has to be alike where two are compared."""

from typing import Any

HOW = (
    "chain_length temperature max_tokens max_length turns average thinking dtype verify "
    "verify_cost model.chat_template_kwargs"
)
"""Of bench's settings those that an accepted length depends on, beside draft, prompts and seed."""


def way_of(bench: dict[str, Any]) -> str:
    """Equal for two bench.json whose accepted lengths may be compared."""
    settings = {"verify": "all"} | bench.get("settings", {})
    how = {key: settings.get(key) for key in HOW.split()}
    how["engine"] = settings.get("engine", {}).get("name", "transformers")
    how |= {f"data set {name}": prompts_of(bench, name) for name in bench["datasets"]}
    return ", ".join(f"{key} {value}" for key, value in how.items())


def prompts_of(bench: dict[str, Any], name: str) -> str:
    """What tells the prompts of a data set from others: a file's digest, how many, which of all."""
    figures, settings = bench["datasets"][name], bench.get("settings", {})
    source = (settings.get("suite") or settings.get("datasets") or {}).get(name, {})
    digest = bench.get("inputs", {}).get(f"the file of bench data set {name}", "")[:8]
    told = [f"{key} {source[key]}" for key in ("shuffle", "skip") if source.get(key) is not None]
    return " ".join(
        [f"{figures.get('source')}", digest, *told, f"{figures.get('prompts')} prompts"]
    )
