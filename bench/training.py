"""Speed of `memlong train`: tokens per second by rows, segment size, K-V source, and with or without gates.

The text is random, as are the weights by default; training on real ones costs the same. Steps before the first
retrieval are not counted.

    python bench/training.py --model random-135m --device cuda --json out/training.json
    python bench/training.py --model random-tiny --steps 2
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from ratios import Ratio
from results import Budget, Report
from shapes import MODEL_HELP, load
from transformers import PreTrainedModel

from memlong import MemoryConfig, MemoryDecoder
from memlong.errors import MemlongError
from memlong.training import Step, Trainer, TrainingConfig, fit_latent_maps, usual_retrieval_layers

WINDOW = 1024


@dataclass(frozen=True)
class Setting:
    """What to train, with how many rows and which segment size."""

    kv_source: str
    gates: bool
    rows: int
    segment: int

    @property
    def name(self) -> str:
        """Name in the table."""
        gates = ", gates" if self.gates else ""
        return f"{self.kv_source}{gates}, {self.rows} x {self.segment}"


SETTINGS = (
    Setting("shared", gates=False, rows=4, segment=256),
    Setting("shared", gates=False, rows=32, segment=512),
    Setting("shared", gates=True, rows=4, segment=256),
    Setting("latent", gates=False, rows=4, segment=256),
    Setting("latent", gates=True, rows=4, segment=256),
)


@dataclass(frozen=True)
class Measured:
    """Steps of one setting, possibly cut short; the loss is that of the last step, in nats."""

    setting: str
    steps: int
    tokens_per_second: float
    ms_per_step: float
    loss: float
    device_peak_bytes: int


class _Enough(Exception):  # noqa: N818 - not an error
    """Raised to stop the trainer."""


def main(
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "random-135m",
    steps: Annotated[int, typer.Option(min=1, help="Steps to time in each setting.")] = 24,
    most_rows: Annotated[int, typer.Option(min=1, help="Skip settings with more rows.")] = 32,
    seconds: Annotated[
        float | None,
        typer.Option(help="Approximate time limit in seconds; parts that are skipped are listed."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="'float32' or 'bfloat16'.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="'cpu', 'cuda' or 'cuda:N'.")] = "cpu",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the result to this file.")
    ] = None,
) -> None:
    """Time training steps."""
    report = Report(json_file, {"model": model, "dtype": dtype}, device, Budget(seconds))
    settings = [setting for setting in SETTINGS if setting.rows <= most_rows]
    done: list[Measured] = []
    for number, setting in enumerate(settings):
        if number and report.budget.is_spent:
            report.leave_out(setting.name)
            continue
        budget = report.budget.share(len(settings) - number)
        row: Measured | None = None

        def note(measured: Measured) -> None:
            nonlocal row
            row = measured
            report.ratios = _ratios([*done, measured])
            report.add({"rows": [asdict(each) for each in (*done, measured)]})

        try:
            language_model, tokenizer = load(model, dtype=dtype, device=device)
            with tempfile.TemporaryDirectory() as folder:
                decoder = _decoder(language_model, tokenizer, setting, Path(folder))
                _train(decoder, setting, steps, budget, Path(folder), note)
        except torch.OutOfMemoryError as error:
            report.leave_out(setting.name, str(error).split(". ")[0])
        if row is None:
            report.leave_out(setting.name, "the first steps did not finish")
            continue
        done.append(row)
        if row.steps < steps:
            report.leave_out(f"{setting.name} beyond {row.steps} of {steps} steps")
        typer.echo(
            f"{row.setting:28s} {row.tokens_per_second:8,.0f} tokens/s, {row.ms_per_step:8.1f} ms per step, peak "
            f"{row.device_peak_bytes / 1e9:.1f} GB"
        )
    report.end()


def _ratios(rows: list[Measured]) -> list[Ratio]:
    """Speeds relative to the first setting."""
    return [
        Ratio(
            f"tokens/s, {row.setting} to {rows[0].setting}", row.tokens_per_second / rows[0].tokens_per_second
        )
        for row in rows[1:]
    ]


def _decoder(model: PreTrainedModel, tokenizer: object, setting: Setting, folder: Path) -> MemoryDecoder:
    options: dict[str, Any] = {
        "backend": "torch",
        "retriever": "lm",
        "kv_source": setting.kv_source,
        "local_window": WINDOW,
        "segment_size": setting.segment,
        "gate_init": -1.0 if setting.gates else None,
    }
    count = model.config.num_hidden_layers
    if setting.kv_source == "latent":
        options["retrieval_layers"] = f"{count // 2}-{count - 1}"
        options["maps"] = str(folder / "maps.safetensors")
        passages = [text[None] for text in _texts(model, 1, 2048)]
        maps = fit_latent_maps(model, passages, dim=64, layers=options["retrieval_layers"])
        maps.save(options["maps"])
    else:
        options["retrieval_layers"] = usual_retrieval_layers(model, MemoryConfig(kv_source="shared"))
    return MemoryDecoder(model, tokenizer, MemoryConfig(**options))


def _texts(model: PreTrainedModel, count: int, tokens: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(3, model.config.vocab_size, (count, tokens), generator=generator))


def _train(
    decoder: MemoryDecoder,
    setting: Setting,
    steps: int,
    budget: Budget,
    folder: Path,
    note: Callable[[Measured], None],
) -> None:
    """Train for a number of one-segment steps, starting once memory is retrieved."""
    device = decoder.model.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    first = WINDOW // setting.segment + 2  # steps before the first retrieval, and the step of that retrieval
    tokens = (first + steps) * setting.segment
    config = TrainingConfig(
        steps=first + steps,
        rows=setting.rows,
        document_tokens=tokens,
        accumulate=1,
        warmup_steps=0,
        checkpoint_every=10**6,
    )
    made: list[Step] = []

    def told(step: Step) -> None:
        made.append(step)
        timed = made[first - 1 :]
        if len(timed) < 2:
            return
        spent = [later.seconds - earlier.seconds for earlier, later in pairwise(timed)]
        read = timed[-1].tokens - timed[0].tokens
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        note(Measured(setting.name, len(spent), read / sum(spent), 1000 * median(spent), step.loss, peak))
        if budget.is_spent:
            raise _Enough

    documents = _texts(decoder.model, setting.rows, tokens + 1)
    with suppress(_Enough):
        Trainer(decoder, documents, config, folder=folder / "run").run(progress=told)


if __name__ == "__main__":
    try:
        typer.run(main)
    except MemlongError as error:
        raise SystemExit(f"bench: {error}") from error
