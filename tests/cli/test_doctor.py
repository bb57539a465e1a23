"""`ragkit doctor`: each check, and the exit code."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

import ragkit.models
from ragkit.cli import doctor
from ragkit.errors import OfflineError, StoreCorruptError
from ragkit.settings import load_settings


@pytest.fixture(autouse=True)
def models_here(monkeypatch):
    monkeypatch.setattr(ragkit.models, "resolve", lambda name, *, offline=False: Path("/models") / name)


def statuses(result) -> dict[str, str]:
    return {check["name"]: check["status"] for check in result.json["checks"]}


def test_a_sound_machine_passes(run):
    result = run("doctor", "--json")
    assert result.code == 0
    assert result.json["ok"] is True
    assert {"python", "sqlite", "torch", "faiss", "cuda", "embedder", "generator", "disk", "store"} <= set(
        statuses(result)
    )
    assert run("doctor").out.startswith("ok    python")


def test_a_missing_model_is_a_warning_online_and_a_failure_offline(run, monkeypatch):
    def resolve(name, *, offline=False):
        raise OfflineError(f"{name} was not pulled yet")

    monkeypatch.setattr(ragkit.models, "resolve", resolve)
    online, offline = run("doctor", "--json"), run("doctor", "--json", "--offline")
    assert (online.code, statuses(online)["embedder"]) == (0, "warn")
    assert (offline.code, statuses(offline)["embedder"]) == (1, "fail")
    assert "-> ragkit models pull all-minilm-l6-v2" in run("doctor").out


def test_a_gpu_that_is_asked_for_and_missing_is_a_failure(run, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert statuses(run("doctor", "--json"))["cuda"] == "ok"
    wanted = run("doctor", "--json", "--device", "cuda")
    assert (wanted.code, statuses(wanted)["cuda"]) == (1, "fail")


def test_a_package_that_is_missing_is_a_failure_with_its_extra(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: "" if name.startswith("faiss") else "1.0")
    checks = {check.name: check for check in doctor.check_packages(load_settings(environ={}))}
    assert (checks["faiss"].status, checks["faiss"].remedy) == ("fail", "pip install 'ragkit[cpu]' (or 'ragkit[gpu]')")
    monkeypatch.setattr(doctor, "_version", lambda name: "1.0")
    checks = {check.name: check for check in doctor.check_packages(load_settings(environ={}))}
    assert checks["faiss"].status == "warn"


def test_a_nearly_full_disk_is_a_warning(run, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10, 9, 1_000_000))
    assert statuses(run("doctor", "--json"))["disk"] == "warn"


def test_the_store_is_opened_and_its_failed_sources_counted(run, world):
    Path(".ragkit").mkdir()
    result = run("doctor", "--json")
    assert statuses(result)["store"] == "warn"
    assert "2 sources, 1 failed, 0 damaged" in run("doctor").out


def test_a_damaged_store_is_a_failure(run, monkeypatch):
    import sys

    def status(self):
        raise StoreCorruptError("the catalogue is damaged")

    Path(".ragkit").mkdir()
    monkeypatch.setattr(sys.modules["ragkit.pipeline"].Pipeline, "status", status)
    result = run("doctor", "--json")
    assert (result.code, statuses(result)["store"]) == (1, "fail")
