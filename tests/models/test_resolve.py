import json

import pytest

from ragkit.errors import ModelError, OfflineError
from ragkit.models import local_folder, resolve, weights_fingerprint, weights_stamp
from ragkit.models.cache import models_home


def _model(folder, weights=b"weights"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_a_local_folder_is_itself(tmp_path):
    folder = _model(tmp_path / "model")
    assert resolve(str(folder)) == folder


@pytest.mark.parametrize(
    ("missing", "message"), [("config.json", "no config.json"), ("model.safetensors", "no safetensors")]
)
def test_a_folder_that_lacks_something_is_refused(tmp_path, missing, message):
    (_model(tmp_path / "model") / missing).unlink()
    with pytest.raises(ModelError, match=message):
        resolve(str(tmp_path / "model"))


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"only a \.gguf file"):
        resolve(str(tmp_path / "model.bin"))


def test_a_damaged_gguf_is_refused_and_leaves_nothing(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(ModelError, match="cannot be read as GGUF"):
        resolve(str(tmp_path / "model.gguf"))
    assert not [path for path in models_home().iterdir() if path.is_dir()]


@pytest.mark.parametrize("name", ["nonsense", "./gone", "a/b/c", "/gone"])
def test_a_name_that_means_nothing_lists_what_could_be_given(name):
    with pytest.raises(ModelError, match=r"give a bundled name \(all-minilm-l6-v2, smollm2-135m-instruct\)"):
        resolve(name)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hugging Face cache that holds one model."""
    cache = tmp_path / "hub"
    repository = cache / "models--someone--tiny"
    _model(repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return cache


def test_a_cached_hub_model_is_found_offline(hub):
    assert (resolve("someone/tiny", offline=True) / "model.safetensors").read_bytes() == b"weights"


def test_the_hubs_own_offline_switch_is_respected(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert (resolve("someone/tiny") / "config.json").is_file()


def test_a_folder_is_only_named_where_the_model_is_here(hub, tmp_path):
    (tmp_path / "big.gguf").write_bytes(b"GGUF")
    assert local_folder("someone/tiny") == resolve("someone/tiny", offline=True)
    assert [local_folder(name) for name in ("someone/other", "nonsense", str(tmp_path / "big.gguf"))] == [None] * 3


def test_an_uncached_hub_model_offline_names_what_is_missing(hub):
    with pytest.raises(OfflineError, match=r"missing: config\.json, tokenizer\.json, \*\.safetensors of someone/other"):
        resolve("someone/other", offline=True)


def test_equal_weights_have_equal_fingerprints_wherever_they_are(tmp_path):
    one, two, other = _model(tmp_path / "a"), _model(tmp_path / "b"), _model(tmp_path / "c", b"others!")
    assert weights_fingerprint(one) == weights_fingerprint(two)
    assert weights_fingerprint(one) != weights_fingerprint(other)


def test_a_fingerprint_is_remembered_until_the_file_changes(tmp_path, monkeypatch):
    folder = _model(tmp_path / "a")
    before = weights_fingerprint(folder)
    monkeypatch.setattr("ragkit.models.fingerprint.file_sha256", lambda path: pytest.fail("hashed again"))
    assert weights_fingerprint(folder) == before
    monkeypatch.undo()
    monkeypatch.setenv("RAGKIT_HOME", str(tmp_path / "cache"))
    (folder / "model.safetensors").write_bytes(b"changed")
    assert weights_fingerprint(folder) != before


def test_rehashing_finds_bytes_that_changed_behind_the_memory(tmp_path):
    import os

    folder = _model(tmp_path / "a")
    file = folder / "model.safetensors"
    before, times = weights_fingerprint(folder), file.stat()
    with file.open("r+b") as handle:
        handle.write(b"W")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert weights_fingerprint(folder) == before
    assert weights_fingerprint(folder, rehash=True) != before


def test_a_stamp_changes_with_the_file_and_reads_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("ragkit.models.fingerprint.file_sha256", lambda path: pytest.fail("it was read"))
    folder = _model(tmp_path / "a")
    before = weights_stamp(folder)
    assert weights_stamp(folder) == before
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(b"other weights")
    assert weights_stamp(folder) != before
    with pytest.raises(ModelError, match="no safetensors weights"):
        weights_stamp(tmp_path)


def test_a_damaged_memory_is_computed_again(tmp_path, home, caplog):
    folder = _model(tmp_path / "a")
    before = weights_fingerprint(folder)
    (home / "fingerprints.json").write_text("{")
    assert weights_fingerprint(folder) == before
    assert "computed again" in caplog.text
    assert len(json.loads((home / "fingerprints.json").read_text())) == 1


def test_a_folder_without_weights_has_no_fingerprint(tmp_path):
    with pytest.raises(ModelError, match="no safetensors weights"):
        weights_fingerprint(tmp_path)
