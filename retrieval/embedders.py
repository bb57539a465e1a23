"""From the settings to an embedder: the thin encoder for models of BERT type, sentence-transformers for others."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ragkit.config import Device, EmbeddingConfig, EncoderBackend
from ragkit.errors import UsageError
from ragkit.models.resolve import resolve
from ragkit.retrieval.bert_weights import why_unsupported
from ragkit.retrieval.model_folder import read_model_folder

if TYPE_CHECKING:
    from ragkit.retrieval.encoder import BertEncoder
    from ragkit.retrieval.sentence_transformer import SentenceTransformerEmbedder

logger = logging.getLogger(__name__)


def load_embedder(
    config: EmbeddingConfig, *, device: Device | str = Device.AUTO, offline: bool = False
) -> BertEncoder | SentenceTransformerEmbedder:
    """Return the embedder that `config` names; its `backend` says what runs it.

    Args:
        config: model (a bundled name, a local folder or a Hugging Face id), backend and batch size.
        device: `auto` takes CUDA where torch sees it; the thin encoder then answers questions on the GPU too.
        offline: fetch nothing.

    Raises:
        OfflineError: the model would have to be fetched.
        ModelError: the model is missing or damaged, or the thin encoder was asked for and cannot run it.
        UsageError: there is no such device.
    """
    folder = read_model_folder(resolve(config.model, offline=offline))
    place = _device(Device(device))
    reason = why_unsupported(folder)
    if config.backend is EncoderBackend.SENTENCE_TRANSFORMERS or (config.backend is EncoderBackend.AUTO and reason):
        from ragkit.retrieval.sentence_transformer import SentenceTransformerEmbedder

        if config.backend is EncoderBackend.AUTO:
            logger.info("%s runs through sentence-transformers: %s", config.model, reason)
        return SentenceTransformerEmbedder(folder, place, config.batch_tokens)
    from ragkit.retrieval.encoder import BertEncoder

    return BertEncoder(folder, place, config.batch_tokens)


def _device(device: Device) -> str:
    if device is Device.CPU or (device is Device.AUTO and not _cuda_can_be_there()):
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if device is Device.CUDA:
        raise UsageError("device cuda was asked for, but torch sees no GPU; take --device cpu or auto")
    return "cpu"


def _cuda_can_be_there() -> bool:
    """Return False where no NVIDIA driver runs, without importing torch, which would cost a search seconds."""
    from pathlib import Path

    return Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()
