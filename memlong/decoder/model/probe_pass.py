"""One pass of a single token through a model, recording everything that concerns a memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import LinearAttentionAndFullAttentionLayer

from memlong.decoder.model import attention
from memlong.decoder.model.attention import Visibility
from memlong.decoder.model.kernels import Attend, Output
from memlong.decoder.model.rope import Angles, RotaryCall

_FARTHEST = 1 << 18  # keys up to so far back are asked of a mask; a window beyond that is none


@dataclass(frozen=True)
class Reading:
    """One call of attention.

    Attributes
    ----------
    module
        Who called it.
    layer
        Number of the layer whose K-V it was given, or made its own of; None if no cache knows them.
    is_latest
        Whether that layer was the latest to update its cache.
    is_made
        Whether the K-V are not what the cache gave, but made of it.
    heads
        Of queries.
    mask, visible
        The mask that it was given, and what transformers made it of, if it did.
    sliding_window
        What the module itself says of its window.
    bias
        Name of what it adds to the logits of each query and key in addition to the mask; None if nothing.
    """

    module: nn.Module
    layer: int | None
    is_latest: bool
    is_made: bool
    heads: int
    mask: Tensor | None
    visible: Visibility | None
    sliding_window: int | None
    bias: str | None


class NotingLayer(LinearAttentionAndFullAttentionLayer):
    """A cache for any kind of layer that records what it is given."""

    def __init__(self, seen: ProbePass, number: int, states: int) -> None:
        super().__init__(number_of_states=states)
        self._seen, self._number = seen, number

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Record keys and values."""
        self._seen.written[self._number] = self._seen.written.get(self._number, 0) + 1
        self._seen.latest = self._number
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Tensor:
        """Record the inputs of a convolution."""
        self._seen.states[self._number] = self.number_of_states
        return super().update_conv_state(*args, **kwargs)

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Tensor:
        """Record a state."""
        self._seen.states[self._number] = self.number_of_states
        return super().update_recurrent_state(*args, **kwargs)

    def update_indexer(self, keys: Tensor) -> Tensor:
        """Record what selects keys."""
        self._seen.indexed = True
        return keys


class ProbePass(attention.AttentionSlot):
    """What a pass of one token showed, at two positions in two rows.

    Attributes
    ----------
    positions
        [2, 1].
    written
        By layer, how often its K-V cache was updated.
    latest
        The last of those.
    states
        By layer, the number of states it carries in addition.
    readings
        All calls of attention, in order.
    indexed
        Whether the cache was to hold an index of keys.
    """

    def __init__(self, model: PreTrainedModel, config: PreTrainedConfig, positions: tuple[int, int]) -> None:
        super().__init__()
        self._model = model
        device = cast("torch.device", model.get_input_embeddings().weight.device)
        self.positions = torch.tensor(positions, device=device)[:, None]
        padding = getattr(config, "pad_token_id", None)
        token = 0 if padding != 0 else 1  # a padding token embeds as zero, which shows nothing
        self._token = torch.full_like(self.positions, token)
        counts = [getattr(each, "number_of_states", 1) for each in DynamicCache(config=config).layers]
        self.depth = len(counts)
        self.written: dict[int, int] = {}
        self.latest: int | None = None
        self.states: dict[int, int] = {}
        self.readings: list[Reading] = []
        self.indexed = False
        self._layers = [NotingLayer(self, number, count) for number, count in enumerate(counts)]
        self._calls: list[RotaryCall] = []
        self._outside: list[tuple[nn.Module, str]] = []
        self._masks: list[tuple[Tensor, Visibility]] = []
        self._windows: dict[Visibility, int | None] = {}

    def run(self) -> None:
        """Run the model."""
        held = {(module, name): each for module, name, each in self._tensors_outside()}
        with ExitStack() as stack:
            for module in self._model.modules():
                if _rotates(module):
                    stack.callback(module.register_forward_hook(self._note_rotation, with_kwargs=True).remove)
            stack.enter_context(attention.installed(self, self._model.modules()))
            stack.enter_context(torch.no_grad())
            self._masks = stack.enter_context(attention.masks_noted())
            self._model(
                input_ids=self._token,
                position_ids=self.positions,
                past_key_values=Cache(layers=list(self._layers)),
                use_cache=True,
            )
        self._outside = [
            (module, name)
            for module, name, each in self._tensors_outside()
            if held.get((module, name)) is not each
        ]

    def _tensors_outside(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        for module in self._model.modules():
            for name, each in vars(module).items():
                if isinstance(each, Tensor) and not _rotates(
                    module
                ):  # which may keep frequencies for longer texts
                    yield module, name, each

    def attend(
        self,
        base: Attend,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> Output:
        """Record the call, and attend as the model does."""
        given = self._given_by(key, value)
        layer = self.latest if given is None else given
        visible = None
        if attention_mask is not None:
            place = attention_mask.data_ptr()
            visible = next((rule for mask, rule in self._masks if mask.data_ptr() == place), None)
        self.readings.append(
            Reading(
                module,
                layer,
                layer == self.latest,
                given is None,
                query.shape[1],
                attention_mask,
                visible,
                options.get("sliding_window"),
                next(
                    (name for name, each in options.items() if isinstance(each, Tensor) and each.ndim == 4),
                    None,
                ),
            )
        )
        return base(module, query, key, value, attention_mask, **options)

    def _given_by(self, key: Tensor, value: Tensor) -> int | None:
        """Return the layer whose cache returned these."""
        for number in self.written:
            mine, theirs = self.cached(number)
            if (key.data_ptr(), value.data_ptr()) == (mine.data_ptr(), theirs.data_ptr()):
                return number
        return None

    def _note_rotation(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: object
    ) -> None:
        call = RotaryCall.record(module, args, kwargs, self.positions)
        if call is not None and call.key not in [each.key for each in self._calls]:
            self._calls.append(call)

    def rotations(self) -> Iterator[tuple[RotaryCall, Angles]]:
        """All rotations that the model asked for, and their angles at the two positions."""
        for call in self._calls:
            given = call.given(self.positions)
            if given is not None:
                yield call, given

    def kept_outside(self) -> list[tuple[nn.Module, str]]:
        """Tensors that modules hold since the pass, which neither weights nor the cache hold."""
        return self._outside

    def readings_of(self, number: int) -> list[Reading]:
        """Calls of attention to the K-V of a layer."""
        return [each for each in self.readings if each.layer == number]

    def readers(self) -> dict[nn.Module, tuple[int, ...]]:
        """By attention module, the layers whose K-V it reads."""
        found: dict[nn.Module, list[int]] = {}
        for each in self.readings:
            layers = found.setdefault(each.module, [])
            if each.layer is not None and each.layer not in layers:
                layers.append(each.layer)
        return {module: tuple(layers) for module, layers in found.items()}

    def window_of(self, reading: Reading) -> int | None:
        """How many tokens, itself included, a token sees; None for all before it.

        Raises
        ------
        ValueError
            If neither is the case, saying what is.
        """
        if reading.visible is None:
            return reading.sliding_window
        if reading.visible not in self._windows:
            try:
                self._windows[reading.visible] = _window(reading.visible, self.positions.device)
            except IndexError:  # it knows the tokens of this call alone
                return reading.sliding_window
        return self._windows[reading.visible]

    def cached(self, number: int) -> tuple[Tensor, Tensor]:
        """What the cache of a layer was given: [2, heads, 1, width] each."""
        layer = self._layers[number]
        return cast("Tensor", layer.keys), cast("Tensor", layer.values)

    def state_shapes(self) -> dict[tuple[int, str, int], torch.Size]:
        """By layer, kind and number of a state, its shape without the rows."""
        return {
            (number, kind, index): state.shape[1:]
            for number in self.states
            for kind in ("conv", "recurrent")
            for index, state in getattr(self._layers[number], f"{kind}_states").items()
            if state is not None
        }

    @property
    def is_unusual(self) -> bool:
        """Whether more than one softmax a layer over what the cache gives has a part in what comes out."""
        return (
            bool(self.states)
            or any(each.is_made for each in self.readings)
            or (len(self.readings) != len(self.written))
        )


def _rotates(module: nn.Module) -> bool:
    name = type(module).__name__
    return "Rotary" in name or "Rope" in name


def _window(visible: Visibility, device: torch.device) -> int | None:
    query = 4 * _FARTHEST
    sizes = set()
    for place in (query, query + 1, query + 777):
        keys = torch.arange(place + 1, place - _FARTHEST, -1, device=device)
        zero = torch.zeros_like(keys)
        seen: Tensor = visible(zero, zero, torch.full_like(keys, place), keys) & (keys >= 0)
        count = int(seen.sum())
        if bool(seen[0]) or not bool(seen[1 : 1 + count].all()):
            raise ValueError("its masks are neither causal nor those of a sliding window")
        sizes.add(count)
    if len(sizes) > 1:
        raise ValueError("its attention goes by chunks of the text, at whose borders all before is hidden")
    size = sizes.pop()
    return None if size == _FARTHEST else size
