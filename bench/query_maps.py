"""What trained query maps give, on texts that they were not trained on.

For each text: perplexity with the retriever, with each query map, and with random chunks, on the same tokens.
And how good a single choice is: of what the best of some chunks gives a segment over random ones, when each is tried
alone, how much does the chunk give that is most similar to the query? Brackets are paired 95 % intervals.

    memlong train-retriever --model demo --text train.txt --segment-size 128 --out map.safetensors
    python bench/query_maps.py --map trained=map.safetensors --text typing.py --text moby_dick.txt
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from results import Report
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from memlong import MemoryConfig, MemoryDecoder, load_model
from memlong.decoder import choose_machine
from memlong.errors import InvalidArgumentError, MemlongError
from memlong.evaluation import Perplexity, evaluate_perplexity, perplexity_ratio, read_text, tokenize
from memlong.training import QueryMap, Tries, gain_share, gains, try_chunks

_SAMPLES = 1000


def main(
    text: Annotated[list[Path], typer.Option(help="UTF-8 text that no map was trained on; repeatable.")],
    maps: Annotated[list[str], typer.Option("--map", metavar="NAME=FILE", help="A map; repeatable.")],
    model: Annotated[str, typer.Option(help="Hub id, folder, GGUF file, or 'demo'.")] = "demo",
    retriever: Annotated[str, typer.Option(help="The retriever that the maps are of.")] = "lm",
    segment_size: Annotated[int, typer.Option(help="Tokens of a segment, and of a query.")] = 128,
    max_tokens: Annotated[int, typer.Option(help="Use the first N tokens for perplexity.")] = 8192,
    score_from: Annotated[int, typer.Option(help="Index of the first scored token.")] = 2048,
    tried_tokens: Annotated[int, typer.Option(help="Try chunks in the first N tokens; 0 for none.")] = 5120,
    dtype: Annotated[str, typer.Option(help="'float32', 'bfloat16', 'float16' or 'auto'.")] = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results here.")] = None,
) -> None:
    """Compare a retriever with and without trained query maps."""
    files = dict(each.split("=", 1) for each in maps if "=" in each)
    if len(files) < len(maps):
        raise InvalidArgumentError(f"--map must be NAME=FILE, each name once, got {', '.join(maps)}")
    dtype, device = choose_machine(dtype).names
    language_model, tokenizer = load_model(model, dtype=dtype, device=device)
    plain = MemoryConfig(retriever=retriever, segment_size=segment_size)
    if used := files.keys() & {"random", "retriever"}:
        raise InvalidArgumentError(f"--map must have a name of its own, got {sorted(used)[0]!r}")
    systems = {
        "random": replace(plain, retriever="random"),
        "retriever": plain,
        **{name: replace(plain, query_map=file) for name, file in files.items()},
    }
    about = {"model": model, "retriever": retriever, "segment_size": segment_size, "dtype": dtype}
    about |= {"tokens": max_tokens, "score_from": score_from, "tried_tokens": tried_tokens}
    report = Report(json_file, about, device)
    rows: list[dict[str, Any]] = []
    for path in text:
        input_ids = tokenize(tokenizer, read_text(path))
        row: dict[str, Any] = {"text": path.name}
        if tried_tokens:
            tries = _tries(
                MemoryDecoder(language_model, tokenizer, plain), input_ids[:, :tried_tokens], path.name
            )
            row |= {"segments": len(tries), "shares": _shares(tries, files)}
        measured: dict[str, Perplexity] = {}
        for name, config in systems.items():
            decoder = MemoryDecoder(language_model, tokenizer, config)
            with decoder, tqdm(total=max_tokens, unit="tok", desc=f"{path.name}, {name}", leave=False) as bar:
                measured[name] = evaluate_perplexity(
                    decoder, input_ids[:, :max_tokens], score_from=score_from, progress=bar.update
                )
        row["systems"] = {name: _compared(each, measured) for name, each in measured.items()}
        rows.append(row)
        report.add({"rows": rows})
        _print(row)
    report.end()


def _tries(decoder: MemoryDecoder, input_ids: Tensor, name: str) -> Tries:
    with decoder, tqdm(total=input_ids.shape[1], unit="tok", desc=f"{name}, trying", leave=False) as bar:
        return try_chunks(decoder, [input_ids], progress=bar.update)


def _shares(tries: Tries, files: dict[str, str]) -> dict[str, dict[str, float]]:
    """Return the shares of the retriever and of each map, with intervals over segments; the same ones for all."""
    drawn = np.random.default_rng(0).integers(0, len(tries), (_SAMPLES, len(tries)))
    found = {}
    for name, file in {"retriever": None, **files}.items():
        query_map = None if file is None else QueryMap.load(file)
        parts = gains(tries, query_map).numpy()
        gained, possible = parts[drawn].sum(axis=1).T
        low, high = np.quantile(gained / possible, [0.025, 0.975])
        found[name] = {"value": gain_share(tries, query_map), "low": float(low), "high": float(high)}
    return found


def _compared(found: Perplexity, others: dict[str, Perplexity]) -> dict[str, Any]:
    against = {name: others[name] for name in ("retriever", "random") if name in others}
    return {
        "perplexity": found.perplexity,
        "long_range_perplexity": found.long_range_perplexity,
        **{
            f"to {name}": asdict(perplexity_ratio(found.token_nll, other.token_nll))
            for name, other in against.items()
        },
    }


def _print(row: dict[str, Any]) -> None:
    table = Table(row["text"], "share", "perplexity", "to retriever", "to random", box=box.MARKDOWN)
    for name, found in row["systems"].items():
        share = row.get("shares", {}).get(name)
        ratios = (found["to retriever"], found["to random"])
        table.add_row(
            name,
            "" if share is None else f"{share['value']:.0%} [{share['low']:.0%}, {share['high']:.0%}]",
            f"{found['perplexity']:.3f}",
            *(f"{each['value']:.3f} [{each['low']:.3f}, {each['high']:.3f}]" for each in ratios),
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    try:
        typer.run(main)
    except MemlongError as error:
        raise SystemExit(f"query_maps: {error}") from error
