"""A trained decoder as a folder: adapter, maps, gates, a null chunk, and ``memlong.json``, which says what is there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import PreTrainedModel

from memlong.bank.snapshot.reader import folder_of
from memlong.decoder.config import MemoryConfig
from memlong.decoder.kv.sources import LatentSource
from memlong.decoder.model.loading import NAME, load_model, stable_name
from memlong.decoder.model.machine import choose_machine, dtype_name
from memlong.decoder.persistence.adapter_files import base_weights, write_adapter
from memlong.decoder.persistence.json_file import read_json
from memlong.decoder.persistence.strangers import chosen_config, declared_options, is_on_another_host
from memlong.decoder.setup import Setup
from memlong.errors import InvalidArgumentError, StorageError
from memlong.plugins import Registry
from memlong.versions import versions

SETTINGS, MAPS, GATES = "memlong.json", "maps.safetensors", "gates.safetensors"
NULL_CHUNK, QUERY_MAP = "null_chunk.safetensors", "query_map.safetensors"
"""Files of the folder, besides those of the adapter."""

CHANGEABLE = (
    *("backend", "backend_options", "retriever", "retriever_options", "query_map", "store"),
    *("top_k", "answer_cutoff", "retrieve_for"),
)
"""Fields of a MemoryConfig that may differ from those of the training: how chunks are found and kept, and how many."""

_FORMAT, _MODEL = "memlong-decoder-1", "config.json"


@dataclass(frozen=True)
class Pretrained:
    """What a folder says of its decoder.

    Attributes
    ----------
    folder
        Where it is.
    base_model
        The name under which `load_model` finds the model that the adapter belongs to; None if unknown, or on another
        host.
    config
        The settings; maps, gates, null chunk and the query map are named by their path.
    has_adapter
        Whether weights of the model were trained.
    dtype
        The model's dtype in training; None if an older memlong wrote the folder.
    base_weights
        A hash of the model's own weights, or None likewise.
    """

    folder: Path
    base_model: str | None
    config: MemoryConfig
    has_adapter: bool
    dtype: str | None = None
    base_weights: str | None = None

    @property
    def trained_in(self) -> tuple[str, str] | None:
        """Dtype of the training, and the folder, as `choose_machine` takes them."""
        return None if self.dtype is None else (self.dtype, str(self.folder))


def write_pretrained(
    folder: str | Path, setup: Setup, *, base_model: str | None, training: Mapping[str, Any] | None
) -> None:
    """Write a decoder's folder, for `read_pretrained`; an earlier decoder's files are replaced at the end.

    Raises
    ------
    InvalidArgumentError
        If several adapters are active, since a folder holds one; or the folder holds a model, which transformers would
        load with this adapter.
    StorageError
        If it cannot be written; a decoder that was there is unchanged.
    """
    folder, model, config, gates = folder_of(folder), setup.model, setup.config, setup.gates
    maps = setup.source.maps if isinstance(setup.source, LatentSource) else None
    has_adapter = bool(getattr(model, "peft_config", None))
    if has_adapter and (folder / _MODEL).exists():
        raise InvalidArgumentError(
            f"The folder {str(folder)!r} holds a model, which would be loaded with this adapter from now on: name "
            "another folder"
        )
    null_chunk = setup.source.null_chunk
    query_map = setup.query_map
    memory = replace(
        config,
        maps=MAPS if maps else None,
        gates=GATES if gates else None,
        null_chunk=NULL_CHUNK if null_chunk else None,
        query_map=QUERY_MAP if query_map else None,
    ).as_dict()
    del memory["store"]  # where a machine keeps its chunks says nothing about the decoder
    memory |= declared_options(config, setup.registry)
    facts = {
        "format": _FORMAT,
        "base_model": base_model
        or getattr(model, NAME, None)
        or stable_name(model.name_or_path or "")
        or None,
        "base_weights": base_weights(model),
        "dtype": dtype_name(model.dtype),
        "adapter": has_adapter,
        "memory": memory,
        "training": training,
        "versions": dict(versions()),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".memlong-", dir=folder) as made:
            temporary = Path(made)
            if has_adapter:
                write_adapter(temporary, model)
            if maps is not None:
                maps.save(temporary / MAPS)
            if gates is not None:
                gates.save(temporary / GATES)
            if null_chunk is not None:
                null_chunk.save(temporary / NULL_CHUNK)
            if query_map is not None:
                query_map.save(temporary / QUERY_MAP)
            settings = temporary / SETTINGS
            settings.write_text(json.dumps(facts, indent=2, default=str) + "\n", encoding="utf-8")
            # Without it there is no decoder: better none than a mix of old and new parts.
            (folder / SETTINGS).unlink(missing_ok=True)
            for path in sorted(temporary.iterdir(), key=lambda path: path == settings):
                path.replace(folder / path.name)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"The decoder cannot be written to {str(folder)!r}: {error}") from error


def read_pretrained(
    name: str | Path, changes: Mapping[str, Any] | None = None, registry: Registry | None = None
) -> Pretrained:
    """Read what a folder, or a repository of the hub, says of its decoder.

    Parameters
    ----------
    name
        The folder; where there is none, a hub id.
    changes
        Fields of the MemoryConfig to change, of those in ``CHANGEABLE``.
    registry
        Where the backend and the retriever are looked up; a new one by default.

    Raises
    ------
    InvalidArgumentError
        If there is no such folder, it holds no decoder, a field cannot be changed, or the folder, which may come from a
        stranger, names a place to connect or write to, which only the user may name.

    Notes
    -----
    A backend or retriever that replaces another gets its own options, or none, and queries are not mapped for it.
    """
    for field in changes or {}:
        if field not in CHANGEABLE:
            raise InvalidArgumentError(
                f"changes must be among {', '.join(CHANGEABLE)}, got {field!r}, decided by the training"
            )
    folder = _folder(name)
    try:
        facts = read_json(folder / SETTINGS)
        if facts["format"] != _FORMAT:
            raise InvalidArgumentError(
                f"{str(folder / SETTINGS)!r} must have the format {_FORMAT!r}, got {facts['format']!r}. Use the "
                "memlong that wrote it, or a newer one"
            )
        for field in ("base_model", "dtype", "base_weights"):
            if not isinstance(facts.get(field), str | None):
                raise TypeError(f"{field} must be a string or null, got {facts[field]!r}")
        config = chosen_config(folder, str(folder / SETTINGS), facts["memory"], changes or {}, registry)
        return Pretrained(
            folder,
            None if is_on_another_host(facts["base_model"]) else facts["base_model"],
            config,
            bool(facts["adapter"]),
            facts.get("dtype"),
            facts.get("base_weights"),
        )
    except FileNotFoundError as error:
        raise InvalidArgumentError(
            f"The folder {str(name)!r} holds no {SETTINGS}, so no decoder that save_pretrained or `memlong train` "
            "wrote. Name one that does"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InvalidArgumentError):
            raise
        raise InvalidArgumentError(
            f"{str(folder / SETTINGS)!r} cannot be read as a decoder's settings: {error!r}. Save the decoder again, or "
            "use the memlong that wrote it"
        ) from error


def load_pretrained_model(
    name: str | Path, found: Pretrained, *, dtype: str, device: str, trust_remote_code: bool
) -> tuple[PreTrainedModel, Any]:
    """Load the model that a decoder was trained for, and its tokenizer; arguments are those of `from_pretrained`.

    Raises
    ------
    InvalidArgumentError
        If the folder does not name it.
    """
    if found.base_model is None:
        raise InvalidArgumentError(
            f"{str(name)!r} does not say for which model it was trained, or names a place on another host: "
            "give `model` and `tokenizer`, or --model"
        )
    dtype, device = choose_machine(dtype, device, trained=found.trained_in).names
    return load_model(found.base_model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)


def _folder(name: str | Path) -> Path:
    folder = folder_of(name)
    try:
        is_folder, is_there = folder.is_dir(), folder.exists()
    except OSError as error:  # such as a name that is too long
        raise InvalidArgumentError(f"{str(name)!r} cannot be read: {error.strerror}") from error
    if is_folder:
        return folder
    if is_there:
        raise InvalidArgumentError(f"{str(name)!r} is a file; name the folder that holds {SETTINGS}")
    try:
        return Path(snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, ValueError) as error:  # which all errors of huggingface_hub are
        raise InvalidArgumentError(
            f"{str(name)!r} is not a folder here, and cannot be downloaded from the hub: {error}"
        ) from error
