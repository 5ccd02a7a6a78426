"""generate() with a memory: the model's own, with every forward call taken through the streams."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from threading import get_ident
from types import MethodType
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, MaxLengthCriteria, PreTrainedModel, StoppingCriteriaList
from transformers.modeling_outputs import CausalLMOutputWithPast

from memlong.bank.uncopied import Uncopied
from memlong.decoder.config import MemoryConfig
from memlong.decoder.model.attention import AttentionSlot
from memlong.decoder.model.replacing import replaced
from memlong.decoder.stream.row import Row
from memlong.decoder.stream.streams import Streams
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


class StreamCache(Uncopied, Cache):
    """Stands for the streams where transformers expects a K-V cache.

    ``generate(return_dict_in_generate=True)`` hands it out as ``past_key_values``, and takes it for the next turn.

    Attributes
    ----------
    columns
        Columns of ``input_ids`` that the streams have read, or will have at the end of the turn.
    """

    is_compileable = False
    why_uncopied = (
        "it stands for the streams of a decoder. Write those with decoder.save(path), and of what generate() returned "
        "keep the sequences."
    )

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


class Endings(StoppingCriteriaList):
    """The stopping criteria of a turn, which note which sequence ended where.

    What a row is given once it has ended (padding, or tokens that nobody reads) is not what it said.
    """

    def __init__(self, criteria: StoppingCriteriaList, columns: int, rows: int, *, beams: bool) -> None:
        super().__init__(criteria)
        for each in self:
            if isinstance(each, MaxLengthCriteria):  # which warns of more positions than a memory takes
                each.max_position_embeddings = None
        self._columns, self._rows = columns, rows
        self._beams = beams
        self._done: list[Tensor] = []
        self._said: set[tuple[int, ...]] = set()  # each after its row

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Tell which rows [rows] have ended, as transformers asks after each token."""
        done: Tensor = super().__call__(input_ids, scores, **kwargs)
        if self._beams:  # where rows change places
            per_row = len(input_ids) // self._rows
            numbers = done.nonzero()[:, 0].tolist()
            said = input_ids[done, self._columns :].tolist()
            self._said |= {(number // per_row, *tokens) for number, tokens in zip(numbers, said, strict=True)}
        else:  # without waiting for the device
            self._done.append(done)
        return done

    def answers(self, sequences: Tensor) -> list[list[int]]:
        """Return what each of the sequences [rows, tokens] that were returned said."""
        answers: list[list[int]] = sequences[:, self._columns :].tolist()
        if self._beams:
            per_row = len(answers) // self._rows
            for number, tokens in enumerate(answers):
                row = number // per_row
                ends = (end for end in range(1, len(tokens)) if (row, *tokens[:end]) in self._said)
                del tokens[next(ends, len(tokens)) :]
        elif self._done:
            for tokens, done in zip(answers, torch.stack(self._done, dim=1).tolist(), strict=True):
                del tokens[(done.index(True) + 1 if True in done else len(tokens)) :]
        return answers


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
        Says after how many tokens memory is retrieved again, for which text.
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
        self._endings: Endings | None = None
        self.cache = StreamCache(columns, self)

    @contextmanager
    def attached(self, model: PreTrainedModel) -> Iterator[None]:
        """Let the model's forward calls for this turn, and what ends it, come here."""
        inner, turn = model.forward, get_ident()
        kind: Any = type(model)
        criteria: Any = kind._get_stopping_criteria  # noqa: SLF001 - the only way to know of all

        @wraps(kind.forward)
        def forward(this: Any, *args: Any, **given: Any) -> Any:
            if this is not model:  # a copy that was made meanwhile
                return kind.forward(this, *args, **given)
            if given.get("past_key_values") is self.cache:
                return self._forward(given["input_ids"])
            return inner(*args, **given)

        @wraps(criteria)
        def endings(
            this: Any, generation_config: GenerationConfig, *args: Any, **given: Any
        ) -> StoppingCriteriaList:
            found: StoppingCriteriaList = criteria(this, generation_config, *args, **given)
            # Not of a plain generate() meanwhile, of a copy, in another thread or in a criterion.
            if this is not model or get_ident() != turn or self._endings is not None:
                return found
            beams = (generation_config.num_beams or 1) > 1
            self._endings = Endings(found, self.cache.columns, len(self._streams.rows), beams=beams)
            return self._endings

        # Bound, so that a deepcopy of the model has them bound to the copy.
        bound = MethodType(forward, model), MethodType(endings, model)
        with replaced(model, "forward", bound[0]), replaced(model, "_get_stopping_criteria", bound[1]):
            yield

    def answers(self, sequences: Tensor) -> list[list[int]]:
        """Return what each row said: of the sequences that generate() returned, its first, up to where it ended."""
        assert self._endings is not None  # noqa: S101 - generate() has asked for criteria
        per_row = len(sequences) // len(self._streams.rows)
        return self._endings.answers(sequences)[::per_row]

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
    place = ref(model)

    kind: Any = type(model)

    @wraps(kind.generate)
    def generate(self: Any, *args: Any, **options: Any) -> Any:
        if self is not place():  # a copy of the model, which has no memory
            return type(self).generate(self, *args, **options)
        warnings.warn(
            "model.generate() knows nothing of the memory that is attached: call decoder.generate(), or let "
            "`with decoder.replacing_generate():` have it called for you.",
            stacklevel=2,
        )
        return kind.generate(self, *args, **options) if before is None else before(*args, **options)

    # Bound, so that a deepcopy of the model has it bound to the copy.
    with replaced(model, "generate", MethodType(generate, model)):
        yield


_NO_TEXT = re.compile(r"pixel|image|video|audio|speech|input_features")


def check_generate_options(model: PreTrainedModel, options: dict[str, Any]) -> None:
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
    for name in ("logits_processor", "stopping_criteria"):
        odd = next((each for each in options.get(name) or () if not callable(each)), None)
        if odd is not None:
            raise InvalidArgumentError(f"{name} holds {odd!r}; expected a list of functions or their like.")
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


def _setting(model: PreTrainedModel, options: dict[str, Any], name: str) -> Any:
    if name in options:
        return options[name]
    given = getattr(options.get("generation_config"), name, None)
    return getattr(model.generation_config, name, None) if given is None else given
