"""What each stage runs on, as the launcher reads it, and what is refused before it is rented."""

import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import cloudpickle
import conftest
import pytest
from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.basecontainer import BaseContainer
from test_conf import ROOT, composed

from modal_sweep.client.settings import job_settings
from modal_sweep.config import JobSettings, ModalLauncherConf
from modal_sweep.errors import LaunchError
from specforge_exp.config import STAGES, check_job, resolvers
from specforge_exp.config.machine import command
from specforge_exp.config.machine import machine as machine_of
from specforge_exp.errors import InputError

MACHINES = ["auto", "h100x8", "h100", "cpu"]
BIG = ["qwen3_0_6b", "qwen3_8b", "qwen3_32b", "llama3_1_8b"]


@cache
def with_hydra(*overrides: str) -> DictConfig:
    return conftest.composed(*overrides, whole=True)


def job(stage: str, *overrides: str) -> DictConfig:
    """A composed job as the launcher has it."""
    cfg = with_hydra(*overrides)
    with open_dict(cfg):
        cfg.hydra.job.name = stage
    return cfg


def settings(stage: str, *overrides: str) -> JobSettings:
    return job_settings(ModalLauncherConf(), job(stage, *overrides))


def for_validation(*overrides: str) -> DictConfig:
    """The copy that the launcher hands to resources.validate."""
    cfg = job("train", *overrides)
    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("resources.hour=6", "resources.hour is not a setting of a job; valid: gpu, cpu"),
        ("resources.tasks.train.gpus=2", "resources.gpus is not a setting of a job"),
        ("resources.hours=soon", "resources.hours: Value 'soon'"),
        ("resources.image.pakages=[x]", "resources.image.pakages is not a setting of an image"),
        ("trainer.batch_size=3", "job 0 [trainer.batch_size=3]: trainer.batch_size=3"),
    ],
)
def test_what_no_machine_has_is_refused(override: str, named: str) -> None:
    cfg = job("train", override)
    with open_dict(cfg):
        cfg.hydra.job.num = 0
    with pytest.raises(LaunchError) as caught:
        job_settings(ModalLauncherConf(), cfg)
    assert named in str(caught.value)


def test_tasks_win_over_the_machine() -> None:
    options = [
        "resources.hours=6",
        "resources.tasks.bench.gpu=A100",
        "resources.tasks.bench.hours=1",
    ]
    assert [settings(stage, *options).hours for stage in ("train", "bench")] == [6, 1]
    assert [settings(stage, *options).gpu for stage in ("train", "bench")] == ["H100:8", "A100"]


@pytest.mark.parametrize("machine", MACHINES)
def test_every_stage_gets_settings(machine: str) -> None:
    for stage in STAGES:
        said = settings(stage, f"resources={machine}", "tracker=wandb")
        assert said.secrets == {"wandb-secret": ["WANDB_API_KEY"]}
        assert said.volumes["/root/.cache/huggingface"] == "specforge-hf-cache"
        assert (ROOT / str(said.image.pyproject)).exists()
        assert all((ROOT / source).exists() for source in said.image.sources or [])
        for entry in said.requires:
            assert entry["volume"] in said.volumes.values()
            assert entry["remedy"].startswith("python ")


@pytest.mark.parametrize(
    ("overrides", "train", "one"),
    [
        ([], "H100:8", "H100"),
        (["engine=openai", "engine.urls=[http://x/v1]"], "H100:8", "H100"),
        (["resources=h100"], "H100", "H100"),
        (["resources=cpu"], None, None),
        (["resources=h100x8", "model=qwen3_0_6b"], "H100:8", "H100"),
        (["model=qwen3_0_6b"], "H100", "H100"),
        (["model=tiny"], None, None),
        (["resources.gpu=[H100:2,A100:2]"], ["H100:2", "A100:2"], ["H100", "A100"]),
        (["model=qwen3_32b"], "H100:8", "H200"),
        (["model=llama3_3_70b"], "H100:8", "B200"),
    ],
)
def test_gpus_of_each_stage(overrides: list[str], train: Any, one: Any) -> None:
    found = {stage: settings(stage, *overrides).gpu for stage in STAGES}
    assert found == {
        **dict.fromkeys(("prefetch", "prep", "regen", "preprocess", "export")),
        **dict.fromkeys(("train", "pretrain", "sft"), train), "bench": one,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "gpu"),
    [
        (["engine=transformers"], "H100"),
        (["engine=sglang"], "H100:8"),
        (["engine=sglang", "resources.gpu=[H200:2,H100:4]"], ["H200:2", "H100:4"]),
        (["engine=transformers", "model=tiny"], None),
    ],
)
def test_regen_gets_what_its_engine_uses(overrides: list[str], gpu: Any) -> None:
    assert settings("regen", *overrides).gpu == gpu


def test_bench_by_sglang_runs_in_its_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the server is started by the image's own Python; the image is the engine's choice."""
    found = settings("bench", "model=qwen3_8b", "engine=sglang", "resources=sglang")
    assert (found.gpu, found.image.base) == ("H100", composed("engine=sglang").engine.image)
    monkeypatch.setenv("SPECFORGE_SGLANG_PYTHON", found.env["SPECFORGE_SGLANG_PYTHON"])
    assert composed("engine=sglang").engine.python == "/usr/bin/python3"


@pytest.mark.parametrize("model", BIG)
def test_regen_of_models_for_a_gpu_fans_out(model: str) -> None:
    cfg = composed(f"model={model}")
    assert cfg.engine.name == "modal"
    assert settings("regen", f"model={model}").image.extras == ["data", "wandb", "modal"]
    assert composed(f"model={model}", "engine=sglang").engine.name == "sglang"


def test_regen_of_the_others_stays_here() -> None:
    for other in ("experiment=quickstart", "experiment=smollm2", "model=tiny"):
        assert composed(other).engine.name == "transformers"
    assert composed("experiment=smoke", "model=tiny").engine.name == "transformers"


@pytest.mark.parametrize("model", BIG)
def test_the_batch_does_not_follow_the_gpus(model: str) -> None:
    for machine, gpus in (("h100x8", 8), ("h100", 1), ("cpu", 1)):
        trainer = composed(f"model={model}", f"resources={machine}").trainer
        assert (trainer.gpus, trainer.batch_size) == (gpus, 8)


def test_processes_follow_the_gpus() -> None:
    assert composed().trainer.gpus == 8
    assert composed("device=cpu").trainer.gpus == 1
    assert composed("trainer.gpus=4").trainer.gpus == 4
    assert composed("model=tiny").trainer.gpus == 1
    assert composed("resources.gpu='H100!:2'").trainer.gpus == 2
    with pytest.raises(InputError, match="make batch_size a multiple of gpus"):
        composed("trainer.gpus=3")


@pytest.mark.parametrize("model", BIG)
def test_models_for_a_gpu_go_to_modal(model: str) -> None:
    assert job("train", f"model={model}").hydra.launcher.get("app") is not None
    here = job("train", f"model={model}", "hydra/launcher=basic")
    assert "app" not in here.hydra.launcher


@pytest.mark.parametrize("other", ["model=tiny", "experiment=quickstart", "experiment=smollm2"])
def test_the_others_stay_here(other: str) -> None:
    assert "app" not in job("train", other).hydra.launcher


def test_secrets_of_model_and_tracker() -> None:
    both = settings("train", "model=llama3_1_8b", "tracker=wandb").secrets
    assert both == {"huggingface-secret": ["HF_TOKEN"], "wandb-secret": ["WANDB_API_KEY"]}
    assert settings("train").secrets == {}
    one = resolvers.both_secrets({"a": ["X"]}, {"a": ["Y"], "b": []})
    assert one == {"a": ["X", "Y"], "b": []}


def needs(stage: str, *overrides: str) -> dict[str, Any]:
    return {entry["volume"]: entry for entry in settings(stage, *overrides).requires}


def test_what_a_stage_needs() -> None:
    train = needs("train")
    assert train["specforge-hf-cache"]["path"] == "prefetched/models--Qwen--Qwen3-8B"
    assert train["specforge-datasets"]["path"] == "sharegpt--qwen3_8b.tokens"
    assert needs("train", "model=tiny")["specforge-hf-cache"]["path"] is None
    assert needs("preprocess")["specforge-datasets"]["path"] == "sharegpt--qwen3_8b"
    own = needs("preprocess", "preprocess.source=prep")["specforge-datasets"]
    assert own["path"] == "sharegpt" and own["remedy"].startswith("python prep.py")
    name = composed().run_name
    assert needs("export")["specforge-checkpoints"]["path"] == name
    assert needs("bench")["specforge-checkpoints"]["path"] == f"{name}/export"
    checkpoints = settings("train").checkpoints
    assert checkpoints is not None and f"/{name}/step-" in checkpoints


@pytest.mark.parametrize(
    ("init", "path", "record"),
    [
        ("other", "other", "run.json"),
        ("/root/.cache/specforge/checkpoints/other", "other", "run.json"),
        ("other/step-000003", "other/step-000003", "state.json"),
        ("runs/other", "runs/other", "run.json"),
        ("/elsewhere/other", "/elsewhere/other", "run.json"),
    ],
)
def test_weights_to_begin_with_lie_on_a_volume(init: str, path: str, record: str) -> None:
    """Where they do not, that is said before a machine is rented; others make other runs."""
    *_, found = settings("train", f"trainer.init={init}").requires
    assert found == {"volume": "specforge-checkpoints", "path": path, "record": record}
    assert all(need["path"] != path for need in settings("bench", f"trainer.init={init}").requires)


@pytest.mark.parametrize(
    ("stage", "overrides", "key"),
    [
        ("prep", "data=local data.path=chats.jsonl", "data.path=chats.jsonl"),
        ("prep", "data=smollm2", "data.train[0].path=artifacts/prompts/smollm2/chat.jsonl"),
        ("prep", "data=synthetic data.eval=[{path:/x.jsonl}]", "data.eval[0].path=/x.jsonl"),
        ("pretrain", "pretrain.sources=[{path:texts}]", "pretrain.sources[0].path=texts"),
        ("bench", "+bench.datasets={a:{path:/a.jsonl}}", "bench.datasets.a.path=/a.jsonl"),
        ("prep", "data=local data.path=hub:/mine/set:train", "data.path=/mine/set"),
    ],
)
def test_files_of_this_machine_are_refused(stage: str, overrides: str, key: str) -> None:
    """Before a container is rented, which would not find them; by the stage that reads them."""
    own = for_validation("model=qwen3_8b", *overrides.split())
    with pytest.raises(InputError) as caught:
        machine_of(stage, own)
    file = key.partition("=")[2]
    put = f"`modal volume put specforge-datasets {file} {Path(file).name}`"
    assert f"{key} is a path of this machine" in str(caught.value) and put in str(caught.value)
    assert ("without -m" in str(caught.value)) == (stage == "prep")
    assert all(machine_of(other, own) for other in {*STAGES} - {stage})


@pytest.mark.parametrize("stage", ["prep", "pretrain"])
def test_files_on_a_volume_are_looked_for_there(stage: str) -> None:
    path = "/root/.cache/specforge/datasets/raw/a.jsonl"
    own = ["data=local", f"data.path={path}", f"pretrain.sources=[{{path:{path}}}]"]
    *_, found = settings(stage, *own).requires
    put = "modal volume put specforge-datasets ... raw/a.jsonl"
    assert found == {"volume": "specforge-datasets", "path": "raw/a.jsonl", "remedy": put}


def test_files_that_go_along_or_are_in_the_image() -> None:
    shipped = settings("prep", "data=local", "data.path=${repository:assets/bench}")
    baked = settings("prep", "data=local", "data.path=/in/it", "resources.image.base=debian:12")
    assert shipped.requires == baked.requires == []


def test_a_study_on_modal_hears_what_it_prunes_by() -> None:
    for named, stage in (("simulated_length", "train"), ("alpha/0", "train"), ("loss", "sft")):
        found = settings(stage, f"objectives=[{named}]").progress_keys
        assert f"eval/{named}" in found and len(found) == len({*found})


def test_half_a_checkpoint_is_not_one(tmp_path: Path) -> None:
    pattern = Path(str(settings("train").checkpoints)).name
    for name in ("step-000100", "step-000200.partial", "step-1000000"):
        (tmp_path / name).mkdir()
    assert sorted(p.name for p in tmp_path.glob(pattern)) == ["step-000100", "step-1000000"]


def test_jobs_that_write_one_place() -> None:
    """R29: runs of a sweep write to places of their own."""
    for early in ("prep", "regen", "preprocess"):
        assert settings(early, "loss=mixed").unique == settings(early).unique
    for late in ("train", "export", "bench"):
        small = ["experiment=smollm2"] * (late != "bench")  # its prompts are files of this machine
        for many in ([], ["experiment=smoke"], ["experiment=quickstart"], small):
            places = {
                settings(late, *many, f"loss={loss}").unique[0] for loss in ("mixed", "baseline")
            }
            assert len(places) == 2


LINE = ["-m", "data=local", "data.path=a b", "model=qwen3_8b,tiny", "loss=glob(*)", "lr=1e-4"]


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ("prep", "data=local 'data.path=a b' hydra/launcher=modal"),
        ("prefetch", "model=qwen3_8b,tiny hydra/launcher=modal"),
        ("preprocess", "data=local 'data.path=a b' model=qwen3_8b,tiny hydra/launcher=modal"),
        ("train", "data=local 'data.path=a b' model=qwen3_8b,tiny 'loss=glob(*)' lr=1e-4 "
                  "hydra/launcher=modal"),
    ],
)  # fmt: skip
def test_remedies_are_whole_commands(
    stage: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["hydra/launcher=modal", "hydra.launcher.dry_run=true"]
    monkeypatch.setattr(sys, "argv", ["train.py", *LINE, *more])
    assert command(stage) == f"python {stage}.py -m {said}"


def test_a_remedy_asks_for_nothing_and_is_of_its_own_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["regen.py", "data=local", "regen.status=true"])
    assert command("regen", away=False) == "python regen.py data=local"
    monkeypatch.setattr(sys, "argv", ["bench.py", "sweep=there", "bench.max_tokens=8"])
    assert command("train", away=False) == "python train.py (with the same options)"


def test_a_job_validates_without_hydras_node() -> None:
    check_job(for_validation())
    check_job(for_validation("experiment=smoke", "model=tiny"))


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("trainer.batch_size=3", "trainer.batch_size=3"),
        ("paths.checkpoints=/data/runs", "SPECFORGE_CHECKPOINTS=/data/runs"),
        ("paths.datasets=here", "SPECFORGE_DATASETS=here"),
        ("model.path=assets/tiny_target", "a folder of this machine"),
        ("target.placement=ray trainer.batch_size=14", "image.extras=[data,wandb,modal,ray]"),
        (
            "target.placement=ray target.store=mooncake trainer.batch_size=14",
            "of your own",
        ),
        (
            "target.placement=ray target.engine=vllm trainer.batch_size=14 "
            "resources.image.extras=[ray]",
            "target.python=",
        ),
    ],
)
def test_jobs_that_a_container_cannot_run(
    override: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R28: what would be written outside the Volumes, among others."""
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError) as caught:
        check_job(for_validation(*override.split()))
    assert named in str(caught.value)


def test_paths_on_a_volume_may_be_written_out() -> None:
    check_job(for_validation("paths.checkpoints=/root/.cache/specforge/checkpoints/mine"))


def count(*arguments: str) -> int:
    """Jobs of a sweep with these arguments."""
    with initialize_config_dir(str(conftest.CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        overrides = OverridesParser.create(config_loader=loader).parse_overrides(list(arguments))
        return sum(map(len, BasicSweeper.split_arguments(overrides, None)))


def test_sizes_of_the_sweeps() -> None:
    assert count("loss=glob(*)") == 4
    assert count("loss=glob(*)", "lr_point=low,mid,high") == 12
    assert count("loss=full-opd", "lr=3e-5,5e-5") == 2


def test_smoke_sweeps_where_losses_differ() -> None:
    for stage in STAGES:
        said = job(stage, "experiment=smoke").hydra.sweeper.params.loss
        assert count(f"loss={said}") == (2 if stage in ("train", "export", "bench") else 1)
        assert count(f"loss={said}", "loss=mixed") == 1  # the command line wins
    smoke = composed("experiment=smoke")
    assert (smoke.model.name, smoke.epochs, smoke.trainer.gpus) == ("qwen3_0_6b", 1, 1)
    assert settings("train", "experiment=smoke").gpu == "H100"


def test_resolvers_mean_the_machine_that_asks(tmp_path: Path) -> None:
    """As a container: another folder, the code by import, the resolver from the payload."""
    shutil.copytree(ROOT / "specforge_exp", tmp_path / "specforge_exp")
    for name in ("repository", "folder_name", "gpu_count"):
        (tmp_path / name).write_bytes(cloudpickle.dumps(BaseContainer._resolvers[name]))
    code = (
        "import pickle, omegaconf\n"
        "root = omegaconf.OmegaConf.create()\n"
        "def ask(name, *args):\n"
        "    wrapper = pickle.load(open(name, 'rb'))\n"
        "    return wrapper(root, None, None, args, [str(a) for a in args])\n"
        "print(ask('repository', 'assets/x'), ask('folder_name', 'a/b c'))\n"
        "print(ask('gpu_count', 'L4:4'), ask('gpu_count', 'H100:8', 'auto', 'ray', 2, 2))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == [f"{tmp_path}/assets/x", "b-c", "4", "4"], done.stderr
