"""ragkit answers questions over million-token document collections on one machine.

The public names below are loaded on first use, so that `import ragkit` costs milliseconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ragkit.config import PipelineConfig
    from ragkit.errors import RagkitError
    from ragkit.pipeline import Pipeline
    from ragkit.reports import IngestReport
    from ragkit.types import Answer, Chunk, Citation, Document, PageSpan, Prompt, SearchHit, Segment

__version__ = "0.1.0"

_HOME = {
    "Answer": "ragkit.types",
    "Chunk": "ragkit.types",
    "Citation": "ragkit.types",
    "Document": "ragkit.types",
    "IngestReport": "ragkit.reports",
    "PageSpan": "ragkit.types",
    "Pipeline": "ragkit.pipeline",
    "PipelineConfig": "ragkit.config",
    "Prompt": "ragkit.types",
    "RagkitError": "ragkit.errors",
    "SearchHit": "ragkit.types",
    "Segment": "ragkit.types",
}

__all__ = [
    "Answer",
    "Chunk",
    "Citation",
    "Document",
    "IngestReport",
    "PageSpan",
    "Pipeline",
    "PipelineConfig",
    "Prompt",
    "RagkitError",
    "SearchHit",
    "Segment",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ragkit' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
