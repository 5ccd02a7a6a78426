"""Training: latent maps in closed form, and LoRA, maps and gates with the language-modeling loss."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memlong.decoder.kv.latent import LatentMaps
    from memlong.training.chunks import RandomChunks
    from memlong.training.config import TrainingConfig
    from memlong.training.curve import Step
    from memlong.training.documents import read_dataset, read_documents
    from memlong.training.heads import HeadScores, score_heads
    from memlong.training.latent import fit_latent_maps
    from memlong.training.parts import usual_retrieval_layers
    from memlong.training.trainer import Trainer

# Imported on first access: defining a command's options must not import torch.
_HOMES = {
    "HeadScores": "memlong.training.heads",
    "LatentMaps": "memlong.decoder.kv.latent",
    "RandomChunks": "memlong.training.chunks",
    "Step": "memlong.training.curve",
    "Trainer": "memlong.training.trainer",
    "TrainingConfig": "memlong.training.config",
    "fit_latent_maps": "memlong.training.latent",
    "read_dataset": "memlong.training.documents",
    "read_documents": "memlong.training.documents",
    "score_heads": "memlong.training.heads",
    "usual_retrieval_layers": "memlong.training.parts",
}

__all__ = [
    "HeadScores",
    "LatentMaps",
    "RandomChunks",
    "Step",
    "Trainer",
    "TrainingConfig",
    "fit_latent_maps",
    "read_dataset",
    "read_documents",
    "score_heads",
    "usual_retrieval_layers",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
