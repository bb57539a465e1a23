"""S3 for real, by a server of moto on this machine: what fsspec's memory:// does not show."""

from pathlib import Path

import pytest
from kv_samples import LAYOUT, encoded_of, ref_of

from ragkit.errors import JobError, KVCacheError, UsageError
from ragkit.jobs.job_folder import open_job_folder
from ragkit.jobs.question_files import open_questions
from ragkit.kvcache.codecs import make_codec
from ragkit.kvcache.eviction import make_policy
from ragkit.kvcache.remote_tier import RemoteTier
from ragkit.object_stores import appears_whole, is_object_store

pytest.importorskip("s3fs", reason="needs s3fs: pip install s3fs")
moto_server = pytest.importorskip("moto.server", reason="needs moto: pip install 'moto[server]'")


@pytest.fixture(scope="module")
def endpoint():
    server = moto_server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(endpoint, monkeypatch):
    """The file system, with an empty bucket `docs`."""
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key-of-a-test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-a-test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    files = s3fs.S3FileSystem()
    files.mkdir("docs")
    yield files
    files.rm("docs", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()


def buckets(s3) -> list[str]:
    s3.invalidate_cache()
    return sorted(s3.ls("", refresh=True))


def test_a_job_goes_on_from_another_machine_and_its_output_appears_whole(s3, tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    rows.write_bytes(b'{"id": 1}\n{"id": 2}\n')
    out = "s3://docs/deep/answers [1].jsonl"
    with open_job_folder(out) as folder:
        folder.start(rows, b"{}")
        log = folder.open_log(2)
        folder.append(log, [(1, b'{"id": 2}')])
        log.close()
    assert not s3.exists(out)
    with open_job_folder(out) as folder:
        assert folder.manifest() == b"{}"
        log = folder.open_log(2)
        assert (log.done, 1 in log, 0 in log) == (1, True, False)
        folder.append(log, [(0, b'{"id": 1}')])
        folder.publish(lambda path: path.write_bytes(b"\n".join(log.rows())))
        log.close()
    s3.invalidate_cache()
    assert s3.find("docs") == ["docs/deep/answers [1].jsonl"]
    assert s3.cat_file(out) == b'{"id": 1}\n{"id": 2}'


def test_a_job_does_not_make_a_bucket_that_a_mistyped_url_names(s3, tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    rows.write_bytes(b"{}\n")
    with (
        open_job_folder("s3://dosc/a.jsonl") as folder,
        pytest.raises(JobError, match=r"^s3://dosc/a\.jsonl cannot be written or read: .*bucket does not exist"),
    ):
        folder.start(rows, b"{}")
    assert buckets(s3) == ["docs"]


def test_chunk_kv_does_not_make_a_bucket_that_a_mistyped_url_names(s3) -> None:
    tier = RemoteTier("s3://dosc/kv", 1 << 20, make_policy("lru"))
    with pytest.raises(KVCacheError, match="bucket does not exist"):
        tier.save([encoded_of(make_codec("int8", LAYOUT), ref_of(1))])
    assert buckets(s3) == ["docs"]


def test_questions_are_read_from_a_bucket_and_a_missing_file_is_one_line(s3) -> None:
    s3.pipe_file("docs/in/q.jsonl", b'{"question": "Why?"}\n')
    with open_questions("s3://docs/in/q.jsonl") as questions:
        assert [record.values for record in questions.records()] == [{"question": "Why?"}]
    with (
        pytest.raises(UsageError, match=r"^there is no file of questions at s3://docs/in/none\.jsonl$"),
        open_questions("s3://docs/in/none.jsonl"),
    ):
        pass


def test_an_upload_to_s3_needs_no_other_name_first(s3) -> None:
    assert is_object_store(s3)
    assert appears_whole(s3)
