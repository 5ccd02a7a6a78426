"""Options that commands share, apart from memory options (`memlong.cli.memory`): the model and where it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_MODEL = (
    "Hub id, folder, GGUF file, or from pip: 'demo' (SmolLM2-135M-Instruct) or 'demo-gemma' (Gemma 3 270M)"
)

Model = Annotated[str, typer.Option(help=f"{_MODEL}.")]
ModelUnlessAdapter = Annotated[str | None, typer.Option(help=f"{_MODEL}  [default: the adapter's base]")]
ModelUnlessMemory = Annotated[str | None, typer.Option(help=f"{_MODEL}  [default: that of the corpus]")]
Adapter = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER", help="Folder or hub id of a trained decoder (memlong train), with its settings."
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Random seed.")]
Dtype = Annotated[
    str, typer.Option(help="'float32', 'bfloat16', 'float16', or 'auto': the faster one on the device.")
]
Device = Annotated[str, typer.Option(help="'cpu', 'cuda', 'cuda:N', 'mps', or 'auto': a GPU if available.")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run Python code that comes with the model; read that code first."
    ),
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON; '-' prints it.")
]
