"""Which decoder a command runs: a model with settings from the command line, or a trained decoder."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import typer

from memlong.cli.answer import escaped
from memlong.cli.loading import load
from memlong.errors import InvalidArgumentError
from memlong.plugins.registry import installed_registry

if TYPE_CHECKING:
    from memlong.cli.memory import MemoryOptions
    from memlong.decoder import MemoryConfig, MemoryDecoder

_OPTIONS_OF = {
    "backend": ("backend", "backend_option"),
    "retriever": ("retriever", "retriever_option"),
    "query_map": ("query_map",),
    "store": ("store",),
    "top_k": ("top_k",),
    "answer_cutoff": ("answer_cutoff",),
    "retrieve_for": ("retrieve_for",),
}


@dataclass(frozen=True)
class DecoderChoice:
    """The decoder that the user chose: validated, not yet loaded.

    Attributes
    ----------
    model
        Name of the model; None means the adapter's base model.
    adapter
        Folder or hub id of a trained decoder, or None.
    config
        Memory settings from the command line.
    changes
        Settings of the adapter that the command line overrides.
    dtype, device
        The model's.
    trust_remote_code
        Whether to run Python code that comes with the model.
    why
        Why it is this dtype, if nobody typed it.
    """

    model: str | None
    adapter: str | None
    config: MemoryConfig
    changes: dict[str, Any]
    dtype: str
    device: str
    trust_remote_code: bool
    why: str = ""

    def reading_text(self, **changes: Any) -> DecoderChoice:
        """Return the same choice where text that is read retrieves, too, and say so if an adapter was made for answers.

        ``changes`` are further settings of an adapter to change. Without an adapter, all text retrieves by default, and
        there is nothing to change.
        """
        from memlong.decoder.persistence.pretrained import read_pretrained

        if self.adapter is None:
            return self
        if read_pretrained(self.adapter).config.retrieve_for != "all" and self.config.backend is not None:
            typer.echo(
                f"{escaped(self.adapter)} retrieves for answers alone; here, text is read with retrieved chunks, too",
                err=True,
            )
        return replace(self, changes={**self.changes, **changes, "retrieve_for": "all"})

    def open(self) -> MemoryDecoder:
        """Load the model and create its decoder; a missing backend is reported before the slow load."""
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
                why=self.why,
            )
        if self.adapter is None:
            assert model is not None  # noqa: S101 - choose_decoder checked it
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
    """Check that the options are compatible, and return the decoder they choose.

    Raises
    ------
    InvalidArgumentError
        If an option is invalid, neither a model nor an adapter is given, or an option would change what training
        fixed.
    """
    if adapter is None:
        if model is None:
            raise InvalidArgumentError(
                "--model is missing: give a hub id, folder, GGUF file or 'demo', or a trained decoder with --adapter"
            )
        return DecoderChoice(model, None, memory.config(seed), {}, dtype, device, trust_remote_code)
    from memlong.decoder import MemoryConfig

    given = {name for name in context.params if is_given(context, name)}
    free = [name for names in _OPTIONS_OF.values() for name in names]
    fixed = sorted(given & {field.name for field in fields(MemoryConfig)} - {*free})
    if fixed:  # checked before their values, which the adapter's rules would decide
        changeable = ", ".join(f"--{name.replace('_', '-')}" for name in free)
        raise InvalidArgumentError(
            f"--{fixed[0].replace('_', '-')} cannot be combined with --adapter, whose memory is fixed by training. "
            f"Only these can be changed, where a command has them: {changeable}"
        )
    config = memory.config(seed)
    changes: dict[str, Any] = {}
    for name, names in _OPTIONS_OF.items():
        if given & set(names):
            if name in given:
                changes[name] = getattr(config, name)
            if f"{name}_option" in names:
                changes[f"{name}_options"] = getattr(config, f"{name}_options")
    return DecoderChoice(model, adapter, config, changes, dtype, device, trust_remote_code)


def is_given(context: typer.Context, name: str) -> bool:
    """Whether an option was typed."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
