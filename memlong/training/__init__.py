"""Learning what memory needs: maps to a latent vector, in closed form."""

from memlong.training.latent import fit_latent_maps

__all__ = ["fit_latent_maps"]
