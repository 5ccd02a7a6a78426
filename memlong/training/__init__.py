"""Learning what memory needs: maps to a latent vector in closed form, and training by the language-model loss."""

from memlong.training.config import TrainingConfig
from memlong.training.curve import Step
from memlong.training.documents import read_dataset, read_documents
from memlong.training.latent import fit_latent_maps
from memlong.training.parts import usual_retrieval_layers
from memlong.training.trainer import Trainer

__all__ = [
    "Step",
    "Trainer",
    "TrainingConfig",
    "fit_latent_maps",
    "read_dataset",
    "read_documents",
    "usual_retrieval_layers",
]
