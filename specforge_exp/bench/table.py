"""bench.json as a table for people."""

from typing import Any


def table(result: dict[str, Any], published: list[str]) -> str:
    """The rows, what they come from, and below them other people's figures of the same setting."""
    settings = result["settings"]
    sets = result["datasets"]
    head = f"{'data set':14} {'prompts':>7} {'tau':>6} {'95 % interval':>15} {'pooled':>7}"
    head += f" {'novel':>11} {'>=3':>5} {'>=5':>5} {'speed-up':>8} {'decode':>7}"
    head += f" {'forwards saved':>14}  lossless"
    lines = [
        f"{result['draft']}: chain of {settings['chain_length']}, temperature "
        f"{settings['temperature']}, at most {settings['max_tokens']} tokens{served(result)}",
        *origin(result),
        head,
    ]
    for name, d in sets.items():
        low, high = d["accepted_length_ci95"] or (1.0, 1.0)
        novel = d["novel"]
        fresh = (
            "-" if not novel["prompts"] else f"{novel['accepted_length']:.2f} ({novel['prompts']})"
        )
        shares = "".join(
            f"{'-':>5} " if share is None else f"{100 * share:4.0f}% "
            for share in d["gained_at_least"].values()
        )
        lines.append(
            f"{name:14} {d['prompts']:7} {d['accepted_length']:6.2f} {low:7.2f}-{high:<7.2f} "
            f"{d['accepted_length_pooled']:7.2f} {fresh:>11} {shares}{times(d['speedup']):>8} "
            f"{times(d['speedup_decode']):>7} {100 * d['target_forwards_saved']:13.0f}%  "
            f"{same(d, settings)}"
        )
    lines.append(f"average tau {result['average']:.2f}")
    rates = [
        f"{name} {' '.join(f'{rate:.2f}' for rate in d['acceptance_by_position']) or '-'}"
        for name, d in sets.items()
    ]
    lines.append("accepted at position 1.. : " + " | ".join(rates))
    costs = [
        f"{name} {d['verified_per_token']:.2f}"
        for name, d in sets.items()
        if d.get("verified_per_token")
    ]
    if costs:
        by = settings.get("verify", "all")
        lines.append(f"verified per token gained (verify={by}): " + " | ".join(costs))
    if result["left_out"]:
        counts = ", ".join(f"{name} {count}" for name, count in result["left_out"].items())
        lines.append(f"left out, too long or refused by the chat template: {counts}")
    return "\n".join([*lines, *published])


def served(result: dict[str, Any]) -> str:
    """Which engine answered, and how many prompts at a time, where that was not this process; and
    where, as far as that is known."""
    settings = result["settings"]
    name = settings.get("engine", {}).get("name")
    asked = f", engine={name}, {settings['concurrency']} at a time" if name else ""
    here = "" if name == "openai" else result.get("machine")
    return f"{asked}, on {here}" if here else asked


def times(ratio: float | None) -> str:
    """A speed-up."""
    return "-" if ratio is None else f"{ratio:.2f}x"


def same(figures: dict[str, Any], settings: dict[str, Any]) -> str:
    """Whether the answers are the target's own; a server's arithmetic depends on the batch."""
    if settings["temperature"] > 0:
        return "sampled"
    if figures["identical"] is None:
        return "-"
    if figures["lossless"]:
        return "yes"
    return f"{100 * figures['identical']:.0f}% same" if "engine" in settings else "NO"


def origin(result: dict[str, Any]) -> list[str]:
    """Which prompts a suite's are, where that is not what its name says."""
    if not result["settings"]["suite"]:
        return []
    if "shipped" not in [d["source"] for d in result["datasets"].values()]:
        return ["prompts: the suite's own"]
    why = result["samples_because"] or "bench.samples=shipped"
    return [f"prompts: shipped samples, comparable with nothing ({why})"]
