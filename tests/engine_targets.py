"""Which targets' states an engine hands to a draft, read off its sources.

`python tests/engine_targets.py VLLM SGLANG` writes specforge_exp/drafts/engines.json, of a vLLM's
package folder and an SGLang wheel; tests compare it with both.
"""

import ast
import json
import sys
import zipfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

DATA = Path(__file__).parents[1] / "specforge_exp" / "drafts" / "engines.json"
EAGLE3, DFLASH = "set_eagle3_layers_to_capture", "set_dflash_layers_to_capture"
"""Methods by which SGLang's models say that they can."""
KINDS = ("ForCausalLM", "ForConditionalGeneration")


class Classes:
    """The classes of many files: what each has, its parents' share with it."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.parents, self.own = defaultdict[str, set[str]](set), defaultdict[str, set[str]](set)
        for text in texts:
            tree = ast.parse(text)
            imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
            names = {a.asname or a.name: a.name for node in imports for a in node.names}
            for node in tree.body:
                if isinstance(node, ast.ClassDef):
                    bases = [ast.unparse(base).partition("[")[0] for base in node.bases]
                    bases = [base.rpartition(".")[2] for base in bases]
                    self.parents[node.name] |= {names.get(base, base) for base in bases}
                    methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
                    self.own[node.name] |= {method.name for method in methods}

    def has(self, name: str, what: str, seen: frozenset[str] = frozenset()) -> bool:
        """Whether a class is `what`, or has such a method."""
        if name == what or what in self.own[name]:
            return True
        later = seen | {name}
        return any(self.has(parent, what, later) for parent in self.parents[name] - later)


def of_vllm(folder: Path) -> dict[str, list[str]]:
    """Targets that vLLM runs by code of its own without handing out states. All others it reads,
    those that it has no code for through transformers."""
    models = folder / "model_executor" / "models"
    classes = Classes(file.read_text() for file in sorted(models.rglob("*.py")))
    registry = {}
    for node in ast.walk(ast.parse((models / "registry.py").read_text())):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Tuple):
                    registry[str(key.value)] = str(ast.literal_eval(value)[1])
    lacking = [name for name, own in registry.items() if not classes.has(own, "SupportsEagle3")]
    return {"not": sorted(name for name in lacking if name.endswith(KINDS))}


def of_sglang(wheel: Path, method: str) -> dict[str, list[str]]:
    """Targets whose states SGLang hands out by this method."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith("sglang/srt/models/")]
        texts = [archive.read(name).decode() for name in names if name.endswith(".py")]
    entries = set[str]()
    for text in texts:
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EntryClass":
                entries |= {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)}
    classes = Classes(texts)
    return {"only": sorted(n for n in entries if n.endswith(KINDS) and classes.has(n, method))}


if __name__ == "__main__":
    vllm, sglang = map(Path, sys.argv[1:])
    version = sglang.name.split("-")[1]
    content = [
        {"engine": "vLLM 0.32", "drafts": ["eagle3", "peagle", "dflash", "dspark"]} | of_vllm(vllm),
        {"engine": f"SGLang {version}", "drafts": ["eagle3"]} | of_sglang(sglang, EAGLE3),
        {"engine": f"SGLang {version}", "drafts": ["dflash"]} | of_sglang(sglang, DFLASH),
    ]
    DATA.write_text("[\n" + ",\n".join(json.dumps(entry) for entry in content) + "\n]\n")
