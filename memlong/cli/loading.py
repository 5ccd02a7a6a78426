"""Load a model for a command."""

from __future__ import annotations

from typing import Any

import typer


def load(name: str, *, dtype: str, device: str) -> tuple[Any, Any]:
    """Load a model and its tokenizer, and say so, as it takes some seconds.

    Raises
    ------
    MemlongError
        If it cannot be loaded, as :func:`~memlong.load_model` explains.
    """
    from memlong.decoder import load_model

    typer.echo("loading the model…", err=True)
    return load_model(name, dtype=dtype, device=device)
