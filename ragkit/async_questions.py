"""`Pipeline.aquery` and `Pipeline.astream`: questions from asyncio, generated in threads of their own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Unpack

from ragkit.async_stream import PIECES_AHEAD, AsyncAnswerStream
from ragkit.types import Answer

if TYPE_CHECKING:
    from ragkit.answers.options import QuestionOptions
    from ragkit.progress import Progress
    from ragkit.request import AnswerStream


class AsyncQuestions:
    """What a `Pipeline` offers to asyncio. The event loop is never blocked, not even while models load."""

    stream: Callable[..., AnswerStream]

    async def aquery(
        self, question: str, *, progress: Progress | None = None, **options: Unpack[QuestionOptions]
    ) -> Answer:
        """Return the answer to `question`; arguments and errors as for `Pipeline.stream`.

        Cancelling the task ends the generation after the token at hand and frees its KV.
        """
        from ragkit.answers.options import require_options

        require_options("aquery", options)
        async with self.astream(question, progress=progress, **options) as stream:
            return await stream.answer()

    def astream(
        self,
        question: str,
        *,
        progress: Progress | None = None,
        ahead: int = PIECES_AHEAD,
        **options: Unpack[QuestionOptions],
    ) -> AsyncAnswerStream:
        """Return an asynchronous iterator over the pieces of the answer; arguments and errors as for `Pipeline.stream`.

        Everything happens in a thread from the first piece on, errors of the arguments included. At most `ahead` pieces
        are generated before they are asked for.

            async with rag.astream("How do I ...?") as stream:
                async for piece in stream:
                    print(piece, end="")
                answer = await stream.answer()
        """
        from ragkit.answers.options import require_options

        require_options("astream", options)
        return AsyncAnswerStream(partial(self.stream, question, progress=progress, **options), ahead)
