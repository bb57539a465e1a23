"""`Pipeline.aquery` and `Pipeline.astream`: questions from asyncio, generated in threads of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Literal

from ragkit.async_stream import PIECES_AHEAD, AsyncAnswerStream
from ragkit.config import DraftMode, Strategy
from ragkit.types import Answer, MetadataValue

if TYPE_CHECKING:
    from ragkit.progress import Progress
    from ragkit.request import AnswerStream


class AsyncQuestions:
    """What a `Pipeline` offers to asyncio. The event loop is never blocked, not even while models load."""

    stream: Callable[..., AnswerStream]

    async def aquery(
        self,
        question: str,
        *,
        k: int | None = None,
        strategy: Strategy | str | None = None,
        ratio: float | Literal["auto"] | None = None,
        filter: Mapping[str, MetadataValue] | None = None,
        document: str | None = None,
        system_prompt: str | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        draft: str | None = None,
        draft_mode: DraftMode | str | None = None,
        progress: Progress | None = None,
    ) -> Answer:
        """Return the answer to `question`; arguments and errors as for `Pipeline.stream`.

        Cancelling the task ends the generation after the token at hand and frees its KV.
        """
        stream = self.astream(
            question,
            k=k,
            strategy=strategy,
            ratio=ratio,
            filter=filter,
            document=document,
            system_prompt=system_prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            draft=draft,
            draft_mode=draft_mode,
            progress=progress,
        )
        async with stream:
            return await stream.answer()

    def astream(
        self,
        question: str,
        *,
        k: int | None = None,
        strategy: Strategy | str | None = None,
        ratio: float | Literal["auto"] | None = None,
        filter: Mapping[str, MetadataValue] | None = None,
        document: str | None = None,
        system_prompt: str | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        draft: str | None = None,
        draft_mode: DraftMode | str | None = None,
        progress: Progress | None = None,
        ahead: int = PIECES_AHEAD,
    ) -> AsyncAnswerStream:
        """Return an asynchronous iterator over the pieces of the answer; arguments and errors as for `Pipeline.stream`.

        Everything happens in a thread from the first piece on, errors of the arguments included. At most `ahead` pieces
        are generated before they are asked for.

            async with rag.astream("How do I ...?") as stream:
                async for piece in stream:
                    print(piece, end="")
                answer = await stream.answer()
        """
        start = partial(
            self.stream,
            question,
            k=k,
            strategy=strategy,
            ratio=ratio,
            filter=filter,
            document=document,
            system_prompt=system_prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            draft=draft,
            draft_mode=draft_mode,
            progress=progress,
        )
        return AsyncAnswerStream(start, ahead)
