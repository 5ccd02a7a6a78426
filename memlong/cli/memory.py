"""Derive command-line options from the fields of settings: name, help, default and type."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import typer

from memlong.cli.loading import runs_on
from memlong.decoder.config import MemoryConfig
from memlong.errors import InvalidArgumentError
from memlong.settings import default_of, key_values, metadata_of, types_of
from memlong.training.config import TrainingConfig
from memlong.uri import hide_credentials, without_credentials

if TYPE_CHECKING:
    from memlong.decoder import MemoryDecoder

Command = Callable[..., None]

TRAINED = ("gate_init", "gates", "null_chunk", "adapter_for")
"""Settings of a training: a trained decoder's folder has them."""


@dataclass(frozen=True)
class Unset:
    """A default of None for one command, and what None means there."""

    meaning: str


@dataclass(frozen=True)
class MemoryOptions:
    """Memory options as given on the command line, by setting."""

    typed: Mapping[str, Any]

    @property
    def files(self) -> dict[str, list[str | None]]:
        """Files that they name, by option."""
        return {f"--{name.replace('_', '-')}": [self.typed.get(name)] for name in ("maps", "query_map")}

    def config(self, seed: int) -> MemoryConfig:
        """Build the configuration.

        Raises
        ------
        InvalidArgumentError
            If an option is invalid, or needs a backend and there is none.
        """
        settings = values_of(MemoryConfig, self.typed)
        if settings["backend"] == "none":
            settings["backend"] = None
            for each in fields(MemoryConfig):
                needs = metadata_of(each).needs_backend or each.name in (
                    "backend_options",
                    "retriever_options",
                    "store",
                )
                if needs and settings.get(each.name, default_of(each)) != default_of(each):
                    raise InvalidArgumentError(
                        f"--{option_of(each).replace('_', '-')} needs a backend, got --backend none: name one, or "
                        "leave the option out"
                    )
        if settings["retriever"] == "random":
            settings["retriever_options"].setdefault("seed", seed)
        return MemoryConfig(**settings)


def with_memory(
    *,
    without: Collection[str] = (*TRAINED, "retrieve_every"),
    **defaults: Any,
) -> Callable[[Command], Command]:
    """Replace a command's ``memory`` parameter with options, one per setting of `MemoryConfig`.

    Parameters
    ----------
    without
        Settings that are not options of this command.
    **defaults
        Defaults that differ for this command.
    """
    return _with_options("memory", MemoryConfig, MemoryOptions, without, defaults)


def with_training(**defaults: Any) -> Callable[[Command], Command]:
    """Replace a command's ``training`` parameter with options, one per setting of `TrainingConfig`."""

    def made(typed: dict[str, Any]) -> TrainingConfig:
        return TrainingConfig(**values_of(TrainingConfig, typed))

    return _with_options("training", TrainingConfig, made, ("seed",), defaults)


def option_of(each: Field[Any]) -> str:
    """Return the name of a setting's option, in the singular if it is repeatable."""
    repeats = metadata_of(each).metavar is not None and default_of(each) in ({}, ())
    return each.name.removesuffix("s") if repeats else each.name


def values_of(settings: type, typed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings given on the command line."""
    found = {}
    for each in fields(settings):
        if each.name not in typed:
            continue
        value, metadata = typed[each.name], metadata_of(each)
        if default_of(each) == {}:
            option = f"--{option_of(each).replace('_', '-')}"
            value = key_values(option, value or [], example=metadata.example, as_text=metadata.texts)
        elif default_of(each) == ():
            value = tuple(value or ())
        elif value is None and default_of(each) is not None:
            continue  # the command decides
        found[each.name] = value
    return found


def _with_options(
    name: str,
    settings: type,
    made: Callable[[dict[str, Any]], Any],
    without: Collection[str],
    defaults: dict[str, Any],
) -> Callable[[Command], Command]:
    chosen = [each for each in fields(settings) if each.name not in without]
    parameters = [_parameter(settings, each, defaults) for each in chosen]

    def decorate(command: Command) -> Command:
        @wraps(command)
        def run(**given: Any) -> None:
            typed = {each.name: given.pop(option_of(each)) for each in chosen}
            command(**{name: made(typed)}, **given)

        signature = inspect.signature(command, eval_str=True)
        shown: list[inspect.Parameter] = []
        for word, parameter in signature.parameters.items():
            own = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            shown += parameters if word == name else [own]
        run.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
        return run

    return decorate


def _parameter(settings: type, each: Field[Any], defaults: Mapping[str, Any]) -> inspect.Parameter:
    metadata, name = metadata_of(each), option_of(each)
    default: Any = defaults.get(each.name, default_of(each))
    repeats = default in ({}, ())
    text = metadata.help
    if repeats:
        text = text.removesuffix(".") + "; repeatable."
    unset = metadata.unset if default is None or repeats else None
    if isinstance(default, Unset):
        meant: Unset = default
        unset, default = meant.meaning, None
    if unset:
        text = f"{text}  [default: {unset}]"
    kind: Any = list[str] | None if repeats else _typed_as(types_of(settings)[each.name])
    names = [f"--{name.replace('_', '-')}"] if kind is not bool else []
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None if repeats else default,
        annotation=Annotated[kind, typer.Option(*names, metavar=metadata.metavar, help=text)],
    )


def _typed_as(hint: Any) -> Any:
    """Return the type of an option: choices are text, so that a wrong one gets the same error as in Python."""
    parts = [str if get_origin(each) in (Literal, Sequence) else each for each in _parts(hint)]
    kept = list(dict.fromkeys(parts))
    return Union[tuple(kept)] if len(kept) > 1 else kept[0]  # noqa: UP007 - built from a list


def _parts(hint: Any) -> tuple[Any, ...]:
    return (hint,) if get_origin(hint) in (None, Literal, Sequence, Mapping) else get_args(hint)


def described(decoder: MemoryDecoder) -> dict[str, Any]:
    """Return a decoder's settings, and its model's device and dtype, for JSON."""
    return {
        **described_unloaded(decoder.config, ""),
        **runs_on(decoder.model),
        "retrieval_layers": list(decoder.retrieval_layers) if decoder.config.backend is not None else [],
    }


def described_unloaded(config: MemoryConfig, dtype: str) -> dict[str, Any]:
    """Return the same of a decoder whose model was not loaded: None for the device, and for what the model decides."""
    settings = {each.name: getattr(config, each.name) for each in fields(MemoryConfig)}
    for name in ("backend_options", "retriever_options"):
        settings[name] = hide_credentials(settings[name])
    settings |= {
        "backend": without_credentials(config.backend or "none"),
        "retrieval_layers": None,
        "store": {name: without_credentials(str(value)) for name, value in config.store.items()},
        "query_tokens": config.query_length,
        "embedding_overlap": config.overlap_length,
    }
    if config.backend is None:
        settings |= {"retriever": None, "retriever_options": {}, "kv_source": None, "retrieval_layers": []}
    return {"device": None, "dtype": dtype, **settings}
