"""RAG as text over corpora: `memlong ask`, but retrieved chunks are put into the prompt as text, and read again.

The chunks are those of the corpora, found by the retriever that stored them, or by a sentence-transformers model, which
embeds all of them once. Options and JSON are those of `memlong ask`, as far as they matter here. With ``--top-k 0``,
it is the model without a memory.

    python bench/passages.py --memory out/moby --memory out/addresses --prompts prompts.json --json -
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import LogitsProcessor

from memlong import (
    LayeredBank,
    MemoryBank,
    MemoryConfig,
    Passage,
    Retriever,
    create_bank,
    load_bank,
    load_model,
)
from memlong.bank.snapshot.manifest import has_manifest
from memlong.corpus import Corpus
from memlong.decoder import create_retriever
from memlong.errors import InvalidArgumentError, MemlongError
from memlong.evaluation import tokenize

_AT_ONCE = 64  # chunks embedded at a time


class Clock(LogitsProcessor):
    """Notes when the first token of an answer is chosen."""

    def __init__(self) -> None:
        self.first: float | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002 - as transformers calls it
        """Return scores unchanged."""
        self.first = self.first or time.perf_counter()
        return scores


class Shelf:
    """Corpora, of which a retriever finds passages.

    Parameters
    ----------
    corpora
        The corpora.
    retriever
        What made the embeddings in the banks.
    banks
        Those of the corpora, or others with one chunk for each of theirs, in the same order.

    Raises
    ------
    InvalidArgumentError
        If the retriever reranks.
    """

    def __init__(self, corpora: Sequence[Corpus], retriever: Retriever, banks: Sequence[MemoryBank]) -> None:
        if retriever.candidates:
            raise InvalidArgumentError(
                f"{type(retriever).__name__} reranks what a bank finds, and this does not: name another --retriever"
            )
        self._corpora, self._retriever = corpora, retriever
        self._bank = LayeredBank(create_bank("torch", retriever.dim, metric=retriever.metric), banks)
        self._own = [
            (bank.ids.tolist(), corpus.bank.ids) for bank, corpus in zip(banks, corpora, strict=True)
        ]

    def find(self, question: Sequence[int], top_k: int, focus_tokens: int) -> list[list[int]]:
        """Return the tokens of the best chunks, in the order of the corpora, consecutive ones together.

        The end of the question asks, as that of a prompt does in a memory, or, if ``focus_tokens`` is 0, all of it.
        """
        length = (
            MemoryConfig(focus_tokens=focus_tokens).answer_query_length if focus_tokens else len(question)
        )
        query = Passage(tuple(question[-length:]), 0, focus_tokens or None)
        asked = self._retriever.embed_focus([query], self._bank.mean_embedding()[None], [len(self._bank)])
        if not focus_tokens or not asked.any():
            asked = self._retriever.embed_queries([query.latest])
        found = sorted(self._bank.search(asked, top_k).ids[0].tolist())
        texts: list[list[int]] = []
        before = None
        for each in found:
            layer, own = int(self._bank.layer_of([each])), int(self._bank.own_ids([each]))
            corpus = self._corpora[layer]
            ids, theirs = self._own[layer]
            chunk = int(theirs[ids.index(own)])
            document = corpus.document_of(chunk)
            if document is None:
                continue
            span = corpus.bank.spans_of([chunk])[0].tolist()
            first, last = document.span_in_text(*span)
            tokens = corpus.tokens_of(document.source)[first:last].tolist()
            if before == (document.source, each - 1):
                texts[-1] += tokens
            else:
                texts.append(tokens)
            before = document.source, each
        return texts


def main(
    memory: Annotated[list[Path], typer.Option(help="Corpus; repeatable.")],
    prompts: Annotated[Path, typer.Option(help="JSON list of texts to continue.")],
    model: Annotated[str, typer.Option(help="Hub id, folder, 'demo' or 'demo-gemma'.")] = "demo",
    retriever: Annotated[str | None, typer.Option(help="Another retriever than that of the corpora.")] = None,
    top_k: Annotated[int, typer.Option(min=0, help="Chunks in the prompt; 0 for the plain model.")] = 8,
    focus_tokens: Annotated[
        int, typer.Option(min=0, help="Half-life of a query's tokens; 0 for all of the prompt.")
    ] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 20,
    json_file: Annotated[Path, typer.Option("--json", help="Result; - for stdout.")] = Path("-"),
) -> None:
    """Answer prompts with the passages of corpora as text, each prompt alone."""
    questions: list[str] = json.loads(prompts.read_text(encoding="utf-8"))
    language_model, tokenizer = load_model(model, dtype="float32", device="cpu")
    shelf = _shelf(memory, retriever, language_model, tokenizer) if top_k else None
    newline = tokenize(tokenizer, "\n", begins=False)[0].tolist()[-1:]
    answers = []
    for words in questions:
        started, clock = time.perf_counter(), Clock()
        question = tokenize(tokenizer, words)[0].tolist()
        texts = shelf.find(question, top_k, focus_tokens) if shelf else []
        prompt = [token for text in texts for token in [*text, *newline]] + question
        said = _continued(language_model, prompt, clock, max_new_tokens)
        ended, first = time.perf_counter(), clock.first or started
        answers.append(
            {
                "prompt": words,
                "answer": tokenizer.decode(said, skip_special_tokens=True),
                "prompt_tokens": len(prompt),
                "new_tokens": len(said),
                "seconds_to_first_token": first - started,
                "seconds_per_token": (ended - first) / (len(said) - 1) if len(said) > 1 else None,
                "passages": [tokenizer.decode(text) for text in texts],
            }
        )
    result = json.dumps({"model": model, "answers": answers}, indent=2)
    if json_file == Path("-"):
        typer.echo(result)
    else:
        json_file.write_text(result + "\n", encoding="utf-8")


@torch.no_grad()
def _continued(model: Any, prompt: list[int], clock: Clock, most: int) -> list[int]:
    ids = torch.tensor([prompt])
    said = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=most,
        logits_processor=[clock],
        pad_token_id=model.config.eos_token_id,
    )
    new: list[int] = said[0, len(prompt) :].tolist()
    return new


def _shelf(folders: Sequence[Path], name: str | None, model: Any, tokenizer: Any) -> Shelf:
    corpora = [Corpus.load(folder) for folder in folders]
    config = MemoryConfig(**{"embedding_overlap": 0, **corpora[0].notes["settings"]})
    if name is None:
        retriever = create_retriever(config.retriever, model, tokenizer, config.retriever_options)
        return Shelf(corpora, retriever, [corpus.bank for corpus in corpora])
    retriever = create_retriever(name, model, tokenizer)
    overlap = config.overlap_length
    return Shelf(corpora, retriever, [_embedded(corpus, retriever, name, overlap) for corpus in corpora])


def _embedded(corpus: Corpus, retriever: Retriever, name: str, overlap: int) -> MemoryBank:
    """Return a bank with another retriever's embeddings of a corpus's chunks; made once, next to the corpus.

    The folder is named after what the chunks are, so that embeddings of what the corpus had before are not taken.
    """
    assert corpus.folder is not None  # noqa: S101 - it was loaded
    ids = corpus.bank.ids
    documents = [(each.digest, each.first_id, each.chunks) for each in corpus.documents]
    chunks = json.dumps([documents, ids.tolist(), corpus.bank.spans_of(ids).tolist(), overlap])
    state = hashlib.sha256(chunks.encode()).hexdigest()[:16]
    folder = corpus.folder.with_name(f"{corpus.folder.name}.{name.replace('/', '-')}.{state}")
    if has_manifest(folder):
        return load_bank(folder)
    bank = create_bank("torch", retriever.dim, metric=retriever.metric)
    for some in ids.split(_AT_ONCE):
        passages = []
        spans = corpus.bank.spans_of(some)
        for chunk, (start, end) in zip(some.tolist(), spans.tolist(), strict=True):
            document = corpus.document_of(chunk)
            first, last = document.span_in_text(start, end) if document else (0, 0)
            first = max(0, first - overlap)
            tokens = corpus.tokens_of(document.source)[first:last].tolist() if document else []
            passages.append(Passage(tuple(tokens), start))
        nothing = torch.zeros(len(some), 1, 1, 1, 1)
        bank.add(retriever.embed_chunks(passages), nothing, nothing, spans)
    bank.save(folder)
    return bank


if __name__ == "__main__":
    try:
        typer.run(main)
    except MemlongError as error:
        raise SystemExit(f"passages: {error}") from error
