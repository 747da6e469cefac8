"""regen: the target answers the prompts itself.

Reads datasets/<data>/; writes datasets/<data>--<model>/: train.jsonl and eval.jsonl in the same
order with the same ids, and failed.jsonl. Every assistant turn is generated in order; system,
user and tool turns stay. Answers are kept as they come, so an interrupted run continues.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from specforge_exp import paths
from specforge_exp.artifacts import Fingerprint, require, reusable, writing
from specforge_exp.chat import Unrenderable, prompt_ids
from specforge_exp.config import Config
from specforge_exp.conversations import read_jsonl, write_jsonl
from specforge_exp.errors import InputError
from specforge_exp.generation.transformers_engine import TransformersEngine
from specforge_exp.provenance import model_digest, sha256
from specforge_exp.target import check_gpus

log = logging.getLogger(__name__)

Record = dict[str, Any]


def regen(cfg: Config) -> Path:
    """Regenerate a data set with its target; returns the folder."""
    check_gpus(cfg, "regen")
    folder, source = paths.regen_dir(cfg), paths.prompts_dir(cfg)
    command = f"python prep.py data={cfg.data.name} (with the same options)"
    files = {name: require(source / f"{name}.jsonl", command) for name in ("train", "eval")}
    inputs = {f"{source.name}/{path.name}": sha256(path) for path in files.values()}
    inputs["the target"] = model_digest(cfg.model.path)
    settings = {
        "regen.temperature": cfg.regen.temperature,
        "regen.top_p": cfg.regen.top_p,
        "regen.max_tokens": cfg.regen.max_tokens,
        "seed": cfg.seed,
        "max_length": cfg.max_length,
        "model.chat_template_kwargs": cfg.model.chat_template_kwargs,
    }
    fingerprint = Fingerprint(inputs, settings)
    if reusable(folder / "run.json", fingerprint, cfg.regen.force, "regen"):
        return folder
    engine = TransformersEngine(cfg)
    failed: list[Record] = []
    with writing(folder, fingerprint, cfg, resume=True) as partial:
        for name, path in files.items():
            failed += regenerate_file(cfg, engine, path, partial / f"{name}.jsonl")
        write_jsonl(partial / "failed.jsonl", failed)
        if not any((partial / "train.jsonl").read_text().strip().splitlines()):
            raise InputError(f"{files['train']}: the target answered none of its conversations")
        for left in partial.glob("*.done"):
            left.unlink()
    return folder


def regenerate_file(
    cfg: Config, engine: TransformersEngine, source: Path, output: Path
) -> list[Record]:
    """Answer every conversation of a file; returns those that failed, with the reason."""
    records = list(read_jsonl(source))
    journal = output.with_suffix(".done")
    results = read_journal(journal)
    waiting = [(number, r) for number, r in enumerate(records) if number not in results]
    if results:
        log.info("regen: %s: %d of %d already answered", source, len(results), len(records))
    waiting.sort(key=lambda item: sum(len(m["content"]) for m in item[1]["conversations"]))
    size = cfg.engine.batch_size
    bar = tqdm(total=len(waiting), desc=f"regen {source.stem}", unit="conv", disable=None)
    with journal.open("a", encoding="utf-8") as file:
        for start in range(0, len(waiting), size):
            batch = waiting[start : start + size]
            for (number, _), result in zip(batch, answer(cfg, engine, batch), strict=True):
                results[number] = result
                file.write(json.dumps({"number": number, "result": result}) + "\n")
            file.flush()
            bar.update(len(batch))
    bar.close()
    ordered = [results[number] for number in range(len(records))]
    done = [r for r in ordered if "error" not in r]
    failed = [r for r in ordered if "error" in r]
    write_jsonl(output, done)
    cut = sum("length" in r["finish_reasons"] for r in done)
    tokens = sum(r["generated_tokens"] for r in done)
    log.info(
        "regen: %s: input %d = done %d + failed %d; %d cut at max_tokens; %d tokens",
        source, len(records), len(done), len(failed), cut, tokens,
    )  # fmt: skip
    return failed


def read_journal(path: Path) -> dict[int, Record]:
    """Results by number of an interrupted run; a half-written last line is dropped."""
    if not path.exists():
        return {}
    results = {}
    whole = [line for line in path.read_text("utf-8").splitlines(True) if line.endswith("\n")]
    for line in whole:
        entry = json.loads(line)
        results[entry["number"]] = entry["result"]
    path.write_text("".join(whole), "utf-8")
    return results


def answer(
    cfg: Config, engine: TransformersEngine, batch: list[tuple[int, Record]]
) -> Iterator[Record]:
    """Regenerate every assistant turn of a batch, turn by turn; a failure keeps its reason.

    A conversation that ends with a user turn gets one more answer. Answers stop when the
    conversation has no room left within max_length.
    """
    states = [State(record) for _, record in batch]
    while active := [state for state in states if state.advance()]:
        ready = []
        for state in active:
            try:
                ids = prompt_ids(engine.tokenizer, state.messages, cfg.model.chat_template_kwargs)
            except Unrenderable as error:
                state.error = str(error)
                continue
            if len(ids) >= cfg.max_length:
                state.stop(f"the prompt alone has {len(ids)} tokens, max_length={cfg.max_length}")
            else:
                ready.append((state, ids))
        if ready:
            seed = cfg.seed * 1_000_003 + batch[0][0] * 1009 + len(ready[0][0].messages)
            answers = engine.answers([ids for _, ids in ready], seed)
            for (state, _), (text, tokens, ended) in zip(ready, answers, strict=True):
                state.take(text, tokens, "stop" if ended else "length")
    for state in states:
        yield state.result()


class State:
    """One conversation while its turns are being regenerated."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.messages: list[Record] = []
        self.rest = list(record["conversations"])
        if self.rest and self.rest[-1]["role"] != "assistant":
            self.rest.append({"role": "assistant", "content": ""})
        self.finish_reasons: list[str] = []
        self.tokens = 0
        self.error: str | None = None

    def advance(self) -> bool:
        """Copy turns up to the next assistant turn; False when none is left."""
        if self.error:
            return False
        while self.rest and self.rest[0]["role"] != "assistant":
            self.messages.append(self.rest.pop(0))
        return bool(self.rest)

    def take(self, text: str, tokens: int, finish_reason: str) -> None:
        """Put the answer in place of the assistant turn."""
        self.rest.pop(0)
        self.messages.append({"role": "assistant", "content": text})
        self.finish_reasons.append(finish_reason)
        self.tokens += tokens

    def stop(self, reason: str) -> None:
        """End here: earlier answers count, without any the conversation has failed."""
        self.rest = []
        if not self.finish_reasons:
            self.error = reason
        while self.messages and self.messages[-1]["role"] != "assistant":
            self.messages.pop()

    def result(self) -> Record:
        """The regenerated conversation, or the original with its error."""
        if self.error:
            return {**self.record, "error": self.error}
        done = {"finish_reasons": self.finish_reasons, "generated_tokens": self.tokens}
        return {**self.record, "conversations": self.messages, **done}
