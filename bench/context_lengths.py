"""Perplexity by length of text: plain windows, full attention, memory, random chunks, and a trained decoder.

Each system streams a text once; its perplexity at a length is over the first that many tokens. Full attention stops at
the model's trained length. Per-token losses are cached in --out, so that a run that was interrupted, or adds a system,
continues from there; delete the folder after changing memlong itself.

    python bench/context_lengths.py --text moby_dick.txt --adapter examples/trained_demo
    python bench/context_lengths.py --text typing.py --text turtle.py --text _pydecimal.py --max-tokens 24576
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import numpy as np
import typer
from losses import digest, kept_losses
from matplotlib import pyplot as plt
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from memlong import MemoryConfig, MemoryDecoder, load_model
from memlong.cli.values import numbers
from memlong.decoder import choose_machine
from memlong.errors import InvalidArgumentError, InvalidTextError, MemlongError
from memlong.evaluation import evaluate_perplexity, long_range_tokens, perplexity_ratio, read_text, tokenize
from memlong.versions import versions

WINDOW, EQUAL, FULL = "plain window", "plain window, equal budget", "full attention"
LAYER, RANDOM = "memory", "random chunks"
TRAINED, TRAINED_RANDOM = "trained memory", "trained, random chunks"
MIN_LENGTH = 2  # the first token has no loss
LENGTHS = "1024,2048,4096,8192,16384,32768,65536"


@dataclass(frozen=True)
class System:
    """A system that streams a text, and the maximum length it can read."""

    name: str
    settings: dict[str, Any]
    open: Callable[[], MemoryDecoder]
    most_tokens: int | None = None


@dataclass(frozen=True)
class Losses:
    """Negative log-likelihood of tokens 1, 2, ... of a text, by system, and which of them are long-range."""

    text: str
    nll: dict[str, NDArray[np.float64]]
    distant: NDArray[np.bool_]


def main(
    text: Annotated[list[Path], typer.Option(help="UTF-8 text; repeatable.")],
    model: Annotated[str, typer.Option(help="Hub id, folder, GGUF file, or 'demo'.")] = "demo",
    adapter: Annotated[Path | None, typer.Option(help="Folder of a trained decoder.")] = None,
    system: Annotated[
        list[str] | None, typer.Option(help="Only systems with this name prefix; repeatable.")
    ] = None,
    retriever: Annotated[
        list[str] | None,
        typer.Option(help="Retriever by name; repeatable. The first is also used for --adapter."),
    ] = None,
    local_window: Annotated[int, typer.Option(help="Local tokens attended to, the segment included.")] = 1024,
    max_tokens: Annotated[int, typer.Option(help="Use the first N tokens of each text.")] = 65_536,
    lengths: Annotated[str, typer.Option(help="Lengths in tokens, comma-separated.")] = LENGTHS,
    score_from: Annotated[
        int, typer.Option(help="Index of the first token scored in the ratios over a whole text.")
    ] = 4096,
    dtype: Annotated[str, typer.Option(help="'float32', 'bfloat16', 'float16' or 'auto'.")] = "auto",
    device: Annotated[str, typer.Option(help="'cpu', 'cuda', 'cuda:N', 'mps' or 'auto'.")] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for the JSON file, the plot and cached runs.")] = Path(
        "out/context_lengths"
    ),
) -> None:
    """Measure perplexity by length of text."""
    out.mkdir(parents=True, exist_ok=True)
    dtype, device = choose_machine(dtype, device).names
    language_model, tokenizer = load_model(model, dtype=dtype, device=device)
    memory = MemoryConfig(local_window=local_window, position_mode="zero")
    retrievers = retriever or ["lm"]
    listed = _systems(language_model, tokenizer, memory, retrievers, adapter, dtype)
    chosen = [each for each in listed if not system or each.name.startswith(tuple(system))]
    if not chosen:
        raise InvalidArgumentError(
            f"--system must start one of {', '.join(repr(each.name) for each in listed)}, got {system}"
        )
    steps = numbers("--lengths", lengths, int)
    if min(steps) < MIN_LENGTH or score_from < 1:
        raise InvalidArgumentError(
            f"--lengths must be at least {MIN_LENGTH} and --score-from at least 1, as token 0 cannot be predicted, got "
            f"{lengths!r} and {score_from}"
        )
    names = [path.name for path in text]
    if len(set(names)) < len(names):
        twice = max(names, key=names.count)
        raise InvalidArgumentError(f"Texts must have different names, got {twice!r} twice: rename one")
    found = []
    for path in text:
        input_ids = tokenize(tokenizer, read_text(path), max_tokens)
        about = {
            "model": model,
            "dtype": dtype,
            "device": device,
            "text": digest(input_ids),
        }
        nll = {each.name: _losses(each, input_ids, about, path.name, out) for each in chosen}
        found.append(Losses(path.name, nll, long_range_tokens(input_ids[0].tolist(), local_window)[1:]))
    result = {
        "model": model,
        "retrievers": retrievers,
        "local_window": local_window,
        "score_from": score_from,
        "adapter": None if adapter is None else adapter.name,
        "versions": versions(),
        "texts": {each.text: _by_length(each, steps) for each in found},
        "ratios": {
            **{each.text: _ratios([each], score_from) for each in found},
            **({"all texts": _ratios(found, score_from)} if len(found) > 1 else {}),
        },
    }
    (out / "context_lengths.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    _print(result)
    _draw(result, out / "context_lengths.png")
    typer.echo(f"Written: {out / 'context_lengths.json'} and {out / 'context_lengths.png'}")


def _systems(
    model: Any, tokenizer: Any, memory: MemoryConfig, retrievers: list[str], adapter: Path | None, dtype: str
) -> list[System]:
    def plain(name: str, config: MemoryConfig, most: int | None = None) -> System:
        return System(name, asdict(config), lambda: MemoryDecoder(model, tokenizer, config), most)

    def trained(name: str, folder: Path, changes: dict[str, Any]) -> System:
        parts = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in parts)).hexdigest()
        return System(
            name,
            {"adapter": digest, **changes},
            lambda: MemoryDecoder.from_pretrained(  # its own model, as its weights may differ
                folder, changes=changes, dtype=dtype, device=str(model.device)
            ),
        )

    window = replace(memory, backend=None)
    positions = int(model.config.max_position_embeddings)
    retrieved = memory.chunk_size * memory.top_k
    random = {"retriever": "random", "retriever_options": {"seed": 0}}
    listed = [
        plain(WINDOW, window),
        plain(EQUAL, replace(window, local_window=memory.local_window + retrieved)),
        plain(FULL, replace(window, local_window=positions - memory.sink_tokens), positions),
        *(plain(f"{LAYER}, {name}", replace(memory, retriever=name)) for name in retrievers),
        plain(RANDOM, replace(memory, **random)),
    ]
    if adapter is not None:
        own = {"retriever": retrievers[0], "retriever_options": {}}
        listed += [trained(TRAINED, adapter, own), trained(TRAINED_RANDOM, adapter, random)]
    return listed


def _losses(
    system: System, input_ids: Any, about: dict[str, Any], text: str, out: Path
) -> NDArray[np.float64]:
    """Stream a text, or load the losses that an earlier run cached."""
    if system.most_tokens is not None:
        input_ids = input_ids[:, : system.most_tokens]

    def measure() -> NDArray[np.float64]:
        with (
            system.open() as decoder,
            tqdm(total=input_ids.shape[1], unit="tok", desc=f"{text}: {system.name}") as bar,
        ):
            return evaluate_perplexity(decoder, input_ids, progress=bar.update).token_nll

    return kept_losses(out, {**about, **system.settings, "tokens": input_ids.shape[1]}, measure)


def _by_length(losses: Losses, lengths: list[int]) -> dict[str, dict[str, dict[str, float]]]:
    """By system and length: perplexity of the first tokens, and its ratio to the plain window's."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, nll in losses.nll.items():
        found[name] = {}
        for length in [each for each in lengths if each - 1 <= len(nll)] or [len(nll) + 1]:
            some = nll[: length - 1]
            found[name][str(length)] = {"perplexity": float(np.exp(some.mean()))}
            if WINDOW in losses.nll:
                found[name][str(length)] |= asdict(perplexity_ratio(some, losses.nll[WINDOW][: length - 1]))
    return found


def _ratios(texts: list[Losses], score_from: int) -> dict[str, Any]:
    """By system, over all and over long-range tokens: perplexity, and its ratios to the baselines that were run."""
    first = score_from - 1
    if any(len(each.distant) <= first for each in texts):
        raise InvalidTextError(
            f"Texts must be longer than --score-from ({score_from}), got one that is not: lower it"
        )
    longest = {len(each.distant) for each in texts}
    names = [
        name
        for name in texts[0].nll
        if all(len(each.nll[name]) == len(each.distant) for each in texts) and longest
    ]
    nll = {name: np.concatenate([each.nll[name][first:] for each in texts]) for name in names}
    distant = np.concatenate([each.distant[first:] for each in texts])
    found: dict[str, Any] = {}
    for name in names:
        found[name] = {}
        for kind, where in (("all", np.ones_like(distant)), ("long_range", distant)):
            if not where.any():
                continue
            baselines = [WINDOW, EQUAL, TRAINED_RANDOM if name == TRAINED else RANDOM]
            found[name][kind] = {
                "tokens": int(where.sum()),
                "perplexity": float(np.exp(nll[name][where].mean())),
                **{
                    f"to {baseline}": asdict(perplexity_ratio(nll[name], nll[baseline], where=where))
                    for baseline in baselines
                    if baseline in nll and baseline != name
                },
            }
    return found


def _print(result: dict[str, Any]) -> None:
    console = Console(width=200)
    for text, systems in result["texts"].items():
        lengths = sorted({length for rows in systems.values() for length in rows}, key=int)
        for title, cell in (
            ("perplexity of the first tokens", _perplexity),
            ("ratio to the plain window", _ratio),
        ):
            typer.echo(f"\n{text}: {title}\n")
            table = Table("system", *(f"{int(length):,}" for length in lengths), box=box.MARKDOWN)
            for name, rows in systems.items():
                table.add_row(name, *(cell(rows[length]) if length in rows else "" for length in lengths))
            console.print(table)
    for text, systems in result["ratios"].items():
        for kind in ("all", "long_range"):
            rows = {name: kinds[kind] for name, kinds in systems.items() if kind in kinds}
            if not rows:
                continue
            count = next(iter(rows.values()))["tokens"]
            typer.echo(f"\n{text}: {count:,} {'long-range ' if kind == 'long_range' else ''}tokens\n")
            table = Table(
                "system", "perplexity", "to window", "to equal budget", "to random", box=box.MARKDOWN
            )
            for name, row in rows.items():
                random = f"to {TRAINED_RANDOM if name == TRAINED else RANDOM}"
                ratios = (_ratio(row.get(key)) for key in (f"to {WINDOW}", f"to {EQUAL}", random))
                table.add_row(name, _perplexity(row), *ratios)
            console.print(table)
    typer.echo("\nRatios with 95 % intervals (paired block bootstrap).")


def _perplexity(cell: dict[str, float]) -> str:
    value = cell["perplexity"]
    return f"{value:.{3 if value < 10 else 2 if value < 100 else 1}f}"


def _ratio(cell: dict[str, float] | None) -> str:
    if cell is None or "value" not in cell:
        return ""
    if cell["low"] == cell["high"] == 1.0:  # itself
        return "1"
    return f"{cell['value']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}]"


def _draw(result: dict[str, Any], path: Path) -> None:
    mpl.use("Agg")
    texts = result["texts"]
    figure, axes = plt.subplots(
        1, len(texts), figsize=(2 + 5 * len(texts), 4.5), layout="constrained", squeeze=False
    )
    for axis, (text, systems) in zip(axes[0], texts.items(), strict=True):
        for name, rows in systems.items():
            lengths = sorted(map(int, rows))
            axis.plot(
                lengths, [rows[str(length)]["perplexity"] for length in lengths], marker="o", label=name
            )
        axis.set_xscale("log", base=2)
        axis.set(title=text, xlabel="tokens", ylabel="perplexity of the first tokens")
    axes[0][-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    try:
        typer.run(main)
    except MemlongError as error:
        raise SystemExit(f"context_lengths: {error}") from error
