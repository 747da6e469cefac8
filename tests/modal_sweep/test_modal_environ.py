"""`${oc.env:...}` is in the job what it was for the launching machine, and part of its identity."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from modal_app import driver
from omegaconf import OmegaConf
from test_modal_place import values

from modal_sweep.client.code import Shipment
from modal_sweep.client.environ import environ
from modal_sweep.client.plan import Job, identity
from modal_sweep.config import ImageSettings, JobSettings
from modal_sweep.errors import LaunchError
from modal_sweep.protocol import payload


def read(text: str, **settings: object) -> object:
    """What a configuration with `x` reads."""
    config = OmegaConf.create({"x": text, "hydra": {"job": {"env_set": {"SET": "1"}}}})
    return environ(config, JobSettings(**settings), "resources")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "settings", "values"),
    [
        ("${oc.env:HERE}", {}, {"HERE": "5"}),
        ("a/${oc.env: HERE , 9}/${y}", {}, {"HERE": "5"}),
        ("${oc.decode:${oc.env:'HERE'}}", {}, {"HERE": "5"}),
        ("${oc.env:NOT_HERE,${oc.env:HERE}}", {}, {"NOT_HERE": None, "HERE": "5"}),
        ("${oc.env:HERE}", {"resolve_there": ["HERE"]}, {}),
        ("${oc.env:SET}", {}, {}),
        ("${oc.env:A_TOKEN}", {"secrets": {"one": ["A_TOKEN"]}}, {}),
        ("${oc.env:OTHER_TOKEN,null}", {}, {"OTHER_TOKEN": None}),
        ("${oc.env:MAX_TOKENS}", {}, {"MAX_TOKENS": "7"}),
        ("${oc.env:NOT_HERE}", {"env": {"NOT_HERE": "b"}}, {"NOT_HERE": "b"}),
        ("${oc.env:HERE}", {"image": ImageSettings(env={"HERE": "5"})}, {"HERE": "5"}),
        (r"\${oc.env:NOT_HERE} ${y}", {}, {}),
    ],
)
def test_what_is_read_here(
    text: str, settings: dict[str, object], values: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("HERE", "5"), ("MAX_TOKENS", "7"), ("A_TOKEN", "planted")):
        monkeypatch.setenv(name, value)
    assert read(text, **settings) == values


@pytest.mark.parametrize(
    ("text", "settings", "words"),
    [
        (
            "${oc.env:NOT_HERE}",
            {},
            ["x reads", "NOT_HERE", "is not set here", "resources.env"],
        ),
        (
            "${oc.env:HERE}",
            {"env": {"HERE": "6"}},
            ["else in resources.env", "resolve_there"],
        ),
        ("${oc.env:NOT_HERE,1}", {"env": {"NOT_HERE": "6"}}, ["something else in resources.env"]),
        ("${oc.env:A_TOKEN,null}", {}, ["a secret by its name", "resources.secrets"]),
        ("${oc.env:${y}}", {}, ["x reads", "not set here"]),
    ],
)
def test_what_is_refused(
    text: str, settings: dict[str, object], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HERE", "5")
    monkeypatch.setenv("A_TOKEN", "planted")
    with pytest.raises(LaunchError) as refused:
        read(text, **settings)
    assert all(word in str(refused.value) for word in words)
    assert "planted" not in str(refused.value)


def test_a_frozen_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was there, whatever it is here; what was not set has its default."""
    monkeypatch.setenv("HERE", "of the container")
    monkeypatch.setenv("OTHER", "of the container")
    payload.freeze_environment({"HERE": "5", "UNSET": None, "OTHER": None})
    try:
        config = OmegaConf.create(
            ["${oc.env:HERE}", "${oc.env:UNSET,9}", "${oc.env:OTHER,null}", "${oc.env:PATH}"]
        )
        resolved = OmegaConf.to_container(config, resolve=True)
    finally:
        payload.freeze_environment({})
    assert resolved == ["5", "9", None, os.environ["PATH"]]


def test_a_configuration_without_variables_has_the_identity_that_it_had() -> None:
    config = OmegaConf.create({"x": 1, "y": "${x}", "hydra": {"job": {"name": "app"}}})
    job = Job(0, [], config, JobSettings(), "/out", {"base": "b"}, Shipment({}, "code"), {})
    parts = ["code", {"base": "b"}, {"x": 1, "y": "${x}"}, "app", "/out"]
    text = json.dumps(parts, sort_keys=True)
    assert identity(job, "resources") == hashlib.sha256(text.encode()).hexdigest()[:20]
    job.environ = {"x": "5"}
    assert identity(job, "resources") != hashlib.sha256(text.encode()).hexdigest()[:20]


@pytest.mark.usefixtures("on_local_modal")
def test_the_job_has_what_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = tmp_path / "sweep"
    command = values(sweep, 'x="${oc.env:LR,9}"')
    for value in ("5", "7", "7"):
        monkeypatch.setenv("LR", value)
        printed = driver.run(command)
        assert f"#0 : x={value}" in printed.replace('"', "")
    assert "(done)" in printed
    values_of = [end["value"]["json"] for end in driver.events(sweep, "end")]
    assert values_of == ["5", "7"]
    assert "GOT 7" in driver.modal_sweep("logs", sweep)
    monkeypatch.delenv("LR")
    printed = driver.run(values(tmp_path / "b", "+y=${oc.env:LR}"), expect=1)
    assert "y reads the environment variable LR" in printed and "Traceback" not in printed
    assert driver.events(tmp_path / "b", "spawn") == []
