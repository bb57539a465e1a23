"""Jobs on a Ray cluster of two nodes: the same store and answers as here, whatever dies on the way."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doubles import HashEmbedder, WordTokenizer
from ray_nodes import OBJECT_STORE_BYTES, config_of, contents, two_nodes, write_models

from ragkit import Pipeline
from ragkit.config import ChunkContextName
from ragkit.errors import JobError, MissingExtraError, UsageError
from ragkit.jobs import local_executor, ray_answering, ray_executor, ray_kv
from ragkit.jobs.answering import answer_many
from ragkit.jobs.batch import open_answers
from ragkit.jobs.ray_cluster import RayCluster
from ragkit.jobs.ray_pool import ActorPool
from ragkit.jobs.ray_tasks import Call, Divided, TaskRunner
from ragkit.jobs.ray_worker import RayWorker
from ragkit.jobs.rows import QuestionRow
from ragkit.jobs_config import ExecutorName, JobsConfig
from ragkit.progress import Silent

if find_spec("ray") is None:
    pytest.skip("needs the extra: pip install 'ragkit[ray]'", allow_module_level=True)

ROOT = Path(__file__).resolve().parent.parent.parent
WORDS = ["the", "cat", "sat", "mat", "dog", "ran", "far", "éclair", "猫", "river", "stone"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with two_nodes() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAGKIT_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """Texts, one of them twice in a row, a table with a row that is in it twice, and sources that fail."""
    rng = random.Random(0)
    folder = tmp_path / "docs"
    folder.mkdir()
    for number in range(10):
        text = "\n\n".join(" ".join(rng.choices(WORDS, k=9)) + "." for _ in range(rng.randint(4, 20)))
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    (folder / "3 again.txt").write_bytes((folder / "3.txt").read_bytes())
    rows = [f'{{"text": "The dog {number} ran far.", "year": {2000 + number}}}' for number in (1, 2, 2, 3)]
    (folder / "table.jsonl").write_text("\n".join([*rows, "no json"]), encoding="utf-8")
    (folder / "broken.pdf").write_bytes(b"%PDF-1.4 nothing")
    (folder / "empty.txt").write_bytes(b"")
    return folder


def ingest(store: Path, docs: Path, models: Path, address: str = "", progress: Silent | None = None) -> dict[str, Any]:
    """Return what a store holds after an ingest, its vectors, and the report."""
    with Pipeline.open(store, config_of(models, address)) as pipeline:
        report = pipeline.ingest([docs], progress=progress)
        vectors = np.concatenate([part.vectors for part in pipeline.store.vectors().parts])
        assert pipeline.verify().problems == ()
        return {"report": report, "vectors": vectors, **contents(pipeline)}


def assert_same(got: dict[str, Any], wanted: dict[str, Any], but: str = "/") -> None:
    """Compare two stores and reports, but for a source of that name."""
    assert [one for one in got["sources"] if not one[0].endswith(but)] == wanted["sources"]
    for part in ("documents", "chunks"):
        assert got[part] == wanted[part], part
    assert [links for links in got["links"] if links] == [links for links in wanted["links"] if links]
    assert np.abs(got["vectors"] - wanted["vectors"]).max() < 1e-5
    for count in ("added", "updated", "skipped", "chunks", "tokens", "warnings"):
        assert getattr(got["report"], count) == getattr(wanted["report"], count), count
    assert [one for one in got["report"].failed if not one.uri.endswith(but)] == list(wanted["report"].failed)


def killed_by(times: dict[str, int], marks: Path) -> type[RayWorker]:
    """Return a worker that kills itself when it is to read a file of a name, so many times in all."""

    class Mortal(RayWorker):
        def read(self, sources: Sequence[Any]) -> Any:
            for name in times.keys() & {source.path.name for source in sources}:
                killed = len(list(marks.glob(f"{name}-*")))
                if killed < times[name]:
                    (marks / f"{name}-{killed}").touch()
                    os.kill(os.getpid(), signal.SIGKILL)
            return super().read(sources)

    return Mortal


@pytest.fixture
def marks(tmp_path: Path) -> Path:
    folder = tmp_path / "marks"
    folder.mkdir()
    return folder


def test_a_killed_worker_costs_its_shard_and_a_document_that_kills_every_worker_fails_alone(
    cluster: Any, tmp_path: Path, docs: Path, models: Path, marks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_executor, "RayWorker", killed_by({"2.txt": 1, "5.txt": 99}, marks))
    monkeypatch.setattr(ray_executor, "_SHARDS_A_WORKER", 2)  # several sources a shard
    on_ray = ingest(tmp_path / "ray", docs, models, cluster.address)
    (failed,) = [one for one in on_ray["report"].failed if one.uri.endswith("5.txt")]
    assert (failed.code, failed.stage) == ("crash", "read")
    assert on_ray["report"].added == 11
    (docs / "5.txt").unlink()
    local = ingest(tmp_path / "local", docs, models)
    assert_same(on_ray, local, but="5.txt")
    assert {Path(one.uri).name for one in local["report"].failed} == {"broken.pdf", "empty.txt", "table.jsonl#row=5"}


def test_a_large_table_comes_in_parts_and_is_stored_as_here(
    cluster: Any, tmp_path: Path, models: Path, marks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_executor, "PART_DOCUMENTS", 5)
    monkeypatch.setattr(ray_executor, "PART_DOCUMENTS", 5)

    class Mortal(RayWorker):
        """Dies once at the third part, and hands over no table whole."""

        def read_part(self, table: Any, start: int, stop: int) -> Any:
            assert stop - start <= 5
            if start == 10 and not (marks / "died").exists():
                (marks / "died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().read_part(table, start, stop)

    monkeypatch.setattr(ray_executor, "RayWorker", Mortal)
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.txt").write_text("Before the table.")
    rows = [json.dumps({"text": f"The dog {number % 20} ran far.", "year": number}) for number in range(23)]
    (folder / "b.jsonl").write_text("\n".join([*rows, "no json"]))
    (folder / "c.txt").write_text("The dog 3 ran far.")
    on_ray = ingest(tmp_path / "ray", folder, models, cluster.address)
    assert (marks / "died").exists()
    local = ingest(tmp_path / "local", folder, models)
    assert on_ray["report"].added == 3
    assert_same(on_ray, local)


def test_a_part_that_kills_its_workers_fails_the_table_which_shows_nothing(
    cluster: Any, tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_executor, "PART_DOCUMENTS", 5)

    class Mortal(RayWorker):
        def read_part(self, table: Any, start: int, stop: int) -> Any:
            if start == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().read_part(table, start, stop)

    monkeypatch.setattr(ray_executor, "RayWorker", Mortal)
    table = tmp_path / "table.jsonl"
    table.write_text("\n".join(json.dumps({"text": f"The dog {number} ran far."}) for number in range(17)))
    with Pipeline.open(tmp_path / "store", config_of(models, cluster.address)) as pipeline:
        report = pipeline.ingest([table])
        assert [(one.stage, one.code) for one in report.failed] == [("read", "crash")]
        assert pipeline.store.counts().chunks == 0
        monkeypatch.undo()
        monkeypatch.setattr(ray_executor, "PART_DOCUMENTS", 5)
        assert pipeline.ingest([table], retry_failed=True).added == 1
        assert pipeline.store.counts().documents == 17


class RemovesNode(Silent):
    """Takes a node away once something is committed."""

    def __init__(self, cluster: Any, node: Any) -> None:
        self.cluster, self.node = cluster, node

    def advance(self, documents: int = 0, bytes: int = 0, tokens: int = 0) -> None:
        if documents and self.node is not None:
            node, self.node = self.node, None
            self.cluster.remove_node(node, allow_graceful=False)


def test_a_lost_node_costs_its_shards_and_nothing_comes_twice(
    cluster: Any, tmp_path: Path, docs: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_executor, "SHARD_BYTES", 300)
    node = cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE_BYTES)
    watch = RemovesNode(cluster, node)
    on_ray = ingest(tmp_path / "ray", docs, models, cluster.address, watch)
    assert watch.node is None
    assert_same(on_ray, ingest(tmp_path / "local", docs, models))


def test_nothing_to_do_needs_no_cluster(tmp_path: Path, docs: Path, models: Path) -> None:
    ingest(tmp_path / "store", docs, models)
    again = ingest(tmp_path / "store", docs, models, "127.0.0.1:1")
    assert (again["report"].added, again["report"].unchanged) == (0, 12)


@pytest.mark.parametrize(
    "context", [ChunkContextName.NEIGHBOURS, pytest.param(ChunkContextName.PREFIX, marks=pytest.mark.slow)]
)
def test_chunk_kv_of_workers_is_what_this_process_would_compute(
    cluster: Any, tmp_path: Path, docs: Path, models: Path, context: ChunkContextName, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_kv, "SHARD_CHUNKS", 20)
    ingest(tmp_path / "store", docs, models)
    config = config_of(models, cluster.address, context=context)
    with Pipeline.open(tmp_path / "store", config) as pipeline:
        on_ray = pipeline.ingest([], kv=True)
        chunks = pipeline.store.counts().chunks
        assert on_ray.kv is not None
        assert on_ray.kv.computed + on_ray.kv.present + on_ray.kv.shared == chunks
        assert on_ray.kv.computed == pipeline.store.kv_totals().entries > 50
        assert pipeline.gc().removed_files == 0  # every segment that was written is recorded
        assert pipeline.verify().problems == ()
    with Pipeline.open(tmp_path / "store", config_of(models, context=context)) as pipeline:
        assert pipeline.ingest([], kv=True).kv.computed == 0
        stored = [one.chunk for one in pipeline.store.chunks(pipeline.store.row_ids()[:30])]
        blending = pipeline.parts.blending
        refs = blending.refs(stored)
        computed = blending.chunks.compute(refs)
        with blending.kv_store.fetch(refs, _never_computes) as fetched:
            for encoded, here in zip(fetched.chunks, computed, strict=True):
                for layer, layer_here in zip(blending.kv_store.decode(encoded).layers, here.layers, strict=True):
                    assert max((got - wanted).abs().max() for got, wanted in zip(layer, layer_here, strict=True)) < 1e-5


def _never_computes(refs: Sequence[Any]) -> Sequence[Any]:
    raise AssertionError(f"{len(refs)} chunks were not loaded")


def test_rows_of_a_batch_get_the_answers_that_they_get_here(
    cluster: Any, tmp_path: Path, docs: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ragkit.jobs.ray_answering.SHARD_ROWS", 3)
    ingest(tmp_path / "store", docs, models)
    rows = [QuestionRow(number, f"row {number}", f"Where did the dog run, {number}?") for number in range(8)]
    with Pipeline.open(tmp_path / "store", config_of(models)) as pipeline:
        here = {one.row.row_id: one.answer for one in answer_many(pipeline.parts, rows)}
    with Pipeline.open(tmp_path / "store", config_of(models, cluster.address)) as pipeline:
        there = {one.row.row_id: one.answer for one in open_answers(pipeline.parts, threading.Event())(rows)}
    assert len(there) == 8
    for row_id, answer in there.items():
        assert (answer.text, answer.citations) == (here[row_id].text, here[row_id].citations)


def test_rows_of_a_killed_worker_are_answered_once_and_one_that_kills_every_worker_fails_alone(
    cluster: Any, tmp_path: Path, docs: Path, models: Path, marks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dying(ray_answering.RayAnswerer):
        """Dies once of the row 1, and whenever it has the row 7."""

        def answer(self, rows: Sequence[QuestionRow]) -> Any:
            numbers = [row.number for row in rows]
            once = marks / "died"
            if 7 in numbers or (1 in numbers and not once.exists()):
                once.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().answer(rows)

    monkeypatch.setattr(ray_answering, "RayAnswerer", Dying)
    monkeypatch.setattr(ray_answering, "SHARD_ROWS", 3)
    ingest(tmp_path / "store", docs, models)
    rows = [QuestionRow(number, f"r{number}", f"Where did the dog run, {number}?") for number in range(9)]
    with Pipeline.open(tmp_path / "store", config_of(models, cluster.address)) as pipeline:
        outcomes = list(open_answers(pipeline.parts, threading.Event())(rows))
    assert (marks / "died").exists()
    assert sorted(one.row.number for one in outcomes) == list(range(9))
    assert {one.row.number: one.error.code for one in outcomes if one.error is not None} == {7: "crash"}


class Counter:
    """A worker that needs no model."""

    def __init__(self, marks: str) -> None:
        self._marks = Path(marks)

    def start(self) -> int:
        return 0

    def double(self, number: int) -> int:
        mark = self._marks / str(number)
        if mark.exists():
            mark.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return 2 * number

    def poison(self, number: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return number


class Doubles:
    """Doubles numbers, all of them in one call; `poison` kills its worker."""

    def __init__(self, numbers: Sequence[int], poison: int = -1) -> None:
        self.numbers, self.poison = numbers, poison

    def steps(self) -> Any:
        doubled = []
        for number in self.numbers:
            method = "poison" if number == self.poison else "double"
            doubled.append((yield Call("count", method, (number,))))
        return doubled

    def parts(self) -> list[Doubles]:
        return [Doubles([number], self.poison) for number in self.numbers] if len(self.numbers) > 1 else []

    def failed(self, step: str, code: str, message: str) -> list[Any]:
        return [(step, code, message)]


@pytest.fixture
def pool(cluster: Any, marks: Path) -> Iterator[ActorPool]:
    with RayCluster(JobsConfig(ray_address=cluster.address)) as connection:
        connection.connect()
        by_value = connection.ray.cloudpickle
        by_value.register_pickle_by_value(sys.modules[Counter.__module__])
        pool = ActorPool(connection.ray, "counting", 2, Counter, (str(marks),), {"num_cpus": 1}, lambda _: None)
        yield pool
        pool.close()
        by_value.unregister_pickle_by_value(sys.modules[Counter.__module__])


def run_doubles(pool: ActorPool, tasks: Sequence[Doubles]) -> tuple[list[Any], int]:
    import ray

    runner = TaskRunner(ray, {"count": pool}, lambda: None)
    return list(runner.run(tasks)), runner.deaths


def test_results_come_in_order_and_tasks_are_drawn_only_so_far_ahead(pool: ActorPool) -> None:
    import ray

    drawn: list[int] = []

    def tasks() -> Iterator[Doubles]:
        for number in range(60):
            drawn.append(number)
            yield Doubles([number])

    ahead = [
        (result, len(drawn) - done)
        for done, result in enumerate(TaskRunner(ray, {"count": pool}, lambda: None).run(tasks()))
    ]
    assert [result for result, _ in ahead] == [[2 * number] for number in range(60)]
    assert max(count for _, count in ahead) <= 8


def test_a_task_whose_worker_is_killed_is_done_again(pool: ActorPool, marks: Path) -> None:
    (marks / "2").touch()
    results, deaths = run_doubles(pool, [Doubles([0, 1]), Doubles([2, 3]), Doubles([4, 5])])
    assert results == [[0, 2], [4, 6], [8, 10]]
    assert deaths == 1


def test_a_task_that_keeps_killing_its_workers_is_divided_and_fails_alone(pool: ActorPool) -> None:
    results, deaths = run_doubles(pool, [Doubles([0, 1]), Doubles([2, 3, 4], poison=3), Doubles([5])])
    failure = [("poison", "crash", "3 workers in a row died at it")]
    assert results == [[0, 2], [4], failure, [8], [10]]
    assert deaths == 4


def test_a_task_that_turns_out_to_be_many_takes_its_place_with_few_under_way(pool: ActorPool) -> None:
    import ray

    begun: list[int] = []

    class Many:
        """Becomes as many tasks as its first call says."""

        def __init__(self, numbers: Sequence[int]) -> None:
            self.numbers = numbers

        def steps(self) -> Any:
            if len(self.numbers) > 1:
                yield Call("count", "double", (0,))
                return Divided([Many([number]) for number in self.numbers])
            begun.extend(self.numbers)
            return [(yield Call("count", "double", (self.numbers[0],)))]

        def parts(self) -> list[Any]:
            return []

    tasks = [Many([0]), Many(range(1, 41)), Many([41])]
    runner = TaskRunner(ray, {"count": pool}, lambda: None)
    ahead = [(result, len(begun) - done) for done, result in enumerate(runner.run(tasks))]
    assert [result for result, _ in ahead] == [[2 * number] for number in range(42)]
    assert max(count for _, count in ahead) <= 8 + 1  # the task behind them was begun before


def test_a_stop_is_heard_by_workers_which_hand_over_what_they_have_answered(
    cluster: Any, tmp_path: Path, docs: Path, models: Path, marks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Waiting(ray_answering.RayAnswerer):
        """Answers one row of a shard, and goes on when a stop is asked for."""

        def answer(self, rows: Sequence[QuestionRow]) -> Any:
            first = super().answer(rows[:1])
            (marks / f"{rows[0].number}").touch()
            assert self._stop.wait(60)
            return first + super().answer(rows[1:])

    monkeypatch.setattr(ray_answering, "RayAnswerer", Waiting)
    monkeypatch.setattr(ray_answering, "SHARD_ROWS", 3)
    rows = [QuestionRow(number, f"r{number}", f"Where is the {WORDS[number]}?") for number in range(9)]
    stop = threading.Event()

    def stop_when_answered() -> None:
        for _ in range(600):
            if list(marks.iterdir()) or stop.wait(0.1):
                break
        stop.set()

    with Pipeline.open(tmp_path / "store", config_of(models)) as pipeline:
        pipeline.ingest([docs])
    with Pipeline.open(tmp_path / "store", config_of(models, cluster.address)) as pipeline:
        watcher = threading.Thread(target=stop_when_answered)
        watcher.start()
        try:
            kept = [one.row.number for one in open_answers(pipeline.parts, stop)(rows)]
        finally:
            stop.set()
            watcher.join()
    assert kept
    assert {number % 3 for number in kept} == {0}
    assert {int(path.name) for path in marks.iterdir()} >= set(kept)


def test_a_stop_leaves_at_once(pool: ActorPool) -> None:
    import ray

    def check() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(TaskRunner(ray, {"count": pool}, check).run([Doubles([1])]))


OTHER_PROCESS = """
import sys
from ragkit.jobs.ray_cluster import RayCluster
from ragkit.jobs_config import JobsConfig
with RayCluster(JobsConfig(ray_address=sys.argv[1])) as cluster:
    cluster.connect()
    def bare():
        import sys, ragkit.chunking.registry, ragkit.kernels, ragkit.kvcache.kv_segment, ragkit.jobs.ray_worker
        ours = ("chunking", "cli", "kernels", "kvcache", "retrieval")
        return [name for name in ours if name in sys.modules], sys.path
    names, path = cluster.ray.get(cluster.ray.remote(bare).remote())
    print(names, sys.argv[2] in path)
"""


def in_another_process(address: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-c", OTHER_PROCESS, address, str(ROOT)]
    env = os.environ | environ
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_a_worker_of_a_job_that_starts_in_the_checkout_imports_nothing_by_a_bare_name(cluster: Any) -> None:
    done = in_another_process(cluster.address)
    assert (done.stdout.strip(), done.returncode) == ("[] False", 0), done.stderr


def test_a_cluster_refuses_another_token(cluster: Any) -> None:
    done = in_another_process(cluster.address, RAY_AUTH_TOKEN="f" * 64, RAY_NUM_REDIS_GET_RETRIES="1")
    assert done.returncode != 0
    assert "JobError: the Ray cluster at" in done.stderr
    assert "RAY_AUTH_TOKEN" in done.stderr


def test_the_handler_of_sigterm_stays_the_program_s(cluster: Any) -> None:
    def handler(number: int, frame: Any) -> None:
        raise AssertionError(number)

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with RayCluster(JobsConfig(ray_address=cluster.address)) as connection:
            connection.connect()
            assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_models_that_were_handed_over_are_refused(tmp_path: Path, docs: Path, models: Path) -> None:
    config = config_of(models, "127.0.0.1:1")
    with (
        Pipeline.open(tmp_path / "store", config, embedder=HashEmbedder(), tokenizer=WordTokenizer()) as pipeline,
        pytest.raises(UsageError, match="embedder and tokenizer"),
    ):
        pipeline.ingest([docs])


def test_without_ray_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"^--engine ray needs Ray: pip install 'ragkit\[ray\]'$"):
        RayCluster(JobsConfig(engine=ExecutorName.RAY))


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere", "ray://127.0.0.1:1"])
def test_a_cluster_that_is_not_there_is_one_line(address: str) -> None:
    with pytest.raises(JobError, match=f"^the Ray cluster at '{address}' cannot be used: .*takes HOST:PORT"):
        RayCluster(JobsConfig(ray_address=address)).connect()


def test_the_command_prints_its_result_and_nothing_else(cluster: Any, tmp_path: Path, docs: Path, models: Path) -> None:
    settings = [f'embedding.model = "{models / "bert"}"', f'generation.model = "{models / "generator"}"']
    (tmp_path / "ragkit.toml").write_text("\n".join(settings), encoding="utf-8")
    command = [Path(sys.executable).parent / "ragkit", "ingest", docs, "--json", "--device", "cpu"]
    command += ["--store", tmp_path / "store", "--config", tmp_path / "ragkit.toml"]
    command += ["--engine", "ray", "--ray-address", cluster.address]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (json.loads(done.stdout)["added"], done.returncode) == (12, 3), done.stderr
