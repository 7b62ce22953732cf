"""The lock and the ranges: they fit together on every interpreter, and a package that is not as tested is named with the reason."""

from __future__ import annotations

import configparser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

from vlm_pruner_eval import versions
from vlm_pruner_eval.cli import app
from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.lmms.families import family_class

ROOT = Path(__file__).parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
NEVER = "999.1"


def environment(python: str) -> dict[str, str]:
    linux = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "extra": ""}
    return linux | {"python_version": python, "python_full_version": f"{python}.0"}


def read_setup() -> list[Requirement]:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    texts = [parser["options"]["install_requires"], *parser["options.extras_require"].values()]
    lines = [line.strip() for text in texts for line in text.splitlines()]
    return [Requirement(line) for line in lines if line]


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_holds_one_version_of_every_requirement_within_its_range(python: str) -> None:
    """Fails when setup.cfg was changed without `bash scripts/relock.sh`."""
    lines = [line.partition("#")[0].strip() for line in versions.LOCK.read_text().splitlines()]
    pins = [pin for pin in map(Requirement, filter(None, lines)) if pin.marker is None or pin.marker.evaluate(environment(python))]
    held = {pin.name.lower(): str(pin.specifier) for pin in pins}
    assert len(held) == len(pins), "a package is locked twice"
    assert all(specifier.startswith("==") for specifier in held.values())
    for requirement in read_setup():
        if requirement.marker is None or requirement.marker.evaluate(environment(python)):
            version = held[requirement.name.lower()].removeprefix("==")
            assert requirement.specifier.contains(version), f"{requirement} and {version}: call bash scripts/relock.sh"


def test_every_required_package_has_a_cap() -> None:
    for requirement in read_setup():
        assert any(clause.operator == "<" for clause in requirement.specifier), requirement


def found(monkeypatch: pytest.MonkeyPatch, name: str, version: str | None) -> versions.Version:
    """The verdict on one required package, were it installed in that version."""
    real = versions._installed
    monkeypatch.setattr(versions, "_installed", lambda other: version if other == name else real(other))
    (requirement,) = [one for one in versions.requirements() if one.name == name]
    return versions.judge(requirement)


@pytest.mark.parametrize(
    ("name", "version", "verdict"),
    [
        ("transformers", NEVER, versions.NEWER),
        ("transformers", "4.40.0", versions.OLDER),
        ("filelock", "4.3.1", versions.BROKEN),
        ("filelock", "3.20.0", versions.OK),
        ("rich", None, versions.ABSENT),
    ],
)
def test_verdicts(monkeypatch: pytest.MonkeyPatch, name: str, version: str | None, verdict: str) -> None:
    judged = found(monkeypatch, name, version)
    assert judged.verdict == verdict
    assert judged.wanted in judged.facts and verdict in judged.facts and (version or "nothing") in judged.facts
    assert judged.locked in judged.fix and name in judged.fix


def test_a_release_that_is_known_not_to_work_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch, "filelock", "4.3.1")
    with pytest.raises(ConfigError) as error:
        versions.check(lambda text: None)
    assert "filelock" in str(error.value) and "filelock._api" in str(error.value) and "pip install" in str(error.value)


def test_a_sweep_refuses_it_before_anything_is_read_or_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found(monkeypatch, "filelock", "4.3.1")
    done = CliRunner().invoke(app, ["sweep", str(tmp_path / "there-is-no-file.yaml"), "--output", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert "filelock._api" in done.output and "there-is-no-file" not in done.output
    assert not (tmp_path / "out").exists()


def test_a_model_of_lmms_eval_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch, "filelock", "4.3.1")
    with pytest.raises(ConfigError, match=r"filelock\._api"):
        family_class("vlmpruner_llava").create_from_arg_string("pretrained=minivlm")


def test_a_newer_release_is_warned_about_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "_warned", set())
    found(monkeypatch, "transformers", NEVER)
    said: list[str] = []
    versions.check(said.append)
    versions.check(said.append)
    assert len(said) == 1 and NEVER in said[0] and "newer than tested" in said[0]


def test_what_was_changed_by_hand_is_found_in_packages_that_are_not_required_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "tokenizers" in versions.locked() and "tokenizers" not in {one.name for one in versions.requirements()}
    real = versions._installed
    monkeypatch.setattr(versions, "_installed", lambda other: "0.1" if other == "tokenizers" else real(other))
    assert versions.changed()["tokenizers"] == (versions.locked()["tokenizers"], "0.1")
