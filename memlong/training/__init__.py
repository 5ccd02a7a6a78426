"""Training: latent maps in closed form; LoRA, maps, gates and a null chunk by gradients; query maps."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memlong.decoder.kv.latent import LatentMaps
    from memlong.decoder.kv.null_chunk import NullChunk
    from memlong.decoder.retrievers.query_map import QueryMap
    from memlong.training.chunks import RandomChunks
    from memlong.training.config import TrainingConfig
    from memlong.training.curve import Step
    from memlong.training.documents import read_dataset, read_documents
    from memlong.training.heads import HeadScores, score_heads
    from memlong.training.latent import fit_latent_maps
    from memlong.training.parts import usual_retrieval_layers
    from memlong.training.retriever import TrainedRetriever, fit_query_map, gain_share, gains, train_retriever
    from memlong.training.trainer import Trainer
    from memlong.training.tries import Tries, try_chunks

# Imported on first access: defining a command's options must not import torch.
_HOMES = {
    "HeadScores": "memlong.training.heads",
    "LatentMaps": "memlong.decoder.kv.latent",
    "NullChunk": "memlong.decoder.kv.null_chunk",
    "QueryMap": "memlong.decoder.retrievers.query_map",
    "RandomChunks": "memlong.training.chunks",
    "Step": "memlong.training.curve",
    "TrainedRetriever": "memlong.training.retriever",
    "Trainer": "memlong.training.trainer",
    "TrainingConfig": "memlong.training.config",
    "Tries": "memlong.training.tries",
    "fit_latent_maps": "memlong.training.latent",
    "fit_query_map": "memlong.training.retriever",
    "gain_share": "memlong.training.retriever",
    "gains": "memlong.training.retriever",
    "read_dataset": "memlong.training.documents",
    "read_documents": "memlong.training.documents",
    "score_heads": "memlong.training.heads",
    "train_retriever": "memlong.training.retriever",
    "try_chunks": "memlong.training.tries",
    "usual_retrieval_layers": "memlong.training.parts",
}

__all__ = [
    "HeadScores",
    "LatentMaps",
    "NullChunk",
    "QueryMap",
    "RandomChunks",
    "Step",
    "TrainedRetriever",
    "Trainer",
    "TrainingConfig",
    "Tries",
    "fit_latent_maps",
    "fit_query_map",
    "gain_share",
    "gains",
    "read_dataset",
    "read_documents",
    "score_heads",
    "train_retriever",
    "try_chunks",
    "usual_retrieval_layers",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
