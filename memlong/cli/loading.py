"""Load a model for a command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(name: str, *, dtype: str, device: str) -> tuple[PreTrainedModel, Any]:
    """Load a model and its tokenizer, and say so, as it takes some seconds.

    Raises
    ------
    MemlongError
        If it cannot be loaded, as :func:`~memlong.load_model` explains.
    """
    from memlong.decoder import load_model

    typer.echo("loading the model…", err=True)
    return load_model(name, dtype=dtype, device=device)
