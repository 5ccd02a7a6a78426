"""Which decoder a command is about: a model with settings of the command line, or a trained one."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import typer

from memlong.cli.loading import load
from memlong.errors import InvalidArgumentError
from memlong.plugins.registry import installed_registry

if TYPE_CHECKING:
    from memlong.cli.memory import MemoryOptions
    from memlong.decoder import MemoryConfig, MemoryDecoder

_OPTIONS_OF = {
    "backend": ("backend", "backend_option"),
    "retriever": ("retriever", "retriever_option"),
    "store": ("store",),
}


@dataclass(frozen=True)
class DecoderChoice:
    """What the user asked for, found good, and not yet loaded.

    Attributes
    ----------
    model
        A model's name; None for the one that the adapter was trained for.
    adapter
        A trained decoder's folder or hub id, or None.
    config
        Settings of the memory, as the command line has them.
    changes
        With an adapter, what the command line changes of its settings.
    dtype, device
        Of the model.
    trust_remote_code
        Whether code that the model brings may run here.
    """

    model: str | None
    adapter: str | None
    config: MemoryConfig
    changes: dict[str, Any]
    dtype: str
    device: str
    trust_remote_code: bool

    def open(self) -> MemoryDecoder:
        """Load the model and give it its memory; a backend that is missing is reported before that."""
        from memlong.decoder import MemoryDecoder
        from memlong.decoder.persistence.pretrained import read_pretrained

        if self.config.backend is not None:
            installed_registry().load_backend_class(self.config.backend)
        found = None if self.adapter is None else read_pretrained(self.adapter, self.changes)
        name, trained = self.model, None
        if found is not None:
            name, trained = name or found.base_model, found.trained_in
        model, tokenizer = None, None
        if name is not None:
            model, tokenizer = load(
                name,
                dtype=self.dtype,
                device=self.device,
                trust_remote_code=self.trust_remote_code,
                trained=trained,
            )
        if self.adapter is None:
            assert model is not None  # noqa: S101 - choose_decoder saw to it
            return MemoryDecoder(model, tokenizer, self.config)
        return MemoryDecoder.from_pretrained(self.adapter, model, tokenizer, changes=self.changes)


def choose_decoder(
    context: typer.Context,
    model: str | None,
    adapter: str | None,
    memory: MemoryOptions,
    *,
    seed: int,
    dtype: str,
    device: str,
    trust_remote_code: bool,
) -> DecoderChoice:
    """Check that the options go together.

    Raises
    ------
    InvalidArgumentError
        If an option cannot be used, there is neither model nor adapter, or an option would change what was decided in
        training.
    """
    if adapter is None:
        if model is None:
            raise InvalidArgumentError(
                "--model is missing: name a hub id, a folder, a GGUF file or 'demo', or a trained decoder by --adapter."
            )
        return DecoderChoice(model, None, memory.config(seed), {}, dtype, device, trust_remote_code)
    from memlong.decoder import MemoryConfig

    given = {name for name in context.params if _is_given(context, name)}
    free = {name for names in _OPTIONS_OF.values() for name in names}
    fixed = sorted(given & {field.name for field in fields(MemoryConfig)} - free)
    if fixed:  # before their values are judged, by rules that are not theirs
        raise InvalidArgumentError(
            f"--{fixed[0].replace('_', '-')} does not go with --adapter: its memory is as it was trained. What may be "
            "another is the backend, the retriever, their options and the store."
        )
    config = memory.config(seed)
    changes: dict[str, Any] = {}
    for name, names in _OPTIONS_OF.items():
        if given & set(names):
            if name in given:
                changes[name] = getattr(config, name)
            if name != "store":
                changes[f"{name}_options"] = getattr(config, f"{name}_options")
    return DecoderChoice(model, adapter, config, changes, dtype, device, trust_remote_code)


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
