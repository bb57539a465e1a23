"""What a batch counted: tokens, steps, and the memory that its requests held."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class BatchStats:
    """The counters of a batch engine, over all its runs.

    `prefill_tokens_computed == prefill_tokens_needed + prefill_tokens_repeated` always holds once a run has ended and
    no request failed on the way.

    Attributes:
        requests, failed: results so far, and those with an error.
        steps, mixed_steps: steps, and those in which some requests decoded while others were prefilled.
        prompt_tokens: tokens of the prompts that were begun.
        prefill_tokens_needed: of these, each distinct beginning counted once; with a strategy, what it recomputed.
        prefill_tokens_computed: tokens that passes computed for prompts.
        prefill_tokens_shared: tokens that some other prompt's pass has computed.
        prefill_tokens_reused: tokens whose KV a strategy took from a store.
        prefill_tokens_repeated: tokens computed again because rows had been given up.
        decode_tokens: tokens of answers that a decoding step computed, without drafts.
        verify_steps: steps that verified drafts.
        draft_tokens_verified, draft_tokens_accepted: tokens that were drafted and verified, and how many of them stood.
        preemptions: how often a request had to give its rows up.
        kv_bytes_peak: most bytes of KV that running requests held together, each block counted once.
        kv_bytes_listed_peak: the same if each request held its own copy of what it lists.
    """

    requests: int = 0
    failed: int = 0
    steps: int = 0
    mixed_steps: int = 0
    prompt_tokens: int = 0
    prefill_tokens_needed: int = 0
    prefill_tokens_computed: int = 0
    prefill_tokens_shared: int = 0
    prefill_tokens_reused: int = 0
    prefill_tokens_repeated: int = 0
    decode_tokens: int = 0
    verify_steps: int = 0
    draft_tokens_verified: int = 0
    draft_tokens_accepted: int = 0
    preemptions: int = 0
    kv_bytes_peak: int = 0
    kv_bytes_listed_peak: int = 0
