"""Which model a name means, where its files are, and how its text becomes ids."""

from ragkit.models.catalogue import CATALOGUE, CatalogueEntry, ModelRole
from ragkit.models.fingerprint import weights_fingerprint, weights_stamp
from ragkit.models.pulling import pull
from ragkit.models.resolve import ModelInfo, list_models, local_folder, resolve

__all__ = [
    "CATALOGUE",
    "CatalogueEntry",
    "ModelInfo",
    "ModelRole",
    "list_models",
    "local_folder",
    "pull",
    "resolve",
    "weights_fingerprint",
    "weights_stamp",
]
