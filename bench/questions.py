"""Many questions on one text: a memory, RAG as text, and full attention over a K-V cache.

A text hides pass keys, each with a name, and all of them are asked for. A memory and full attention read the text once
and then only the question; RAG as text embeds it once, and reads the retrieved chunks again for each question. What
that takes for one question, for all of them, and from which number of questions on the memory is faster:

    python bench/questions.py --text moby_dick.txt
    python bench/questions.py --text moby_dick.txt --length 65536 --keys 20 --json out/questions.json
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import Annotated, Any

import torch
import typer
from cells import table
from ratios import Clock, Ratio
from results import Budget, Report
from scipy.stats import binomtest
from systems import System, all_different, check_able, described
from torch import Tensor
from tqdm import tqdm
from transformers import LogitsProcessor

from memlong import MemoryConfig, load_model
from memlong.decoder import choose_machine
from memlong.errors import MemlongError
from memlong.evaluation import read_text
from memlong.evaluation.needle import Filler, named_keys_prompt, says

MEMORY, RAG, FULL = "memory", "RAG as text", "full attention"
_COLORS = ("red", "green", "blue", "white", "black", "silver", "golden", "purple")
_THINGS = (
    "anchor",
    "bridge",
    "candle",
    "drawer",
    "engine",
    "garden",
    "hammer",
    "kettle",
    "ladder",
    "mirror",
    "piano",
)
_ANSWER = 8  # tokens

Asked = tuple[Tensor, list[Tensor]]
"""A text [1, tokens] and questions [1, tokens] on it."""


@dataclass(frozen=True)
class Cost:
    """What a system did on one text.

    Attributes
    ----------
    right
        For each question, whether its key was the answer.
    read_seconds
        Time to read, or only to embed, the text.
    first_seconds, token_seconds
        Medians of the time from a question to the first token of its answer, and of each further token.
    kv_bytes
        Bytes of K-V held between questions, on the device and in the bank.
    """

    right: list[bool]
    read_seconds: float
    first_seconds: float
    token_seconds: float
    kv_bytes: int

    def seconds(self, questions: int) -> float:
        """Time to read the text and answer so many questions."""
        return self.read_seconds + questions * (self.first_seconds + (_ANSWER - 1) * self.token_seconds)


class Marks(LogitsProcessor):
    """Notes when each token of an answer is chosen."""

    def __init__(self, clock: Clock) -> None:
        self.times: list[float] = []
        self._clock = clock

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002 - as transformers calls it
        """Return scores unchanged."""
        scores[0, 0].item()  # waits for the device
        self.times.append(self._clock.now())
        return scores


def main(
    text: Annotated[Path, typer.Option(help="UTF-8 text to hide the keys in.")],
    model: Annotated[str, typer.Option(help="Hub id, folder, GGUF file, 'demo' or 'demo-gemma'.")] = "demo",
    length: Annotated[
        int, typer.Option(min=256, help="Tokens of the text with its longest question.")
    ] = 8000,
    keys: Annotated[
        int, typer.Option(min=1, max=len(_COLORS) * len(_THINGS), help="Keys, and so questions.")
    ] = 50,
    seeds: Annotated[int, typer.Option(min=1, help="Texts, each with other keys.")] = 1,
    system: Annotated[
        list[str] | None,
        typer.Option(metavar="'NAME: K=V, K=V'", help="Another system, by its settings; repeatable."),
    ] = None,
    clock: Annotated[Clock, typer.Option(help="'wall', or 'cpu': unaffected by other load.")] = Clock.WALL,
    dtype: Annotated[str, typer.Option(help="'float32', 'bfloat16', 'float16' or 'auto'.")] = "auto",
    device: Annotated[str, typer.Option(help="'cpu', 'cuda', 'cuda:N', 'mps' or 'auto'.")] = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result as JSON.")] = None,
) -> None:
    """Ask many questions on one text, and measure what each system takes."""
    dtype, device = choose_machine(dtype, device).names
    language_model, tokenizer = load_model(model, dtype=dtype, device=device)
    filler = Filler.of(tokenizer, read_text(text))
    systems = _systems(language_model, tokenizer, length, system or ())
    check_able(systems, language_model, tokenizer, ["generate", "be timed"])
    told = {
        "model": model,
        "dtype": dtype,
        "device": device,
        "text": text.name,
        "length": length,
        "keys": keys,
        "seeds": seeds,
        "systems": {each.name: each.settings for each in systems},
        "clock": clock,
    }
    report = Report(json_file, told, device, Budget())
    texts = (_questions(tokenizer, length, keys, seed, filler) for seed in range(seeds))
    with tqdm(total=seeds * keys * len(systems), unit="question") as bar:
        costs = _costs(language_model, tokenizer, systems, texts, clock, report, bar)
    rows = {name: _row(found, keys) for name, found in costs.items()}
    report.add({"rows": rows}, _ratios(rows))
    typer.echo(f"\n{length:,} tokens of {text.name}, {keys} questions on each of {seeds} texts\n")
    typer.echo(shown({"rows": rows, "keys": keys}))
    if even := _break_even(rows[MEMORY], rows[RAG]):
        typer.echo(f"From {even} questions on, the memory takes less time than RAG as text")
    report.end()


def shown(result: Mapping[str, Any]) -> str:
    """Return the table of a result."""
    head = ["system", "found", "read, s", "first token, s", "token, ms", "1 question, s"]
    head += [f"{result['keys']} questions, s", "K-V held, MB"]
    rows = [
        [
            name,
            f"{row['found']['value']:.0%} [{row['found']['low']:.0%}, {row['found']['high']:.0%}]",
            f"{row['read_seconds']:.1f}",
            f"{row['first_seconds']:.2f}",
            f"{1e3 * row['token_seconds']:.0f}",
            f"{row['one_question']:.1f}",
            f"{row['all_questions']:.1f}",
            f"{row['kv_bytes'] / 1e6:,.0f}",
        ]
        for name, row in result["rows"].items()
    ]
    return table(head, rows)


def _systems(model: Any, tokenizer: Any, length: int, typed: Sequence[str]) -> list[System]:
    """Return the systems; full attention is one where the model's positions reach to the end of an answer."""
    base = MemoryConfig()
    systems = [System(MEMORY, base), System(RAG, base, kind="text")]
    positions = systems[0].decoder(model, tokenizer).model_layout.max_positions
    if positions is None or length + _ANSWER <= positions:
        window = length + 2 * base.segment_size
        whole = MemoryConfig(backend=None, local_window=window, position_mode="original")
        systems.append(System(FULL, whole))
    return all_different([*systems, *(described(each, base) for each in typed)])


def _questions(tokenizer: Any, length: int, keys: int, seed: int, filler: Filler) -> tuple[Asked, list[str]]:
    """Return a text [1, tokens], questions [1, tokens] on it, and their answers."""
    draw = Random(seed)  # noqa: S311 - not for cryptography
    names = draw.sample([f"{color} {thing}" for color in _COLORS for thing in _THINGS], keys)
    named = dict(zip(names, draw.sample(range(10_000, 100_000), keys), strict=True))
    depths = [(number + 0.5) / keys for number in range(keys)]
    return named_keys_prompt(tokenizer, length, depths, named, filler), [str(key) for key in named.values()]


def _costs(
    model: Any,
    tokenizer: Any,
    systems: Sequence[System],
    texts: Iterable[tuple[Asked, list[str]]],
    clock: Clock,
    report: Report,
    bar: tqdm[Any],
) -> dict[str, list[Cost]]:
    """Ask each system on each text, and report what is known after each of them."""
    costs: dict[str, list[Cost]] = {each.name: [] for each in systems}
    for asked, answers in texts:
        for each in systems:
            bar.set_description(each.name)
            with each.decoder(model, tokenizer) as decoder:
                costs[each.name].append(_cost(decoder, asked, answers, clock, bar))
            report.add({"costs": {name: [asdict(cost) for cost in found] for name, found in costs.items()}})
    return costs


def _cost(decoder: Any, asked: Asked, answers: list[str], clock: Clock, bar: tqdm[Any]) -> Cost:
    text, questions = asked
    decoder.reset()
    started = clock.now()
    decoder.read(text)
    read = clock.now() - started
    held = decoder.device_kv_bytes + sum(bank.nbytes for bank in decoder.banks)
    right, first, further = [], [], []
    for question, answer in zip(questions, answers, strict=True):
        marks, started = Marks(clock), clock.now()
        said = decoder.generate(
            question,
            torch.ones_like(question),
            remember=False,
            do_sample=False,
            min_new_tokens=_ANSWER,
            max_new_tokens=_ANSWER,
            logits_processor=[marks],
        )
        right.append(says(decoder.tokenizer.decode(said[0, question.shape[1] :]), answer))
        first.append(marks.times[0] - started)
        further.append((marks.times[-1] - marks.times[0]) / (_ANSWER - 1))
        bar.update()
    return Cost(right, read, median(first), median(further), held)


def _row(found: list[Cost], keys: int) -> dict[str, Any]:
    """Join a system's texts: accuracy over all, with Wilson's 95 % interval, and medians of times."""
    right = [each for cost in found for each in cost.right]
    share = binomtest(sum(right), len(right)).proportion_ci(method="wilson")
    row = {
        name: median(getattr(cost, name) for cost in found)
        for name in ("read_seconds", "first_seconds", "token_seconds", "kv_bytes")
    }
    totals = {
        "one_question": median(cost.seconds(1) for cost in found),
        "all_questions": median(cost.seconds(keys) for cost in found),
    }
    accuracy = {"value": sum(right) / len(right), "low": share.low, "high": share.high}
    return {"found": accuracy, **row, **totals}


def _ratios(rows: Mapping[str, Mapping[str, Any]]) -> list[Ratio]:
    memory = rows[MEMORY]
    measures = {
        "one_question": "one question",
        "all_questions": "all questions",
        "first_seconds": "first token",
    }
    return [
        Ratio(f"{what}, {name} / {MEMORY}", row[measure] / memory[measure], at_least=True)
        for name, row in rows.items()
        if name != MEMORY
        for measure, what in measures.items()
    ]


def _break_even(memory: Mapping[str, float], rag: Mapping[str, float]) -> int | None:
    """Return from which number of questions on the memory takes less time; None if it never does."""
    of_each = (row["first_seconds"] + (_ANSWER - 1) * row["token_seconds"] for row in (rag, memory))
    gain = next(of_each) - next(of_each)
    lead = memory["read_seconds"] - rag["read_seconds"]
    return None if gain <= 0 else max(1, int(lead / gain) + 1)


if __name__ == "__main__":
    try:
        typer.run(main)
    except MemlongError as error:
        raise SystemExit(f"questions: {error}") from error
