"""A draft on the hub: its files, and a card made of what the run's records say."""

import json
import logging
import shlex
from pathlib import Path
from typing import Any

from specforge_exp.artifacts import read_object, read_record, sha256
from specforge_exp.config import Config
from specforge_exp.config.machine import on_the_hub
from specforge_exp.config.stages import ExportConfig
from specforge_exp.errors import InputError, first_line
from specforge_exp.offline import offline
from specforge_exp.serving.sglang import flag

log = logging.getLogger(__name__)

SETTING = "chain_length temperature max_tokens thinking turns average"
CARD = Path(__file__).with_name("card.md.format")


def model_card(cfg: Config, run: Path, options: dict[str, Any], vllm: dict[str, Any]) -> str:
    """The README.md of a published draft.

    Args:
        cfg: names target and draft.
        run: folder of the run, with the export and what bench measured of it.
        options: SGLang's for this draft; empty where it has none.
        vllm: the same for vLLM.

    Raises:
        InputError: a record cannot be read.
    """
    record, own = read_record(run / "export" / "run.json"), read_trained(run)
    target, hub = cfg.model.path, on_the_hub(cfg.model.path)
    name = target if hub else cfg.model.name
    folder = str(cfg.export.push).rpartition("/")[2]
    served = {"speculative_draft_model_path": folder, **options}
    words = ["python", "-m", "sglang.launch_server", "--model-path", name]
    for key, value in served.items():
        words += flag(key, value)
    return CARD.read_text(encoding="utf-8").format(
        front=f"base_model: {target}" if hub else "license: other",
        draft=cfg.draft.name, title=folder, target=f"[{name}](https://huggingface.co/{name})"
        if hub else name, training=rows(trained(own, record)), command=typed(own["command"]),
        measured=measured(run, record), folder=folder,
        serve=shlex.join(words) if options else "# SGLang does not serve this draft",
        vllm=json.dumps(vllm | {"model": folder}),
    )  # fmt: skip


def typed(command: str) -> str:
    """A record's command without the folder that the script lies in."""
    script, _, options = command.partition(" ")
    return f"python {Path(script).name} {options}".strip()


def read_trained(run: Path) -> dict[str, Any]:
    """The record of the training; of one that has not ended the newest checkpoint's."""
    states = sorted(run.glob("step-*[0-9]/state.json"), reverse=True)
    file = next(path for path in [run / "run.json", *states] if path.exists())
    return {"command": "(not ended)", "settings": {}, "config": {}, **read_record(file)}


def rows(values: dict[str, Any]) -> str:
    """A table's rows, of what is known."""
    return "\n".join(f"| {key} | {value} |" for key, value in values.items() if value is not None)


def trained(own: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """What the card says of the training, from its record and the export's."""
    config = record["config"]
    kept = {**config, **own["config"]}
    weights = {key: value for key, value in kept["loss"].items() if isinstance(value, float)}
    weights = {key: value for key, value in weights.items() if value and key != "temperature"}
    held_out = own.get("evaluation", {}).get("simulated_length")
    seconds = own.get("seconds")
    return {
        "prompts": kept["data"]["name"],
        "answers": "the target's own" if kept["preprocess"]["source"] == "regen" else "the data's",
        "loss": f"{kept['loss']['name']}: " + ", ".join(f"{k} {v:g}" for k, v in weights.items()),
        "learning rate": f"{kept['lr']:g}, {kept['trainer']['schedule']}",
        "passes": kept["epochs"],
        "step": record["settings"]["step"],
        "conversations per step": kept["trainer"]["batch_size"] * kept["trainer"]["accumulate"],
        "tokens per conversation, at most": kept["max_length"],
        "seed": kept["seed"],
        "time": seconds and f"{seconds / 3600:.2f} h on {own.get('processes', 1)} processes",
        "simulated length, held out": held_out and f"{held_out:.3f}",
        "weights": config["export"]["dtype"],
        "code": own.get("git"),
    }


def measured(run: Path, record: dict[str, Any]) -> str:
    """Tables of the accepted length, one for each file of bench that is of this export."""
    parts = []
    for file in sorted(run.glob("bench*.json")):
        bench = read_object(file)
        if bench["inputs"].get("the draft") != record["inputs"]["the checkpoint"]:
            continue
        said = {key: bench["settings"].get(key) for key in SETTING.split()}
        lines = ["| data set | prompts | tau | 95 % interval |", "|---|---|---|---|"]
        for name, figures in bench["datasets"].items():
            between = figures.get("accepted_length_ci95")
            interval = "{:.2f} to {:.2f}".format(*between) if between else "-"
            tau = f"{figures['accepted_length']:.2f}"
            lines.append(f"| {name} | {figures['prompts']} | {tau} | {interval} |")
        setting = ", ".join(f"{key} {value}" for key, value in said.items() if value is not None)
        mean = f"Mean {bench['average']:.3f}. Tau is the tokens gained per verification"
        lines.append(f"\n{mean}; {setting}.")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or "Not measured."


def publish(options: ExportConfig, files: list[Path], card: str) -> None:
    """Upload files and card as one commit; a dry run prints them.

    Raises:
        InputError: the hub cannot be reached, or refuses.
    """
    repository = str(options.push)
    what = ", ".join(f"{file.name} ({file.stat().st_size / 1e6:.1f} MB)" for file in files)
    kind = "private" if options.private else "public"
    if options.dry_run:
        print(card)
        log.info("export: would upload %s and README.md to %s (%s if new)", what, repository, kind)
        return
    from huggingface_hub import CommitOperationAdd, HfApi

    if why := offline():
        raise InputError(f"export.push={repository}: {why}; the export itself is complete")
    added = [CommitOperationAdd(file.name, str(file)) for file in files]
    added.append(CommitOperationAdd("README.md", card.encode()))
    try:
        api = HfApi()
        api.create_repo(repository, private=options.private, exist_ok=True)
        digest = sha256(files[-1])[:12]
        url = api.create_commit(repository, added, commit_message=f"Draft {digest}").commit_url
    except Exception as error:  # the hub client raises dozens of types
        raise InputError(
            f"export.push={repository}: {first_line(error)}; HF_TOKEN=... of an account that may "
            "write there, or `hf auth login`; the export itself is complete"
        ) from None
    log.info("export: uploaded %s and README.md: %s", what, url)
