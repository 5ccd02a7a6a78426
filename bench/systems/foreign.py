"""A control: a memory of another text, for what any keys and values at all give."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from memlong import MemoryBank, MemoryConfig, Segment
from memlong.bank import whole_number
from memlong.errors import InvalidArgumentError, InvalidTextError
from memlong.evaluation import read_text, tokenize
from systems.chosen import ChosenMemory

_TEXT = Path(sysconfig.get_path("stdlib")) / "argparse.py"  # that every machine has


class ForeignMemory(ChosenMemory):
    """A memory of which each chunk is replaced by the one that stands at the same place of a foreign text.

    That text is read first, from its own beginning, as a memory reads it. A chunk of it can be found once the chunk of
    the text itself has left the window, so that numbers of chunks, spans and positions are those of the memory.

    Parameters
    ----------
    model, tokenizer, config
        As for `MemoryDecoder`. Without a tokenizer, the foreign text is random.
    text
        File with the foreign text; a module of the standard library by default.
    tokens
        How much of it is read; no text that is measured may be longer. At original positions, at most as many as the
        model has.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        config: MemoryConfig,
        *,
        text: str | None = None,
        tokens: int = 8192,
    ) -> None:
        tokens = whole_number("tokens", tokens, at_least=1)
        if text is not None and not isinstance(text, str):
            raise InvalidArgumentError(f"text must be the path of a text file, got {text!r}")
        super().__init__(model, tokenizer, config)
        positions = self.model_layout.max_positions
        if self.memory.config.position_mode == "original" and positions is not None:
            tokens = min(tokens, positions)
        self._foreign: MemoryBank | None = None
        if tokenizer is None:
            generator = torch.Generator().manual_seed(1)  # other tokens than those of random texts
            self.foreign_ids = torch.randint(3, model.config.vocab_size, (1, tokens), generator=generator)
        else:
            self.foreign_ids = tokenize(tokenizer, read_text(text or _TEXT), tokens)

    @staticmethod
    def facts() -> dict[str, str]:
        """Return what a cached run depends on besides its options: the content of the default text."""
        return {"default text": hashlib.sha256(_TEXT.read_bytes()).hexdigest()}

    def stream(self, input_ids: Tensor, *, logits: Literal["all", "last"] = "all") -> Iterator[Segment]:
        """Read more of the text [1, tokens] segment by segment; the foreign text before anything else."""
        if self._foreign is None:
            self.memory.reset()
            self.memory.read(self.foreign_ids)
            self.memory.flush()
            (self._foreign,) = self.memory.banks
            self.reset()
        return super().stream(input_ids, logits=logits)

    def choose(self, bank: MemoryBank, query: Tensor) -> tuple[MemoryBank, Tensor, Tensor]:
        """Choose as a memory does, among the foreign chunks at the places of those that have left the window."""
        foreign = self._foreign
        assert foreign is not None  # noqa: S101 - the text is read after it
        if bank.next_id > foreign.next_id:
            raise InvalidTextError(
                f"The foreign text must be as long as the text, of which {bank.next_id} chunks have left the window, "
                f"got {foreign.next_id} chunks: give the system a longer one (text=FILE), or more of it (tokens=N)"
            )
        found = foreign.search(query[None], len(foreign))
        has_place = found.ids[0] < bank.next_id
        most = self.config.top_k
        return foreign, found.ids[0, has_place][:most], found.scores[0, has_place][:most]
