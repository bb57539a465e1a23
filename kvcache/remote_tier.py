"""Chunk KV at any fsspec URL, one object a chunk."""

from __future__ import annotations

import contextlib
import logging
import threading
import urllib.parse
from collections.abc import Iterator, Sequence
from typing import Any

from ragkit.credentials import public_url, safe_cause, without_credentials
from ragkit.errors import KVCacheError, MissingExtraError
from ragkit.kvcache.backing_tier import KnownRecord
from ragkit.kvcache.chunk_kv import ChunkRef, EncodedKV
from ragkit.kvcache.eviction import EvictionPolicy, EvictionQueue
from ragkit.kvcache.kv_key import KVKey
from ragkit.kvcache.kv_segment import KVMissError, MemorySource, MissReason, RecordReader, misses_in, write_record
from ragkit.object_stores import make_folder

_log = logging.getLogger(__name__)


class RemoteTier:
    """One object a chunk below an fsspec URL (`file://`, `s3://`, `memory://`, ...), for sharing between machines.

    Nothing is locked there: a half-written or foreign object is recognised by its checksums and is a miss. Tenants
    whose recipes have salts of their own (`KVRecipe.tenant_salt`) share a place without sharing KV.

    Args:
        url: the folder.
        budget_bytes: most bytes that this process lets lie there, objects that it finds at the start included.
        policy: which chunks leave first.
        options: settings of the file system, as fsspec takes them.

    Attributes:
        failed_removals: objects that should have left and could not be removed; they count until they are.
    """

    def __init__(
        self, url: str, budget_bytes: int, policy: EvictionPolicy, options: dict[str, Any] | None = None
    ) -> None:
        shown = public_url(url)
        try:
            import fsspec  # type: ignore[import-untyped]
        except ImportError as error:
            raise MissingExtraError(f"the KV tier {shown} needs fsspec: pip install 'ragkit[remote]'") from error
        self._url = url
        self.name = urllib.parse.urlsplit(url).scheme or "file"
        self.budget_bytes = budget_bytes
        self._lock = threading.Lock()
        self._queue: EvictionQueue[KVKey] = EvictionQueue(policy)
        self._sizes: dict[KVKey, int] = {}
        self.bytes_used = 0
        self.failed_removals = 0
        try:
            self._files, self._root = fsspec.core.url_to_fs(url, **(options or {}))
            found = self._files.find(self._root, detail=True) if self._files.exists(self._root) else {}
        except Exception as error:  # every file system has errors of its own
            raise KVCacheError(
                f"the KV tier {shown} cannot be opened: {self._said(error)}; check kv.remote, or leave it empty"
            ) from safe_cause(error, url)
        for path, about in sorted(found.items()):
            name = str(path).rsplit("/", 1)[-1]
            with contextlib.suppress(KVCacheError):  # other files may lie there
                self._note(KVKey(name.removesuffix(".kv")), int(about["size"] or 0))

    def holds(self, keys: Sequence[KVKey], *, remember: bool = False) -> set[KVKey]:
        """Return which of these keys have an object; its name says where it is, so there is nothing to remember."""
        try:
            return {key for key in keys if self._files.exists(self._path(key))}
        except Exception as error:  # every file system has errors of its own
            raise KVCacheError(f"{self.name} cannot be asked for chunk KV: {self._said(error)}") from safe_cause(
                error, self._url
            )

    def known(self, keys: Sequence[KVKey]) -> dict[KVKey, KnownRecord]:
        """Return the sizes of objects that were there at the start, or that this process wrote."""
        with self._lock:
            return {key: KnownRecord(self._sizes[key]) for key in keys if key in self._sizes}

    @contextlib.contextmanager
    def open(self, ref: ChunkRef, codec_id: str, num_layers: int) -> Iterator[RecordReader]:
        """Give a reader of the chunk's record, which is fetched in one request."""
        with misses_in(f"{ref.key.digest}.kv at {self.name}"):
            reader = RecordReader(MemorySource(self._content(ref)), ref, codec_id, num_layers)
            with self._lock:
                if ref.key in self._sizes:
                    self._queue.use(ref.key)
            yield reader

    def save(self, chunks: Sequence[EncodedKV]) -> int:
        """Write one object a chunk; where others cannot be removed for it, it is left out."""
        kept = 0
        for chunk in chunks:
            record = write_record(chunk)
            if len(record) > self.budget_bytes or not self._has_room(len(record)):
                continue
            with self._lock:
                self._note(chunk.ref.key, len(record))
            try:
                make_folder(self._files, self._path(chunk.ref.key).rsplit("/", 1)[0])
                self._files.pipe_file(self._path(chunk.ref.key), record)
            except Exception as error:
                with self._lock:
                    self._forget(chunk.ref.key)
                raise KVCacheError(
                    f"chunk KV could not be written to {self.name}: {self._said(error)}"
                ) from safe_cause(error, self._url)
            kept += 1
        return kept

    def _content(self, ref: ChunkRef) -> bytes:
        try:
            return bytes(self._files.cat_file(self._path(ref.key)))
        except FileNotFoundError as error:
            raise KVMissError(MissReason.ABSENT, f"the KV of {ref.key} is not at {self.name}") from error
        except Exception as error:
            raise KVMissError(
                MissReason.UNREADABLE, f"the KV of {ref.key} cannot be fetched: {self._said(error)}"
            ) from safe_cause(error, self._url)

    def _has_room(self, nbytes: int) -> bool:
        """Remove the objects of least worth until `nbytes` fit the budget, and return whether they do."""
        with self._lock:
            missing = self.bytes_used + nbytes - self.budget_bytes
            leaving = self._queue.make_room(missing, lambda _: True) if missing > 0 else []
            sizes = {key: self._sizes.pop(key) for key in leaving}
            self.bytes_used -= sum(sizes.values())
        for key, size in sizes.items():
            try:
                self._files.rm_file(self._path(key))
            except FileNotFoundError:  # another machine was faster
                continue
            except Exception as error:  # every file system has errors of its own
                _log.warning(
                    "the KV of %s could not be removed from %s and stays: %s", key, self.name, self._said(error)
                )
                with self._lock:
                    self.failed_removals += 1
                    self._note(key, size)  # as though it had just been used, so that others are tried next
        with self._lock:
            return self.bytes_used + nbytes <= self.budget_bytes

    def _said(self, error: Exception) -> str:
        """Return what a file system says, without the credentials that the URL may hold."""
        return without_credentials(str(error) or type(error).__name__, self._url)

    def _path(self, key: KVKey) -> str:
        return f"{self._root.rstrip('/')}/{key.digest[:2]}/{key.digest}.kv"

    def _note(self, key: KVKey, nbytes: int) -> None:
        self._forget(key)
        self._sizes[key] = nbytes
        self._queue.add(key, nbytes, float(nbytes))  # a byte costs the same everywhere: frequency decides
        self.bytes_used += nbytes

    def _forget(self, key: KVKey) -> None:
        if key in self._sizes:
            self._queue.remove(key)
            self.bytes_used -= self._sizes.pop(key)
