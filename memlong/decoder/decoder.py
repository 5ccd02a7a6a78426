"""MemoryDecoder: gives a transformers model a memory, and streams text of any length through it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any, Self

from torch import Tensor
from transformers import PreTrainedModel

from memlong.bank import MemoryBank
from memlong.decoder.generation import Speaker, StreamCache, check_generate_options, inferred_mask
from memlong.decoder.kv.sources import LatentSource
from memlong.decoder.model.loading import load_model
from memlong.decoder.model.machine import AUTO, choose_machine
from memlong.decoder.model.replacing import replaced
from memlong.decoder.persistence.adapter_files import attach_adapter
from memlong.decoder.persistence.pretrained import read_pretrained, write_pretrained
from memlong.decoder.persistence.saving import SavingDecoder
from memlong.decoder.retrievers.base import Retriever
from memlong.decoder.stream.recall import RandomChunks
from memlong.decoder.stream.streams import Streams
from memlong.decoder.stream.tokens import token_lists
from memlong.errors import InvalidArgumentError
from memlong.plugins import Registry


@dataclass(frozen=True)
class _Turn:
    """What generate() returned last, and how far the streams were then; ``sequences`` are [rows, columns]."""

    cache: StreamCache
    tokens_read: tuple[int, ...]
    sequences: Tensor


class MemoryDecoder(SavingDecoder):
    """A transformers model with a long-term memory.

    Use it as a context manager: inside, the model's attention goes through memlong; afterwards the model is what it
    was. Each row of a batch is a stream of its own with a bank of its own.

    Parameters
    ----------
    model
        A decoder-only model of transformers (``memlong models`` lists them), its attention implementation ``"sdpa"`` or
        ``"eager"``; or peft's ``PeftModel`` around one, whose adapters stay at work in it.
    tokenizer
        Its tokenizer; retrievers that read text need it.
    config
        What to remember and how; see `MemoryConfig`.
    retriever
        A retriever at hand, instead of the one that ``config`` names.
    registry
        Where names of backends and retrievers are looked up; by default all installed plugins.

    Raises
    ------
    UnsupportedModelError
        If memory cannot be attached to the model.
    InvalidArgumentError
        If a setting does not fit the model.
    UnknownNameError, MissingDependencyError, PluginError
        If the backend or the retriever is not available.

    Examples
    --------
    >>> with MemoryDecoder(model, tokenizer, MemoryConfig(backend="faiss")) as decoder:  # doctest: +SKIP
    ...     for segment in decoder.stream(tokenizer(text, return_tensors="pt").input_ids):
    ...         segment.logits

    Notes
    -----
    While it is attached, the model is in evaluation mode. A decoder serves one thread at a time; several decoders, each
    with a model of its own, may work in threads of their own. Where a call ends in an error or an interrupt,
    `tokens_read` tells how far it came; going on from there loses nothing.

    The method is MemLong's (arXiv 2408.16967), with K-V of each layer's own (training-free) and attention sinks
    (arXiv 2309.17453).
    """

    def reset(
        self,
        banks: Sequence[MemoryBank] | None = None,
        *,
        random_chunks: RandomChunks | None = None,
        any_model: bool = False,
    ) -> None:
        """Begin new streams, with empty windows; as `StreamingDecoder.reset`."""
        super().reset(banks, random_chunks=random_chunks, any_model=any_model)
        self._turn: _Turn | None = None

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        model: PreTrainedModel | None = None,
        tokenizer: Any = None,
        *,
        changes: Mapping[str, Any] | None = None,
        retriever: Retriever | None = None,
        registry: Registry | None = None,
        dtype: str = AUTO,
        device: str = AUTO,
        trust_remote_code: bool = False,
    ) -> Self:
        """Load a trained decoder: its model, the adapter, and what reads the memory.

        Parameters
        ----------
        name
            A folder that `save_pretrained` or ``memlong train`` wrote, or a hub id.
        model, tokenizer
            The model that it was trained for, and its tokenizer, if they are at hand. The model gets the adapter.
        changes
            Settings that may be others than those of the training: ``backend``, ``backend_options``, ``retriever``,
            ``retriever_options`` and ``store``.
        retriever, registry
            As for `MemoryDecoder`.
        dtype, device
            Of the model, if it is to be loaded, as `load_model` takes them; but ``"auto"`` is the dtype
            of the training, where the folder names it.
        trust_remote_code
            Whether code that the model brings may run here, as `load_model` takes it. The decoder's own
            folder holds no code.

        Raises
        ------
        InvalidArgumentError
            If the folder holds no decoder, or one for another model.
        MissingDependencyError
            If peft is not installed, or the model needs a package that is not.
        """
        found = read_pretrained(name, changes, registry)
        if model is None:
            if found.base_model is None:
                raise InvalidArgumentError(
                    f"{str(name)!r} does not say for which model it was trained, or names a place on another host: "
                    "give `model` and `tokenizer`, or --model."
                )
            dtype, device = choose_machine(dtype, device, trained=found.trained_in).names
            model, tokenizer = load_model(
                found.base_model, dtype=dtype, device=device, trust_remote_code=trust_remote_code
            )
        # Before the adapter: a retriever that asks the model is then the one of the training.
        decoder = cls(model, tokenizer, found.config, retriever=retriever, registry=registry)
        if found.has_adapter:
            attach_adapter(model, found.folder, found.base_weights)
        return decoder

    def save_pretrained(
        self, folder: str | Path, *, base_model: str | None = None, training: Mapping[str, Any] | None = None
    ) -> None:
        """Write what was trained into a folder, for `from_pretrained`: adapter, maps, gates and settings.

        Parameters
        ----------
        folder
            Made if it does not exist.
        base_model
            Under which name `load_model` finds the model; by default, where transformers loaded it from.
        training
            Settings of the training, to be noted down.

        Raises
        ------
        StorageError
            If it cannot be written.
        """
        maps = self._source.maps if isinstance(self._source, LatentSource) else None
        write_pretrained(
            folder,
            self.model,
            self.config,
            maps,
            self.gates,
            base_model=base_model,
            training=training,
            registry=self._registry,
        )

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        remember: bool = True,
        past_key_values: StreamCache | None = None,
        **options: Any,
    ) -> Any:
        """Read a prompt and continue it, as the model's ``generate()`` does, with all that was read before in memory.

        At the end of the prompt, and every ``retrieve_every`` tokens that follow, what the text at hand calls for is
        retrieved; the last tokens of the prompt, a segment's at most, are read again with it, so that a question is
        understood in the light of its answer. Chunks that leave the window meanwhile are in memory, too.

        Parameters
        ----------
        input_ids
            [rows, tokens], int64: the prompt of each stream, of any length. It follows what was read before.
        attention_mask
            [rows, tokens]; 0 where padded, on the left.
        remember
            Whether the streams go on from the prompt and its answer (of several, the first returned), or from
            where they are now, so that the next prompt does not know of this one; a single stream then serves any
            number of prompts, side by side. A long text is better given to `read` first: what a prompt adds to
            memory without being remembered stays on the device.
        past_key_values
            What an earlier call returned in its dict: then ``input_ids`` is the whole conversation, as transformers has
            it, and only what is new is read.
        options
            Of the model's ``generate()``: greedy, sampling and beam search, streamers, logits processors and stopping
            criteria.

        Returns
        -------
        Tensor or ModelOutput
            What the model's ``generate()`` returns: prompt and answer.

        Raises
        ------
        InvalidArgumentError
            If shapes, token ids or the number of rows are wrong, or an option does not go with a memory. Nothing is
            read before transformers has accepted the options.
        MemlongError
            If the decoder is not attached.
        """
        self._check_attached()
        check_generate_options(self.model, options)
        token_lists(input_ids, attention_mask, self._layout)  # before anything is cut
        is_inferred = attention_mask is None
        if attention_mask is None:
            attention_mask = inferred_mask(self.model, input_ids, options)
        known = 0 if past_key_values is None else self._columns_of(past_key_values, input_ids)
        new_mask = None if attention_mask is None else attention_mask[:, known:]
        prompt = token_lists(input_ids[:, known:], new_mask, self._layout)
        if not all(prompt) or (new_mask is not None and not bool(new_mask[:, -1].all())):
            raise InvalidArgumentError(
                "A row of the prompt is empty, or padded on the right; expected at least one token in every row, and "
                "padding on the left: tokenizer.padding_side = 'left'."
                + (" Where tokens that pad are text, give an attention_mask of ones." if is_inferred else "")
            )
        streams = self._streams_for(len(prompt)) if remember else self._forked(len(prompt))

        def read_prompt() -> None:  # when the options have been found good
            if remember:
                self._streams, self._call = streams, object()
            streams.finish(prompt, self._slot)

        speaker = Speaker(streams, self._slot, read_prompt, input_ids.shape[1], self.config)
        with speaker.attached(self.model):
            plain: Any = type(self.model)
            output = plain.generate(
                self.model,
                input_ids,
                attention_mask=attention_mask,
                past_key_values=speaker.cache,
                **options,
            )
        if remember:
            # Read as any text is: what the streams hold must not depend on beams, or on the rows beside them.
            sequences = output if isinstance(output, Tensor) else output.sequences
            streams.finish(speaker.answers(sequences), self._slot)
            speaker.cache.columns = sequences.shape[1]
            self._turn = _Turn(speaker.cache, self.tokens_read, sequences[:: len(sequences) // len(prompt)])
        return output

    @contextmanager
    def replacing_generate(self) -> Iterator[None]:
        """Let the model's ``generate()`` be this decoder's, for callers such as ``transformers.pipeline``.

        Every call knows what was read in before, and nothing of another call (``remember=False``).
        """

        def generate(
            model: Any,
            inputs: Tensor | None = None,
            generation_config: Any = None,
            logits_processor: Any = None,
            stopping_criteria: Any = None,
            **options: Any,
        ) -> Any:
            options |= {"logits_processor": logits_processor, "stopping_criteria": stopping_criteria}
            if model is not self.model:  # a copy, which has no memory
                return type(model).generate(model, inputs, generation_config, **options)
            input_ids = options.pop("input_ids", inputs)
            return self.generate(input_ids, remember=False, generation_config=generation_config, **options)

        with replaced(self.model, "generate", MethodType(generate, self.model)):
            yield

    def _columns_of(self, cache: StreamCache, input_ids: Tensor) -> int:
        """How many columns of a conversation the streams have read; it must begin with those."""
        turn = self._turn
        if turn is None or turn.cache is not cache or turn.tokens_read != self.tokens_read:
            raise InvalidArgumentError(
                "past_key_values is not what this decoder's latest generate() returned, or the streams have read on "
                "since: pass only the new text, which the streams continue with, and leave past_key_values out."
            )
        read = turn.sequences.to(input_ids.device)
        remedy = "Pass the conversation as generate() returned it with the new text behind it, or the new text alone"
        if input_ids.shape[0] != len(read) or input_ids.shape[1] <= cache.columns:
            raise InvalidArgumentError(
                f"input_ids is {tuple(input_ids.shape)}, but past_key_values stands for {len(read)} rows of "
                f"{cache.columns} tokens, of which it must be the continuation. {remedy}, without past_key_values."
            )
        odd = (input_ids[:, : cache.columns] != read).nonzero()
        if len(odd):
            row, column = odd[0].tolist()
            raise InvalidArgumentError(
                f"input_ids holds {int(input_ids[row, column])} in row {row} at column {column}, where the streams "
                f"have read {int(read[row, column])}: it is not the conversation that past_key_values stands for. "
                f"{remedy}, without past_key_values."
            )
        return cache.columns

    def _forked(self, rows: int) -> Streams:
        """Streams that will be dropped: one for each row, or all from a single one."""
        if self._streams is not None and len(self._streams.rows) == 1:
            return self._streams.fork([0] * rows)
        return self._streams_for(rows).fork(range(rows))
