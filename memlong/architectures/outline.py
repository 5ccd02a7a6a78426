"""Find out how memory works with a model from its configuration alone, by attaching memory to a light model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    __version__,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from memlong.architectures.described import kinds_of_layers, stored_of_a_token, token_bytes
from memlong.architectures.light import light_models
from memlong.architectures.listing import Architecture, architectures, encoder_decoders
from memlong.architectures.trial import try_architecture
from memlong.decoder import MemoryConfig, MemoryDecoder
from memlong.decoder.model.layout import ModelLayout
from memlong.decoder.model.quiet_loading import quiet_loading
from memlong.errors import InvalidArgumentError, UnsupportedModelError

_TOO_LARGE = (
    "Out of memory while building a light model of this configuration: lower only its number of layers"
)
_KINDS: tuple[Any, ...] = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)


@dataclass(frozen=True)
class Outline:
    """How memory works with a model.

    Attributes
    ----------
    class_name
        The model's class, or its model type if there is no class.
    reason
        Why memory does not attach; empty if it does. If it does not, the attributes below are empty.
    depth
        Number of layers in the model's cache.
    layers
        Kinds of layers in the model.
    windows
        Sliding window by attention layer; None for full attention.
    retrieval_layers
        Layers that retrieve by default.
    stored
        What is stored per token.
    token_bytes
        Bytes per token of memory, by storage dtype, without the chunk's embedding.
    max_positions
        Number of positions the model was trained on, if known.
    local_window
        Smallest and largest local window with the default chunk and segment sizes; None means no upper limit.
    """

    class_name: str
    reason: str = ""
    depth: int = 0
    layers: str = ""
    windows: Mapping[int, int | None] = field(default_factory=dict)
    retrieval_layers: tuple[int, ...] = ()
    stored: str = ""
    token_bytes: Mapping[str, int] = field(default_factory=dict)
    max_positions: int | None = None
    local_window: tuple[int, int | None] = (0, None)

    @property
    def attaches(self) -> bool:
        """Whether memory attaches to the model."""
        return not self.reason


def outline(config: PreTrainedConfig) -> Outline:
    """Attach memory to a light model of a configuration, and describe the result."""
    kind = _class_of(config)
    if kind is None:
        return Outline(
            config.model_type, f"transformers {__version__} has no model of this type that generates text"
        )
    if config.model_type in encoder_decoders():
        return Outline(kind.__name__, "an encoder reads its text, and memory is for decoder-only models")
    reason = ""
    with quiet_loading():
        for make, is_whole in light_models(kind, config):
            try:
                decoder = MemoryDecoder(make(), None, MemoryConfig(position_mode="original"))
                if is_whole(decoder.model_layout):
                    return _confirmed(_attached(kind.__name__, decoder), config, decoder.model_layout)
            except UnsupportedModelError as error:
                reason = str(error)
            except MemoryError as error:
                raise InvalidArgumentError(_TOO_LARGE) from error
            except Exception as error:  # a model class may raise anything on a shrunk configuration
                if "allocate memory" in str(error):
                    raise InvalidArgumentError(_TOO_LARGE) from error
                reason = f"cannot build a model from this configuration: {type(error).__name__}: {error}"
    return Outline(kind.__name__, reason)


def _confirmed(found: Outline, config: PreTrainedConfig, layout: ModelLayout) -> Outline:
    """Let a tiny model's trial overrule: the weights of a light model are too small to show every problem."""
    architecture = Architecture(config.model_type, found.class_name)
    if layout.is_unusual and architecture in architectures():
        trial = try_architecture(architecture)
        if trial.status == "refused" and not trial.is_unmade:
            return Outline(found.class_name, trial.reason)
    return found


def _attached(class_name: str, decoder: MemoryDecoder) -> Outline:
    layout, config = decoder.model_layout, decoder.config
    return Outline(
        class_name=class_name,
        depth=layout.depth,
        layers=kinds_of_layers(layout),
        windows={index: layer.sliding_window for index, layer in layout.layers.items()},
        retrieval_layers=decoder.retrieval_layers,
        stored=stored_of_a_token(decoder),
        token_bytes=token_bytes(decoder),
        max_positions=layout.max_positions,
        local_window=(config.segment_size + config.chunk_size, _greatest_window(layout)),
    )


def _greatest_window(layout: ModelLayout) -> int | None:
    default = MemoryConfig(position_mode="zero")  # where the window leaves room for no more
    memory = default.memory_span(default.top_k)
    retrieving = [layout.layers[layer].sliding_window for layer in layout.full_attention_layers]
    limits = [size - memory for size in retrieving if size is not None]
    if layout.max_positions is not None:
        limits.append(layout.max_positions - memory - default.sink_tokens)
    return min(limits, default=None)


def _class_of(config: PreTrainedConfig) -> Any:
    """Return the class that `load_model` uses for this configuration; None if there is none."""
    own = getattr(config, "auto_map", None) or {}
    for kind in _KINDS:
        if type(config) in kind._model_mapping:  # noqa: SLF001 - there is no public equivalent
            return kind._model_mapping[type(config)]  # noqa: SLF001
        if kind.__name__ in own:  # its code is trusted, or the configuration could not have been read
            return get_class_from_dynamic_module(own[kind.__name__], str(config.name_or_path))
    return None
