"""Every command of README and docs, typed from the top of its page to the end, on the tiny target.

Of what takes an account, a GPU, a server or a network, what there is to see without: one message.
What takes long is run by tests that are named here.
"""

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import warm
from conftest import REPOSITORY, TINY, write_jsonl
from test_documented import TYPED, words_of

PREPARED = [
    "prep.py", "regen.py", "preprocess.py", "train.py", "export.py", "bench.py",
    "train.py loss=baseline", "train.py -m loss=mixed,rkl-only",
]  # fmt: skip
"""What a reader has done before coming to a page, each with experiment=quickstart."""
SMALL = {
    "prep": ["data.sample_size=16", "prep.force=true"],
    "regen": ["regen.max_tokens=48"],
    "train": ["epochs=1", "max_steps=2", "trainer.resume=false"],
    "pretrain": ["max_steps=2"],
    "sft": ["max_steps=2"],
    "export": ["export.force=true"],
    "bench": ["bench.max_tokens=2", "bench.force=true", "export.force=true"],
    "chat": ["chat.max_tokens=8"],
}
"""Options that a stage carries along: for the sake of time, and of what shares a name."""
SETS = "stories arithmetic howto objects python".split()
OF_QUICKSTART = {
    "prep": ["data.eval=[{path: 'synthetic:eval', limit: 8}]"],
    "bench": [f"bench.datasets.{name}.limit=2" for name in SETS],
}
"""The same with experiment=quickstart."""
README = REPOSITORY / "README.md"
EXPORT = "artifacts/checkpoints/quickstart_full-opd/export"
OWN = {
    " ...": " experiment=quickstart", "model=qwen3_0_6b": "model=tiny draft.draft_vocab_size=512",
    "sweep=<folder>": "sweep=artifacts/checkpoints/sweeps/tiny_quickstart_eagle3",
    "run=<name>": "run=quickstart_full-opd",
    "draft=<folder>": f"draft={EXPORT}",
    "path=<folder or hub id>": f"path={TINY.path}", "init=<run>": "init=a_dflash_run",
    "<run, checkpoint or export>": "quickstart_full-opd run_name=goes_on",
    "onpolicy=replay": "onpolicy=replay target.cache=none",
    "onpolicy=rollout": "onpolicy=rollout onpolicy.max_tokens=8 target.cache=none",
    "from=<folder or hub id>": f"from={EXPORT}",
    "theirs draft=dflash model=qwen3_8b": "theirs experiment=quickstart",
    "theirs draft=dflash": "theirs", "draft=dspark trainer.init=theirs": "trainer.init=theirs",
}  # fmt: skip
"""What a reader has instead of what is written."""
ON_RAY = "python train.py experiment=quickstart target.placement=ray"
TESTED = {
    "make quickstart": "end_to_end/test_pipeline.py::test_six_commands",
    "make test": "tiers.py::main",
    "make install": "tiers.py::main",
    "bash runs/gpu_check.sh": "benchmarks/test_gpu_check.py::test_a_step_is_profiled",
    "python benchmarks/parity.py": "specforge_exp/test_parity.py::test_",
    "python -m tests.modal_local": "end_to_end/test_first_contact.py::test_every_line",
    "modal-sweep setup": "modal_sweep/test_modal_launcher.py::test_setup_makes_volumes",
    "modal-sweep": "modal_sweep/test_modal_sweep.py::test_a_sweep_from_its_submission",
    "specforge train": "end_to_end/test_installed.py::test_two_steps",
    f"{ON_RAY} target.alone=workers": "specforge_exp/test_streamed.py::test_workers_alone",
    f"{ON_RAY} target.alone=trainer": "specforge_exp/test_alone.py::test_a_trainer_alone",
    ON_RAY: "inference/test_ray.py::test_a_",
}
"""Beginnings of commands, and of the tests that run them."""
HERE = re.compile(
    r"experiment=(quickstart|\w+_tiny|opd_)|model=(tiny|local)|python report|sweep=|=chats.jsonl"
)
"""Commands that need nothing but this machine,"""
AWAY = re.compile(
    r"model=qwen3_8b|engine=(sglang|vllm)|Qwen/|export\.push=\S+$|hub:|gpus=8|a_dflash_run|postgres"
)
"""unless there is something of this in them."""
SAYS = re.compile(r"dry_run=true|prep\.check=true|regen.py status")
"""Commands that only say something: here, they may end well although nothing is there."""


@dataclass
class Reader:
    """Someone in a folder with prompts of their own, without account and network."""

    folder: Path
    refused: set[str]
    """What it has seen to need more than this machine; not typed again."""

    def types(self, words: Sequence[str]) -> CompletedProcess[str]:
        """What a stage says to what is typed after `python`."""
        script, *options = words
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("MODAL_", "HF_"))}
        here = {"MODAL_CONFIG_PATH": str(self.folder / "none.toml"), "HOME": str(self.folder)}
        here |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        small = SMALL.get(Path(script).stem, [])
        if any(option.startswith("hparams_search=") for option in options):
            small = [*small, "hydra.sweeper.n_trials=1"]
        if "experiment=quickstart" in options:
            small = [*small, *OF_QUICKSTART.get(Path(script).stem, [])]
        return warm.run(
            [str(REPOSITORY / script), *options, *small], self.folder, {**clean, **here},
            kind="stages", typed="What is a lamp?\n",
        )  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    reader = Reader(tmp_path_factory.mktemp("reader"), set())
    for name, numbers in {"prompts": range(16), "chats": range(12), "eval": range(20, 24)}.items():
        turns = [[{"role": "user", "content": f"Describe lamp {n}."},
                  {"role": "assistant", "content": f"Lamp {n} is a warm light."}]
                 for n in numbers]  # fmt: skip
        write_jsonl(reader.folder / f"{name}.jsonl", [{"conversations": turn} for turn in turns])
    for line in PREPARED:
        script, *options = line.split()
        done = reader.types([script, "experiment=quickstart", *options])
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return reader


def wrong(reader: Reader, line: str) -> str:
    """What is wrong with a documented command; "": nothing."""
    if re.search(r"train\.py .*draft(\.|=peagle)", line):
        line += " run_name=another"  # one of several ways; the page goes on with the first
    for written, own in OWN.items():
        line = line.replace(written, own)
    for beginning, test in TESTED.items():
        if line.startswith(beginning):
            path, _, name = test.partition("::")
            there = f"def {name}" in (REPOSITORY / "tests" / path).read_text()
            return "" if there else f"{line}: there is no {test}"
    here = bool(HERE.search(line) and not AWAY.search(line))
    if line in reader.refused:
        return ""
    done = reader.types(words_of(line)[1:])
    said = f"{line}: {done.returncode}\n{done.stdout[-2000:]}{done.stderr}"
    if "Traceback" in said or "Error executing job" in said:
        return said
    if not here:
        reader.refused.add(line)
    if here or (SAYS.search(line) and not done.returncode):
        return said * (done.returncode != 0)
    return said * (done.returncode == 0 or not done.stderr.strip())


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({page for page, _ in TYPED}))
def test_every_command_of_a_page(page: str, prepared: Reader, tmp_path: Path) -> None:
    shutil.copytree(prepared.folder, tmp_path / "home")
    reader = Reader(tmp_path / "home", prepared.refused)
    problems = [*filter(None, (wrong(reader, line) for name, line in TYPED if name == page))]
    assert not problems, "\n\n".join(problems)


@pytest.mark.slow
def test_stages_write_what_their_table_says(prepared: Reader) -> None:
    own = {"<data>": "quickstart", "<model>": "tiny", "<run_name>": "quickstart_full-opd"}
    rows = re.findall(r"^\| `python (\w+)\.py` \|.*\| (.*) \|$", README.read_text(), re.MULTILINE)
    looked = set()
    for stage, writes in rows:
        parts = re.findall(r"`(artifacts/[^`]*)`([^`]*)", writes)
        if stage == "report":
            parts = [("artifacts/checkpoints/sweeps/*/train/", writes)]
        for written, files in parts:
            place = re.sub("<[^>]*>", lambda name: own[name[0]], written)
            for name in ["", *re.findall(r"[\w*-]+(?:\.\w+|/)", files)]:
                assert [*prepared.folder.glob(f"{place}{name}".rstrip("/"))], (stage, place, name)
                looked.add((stage, name))
    assert len(looked) > 12 and {stage for stage, _ in looked} >= {"prep", "train", "report"}
