"""generate() with a memory: the model's own, with every forward call going through the streams."""

from __future__ import annotations

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
from memlong.decoder.generate_options import check_flag, check_generate_options, inferred_mask, named
from memlong.decoder.model.replacing import replaced
from memlong.decoder.setup import Setup
from memlong.decoder.stream.asking import ask
from memlong.decoder.stream.attention_record import Counted
from memlong.decoder.stream.batch import StreamBatch
from memlong.decoder.stream.current import CurrentStreams, Turn
from memlong.decoder.stream.token_stream import TokenStream
from memlong.decoder.stream.tokens import token_lists
from memlong.errors import InvalidArgumentError


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
        "it stands for the streams of a decoder. Save those with decoder.save(path), and keep only the sequences of "
        "what generate() returned"
    )

    def __init__(self, columns: int, speaker: Speaker) -> None:
        super().__init__(layers=[])
        self.columns = columns
        # Weak, or a turn would live until garbage collection; not a WeakMethod, which swallows an interrupt.
        self._speaker = ref(speaker)

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - as transformers calls it
        """All columns but the last, which the forward call is about."""
        return self.columns - 1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i continue from what was row ``beam_idx[i]``."""
        speaker = self._speaker()
        if speaker is not None:
            speaker.reorder(beam_idx.tolist())


class Endings(StoppingCriteriaList):
    """The stopping criteria of a turn, which note where each sequence ended.

    What follows in a row that has ended (padding, or tokens that nobody reads) is not part of its answer.
    """

    def __init__(self, criteria: StoppingCriteriaList, columns: int, rows: int, *, beams: bool) -> None:
        super().__init__(criteria)
        for each in self:
            if isinstance(each, MaxLengthCriteria):  # it warns of more positions than a memory uses
                each.max_position_embeddings = None
        self._columns, self._rows = columns, rows
        self._beams = beams
        self._done: list[Tensor] = []
        self._said: set[tuple[int, ...]] = set()  # tokens of finished beams, after their row

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return which rows [rows] have ended; transformers calls this after each token."""
        done: Tensor = super().__call__(input_ids, scores, **kwargs)
        if self._beams:  # rows change places
            per_row = len(input_ids) // self._rows
            numbers = done.nonzero()[:, 0].tolist()
            said = input_ids[done, self._columns :].tolist()
            self._said |= {(number // per_row, *tokens) for number, tokens in zip(numbers, said, strict=True)}
        else:  # without waiting for the device
            self._done.append(done)
        return done

    def has_ended(self) -> Tensor | None:
        """Which rows [rows] have ended; None of beams, which go on until the search is over."""
        return torch.stack(self._done).any(dim=0) if self._done else None

    def answers(self, sequences: Tensor) -> list[list[int]]:
        """Return the answers in the sequences [rows, tokens] that generate() returned."""
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
    """One turn: forks the streams, one fork for each beam or sequence, and feeds them what generate() chooses.

    Parameters
    ----------
    batch
        The streams that the turn continues.
    read_prompt
        Lets the streams read the prompt; called once transformers has accepted all options.
    columns
        Columns of the prompt as passed to generate().
    config
        Says after how many tokens memory is retrieved again, and for which text.
    """

    def __init__(
        self,
        batch: StreamBatch,
        read_prompt: Callable[[], None],
        columns: int,
        config: MemoryConfig,
    ) -> None:
        self._batch = batch
        self._read_prompt = read_prompt
        self._config = config
        self._draft: StreamBatch | None = None
        self._steps = 0
        self._endings: Endings | None = None
        self.cache = StreamCache(columns, self)

    @contextmanager
    def attached(self, model: PreTrainedModel) -> Iterator[None]:
        """Route this turn's forward calls and stopping criteria here."""
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
            self._endings = Endings(found, self.cache.columns, len(self._batch.streams), beams=beams)
            return self._endings

        # Bound, so that a deepcopy of the model has them bound to the copy.
        bound = MethodType(forward, model), MethodType(endings, model)
        with replaced(model, "forward", bound[0]), replaced(model, "_get_stopping_criteria", bound[1]):
            yield

    def answers(self, sequences: Tensor) -> list[list[int]]:
        """Return each row's answer: the first of its sequences that generate() returned, up to where it ended."""
        assert self._endings is not None  # noqa: S101 - generate() has asked for criteria
        per_row = len(sequences) // len(self._batch.streams)
        return self._endings.answers(sequences)[::per_row]

    def _forward(self, input_ids: Tensor) -> CausalLMOutputWithPast:
        if self._draft is None:
            logits = self._begin(input_ids.shape[0])
        else:
            self._steps += 1
            copies = len(self._draft.streams) // len(self._batch.streams)
            counted = Counted(times=self._ongoing, copies=copies)
            logits = self._draft.step(input_ids[:, -1:], retrieve=self._is_due, counted=counted)
        return CausalLMOutputWithPast(logits=logits, past_key_values=self.cache)

    def _begin(self, wanted: int) -> Tensor:
        """Read the end of the prompt again, with memory retrieved for it, and fork into ``wanted`` rows."""
        self._read_prompt()
        rows = range(len(self._batch.streams))
        copies = wanted // len(rows)
        draft, logits = ask(self._batch, self._config, answers=copies)
        self._draft = draft if copies == 1 else draft.fork([row for row in rows for _ in range(copies)])
        return logits.repeat_interleave(copies, dim=0)

    def _ongoing(self) -> Tensor | float:
        """How often the next token of each sequence [rows] counts: once, unless the sequence has ended."""
        has_ended = None if self._endings is None else self._endings.has_ended()
        return 1.0 if has_ended is None else (~has_ended).float()

    def _is_due(self, stream: TokenStream) -> bool:
        return self._steps % self._config.retrieval_interval == 0 or stream.is_full

    def reorder(self, rows: Sequence[int]) -> None:
        """Let fork i continue from what was fork ``rows[i]``, as beam search does."""
        if self._draft is not None and list(rows) != list(range(len(rows))):
            self._draft = self._draft.fork(rows)


def generate(
    setup: Setup,
    streams: CurrentStreams,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    past_key_values: StreamCache | None,
    options: dict[str, Any],
    *,
    remember: bool,
) -> Any:
    """Read a prompt and continue it; arguments, result and errors are those of `MemoryDecoder.generate`."""
    model, layout = setup.model, setup.model_layout
    check_flag("remember", remember)
    check_generate_options(model, options)
    token_lists(input_ids, attention_mask, layout)  # before anything is cut
    is_inferred = attention_mask is None
    if attention_mask is None:
        attention_mask = inferred_mask(model, input_ids, options)
    known = 0 if past_key_values is None else _columns_of(past_key_values, input_ids, streams)
    new_mask = None if attention_mask is None else attention_mask[:, known:]
    prompt = token_lists(input_ids[:, known:], new_mask, layout)
    if not all(prompt) or (new_mask is not None and not bool(new_mask[:, -1].all())):
        raise InvalidArgumentError(
            "input_ids must hold at least one token in every row, and be padded on the left, got a row of the prompt "
            "that is empty, or padded on the right: set tokenizer.padding_side = 'left'"
            + (". If padding tokens are text here, pass an attention_mask of ones" if is_inferred else "")
        )
    batch = streams.for_rows(len(prompt)) if remember else streams.forked(len(prompt))

    def read_prompt() -> None:  # once transformers has accepted the options
        if remember:
            streams.take_over(batch)
        batch.finish(prompt)

    speaker = Speaker(batch, read_prompt, input_ids.shape[1], setup.config)
    with speaker.attached(model):
        plain: Any = type(model)
        try:
            output = plain.generate(
                model, input_ids, attention_mask=attention_mask, past_key_values=speaker.cache, **options
            )
        except ValueError as error:
            better = named(error, model, options)
            if better is error:
                raise
            raise better from error
    if remember:
        # Read like any text: what the streams hold must not depend on beams, or on other rows.
        sequences = output if isinstance(output, Tensor) else output.sequences
        batch.finish(speaker.answers(sequences))
        speaker.cache.columns = sequences.shape[1]
        streams.turn = Turn(speaker.cache, streams.tokens_read, sequences[:: len(sequences) // len(prompt)])
    return output


def _columns_of(cache: StreamCache, input_ids: Tensor, streams: CurrentStreams) -> int:
    """Return how many columns of a conversation the streams have read; it must begin with those."""
    turn = streams.turn
    if turn is None or turn.cache is not cache or turn.tokens_read != streams.tokens_read:
        raise InvalidArgumentError(
            "past_key_values is not what this decoder's latest generate() returned, or the streams have read more "
            "since: pass only the new text, and leave past_key_values out"
        )
    read = turn.sequences.to(input_ids.device)
    remedy = "Pass the conversation as generate() returned it followed by the new text, or the new text alone"
    if input_ids.shape[0] != len(read) or input_ids.shape[1] <= cache.columns:
        raise InvalidArgumentError(
            f"input_ids must continue the {len(read)} rows of {cache.columns} tokens that past_key_values stands for, "
            f"got {tuple(input_ids.shape)}. {remedy}, without past_key_values"
        )
    odd = (input_ids[:, : cache.columns] != read).nonzero()
    if len(odd):
        row, column = odd[0].tolist()
        raise InvalidArgumentError(
            f"input_ids must begin with the conversation that past_key_values stands for, got "
            f"{int(input_ids[row, column])} in row {row} at column {column}, where the streams have read "
            f"{int(read[row, column])}. {remedy}, without past_key_values"
        )
    return cache.columns
