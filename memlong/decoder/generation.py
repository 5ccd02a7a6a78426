"""generate() with a memory: the model's own, with every forward call taken through the streams."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any
from weakref import ref

from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from memlong.decoder.attention import AttentionSlot
from memlong.decoder.config import MemoryConfig
from memlong.decoder.row import Row
from memlong.decoder.streams import Streams
from memlong.errors import InvalidArgumentError

_REFUSED = {
    "assistant_model": "assisted decoding takes tokens back",
    "prompt_lookup_num_tokens": "prompt lookup takes tokens back",
    "assistant_early_exit": "assisted decoding takes tokens back",
    "inputs_embeds": "the streams are made of tokens",
    "inputs": "a prompt is given as input_ids",
    "cache_implementation": "the streams are the cache",
    "output_attentions": "attention goes over memory and window, whose columns have no place in the text",
    "output_hidden_states": "the prompt is read in segments, of which only the last logits are kept",
}


class StreamCache(Cache):
    """Stands for the streams where transformers expects a K-V cache.

    ``generate(return_dict_in_generate=True)`` hands it out as ``past_key_values``, and takes it for the next turn.

    Attributes
    ----------
    columns
        Columns of ``input_ids`` that the streams have read, or will have at the end of the turn.
    """

    is_compileable = False

    def __init__(self, columns: int, speaker: Speaker) -> None:
        super().__init__(layers=[])
        self.columns = columns
        # Weak, or a turn would keep what it held until the collector comes; no WeakMethod, which swallows an interrupt.
        self._speaker = ref(speaker)

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - as transformers calls it
        """All columns but the last, which is what a forward call is about."""
        return self.columns - 1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i go on from what was row ``beam_idx[i]``."""
        speaker = self._speaker()
        if speaker is not None:
            speaker.reorder(beam_idx.tolist())


class Speaker:
    """One turn: forks the streams, one for every beam or sequence, and feeds the forks what generate() chooses.

    Parameters
    ----------
    streams
        What the turn goes on from.
    slot
        Where the model's attention looks for memory.
    read_prompt
        Lets the streams read the prompt; called once transformers has accepted all options.
    columns
        Columns of the prompt as generate() gets it.
    config
        Says after how many tokens memory is retrieved anew, for which text.
    """

    def __init__(
        self,
        streams: Streams,
        slot: AttentionSlot,
        read_prompt: Callable[[], None],
        columns: int,
        config: MemoryConfig,
    ) -> None:
        self._streams = streams
        self._slot = slot
        self._read_prompt = read_prompt
        self._segment_size = config.segment_size
        self._every = config.retrieval_interval
        self._query_length = config.query_tokens or config.retrieval_interval
        self._draft: Streams | None = None
        self._steps = 0
        self.cache = StreamCache(columns, self)

    @contextmanager
    def attached(self, model: PreTrainedModel) -> Iterator[None]:
        """Let the model's forward calls for this turn come here."""
        inner, own = model.forward, "forward" in vars(model)

        @wraps(inner)
        def forward(*args: Any, **given: Any) -> Any:
            if given.get("past_key_values") is self.cache:
                return self._forward(given["input_ids"])
            return inner(*args, **given)

        model.forward = forward
        try:
            yield
        finally:
            if own:
                model.forward = inner
            else:
                del model.forward

    def _forward(self, input_ids: Tensor) -> CausalLMOutputWithPast:
        if self._draft is None:
            logits = self._begin(input_ids.shape[0])
        else:
            self._steps += 1
            logits = self._draft.step(input_ids[:, -1:], self._slot, retrieve=self._is_due)
        return CausalLMOutputWithPast(logits=logits, past_key_values=self.cache)

    def _begin(self, wanted: int) -> Tensor:
        """Read the end of the prompt again, with the memory that it calls for, and fork into ``wanted`` rows."""
        self._read_prompt()
        rows = range(len(self._streams.rows))
        draft = self._streams.fork(rows)
        for row in draft.rows:
            row.query_length = self._query_length
        # With room for what is generated until memory is retrieved again.
        tails = draft.rewind(max(1, self._segment_size - self._every))
        logits = draft.advance(tails, self._slot, 1, retrieve=lambda _: True).logits
        copies = wanted // len(rows)
        self._draft = draft if copies == 1 else draft.fork([row for row in rows for _ in range(copies)])
        return logits.repeat_interleave(copies, dim=0)

    def _is_due(self, row: Row) -> bool:
        return self._steps % self._every == 0 or row.is_full

    def reorder(self, rows: Sequence[int]) -> None:
        """Let fork i go on from what was fork ``rows[i]``, as beam search asks."""
        if self._draft is not None and list(rows) != list(range(len(rows))):
            self._draft = self._draft.fork(rows)


@contextmanager
def plain_generate_told(model: PreTrainedModel) -> Iterator[None]:
    """Warn where the model's own ``generate()`` is called meanwhile, which knows nothing of a memory."""
    before = vars(model).get("generate")
    inner: Any = model.generate

    @wraps(inner)
    def generate(*args: Any, **options: Any) -> Any:
        warnings.warn(
            "model.generate() knows nothing of the memory that is attached: call decoder.generate(), or let "
            "`with decoder.replacing_generate():` have it called for you.",
            stacklevel=2,
        )
        return inner(*args, **options)

    vars(model)["generate"] = generate
    try:
        yield
    finally:
        del vars(model)["generate"]
        if before is not None:
            vars(model)["generate"] = before


_NO_TEXT = re.compile(r"pixel|image|video|audio|speech|input_features")


def check_options(model: PreTrainedModel, options: dict[str, Any]) -> None:
    """Refuse what generate() can do only with a cache of its own.

    Raises
    ------
    InvalidArgumentError
        Naming the option and the reason.
    """
    config = options.get("generation_config")
    if config is not None and not isinstance(config, GenerationConfig):
        raise InvalidArgumentError(f"generation_config is {config!r}; expected a GenerationConfig.")
    options.setdefault(
        "cache_implementation", getattr(config, "cache_implementation", None)
    )  # not the model's own
    for name, value in options.items():
        if _NO_TEXT.search(name) and value is not None:
            raise InvalidArgumentError(
                f"{name} does not go with a memory, which holds text alone. Leave it out, or generate with the model "
                "itself, outside `with decoder:`."
            )
    for name in ("num_beams", "num_return_sequences"):
        value = _setting(model, options, name)
        if value is not None and not (isinstance(value, int) and value >= 1):
            raise InvalidArgumentError(f"{name} is {value!r}; expected an integer of at least 1.")
    for name, reason in _REFUSED.items():
        value = _setting(model, options, name)
        if isinstance(value, Tensor) or value:
            raise InvalidArgumentError(
                f"{name} does not go with a memory: {reason}. Leave it out, or generate with the model itself, outside "
                "`with decoder:`."
            )


def inferred_mask(model: PreTrainedModel, input_ids: Tensor, options: dict[str, Any]) -> Tensor | None:
    """Return the mask [rows, tokens] that transformers infers from padding in a prompt; None where it infers none."""
    padding, ends = (_setting(model, options, name) for name in ("pad_token_id", "eos_token_id"))
    padding, ends = (
        each.flatten().tolist() if isinstance(each, Tensor) else each for each in (padding, ends)
    )
    padding = padding[0] if isinstance(padding, list) and padding else padding
    stops = {ends} if isinstance(ends, int) else set(ends or ())
    if not isinstance(padding, int) or padding in stops or not bool((input_ids == padding).any()):
        return None
    return (input_ids != padding).long()


def answers_of(
    model: PreTrainedModel, sequences: Tensor, columns: int, rows: int, options: dict[str, Any]
) -> list[list[int]]:
    """Return what each row said: of its first sequence, the tokens after ``columns``, without padding."""
    per_row = sequences.shape[0] // rows
    ends = _setting(model, options, "eos_token_id")
    ends = ends.flatten().tolist() if isinstance(ends, Tensor) else ends
    stops = {ends} if isinstance(ends, int) else set(ends or ())
    padding = _setting(model, options, "pad_token_id")
    answers = []
    for tokens in sequences[::per_row, columns:].tolist():
        end = next((place + 1 for place, token in enumerate(tokens) if token in stops), None)
        if end is None:
            end = len(tokens)
            # Nothing is padded where nothing can end early: there the same token is the model's own.
            while stops and end and len(sequences) > 1 and tokens[end - 1] == padding:
                end -= 1
        answers.append(tokens[:end])
    return answers


def _setting(model: PreTrainedModel, options: dict[str, Any], name: str) -> Any:
    if name in options:
        return options[name]
    given = getattr(options.get("generation_config"), name, None)
    return getattr(model.generation_config, name, None) if given is None else given
