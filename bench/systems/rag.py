"""RAG as text: retrieved chunks are put into the prompt as text, and read again for each segment or question."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from memlong import MemoryConfig, Passage, Segment
from memlong.decoder import Likelihood, create_retriever
from memlong.errors import InvalidArgumentError
from systems.alternative import Alternative


class RagAsText(Alternative):
    """What most people do instead of a memory.

    Chunks, queries and retriever are those of a memory with the same configuration, and the prompt of a segment holds
    what that would attend to, sink tokens included; but the model reads all of it again, at plain positions. A question
    retrieves once.

    Parameters
    ----------
    model, tokenizer, config
        As for `MemoryDecoder`.

    Raises
    ------
    InvalidArgumentError
        If the retriever reranks or does not compare by cosine, as this class searches without a bank.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, config: MemoryConfig) -> None:
        self.retriever = create_retriever(config.retriever, model, tokenizer, config.retriever_options)
        if self.retriever.metric != "cosine" or self.retriever.candidates:
            raise InvalidArgumentError(
                f"RAG as text needs a retriever that compares by cosine and does not rerank, got {config.retriever!r}"
            )
        super().__init__(model, tokenizer, config)

    def reset(self) -> None:
        """Begin a new stream."""
        self._read: list[int] = []
        self._embeddings = torch.empty(0, self.retriever.dim)

    def read(self, input_ids: Tensor) -> None:
        """Note more of the text [1, tokens], and embed what leaves the window; the model reads where something asks."""
        self._read += input_ids[0].tolist()
        self._departed(len(self._read))

    def stream(self, input_ids: Tensor, *, logits: Literal["all", "last"] = "all") -> Iterator[Segment]:
        """Read text segment by segment; of segments whose logits nobody asks for, only the last."""
        pending, size = input_ids[0].tolist(), self.config.segment_size
        while pending:
            start = len(self._read)
            count = min(len(pending), size - start % size)
            new, pending = pending[:count], pending[count:]
            if logits == "all" or not pending:
                begin = start - start % size
                prompt = self.prompt(begin, start, self._query(begin, self.config.query_length))
                found = self.logits(prompt + new)[:, -count:]
            else:
                found = torch.empty(1, 0, 0)
            self._read += new
            tokens = torch.arange(start, start + count)[None]
            yield Segment(torch.tensor([new]), tokens, found if logits == "all" else found[:, -1:], (None,))

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:  # noqa: ARG002
        """Answer a prompt [1, tokens] with chunks that its end asks for; the stream stays where it is."""
        options.pop("remember", None)
        return self._continued(input_ids, self.asked(input_ids[0].tolist()), options)

    def score(self, input_ids: Tensor, continuations: Sequence[Sequence[int]], **_: Any) -> list[Likelihood]:
        """Return how likely continuations of a prompt [1, tokens] are; the prompt is read for each."""
        prompt = self.asked(input_ids[0].tolist())
        found = []
        for tokens in continuations:
            wanted = torch.tensor(list(tokens), dtype=torch.long)
            logits = self.logits(prompt + wanted.tolist())[0, len(prompt) - 1 : -1].float().cpu()
            likelihoods = logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0]
            found.append(Likelihood(likelihoods, logits.argmax(-1) == wanted))
        return found

    def prompt(
        self, begin: int, end: int, query: Passage, *, is_focused: bool = False, cutoff: float = 0.0
    ) -> list[int]:
        """Return what is read of the text before token ``end``: sinks, chunks in their order, and the window.

        Chunks leave the window as they do where a segment begins at ``begin``. Those that score less than ``cutoff``
        times as high as the best one are left out.
        """
        config, read = self.config, self._read
        chunks = self._departed(begin)
        if not chunks:
            return read[:end]
        stored = self._embeddings[: len(chunks)]
        asked = self._embedded(query, stored, is_focused=is_focused)
        scores = (normalize(asked.float(), dim=1) @ stored.T)[0]
        # Of equal ones, the first, as in a bank.
        best = scores.sort(descending=True, stable=True).indices[: config.top_k]
        if cutoff and scores[best[0]] > 0:
            best = best[scores[best] >= cutoff * scores[best[0]]]
        text = [token for number in sorted(best.tolist()) for token in chunks[number].token_ids]
        window = config.sink_tokens + len(chunks) * config.chunk_size
        return read[: config.sink_tokens] + text + read[window:end]

    def _departed(self, begin: int) -> list[Passage]:
        """Return the chunks that have left the window where a segment begins at ``begin``, all of them embedded."""
        held = begin - self.config.sink_tokens - self.config.window_past
        chunks = [self._chunk(number) for number in range(max(0, -(-held // self.config.chunk_size)))]
        if len(chunks) > len(self._embeddings):
            new = self.retriever.embed_chunks(list(map(self._overlapping, chunks[len(self._embeddings) :])))
            self._embeddings = torch.cat([self._embeddings, normalize(new.float(), dim=1)])
        return chunks

    def _embedded(self, query: Passage, stored: Tensor, *, is_focused: bool) -> Tensor:
        if is_focused:
            # As a bank does, of no more than 1,024 chunks.
            mean = stored[:: -(-len(stored) // 1024)].mean(dim=0, keepdim=True)
            asked = self.retriever.embed_focus([query], mean, [len(stored)])
            if asked.any():
                return asked
        return self.retriever.embed_queries([query.latest])

    def asked(self, prompt: list[int]) -> list[int]:
        """Return a prompt with what its end retrieves before it."""
        kept, embeddings, config = len(self._read), self._embeddings, self.config
        self._read += prompt
        try:
            end = len(self._read)
            # A memory reads the end again; what left the window before that does not come back.
            again = end - max(1, config.segment_size - config.retrieval_interval)
            begin = max(again, (end - 1) // config.segment_size * config.segment_size)
            query = self._query(end, config.answer_query_length)
            query = replace(query, half_life=config.focus_tokens or None)
            return self.prompt(
                begin, end, query, is_focused=config.focus_tokens > 0, cutoff=config.answer_cutoff
            )
        finally:
            del self._read[kept:]
            self._embeddings = embeddings  # some may be of the prompt

    def _query(self, end: int, length: int) -> Passage:
        start = max(0, end - length)
        return Passage(tuple(self._read[start:end]), start)

    def _overlapping(self, chunk: Passage) -> Passage:
        """Return what the embedding of a chunk covers."""
        start = max(0, chunk.start - self.config.overlap_length)
        return Passage(tuple(self._read[start : chunk.end]), start)

    def _chunk(self, number: int) -> Passage:
        start = self.config.sink_tokens + number * self.config.chunk_size
        return Passage(tuple(self._read[start : start + self.config.chunk_size]), start)
