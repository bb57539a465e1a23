"""Whatever happens to stored chunk KV, an answer has the tokens that a cold run gives it."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from blended_pipeline import CONFIG, QUESTIONS, kv_files, open_blended, write_documents
from tiny_generator import write_generator

from ragkit import Answer, Pipeline
from ragkit.config import LoadingMode
from ragkit.generation.engine import Engine
from ragkit.generation.steps import Finished
from ragkit.kvcache.kv_key import KVKey, KVRecipe
from ragkit.kvcache.kv_segment import MissReason, RecordReader
from ragkit.kvcache.load_controller import LoadController, LoadPlan
from ragkit.store import faults

SCRIPT = Path(__file__).parent / "support" / "blend_script.py"


class Recorder:
    """Notes the token ids of every generation, by the thread that asked for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._last = threading.local()
        generate = Engine.generate

        def recording(engine: Engine, *arguments, **options) -> Iterator:
            for step in generate(engine, *arguments, **options):
                if isinstance(step, Finished):
                    self._last.tokens = step.token_ids
                yield step

        monkeypatch.setattr(Engine, "generate", recording)

    def ask(self, pipeline: Pipeline, question: str) -> tuple[Answer, tuple[int, ...]]:
        answer = pipeline.query(question)
        return answer, self._last.tokens

    def tokens(self, pipeline: Pipeline) -> list[tuple[int, ...]]:
        return [self.ask(pipeline, question)[1] for question in QUESTIONS]


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = write_generator(tmp_path_factory.mktemp("tiny"))
    return Engine.load(folder, device="cpu", dtype="float32", kv_tokens=100_000)


@pytest.fixture
def place(tmp_path: Path, engine: Engine) -> Path:
    """A store whose chunks all have KV, in one file a document."""
    with open_blended(tmp_path / "store", engine) as pipeline:
        for seed in range(3):
            pipeline.ingest([write_documents(tmp_path / f"docs{seed}", [seed])], kv=True)
    assert len(kv_files(tmp_path / "store")) == 3
    return tmp_path / "store"


@pytest.fixture
def cold(place: Path, engine: Engine, recorder: Recorder) -> list[tuple[int, ...]]:
    """The tokens of a run that never saw stored KV; different for every question."""
    with open_blended(place, engine, memory_mb=0, disk_mb=0) as pipeline:
        tokens = recorder.tokens(pipeline)
    assert len(set(tokens)) == len(QUESTIONS)
    return tokens


def swap(files: list[Path]) -> None:
    contents = [file.read_bytes() for file in files]
    for file, content in zip(files, contents[1:] + contents[:1], strict=True):
        file.write_bytes(content)


def swap_records(files: list[Path]) -> None:
    """Exchange the first halves of equally long files: whole records that are not those of the catalogue."""
    one, other = (file.read_bytes() for file in files[:2])
    middle = min(len(one), len(other)) // 8192 * 4096
    files[0].write_bytes(other[:middle] + one[middle:])
    files[1].write_bytes(one[:middle] + other[middle:])


def halve(file: Path) -> None:
    """Leave what a file system may after a power failure: the right length, and zeros from the middle on."""
    size = file.stat().st_size
    os.truncate(file, size // 2)
    os.truncate(file, size)


def remove_with_folder(file: Path) -> None:
    """Remove a file, and its folder unless a segment of vectors happens to lie there too."""
    file.unlink()
    if not any(file.parent.iterdir()):
        file.parent.rmdir()


DAMAGES: dict[str, tuple[Callable[[list[Path]], object], MissReason]] = {
    "missing": (lambda files: [file.unlink() for file in files], MissReason.UNREADABLE),
    "folder": (lambda files: [remove_with_folder(file) for file in files], MissReason.UNREADABLE),
    "empty": (lambda files: [os.truncate(file, 0) for file in files], MissReason.SHORT),
    "truncated": (lambda files: [os.truncate(file, 9000) for file in files], MissReason.SHORT),
    "half-written": (lambda files: [halve(file) for file in files], MissReason.HEADER),
    "zeroed": (lambda files: [file.write_bytes(bytes(file.stat().st_size)) for file in files], MissReason.HEADER),
    "swapped": (swap, MissReason.OTHER_KEY),
    "records swapped": (swap_records, MissReason.OTHER_KEY),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_change_no_answer_and_are_written_anew(
    place: Path, engine: Engine, recorder: Recorder, cold: list[tuple[int, ...]], damage: str
) -> None:
    apply, reason = DAMAGES[damage]
    apply(kv_files(place))
    with open_blended(place, engine) as pipeline:
        assert recorder.tokens(pipeline) == cold
        misses = pipeline.parts.blending.kv_store.stats.misses
        assert misses["disk", reason] > 0
    with open_blended(place, engine) as pipeline:
        answers = [recorder.ask(pipeline, question) for question in QUESTIONS]
        assert [tokens for _, tokens in answers] == cold
        assert sum(answer.kv.misses for answer, _ in answers) == 0


def test_no_flipped_bit_changes_an_answer(
    place: Path, engine: Engine, recorder: Recorder, cold: list[tuple[int, ...]]
) -> None:
    chance = random.Random(3)
    contents = {file: file.read_bytes() for file in kv_files(place)}
    misses = 0
    for _ in range(25):
        for file, content in contents.items():
            flipped = bytearray(content)
            for _ in range(3):
                flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
            file.write_bytes(flipped)
        with open_blended(place, engine, disk_mb=1) as pipeline:
            tiers = pipeline.parts.blending.kv_store
            tiers._saver._tiers = ()  # the damaged files stay as they are
            assert recorder.tokens(pipeline) == cold
            misses += tiers.stats.computed
    assert misses > 25


def test_kv_that_is_evicted_while_it_is_loaded_does_no_harm(
    place: Path, engine: Engine, recorder: Recorder, cold: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    evicting = threading.Lock()
    load = RecordReader.load

    def evicting_load(reader, allocate=None):
        with evicting, pipeline.store.writer() as writer:
            listed = [entry.key for _, entry in pipeline.store.kv_listing()]
            writer.remove_kv(listed[: len(listed) // 2])
            writer.collect(0.0)
        return load(reader, allocate)

    monkeypatch.setattr(RecordReader, "load", evicting_load)
    with open_blended(place, engine) as pipeline:
        assert recorder.tokens(pipeline) == cold
        assert pipeline.store.verify().problems == ()


def test_another_model_under_the_same_name_finds_no_kv_of_the_first(
    tmp_path: Path, place: Path, recorder: Recorder
) -> None:
    tokens = {}
    for seed in (0, 1):
        folder = write_generator(tmp_path / "model", seed)
        engine = Engine.load(folder, device="cpu", dtype="float32")
        with open_blended(place, engine, memory_mb=0, disk_mb=0) as pipeline:
            tokens[seed] = recorder.tokens(pipeline)
        with open_blended(place, engine) as pipeline:
            assert recorder.tokens(pipeline) == tokens[seed]
            # The first has the weights that the KV in the store was made with, wherever its folder is.
            assert (pipeline.parts.blending.kv_store.stats.computed > 0) == (seed == 1)
    assert tokens[0] != tokens[1]


def test_verify_notices_weights_that_were_changed_behind_their_remembered_hash(
    tmp_path: Path, place: Path, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_generator(tmp_path / "model")
    weights = folder / "model.safetensors"
    config = replace(CONFIG, generation=replace(CONFIG.generation, model=str(folder)))
    with open_blended(place, Engine.load(folder, device="cpu", dtype="float32"), config) as pipeline:
        recorder.tokens(pipeline)
        assert pipeline.verify().problems == ()
    assert "changed in place" not in caplog.text
    times, content = weights.stat(), write_generator(tmp_path / "other", seed=1) / "model.safetensors"
    with weights.open("r+b") as file:
        file.write(content.read_bytes())
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    with open_blended(place, Engine.load(folder, device="cpu", dtype="float32"), config) as pipeline:
        pipeline.verify()
        assert "changed in place" in caplog.text
        recorder.tokens(pipeline)
        assert pipeline.parts.blending.kv_store.stats.computed > 0


def test_keys_that_collide_change_no_answer(
    tmp_path: Path, engine: Engine, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_blended(tmp_path / "store", engine, memory_mb=0, disk_mb=0) as pipeline:
        pipeline.ingest([write_documents(tmp_path / "docs")])
        cold = recorder.tokens(pipeline)
    monkeypatch.setattr(KVRecipe, "keys_behind", lambda recipe, context: lambda token_ids: KVKey("ab" * 32))
    for _ in range(2):  # the second finds the first one's KV on disk
        with open_blended(tmp_path / "store", engine) as pipeline:
            assert recorder.tokens(pipeline) == cold
            assert recorder.tokens(pipeline) == cold
            assert pipeline.parts.blending.kv_store.memory.collisions > 0


def test_a_hundred_requests_at_once_get_the_answers_they_get_alone(
    tmp_path: Path, engine: Engine, recorder: Recorder
) -> None:
    with open_blended(tmp_path / "store", engine, memory_mb=0, disk_mb=0) as pipeline:
        pipeline.ingest([write_documents(tmp_path / "docs")])
        cold = dict(zip(QUESTIONS, recorder.tokens(pipeline), strict=True))
    # A cache for a few chunks only, and a disk that evicts all the time.
    with open_blended(tmp_path / "store", engine, memory_mb=1, disk_mb=1) as pipeline:
        pipeline.parts.blending.kv_store.memory.budget_bytes = 150_000
        pipeline.parts.blending.kv_store.backing[0].budget_bytes = 300_000
        with ThreadPoolExecutor(20) as pool:
            asked = [QUESTIONS[number % len(QUESTIONS)] for number in range(100)]
            answers = list(pool.map(lambda question: recorder.ask(pipeline, question), asked))
        assert [tokens for _, tokens in answers] == [cold[question] for question in asked]
        assert all(answer.kv.hits + answer.kv.misses == 5 for answer, _ in answers)
        pipeline.parts.blending.kv_store.flush()
        assert pipeline.parts.blending.kv_store.memory.bytes_used <= 150_000
        assert engine.pool.num_free == engine.pool.num_blocks
        assert pipeline.store.verify().problems == ()


def test_documents_that_come_and_go_meanwhile_change_no_answer(
    tmp_path: Path, place: Path, engine: Engine, recorder: Recorder
) -> None:
    """The others' KV is handed on, erased and computed while questions are asked of one document."""
    with open_blended(place, engine) as pipeline:
        one = str(tmp_path / "docs0" / "0.txt")

        def ask(question: str) -> tuple[int, ...]:
            pipeline.query(question, document=one)
            return recorder._last.tokens

        alone = {question: ask(question) for question in QUESTIONS}
        done = threading.Event()

        def churn() -> None:
            for seed in range(20, 26):
                other = write_documents(tmp_path / "others", [seed])
                pipeline.ingest([other], prune=True, kv=True)
                pipeline.remove([str(other / f"{seed}.txt")], erase=seed % 2 == 0)
            done.set()

        with ThreadPoolExecutor(5) as pool:
            churning = pool.submit(churn)
            while not done.is_set() and not churning.done():
                for question, tokens in zip(QUESTIONS, pool.map(ask, QUESTIONS), strict=True):
                    assert tokens == alone[question]
            churning.result()


def test_damaged_objects_of_a_remote_place_change_no_answer(
    tmp_path: Path, place: Path, engine: Engine, recorder: Recorder, cold: list[tuple[int, ...]]
) -> None:
    remote = tmp_path / "remote"
    with open_blended(place, engine, disk_mb=0, remote=remote.as_uri()) as pipeline:
        recorder.tokens(pipeline)
    objects = sorted(remote.rglob("*.kv"))
    for number, file in enumerate(objects):
        if number % 3 == 0:
            file.unlink()
        elif number % 3 == 1:
            os.truncate(file, file.stat().st_size // 2)
    with open_blended(place, engine, disk_mb=0, remote=remote.as_uri()) as pipeline:
        answers = [recorder.ask(pipeline, question) for question in QUESTIONS]
    assert [tokens for _, tokens in answers] == cold
    assert sum(answer.kv.misses for answer, _ in answers) >= len(objects) // 3


def test_an_answer_says_in_one_line_how_many_of_its_chunks_were_damaged(place: Path, engine: Engine) -> None:
    for file in kv_files(place):
        os.truncate(file, 0)
    with open_blended(place, engine) as pipeline:
        first, second = (pipeline.query(QUESTIONS[0]) for _ in range(2))
    [warning] = first.warnings
    assert warning.startswith("the stored KV of 5 chunks, the first in ")
    assert ".kv, cannot be used (" in warning
    assert warning.endswith("): it is computed again")
    assert first.kv.misses == 5
    assert second.warnings == ()


class _Tossing(LoadController):
    """Decides by tossing a coin what is loaded and what is computed."""

    coin = random.Random(9)

    def plan(self, stored, lacking_tokens=()):
        mixed = self.coin.sample(list(stored), len(stored))
        cut = self.coin.randrange(len(mixed) + 1)
        return LoadPlan(tuple(mixed[:cut]), tuple(mixed[cut:]), 0.0)


@pytest.mark.parametrize("damage", [None, "truncated", "swapped"])
def test_no_answer_depends_on_what_was_loaded_and_what_computed(
    place: Path,
    engine: Engine,
    recorder: Recorder,
    cold: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
    damage: str | None,
) -> None:
    monkeypatch.setattr("ragkit.generation.blending.LoadController", _Tossing)
    if damage is not None:
        DAMAGES[damage][0](kv_files(place))
    recomputed = 0
    for _ in range(4):
        with open_blended(place, engine, loading=LoadingMode.AUTO) as pipeline:
            assert recorder.tokens(pipeline) == cold
            recomputed += pipeline.parts.blending.kv_store.stats.recomputed
    assert recomputed > 0


def test_a_hundred_requests_at_once_with_rates_that_decide_get_the_answers_they_get_alone(
    place: Path, engine: Engine, recorder: Recorder, cold: list[tuple[int, ...]]
) -> None:
    with open_blended(place, engine, loading=LoadingMode.AUTO, memory_mb=1) as pipeline:
        pipeline.parts.blending.kv_store.memory.budget_bytes = 150_000
        with ThreadPoolExecutor(20) as pool:
            asked = [QUESTIONS[number % len(QUESTIONS)] for number in range(100)]
            answers = list(pool.map(lambda question: recorder.ask(pipeline, question), asked))
        expected = dict(zip(QUESTIONS, cold, strict=True))
        assert [tokens for _, tokens in answers] == [expected[question] for question in asked]
        assert all(answer.kv.hits + answer.kv.misses + answer.kv.recomputed == 5 for answer, _ in answers)


@pytest.mark.crash
@pytest.mark.parametrize("step", [1, 3, 6])
def test_a_process_that_dies_while_it_writes_kv_changes_no_answer(
    tmp_path: Path, engine: Engine, recorder: Recorder, step: int
) -> None:
    store = tmp_path / "store"
    with open_blended(store, engine) as pipeline:
        pipeline.ingest([write_documents(tmp_path / "docs")])
    command = [sys.executable, str(SCRIPT), str(store), str(engine.folder), QUESTIONS[0]]
    done = subprocess.run(
        command, env={**os.environ, "RAGKIT_CRASH_AT": str(step)}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == faults.CRASH_EXIT_CODE, done.stderr
    with open_blended(store, engine, memory_mb=0, disk_mb=0) as pipeline:
        cold = recorder.tokens(pipeline)
    with open_blended(store, engine) as pipeline:
        assert recorder.tokens(pipeline) == cold
        pipeline.parts.blending.kv_store.flush()
        assert pipeline.store.verify().problems == ()
