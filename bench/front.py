"""Quality against cost: gap closed, by time of reading and generating, and by bytes of K-V.

Gap closed is ln(window / it) / ln(window / ceiling) in perplexities on the same tokens, with paired intervals; the
ceiling is full attention within the model's trained length. Times are ratios to the plain window, measured in turns.
Losses are cached in --out, so that a run that was interrupted, or adds a system, continues from there; delete the
folder after changing memlong itself.

    python bench/front.py --text code --text moby_dick.txt
    python bench/front.py --text code --system 'shared 8: kv_source=shared, top_k=8' --chunks 8,24
    python bench/front.py --text code --system 'RAG as text 8: kind=text, top_k=8' --chunks 8
    python bench/front.py --text code --system '4 bits: kind=quantized-4' --chunks 8
    python bench/front.py --text code --system 'foreign 8: kind=foreign, top_k=8' --chunks 8 --no-times
    python bench/front.py --text code --reading token
    python bench/front.py --text moby_dick.txt --max-tokens 32768 --score-from 8192 --ceiling 'lm 32'
"""

from __future__ import annotations

import sysconfig
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from forced import generated_losses
from front_costs import measure
from front_picture import draw
from front_tables import PARTS, by_cost, by_text
from gap import Scored, gap_closed, key_tokens
from losses import digest, kept_losses, kept_path
from numpy.typing import NDArray
from ratios import Clock, Ratio
from results import Budget, Report
from shapes import MODEL_HELP, load, token_ids
from systems import FULL, System, all_different, built_in, check_able, described
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from memlong import MemoryConfig, MemoryDecoder
from memlong.cli.values import numbers
from memlong.decoder import choose_machine
from memlong.errors import InvalidArgumentError, InvalidTextError, MemlongError
from memlong.evaluation import evaluate_perplexity, long_range_tokens, read_text, tokenize

CODE = ("typing", "turtle", "_pydecimal", "rich.console", "_pytest.python", "matplotlib.axes._base")
PROSE = {".txt", ".md"}


class Reading(StrEnum):
    """How a text is read where it is scored."""

    SEGMENT = "segment"
    TOKEN = "token"  # noqa: S105 - of a text


@dataclass(frozen=True)
class Text:
    """A text's tokens [1, tokens], the first one that is scored, and which of the scored are long-range."""

    name: str
    input_ids: Tensor
    first: int
    distant: NDArray[np.bool_]

    @property
    def kind(self) -> str:
        """Which picture it belongs to."""
        return "prose" if Path(self.name).suffix in PROSE else "code"

    def parts(
        self, window: NDArray[np.float64], ceiling: NDArray[np.float64]
    ) -> dict[str, NDArray[np.bool_]]:
        """The tokens that count, by part; long-range ones and, by these losses, key tokens only if there are any."""
        found = {
            "all": np.ones_like(self.distant),
            "long_range": self.distant,
            "key": key_tokens(window, ceiling),
        }
        return {part: where for part, where in found.items() if where.any()}


@dataclass(frozen=True)
class Run:
    """The model, how it reads, and where losses are cached."""

    model: PreTrainedModel
    tokenizer: Any
    reading: Reading
    facts: dict[str, str]
    out: Path

    def about(self, system: System, text: Text) -> dict[str, Any]:
        """What the losses of a system on a text depend on."""
        how = {"reading": self.reading, "first": text.first} if self.reading is Reading.TOKEN else {}
        found = {"text": digest(text.input_ids), "tokens": text.input_ids.shape[1], "settings": system.facts}
        return {**self.facts, **found, **how}

    def losses(self, system: System, text: Text) -> NDArray[np.float64]:
        """Losses [scored] of a system on a text's scored tokens."""

        def measured() -> NDArray[np.float64]:
            count = text.input_ids.shape[1]
            with (
                system.decoder(self.model, self.tokenizer) as decoder,
                tqdm(total=count, unit="tok", desc=f"{text.name}: {system.name}") as bar,
            ):
                if self.reading is Reading.TOKEN:
                    return generated_losses(decoder, text.input_ids, count - text.first, bar.update)
                return evaluate_perplexity(decoder, text.input_ids, progress=bar.update).token_nll

        return kept_losses(self.out, self.about(system, text), measured)[-len(text.distant) :]


def main(
    text: Annotated[
        list[str] | None,
        typer.Option(help="UTF-8 text, or 'code' for six modules; repeatable. *.txt and *.md are prose."),
    ] = None,
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "demo",
    windows: Annotated[str, typer.Option(help="Plain windows, in tokens, comma-separated.")] = "2048,4096",
    chunks: Annotated[str, typer.Option(help="Chunks retrieved by memory.")] = "8,16,24,32,48,64",
    system: Annotated[
        list[str] | None,
        typer.Option(metavar="'NAME: K=V, K=V'", help="Another system, by its settings; repeatable."),
    ] = None,
    ceiling: Annotated[str, typer.Option(help="System that closes the gap.")] = FULL,
    local_window: Annotated[int, typer.Option(help="Local tokens attended to, the segment included.")] = 1024,
    position_mode: Annotated[
        str | None,
        typer.Option(
            help="Of memory  [default: 'original'; 'before-window' or 'zero' beyond the model's length]"
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Use the first N tokens of each text.")] = 8188,
    score_from: Annotated[
        int, typer.Option(min=1, help="Index of the first scored token, and of timing.")
    ] = 4096,
    reading: Annotated[
        Reading, typer.Option(help="'segment', or 'token': score the --last tokens as generation reads them.")
    ] = Reading.SEGMENT,
    last: Annotated[int, typer.Option(min=1, help="Tokens that --reading token scores.")] = 512,
    times: Annotated[
        bool, typer.Option(help="Whether to measure times and bytes, on the first text.")
    ] = True,
    clock: Annotated[Clock, typer.Option(help="'wall', or 'cpu': unaffected by other load.")] = Clock.WALL,
    seconds: Annotated[
        float | None, typer.Option(help="Approximate time limit in seconds; if too short, less is measured.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="'float32', 'bfloat16', 'float16' or 'auto'.")] = "auto",
    device: Annotated[str, typer.Option(help="'cpu', 'cuda', 'cuda:N', 'mps' or 'auto'.")] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for front.json, pictures and cached runs.")] = Path(
        "out/front"
    ),
) -> None:
    """Measure what each system closes of the gap to full attention, and what it costs."""
    out.mkdir(parents=True, exist_ok=True)
    dtype, device = choose_machine(dtype, device).names
    language_model, tokenizer = load(model, dtype=dtype, device=device)
    first = -last if reading is Reading.TOKEN else score_from
    texts = [
        _text(path, language_model, tokenizer, max_tokens, first, local_window)
        for path in _paths(text or ["code"])
    ]
    longest = max(each.input_ids.shape[1] for each in texts)
    plain = MemoryConfig(backend=None, local_window=local_window)
    positions = MemoryDecoder(language_model, tokenizer, plain).model_layout.max_positions
    fits = positions is None or longest <= positions
    counts = numbers("--chunks", chunks, int)
    mode: Any = position_mode or ("original" if fits else _mode_beyond(plain, max(counts), positions))
    base = MemoryConfig(local_window=local_window, position_mode=mode)
    systems = all_different(
        [
            *built_in(base, numbers("--windows", windows, int), counts, longest if fits else None),
            *(described(each, base) for each in system or ()),
        ]
    )
    if ceiling not in {each.name for each in systems}:
        why = "" if fits else f" (texts of {longest:,} tokens exceed the model's {positions:,} positions)"
        names = ", ".join(repr(each.name) for each in systems)
        raise InvalidArgumentError(f"--ceiling must be one of {names}, got {ceiling!r}{why}")
    check_able(systems, language_model, tokenizer, ["stream", *(["be timed"] if times else [])])
    if reading is Reading.TOKEN:
        check_able(systems, language_model, tokenizer, ["generate"])
    facts = {"model": model, "dtype": dtype, "device": device}
    run = Run(language_model, tokenizer, reading, facts, out)
    choices = {"reading": reading, "local_window": local_window, "score_from": score_from, "ceiling": ceiling}
    listed = {each.name: {"family": each.family, "settings": each.settings} for each in systems}
    told = {**facts, **choices, "systems": listed}
    report = Report(out / "front.json", told, device, Budget(seconds))
    result = _qualities(run, texts, systems, ceiling, report)
    result["systems"] = listed
    if times:
        measured = [
            each
            for each in systems
            if all(each.name in found["systems"] for found in result["texts"].values())
        ]
        decoders = {each.name: each.decoder(language_model, tokenizer) for each in measured}
        _costs(decoders, texts[0], score_from, clock, report, result)
    for each in texts:
        typer.echo(
            f"\n{each.name}: {len(each.distant):,} tokens, {each.distant.sum():,} of them long-range\n"
        )
        typer.echo(by_text(result, each.name))
    for kind, group in result["kinds"].items():
        typer.echo(f"\n{kind}: mean of {', '.join(group['texts'])}\n")
        typer.echo(by_cost(result, kind))
        if times:
            draw(result, kind, out / f"front_{kind}.png")
    report.end()
    typer.echo(f"Written: {out}")


def _mode_beyond(plain: MemoryConfig, most_chunks: int, positions: int) -> str:
    """Return the mode for texts beyond the model's length, one for memories of all sizes."""
    largest = replace(plain, backend="torch", top_k=most_chunks, position_mode="before-window")
    return "before-window" if largest.position_span <= positions else "zero"


def _costs(
    decoders: dict[str, Any],
    text: Text,
    score_from: int,
    clock: Clock,
    report: Report,
    result: dict[str, Any],
) -> None:
    """Measure what the systems cost, and add it to the report and the result."""
    found = measure(decoders, text.input_ids, score_from, clock, report)
    result["costs"] = {name: asdict(cost) for name, cost in found.items()}
    ratios = [
        Ratio(f"{what}, {name}", value)
        for name, cost in list(found.items())[1:]
        for what, value in (("reading", cost.reading), ("generating", cost.generating))
        if value is not None
    ]
    report.add({"clock": clock, "costs": result["costs"]}, ratios)


def _paths(given: list[str]) -> list[Path]:
    found: list[Path] = []
    for name in given:
        if name != "code":
            found.append(Path(name))
            continue
        for module in CODE:
            spec = find_spec(module) if "." in module else None
            origin = spec.origin if spec and spec.origin else f"{sysconfig.get_path('stdlib')}/{module}.py"
            found.append(Path(origin))
    names = [path.name for path in found]
    if len(set(names)) < len(names):
        twice = max(names, key=names.count)
        raise InvalidArgumentError(f"Texts must have different names, got {twice!r} twice: rename one")
    return found


def _text(
    path: Path, model: PreTrainedModel, tokenizer: Any, max_tokens: int, first: int, local_window: int
) -> Text:
    """Read a text; ``first`` is the first scored token, from the end if negative."""
    if tokenizer is None:
        input_ids = token_ids(model, None, path, max_tokens)
    else:
        input_ids = tokenize(tokenizer, read_text(path), max_tokens)
    count = input_ids.shape[1]
    begin = first if first > 0 else count + first
    if not 1 <= begin < count:
        raise InvalidTextError(
            f"{path.name} must have more tokens than --score-from or --last ({abs(first):,}), got {count:,}: lower it"
        )
    distant = long_range_tokens(input_ids[0].tolist(), local_window)[begin:]
    return Text(path.name, input_ids, begin, distant)


def _qualities(
    run: Run, texts: list[Text], systems: list[System], ceiling: str, report: Report
) -> dict[str, Any]:
    """By text and by kind of text: what each system has on all tokens and on long-range ones."""
    window = systems[0].name
    needed = [each for each in systems if each.name in (window, ceiling)]
    found: dict[str, Any] = {"texts": {}, "kinds": {}}
    nll: dict[str, dict[str, NDArray[np.float64]]] = {}
    for text in texts:
        nll[text.name] = mine = {}
        for each in [*needed, *(each for each in systems if each not in needed)]:
            is_kept = kept_path(run.out, run.about(each, text)).is_file()
            if report.budget.is_spent and each not in needed and not is_kept:
                report.leave_out(f"{text.name}, {each.name}")
                continue
            mine[each.name] = run.losses(each, text)
        nll[text.name] = mine = {each.name: mine[each.name] for each in systems if each.name in mine}
        rows = {
            name: {
                part: {
                    "perplexity": float(np.exp(losses[where].mean())),
                    "gap_closed": _gap([Scored(losses, mine[window], mine[ceiling], where)]),
                }
                for part, where in text.parts(mine[window], mine[ceiling]).items()
            }
            for name, losses in mine.items()
        }
        long_range = int(text.distant.sum())
        found["texts"][text.name] = {
            "kind": text.kind,
            "tokens": len(text.distant),
            "long_range_tokens": long_range,
            "systems": rows,
        }
        report.add({"texts": found["texts"]})
    for kind in dict.fromkeys(text.kind for text in texts):
        group = [text for text in texts if text.kind == kind]
        found["kinds"][kind] = {"texts": [text.name for text in group], "systems": {}}
        for each in systems:
            if all(each.name in nll[text.name] for text in group):
                found["kinds"][kind]["systems"][each.name] = {
                    part: _mean_gap(group, nll, each.name, window, ceiling, part) for part in (*PARTS, "key")
                }
    report.add({"kinds": found["kinds"]})
    return found


def _mean_gap(
    texts: list[Text],
    nll: dict[str, dict[str, NDArray[np.float64]]],
    name: str,
    window: str,
    ceiling: str,
    part: str,
) -> dict[str, float] | None:
    losses = []
    for text in texts:
        mine = nll[text.name]
        where = text.parts(mine[window], mine[ceiling]).get(part)
        if where is None:
            return None
        losses.append((mine, where))
    return _gap([Scored(mine[name], mine[window], mine[ceiling], where) for mine, where in losses])


def _gap(texts: list[Scored]) -> dict[str, float] | None:
    found = gap_closed(texts)
    return None if found is None else asdict(found)


if __name__ == "__main__":
    try:
        typer.run(main)
    except MemlongError as error:
        raise SystemExit(f"front: {error}") from error
