"""Load the model of a command."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import typer

from memlong.cli.answer import escaped


def load(
    name: str,
    *,
    dtype: str,
    device: str,
    trust_remote_code: bool,
    trained: tuple[str, str] | None = None,
    trains: bool = False,
    why: str = "",
    quiet: bool = False,
) -> tuple[Any, Any]:
    """Load a model and its tokenizer, and print the dtype and device, as loading takes some seconds.

    Parameters
    ----------
    name
        Name of the model.
    dtype, device, trained, trains
        As `choose_machine` takes them.
    trust_remote_code
        As `load_model` takes it.
    why
        Why it is this dtype, if nobody typed it.
    quiet
        Print nothing, as another process prints the same.

    Raises
    ------
    MemlongError
        As `load_model` does.
    """
    from memlong.decoder import choose_machine, load_model

    machine = choose_machine(dtype, device, trained=trained, trains=trains)
    machine = replace(machine, why=why or machine.why)
    if not quiet:
        typer.echo(escaped(f"loading the model… {machine}"), err=True)
    dtype, device = machine.names
    return load_model(name, dtype=dtype, device=device, trust_remote_code=trust_remote_code)


def runs_on(model: Any) -> dict[str, str]:
    """Return the device and dtype of a model, for JSON."""
    from memlong.decoder.model.machine import dtype_name

    return {"device": str(model.device), "dtype": dtype_name(model.dtype)}


def machine_of(model: Any) -> str:
    """Return the device and dtype of a model as text."""
    return ", ".join(runs_on(model).values())
