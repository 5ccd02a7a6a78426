"""Train what RAG as text lacks: a model that answers from chunks in its prompt, on the facts a memory is trained on.

Episodes are those of `memlong train --mix`. Each question is read after the chunks that `lm` retrieves for it, as text,
and up to 128 tokens of what stood before it. Only answers are trained, by LoRA on all linear layers, which is merged
into the model in the end. The folder is a model of its own:

    python bench/text_reader.py --text addresses.txt --text argparse.py --text tarfile.py --out reader
    python bench/recall.py --model reader --text essays.txt --chunks text --segment-size 128 --top-k 2
    python bench/questions.py --model reader --text essays.txt
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from peft import LoraConfig, get_peft_model
from systems.rag import RagAsText
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from memlong import MemoryConfig, Passage, load_model
from memlong.errors import InvalidArgumentError, MemlongError
from memlong.evaluation import read_text, tokenize
from memlong.training.documents import Episode
from memlong.training.recall import RecallEpisodes

_CONFIG = MemoryConfig(local_window=512, segment_size=128, top_k=2)
_KINDS = {"needles": 2, "dictionary": 2, "variables": 3}  # shares
_MOST_WINDOW = 128  # tokens
_POOL = 200  # examples, of several episodes
_IGNORED = -100

Example = tuple[Tensor, Tensor]
"""Token ids [tokens], and what is to be predicted after each [tokens], -100 where nothing is."""


def main(
    text: Annotated[list[Path], typer.Option(help="File to hide facts in; repeatable.")],
    out: Annotated[Path, typer.Option(help="Folder for the model.")],
    model: Annotated[str, typer.Option(help="Hub id, folder, GGUF file, or 'demo'.")] = "demo",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 200,
    rows: Annotated[int, typer.Option(min=1, help="Questions of a step.")] = 4,
    tokens: Annotated[int, typer.Option(min=1024, help="Tokens of an episode.")] = 4096,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 5e-4,
    rank: Annotated[int, typer.Option(min=1, help="LoRA rank.")] = 32,
    dtype: Annotated[str, typer.Option(help="'float32', 'bfloat16' or 'auto'.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0,
) -> None:
    """Train it, and save it."""
    plain, tokenizer = load_model(model, dtype=dtype, device="cpu")
    filler = [tokenize(tokenizer, read_text(path))[0] for path in text]
    reader = trained(
        plain, examples(RagAsText(plain, tokenizer, _CONFIG), filler, tokens, seed), steps, rows, lr, rank
    )
    reader.save_pretrained(out)
    tokenizer.save_pretrained(out)
    typer.echo(f"Written: {out}")


def trained(
    model: PreTrainedModel, given: Iterator[Example], steps: int, rows: int, lr: float, rank: int
) -> PreTrainedModel:
    """Return the model after steps on so many examples each."""
    torch.manual_seed(0)
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    reader: Any = get_peft_model(model, lora)
    weights = [each for each in reader.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    with tqdm(range(steps), unit="step") as bar:
        for _ in bar:
            ids, targets = (
                pad_sequence(list(each), batch_first=True, padding_value=_IGNORED)
                for each in zip(*(next(given) for _ in range(rows)), strict=True)
            )
            asked = targets != _IGNORED
            states = model.base_model(ids.clamp_min(0)).last_hidden_state[asked]
            loss = cross_entropy(model.get_output_embeddings()(states).float(), targets[asked])
            loss.backward()
            clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.set_postfix_str(f"loss {loss.item():.3f}")
    merged: PreTrainedModel = reader.merge_and_unload()
    return merged


def examples(rag: RagAsText, filler: Sequence[Tensor], tokens: int, seed: int) -> Iterator[Example]:
    """Yield questions with their chunks before them, without end, of several episodes in a random order."""
    random = np.random.default_rng(seed)
    sources = {
        kind: RecallEpisodes(
            kind,
            rag.tokenizer,
            filler,
            tokens=tokens,
            segment_size=rag.config.segment_size,
            local_window=rag.config.local_window,
            seed=seed,
            questions=2,
        )
        for kind in _KINDS
    }
    shares = np.array([*_KINDS.values()]) / sum(_KINDS.values())
    pool: list[Example] = []
    number = 0
    while True:
        while len(pool) < _POOL:
            kind = str(random.choice([*_KINDS], p=shares))
            pool += _asked(rag, sources[kind][number], random)
            number += 1
            if not pool and number >= _POOL:
                raise InvalidArgumentError(
                    f"--tokens must leave {rag.config.top_k} chunks before a question, got {tokens}: raise it"
                )
        yield pool.pop(int(random.integers(len(pool))))


def _asked(rag: RagAsText, episode: Episode, random: np.random.Generator) -> Iterator[Example]:
    config = rag.config
    rag.reset()
    rag.read(episode.tokens[None])
    for start, query in episode.queries.items():
        weights = episode.weights[start : start + config.segment_size]
        prompt = rag.prompt(start, start, Passage(tuple(query), start), is_focused=True)
        departed = -(-(start - config.sink_tokens - config.window_past) // config.chunk_size)
        if departed < config.top_k or not weights.any():
            continue  # fewer chunks have left the window, or the episode ends here
        window = len(prompt) - config.sink_tokens - config.top_k * config.chunk_size
        before = int(random.integers(min(window, _MOST_WINDOW) + 1))
        kept = [*prompt[: len(prompt) - window], *prompt[len(prompt) - before :]]
        count = int(weights.nonzero()[-1]) + 1
        new = episode.tokens[start : start + count]
        targets = torch.where(weights[:count] > 0, new, _IGNORED)
        ids = torch.cat([torch.tensor(kept), new])
        yield ids[:-1], torch.cat([torch.full((len(kept) - 1,), _IGNORED), targets])


if __name__ == "__main__":
    try:
        typer.run(main)
    except MemlongError as error:
        raise SystemExit(f"text_reader: {error}") from error
