"""Results of requests of a batch that have no answer: what each error says, and when a request has waited enough."""

from __future__ import annotations

from ragkit.errors import CacheCapacityError, GenerationError, RagkitError
from ragkit.generation.batch_job import BatchJob
from ragkit.generation.batch_request import BatchResult
from ragkit.kvcache.pool import KVPool

_MOST_RETRIES = 8  # of a request that finds the pool taken by somebody else


def failed(job: BatchJob, error: BaseException) -> BatchResult:
    """Return the result of a request that an error ended; a foreign one is that of the device's memory."""
    if not isinstance(error, RagkitError):
        error = GenerationError(f"the prompt of {len(job.token_ids)} tokens found no memory: {error}")
    return BatchResult(job.request.request_id, "", error=error)


def refused(job: BatchJob, pool: KVPool) -> BatchResult:
    """Return the result of a request that finds no room although no other one of the batch runs."""
    return failed(
        job,
        CacheCapacityError(
            f"a prompt of {len(job.token_ids)} tokens finds no room: {pool.num_free} of {pool.num_blocks} KV blocks "
            "are free although no other request of the batch runs; end what else uses the pool, or enlarge it"
        ),
    )


def out_of_patience(job: BatchJob, error: RagkitError | None) -> RagkitError | None:
    """Count that a request found the pool taken; return what it fails with, or None where it is to wait again.

    Args:
        job: the request.
        error: what it met; None where that says nothing.
    """
    job.retries += 1
    if job.retries <= _MOST_RETRIES:
        return None
    return error or CacheCapacityError("the KV pool was taken by other requests again and again")
