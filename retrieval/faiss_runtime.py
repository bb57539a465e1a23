"""FAISS, imported where it is used: the missing extra by name, limits on what a file may claim, the GPU's resources."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from ragkit.errors import MissingExtraError, RetrievalError, StoreCorruptError

# A damaged count in a file must not make the reader allocate without end.
_VECTOR_BYTES_LIMIT = 64 << 30
_LOOP_LIMIT = 1 << 24


def import_faiss(device: str = "cpu") -> Any:
    """Return the faiss module.

    Raises:
        MissingExtraError: FAISS is not installed, or `device` is cuda and the installed one runs on the CPU alone.
    """
    try:
        import faiss
    except ImportError as error:
        extra = "gpu" if device.startswith("cuda") else "cpu"
        raise MissingExtraError(
            f"a store of this size is searched through FAISS, which cannot be imported ({error}); "
            f"install ragkit[{extra}]"
        ) from error
    if device.startswith("cuda") and not hasattr(faiss, "StandardGpuResources"):
        raise MissingExtraError(
            "the installed FAISS runs on the CPU alone; install ragkit[gpu] in place of ragkit[cpu]"
        )
    return faiss


def to_device(index: Any, device: str) -> Any:
    """Return `index` itself for the CPU, else an exact fp32 copy of it on that GPU.

    Raises:
        RetrievalError: the GPU has no room for it.
    """
    if device == "cpu":
        return index
    faiss = import_faiss(device)
    number = int(device.partition(":")[2] or 0)
    options = faiss.GpuClonerOptions()
    options.indicesOptions = faiss.INDICES_64_BIT
    try:
        return faiss.index_cpu_to_gpu(gpu_resources(number), number, index, options)
    except RuntimeError as error:
        raise RetrievalError(f"the index could not be copied to {device}: {_first_line(error)}") from error


@functools.lru_cache(maxsize=16)
def gpu_resources(number: int) -> Any:
    """Return the streams and the scratch memory of one GPU, made once in a process."""
    del number  # one object a GPU; FAISS binds it to the GPU it is used with
    return import_faiss("cuda").StandardGpuResources()


def read_index(path: Path) -> Any:
    """Return the index in a file whose checksum was verified before.

    Raises:
        StoreCorruptError: FAISS cannot read it, or it claims impossible sizes.
    """
    faiss = import_faiss()
    faiss.set_deserialization_vector_byte_limit(_VECTOR_BYTES_LIMIT)
    faiss.set_deserialization_loop_limit(_LOOP_LIMIT)
    try:
        # no downcast_index around it: that gives a second handle which does not keep the first one's memory
        return faiss.read_index(str(path))
    except RuntimeError as error:
        raise StoreCorruptError(
            f"the vector index {path} cannot be read ({_first_line(error)}); `ragkit gc` removes it, and the next "
            "ingest makes it again"
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
