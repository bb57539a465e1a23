"""Faults 1 to 4 and 7: crashes at every durable step, kills at random times, full disks, several writers."""

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import store_scenario
from store_children import in_child, start_child
from store_samples import configure, contents, kv_texts, texts_of, update

from ragkit.errors import StoreLockedError, StoreSpaceError
from ragkit.store import Store, connections, faults
from ragkit.store.cleaning import unreferenced_files
from ragkit.store.connections import connect


def lives(folder):
    """The content after every generation of an undisturbed life, and the number of its durable steps."""
    os.environ["RAGKIT_CRASH_AT"] = "1000000"
    faults.restart()
    states = {}
    store_scenario.run(folder, lambda generation, store: states.setdefault(generation, contents(store)))
    taken = faults.steps_taken()
    del os.environ["RAGKIT_CRASH_AT"]
    return states, taken


def orphans(store):
    connection = connect(store.folder)
    try:
        return list(unreferenced_files(store.folder, connection))
    finally:
        connection.close()


@pytest.mark.crash
def test_a_crash_at_any_durable_step_leaves_a_committed_generation_and_a_second_run_completes(memory_path):
    states, steps = lives(memory_path / "undisturbed")
    assert sorted(states) == list(range(11))
    assert steps > 80
    for step in range(1, steps + 1):
        folder = memory_path / f"crash{step}"

        def crashing(folder=folder, step=step):
            os.environ["RAGKIT_CRASH_AT"] = str(step)
            faults.restart()
            store_scenario.run(folder)

        assert in_child(crashing) == faults.CRASH_EXIT_CODE, step
        if Store.exists(folder):
            with Store.open_or_create(folder) as store:
                assert contents(store) == states[store.generation], step
                kv_texts(store)  # every entry belongs to a chunk that has its text
                if step % 4 == 0:  # the most expensive check; the contents above cover every step
                    assert store.verify().problems == (), step
        store_scenario.run(folder)
        with Store.open(folder) as store:
            assert contents(store) == states[10], step
            kv_texts(store)
            assert step % 4 or store.verify().problems == (), step
            assert orphans(store) == [], step
        assert secret_files(folder) == [], step


def secret_files(folder):
    return [
        path for path in folder.rglob("*") if path.is_file() and store_scenario.SECRET.encode() in path.read_bytes()
    ]


@pytest.mark.crash
def test_a_crash_in_a_process_of_its_own_exits_with_the_agreed_status(tmp_path):
    command = [sys.executable, str(Path(store_scenario.__file__)), str(tmp_path / "store")]
    done = subprocess.run(command, env={**os.environ, "RAGKIT_CRASH_AT": "20"}, capture_output=True, timeout=60)
    assert done.returncode == faults.CRASH_EXIT_CODE
    assert subprocess.run(command, capture_output=True, timeout=60).returncode == 0
    with Store.open(tmp_path / "store") as store:
        assert store.generation == 10


@pytest.mark.crash
def test_a_file_is_synced_before_it_gets_its_name_and_named_before_it_is_referred_to(tmp_path, monkeypatch):
    """Power loss drops what was not synced; with this order no catalogue row can name a missing or short file."""
    synced, order = set(), []
    real_fsync, real_replace, real_checkpoint = os.fsync, Path.replace, faults.checkpoint

    def fsync(descriptor):
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        real_fsync(descriptor)

    def replace(self, target):
        assert str(self) in synced, f"{self} was renamed before it was synced"
        order.append(target.parent)
        return real_replace(self, target)

    def checkpoint(step, path):
        if step == "transaction:begin":
            for folder in order:
                assert str(folder) in synced, f"a transaction began before {folder} was synced"
            order.clear()
            synced.clear()
        real_checkpoint(step, path)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.setattr(faults, "checkpoint", checkpoint)
    store_scenario.run(tmp_path / "store")


@pytest.mark.crash
def test_random_kills_lose_no_acknowledged_commit_and_leave_no_half_document(memory_path):
    folder = memory_path / "store"
    Store.create(folder).close()
    random.seed(7)
    acknowledged = 0
    for kill in range(25):
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read_end)
            try:
                write_forever(folder, acknowledged, write_end)
            finally:
                os._exit(1)
        os.close(write_end)
        with os.fdopen(read_end, "rb", buffering=0) as acknowledgements:
            if kill % 3:  # every third one dies before or within its first commit
                acknowledged += len(acknowledgements.read(1))
            time.sleep(random.uniform(0.0, 0.05))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            acknowledged += len(acknowledgements.read())
        with Store.open(folder) as store:
            texts = texts_of(store)
            # at most the commit that was being acknowledged is there beyond the acknowledged ones
            assert acknowledged * 3 <= len(texts) <= (acknowledged + 1) * 3
            assert all(texts[uri] == [text_of(uri)] for uri in texts)
            acknowledged = len(texts) // 3
    assert acknowledged >= 16
    with Store.open(folder) as store:
        assert store.verify().problems == ()


def text_of(uri):
    return f"the text of {uri} " * 12


def write_forever(folder, batch, acknowledge):
    with Store.open(folder) as store:
        while True:
            with store.writer() as writer:
                configure(writer)
                uris = [f"{batch}-{part}.txt" for part in range(3)]
                writer.commit([update(uri, text_of(uri)) for uri in uris])
            os.write(acknowledge, b".")
            batch += 1


def test_a_full_disk_at_any_durable_step_rolls_back_and_the_next_run_continues(memory_path):
    states, steps = lives(memory_path / "undisturbed")
    messages = []
    for step in range(1, steps + 1, 3):
        folder = memory_path / f"full{step}"
        faults.restart()
        os.environ["RAGKIT_ENOSPC_AT"] = str(step)
        try:
            store_scenario.run(folder)
        except StoreSpaceError as error:
            messages.append(str(error))
        finally:
            del os.environ["RAGKIT_ENOSPC_AT"]
        with Store.open_or_create(folder) as store:
            assert contents(store) == states[store.generation], step
        store_scenario.run(folder)
        with Store.open(folder) as store:
            assert contents(store) == states[10], step
            kv_texts(store)
            assert orphans(store) == [], step
    assert len(messages) > 20
    assert all("no space left on device" in message and "are free" in message for message in messages)


@pytest.mark.parametrize("limit", [60_000, 200_000, 700_000])
def test_a_real_write_error_rolls_back_and_names_the_bytes_needed(store, limit):
    with store.writer() as writer:
        configure(writer)
        writer.commit([update("a.txt", "small")])
    big = update("big.txt", " ".join(f"word{number}" for number in range(60_000)))
    before = contents(store)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        with pytest.raises(StoreSpaceError, match=r"about \d.*MB .*bytes\) were needed"), store.writer() as writer:
            writer.commit([big])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, ignored)
    assert contents(store) == before
    with store.writer() as writer:
        writer.commit([big])
    assert store.verify().problems == ()


def test_an_input_output_error_is_a_space_error_and_is_rolled_back(store, monkeypatch):
    def broken(descriptor):
        raise OSError(errno.EIO, "input/output error")

    with store.writer() as writer:
        configure(writer)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", broken)
            with pytest.raises(StoreSpaceError, match="input/output error"):
                writer.commit([update("a.txt", "text")])
        assert store.counts().sources == 0
        writer.commit([update("a.txt", "text")])
    assert texts_of(store) == {"a.txt": ["text"]}


@pytest.mark.crash
def test_four_writers_lose_nothing_and_duplicate_nothing(memory_path):
    folder = memory_path / "store"
    Store.create(folder).close()
    rounds = 100

    def work(worker):
        with Store.open(folder) as store:
            for turn in range(rounds):
                with store.writer(lock_timeout_s=120) as writer:
                    configure(writer)
                    group = [update(f"{worker}-{turn}.txt", f"text of {worker} in {turn}")]
                    writer.commit([*group, update("shared.txt", f"turn {turn} of {worker}")])

    children = [start_child(lambda worker=worker: work(worker)) for worker in range(4)]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0, 0, 0]
    with Store.open(folder) as store:
        texts = texts_of(store)
        assert len(texts) == 4 * rounds + 1
        for worker in range(4):
            for turn in range(rounds):
                assert texts[f"{worker}-{turn}.txt"] == [f"text of {worker} in {turn}"]
        assert store.counts().chunks == len(store.vectors().row_ids) == 4 * rounds + 1
        assert store.generation == 4 * rounds + 1
        assert store.verify().problems == ()


def test_a_waiting_writer_gives_up_and_names_the_owner(store):
    with store.writer():
        started = time.monotonic()
        with (
            pytest.raises(StoreLockedError, match=rf"by process {os.getpid()} on \S+ since 20\d\d.*--lock-timeout"),
            store.writer(lock_timeout_s=0.2),
        ):
            pass
        assert 0.2 <= time.monotonic() - started < 2
    with store.writer(lock_timeout_s=0):
        pass


@pytest.mark.crash
def test_a_dead_owner_loses_the_lock_at_once(store):
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        with store.writer():
            os.write(write_end, b"!")
            time.sleep(60)
    os.read(read_end, 1)
    with pytest.raises(StoreLockedError, match=f"by process {pid}"), store.writer(lock_timeout_s=0):
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with store.writer(lock_timeout_s=1):
        pass


@pytest.mark.crash
def test_a_forked_child_does_not_keep_a_dead_parents_lock(store):
    read_end, write_end = os.pipe()

    def parent():
        with store.writer():
            if os.fork() == 0:
                os.write(write_end, f"{os.getpid()}\n".encode())
                time.sleep(60)
                os._exit(0)
            time.sleep(60)

    pid = start_child(parent)
    grandchild = int(os.read(read_end, 20))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    try:
        with store.writer(lock_timeout_s=0):
            pass
    finally:
        os.kill(grandchild, signal.SIGKILL)


def test_the_lock_is_free_at_once_even_while_a_copy_of_its_file_is_still_open(store):
    with store.writer():
        copies = [os.dup(number) for number in open_descriptors(store.folder / "lock")]
    assert len(copies) == 1
    with store.writer(lock_timeout_s=0):
        pass
    os.close(copies[0])


def open_descriptors(path):
    links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
    return [int(link.name) for link in links if link.exists() and link.samefile(path)]


@pytest.mark.crash
def test_a_forked_child_reads_through_its_own_connection(store, monkeypatch):
    with store.writer() as writer:
        configure(writer)
        writer.commit([update("a.txt", "shared text")])
    expected = contents(store)
    opened = []

    def counting(folder, **options):
        opened.append(os.getpid())
        return connect(folder, **options)

    def child():
        assert contents(store) == expected
        assert opened == [os.getpid()]
        with store.writer() as writer:
            writer.commit([update("child.txt", "from the child")])

    monkeypatch.setattr(connections, "connect", counting)
    with store.snapshot():  # forked while a read transaction is open
        assert in_child(child) == 0
        assert contents(store) == expected
    assert opened == []
    assert sorted(texts_of(store)) == ["a.txt", "child.txt"]
    assert store.verify().problems == ()


@pytest.mark.crash
def test_a_child_that_leaves_its_parents_snapshot_does_not_end_it(store):
    with store.writer() as writer:
        configure(writer)
        writer.commit([update("a.txt", "old")])
    try:
        with store.snapshot():
            pid = os.fork()
            if pid == 0:
                raise SystemExit
            assert os.waitpid(pid, 0)[1] == 0
            with store.writer() as writer:
                writer.commit([update("a.txt", "new")])
            assert store.gc(reader_timeout_s=0).pending_files == 1
            assert texts_of(store) == {"a.txt": ["old"]}
    except SystemExit:
        os._exit(0)
    assert texts_of(store) == {"a.txt": ["new"]}


def test_a_writer_goes_on_after_a_transaction_that_failed(store, monkeypatch):
    with store.writer() as writer:
        configure(writer)
        with monkeypatch.context() as patch:
            faults.restart()
            patch.setenv("RAGKIT_ENOSPC_AT", "6")  # the transaction's commit, after every row was changed
            with pytest.raises(StoreSpaceError, match="transaction:commit"):
                writer.commit([update("a.txt", "lost")])
        assert store.counts().sources == 0
        writer.commit([update("b.txt", "kept")])
    assert texts_of(store) == {"b.txt": ["kept"]}
    assert store.verify().problems == ()


def test_the_lock_file_is_a_witness_of_lost_commits(store):
    with store.writer() as writer:
        configure(writer)
    witness = json.loads((store.folder / "lock").read_text().rsplit(" ", 1)[0])
    assert witness["generation"] == 1
    assert witness["pid"] == os.getpid()
