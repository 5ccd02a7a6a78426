"""Time and memory of reading a long text: streaming with memory against full attention.

Both read the same tokens, in segments, and predict the next one. On a CPU, each measurement runs in its own process, to
measure its resident memory, and the memory's blocks are on disk; on a CUDA device, the blocks are in host memory.

    python bench/long_context.py
    python bench/long_context.py --lengths 2048,8192 --out out
    python bench/long_context.py --model random-135m --device cuda --lengths 8192,32768,131072
"""

from __future__ import annotations

import ctypes
import gc
import inspect
import json
import subprocess
import sys
import tempfile
import time
import typing
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import psutil
import torch
import typer
from ratios import Ratio
from results import Budget, Report
from shapes import MODEL_HELP, SHAPES, load, token_ids
from tqdm import tqdm
from transformers import DynamicCache

from memlong import MemoryConfig, MemoryDecoder
from memlong.cli.values import numbers
from memlong.decoder import choose_machine
from memlong.decoder.model.kernels import steady_kernels
from memlong.errors import MemlongError
from memlong.evaluation import read_text

TEXT = Path(inspect.getfile(typing)).with_name("_pydecimal.py")
SYSTEMS = ("full attention", "memory")
_LOOKED = 8192  # tokens between checks of the clock


@dataclass(frozen=True)
class Measured:
    """One system at one length, possibly cut short; the peak is resident or device memory beyond the loaded model."""

    system: str
    length: int
    tokens: int
    seconds: float
    peak_bytes: int
    device_kv_bytes: int


def main(
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "demo",
    text: Annotated[Path, typer.Option(help="UTF-8 text; by default Python's own _pydecimal.py.")] = TEXT,
    lengths: Annotated[str, typer.Option(help="Lengths in tokens, comma-separated.")] = "2048,8192,16384",
    retriever: Annotated[str, typer.Option(help="Retriever by name.")] = "lm",
    dtype: Annotated[str, typer.Option(help="'float32', 'bfloat16', 'float16' or 'auto'.")] = "auto",
    device: Annotated[str, typer.Option(help="'cpu', 'cuda', 'cuda:N', 'mps' or 'auto'.")] = "auto",
    seconds: Annotated[
        float | None,
        typer.Option(help="Approximate time limit in seconds; parts that are skipped are listed."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the JSON file and the plot.")] = Path("out"),
    one: Annotated[
        str | None, typer.Option(help="Measure 'SYSTEM:LENGTH' in this process.", hidden=True)
    ] = None,
) -> None:
    """Compare streaming with memory and full attention."""
    dtype, device = choose_machine(dtype, device).names
    budget = Budget(seconds)
    if one is not None:
        system, length = one.rsplit(":", 1)
        row = _measure(system, int(length), model, text, retriever, dtype, device, budget)
        print(json.dumps(asdict(row)))
        return
    out.mkdir(parents=True, exist_ok=True)
    if model not in SHAPES:
        read_text(text)
    command = [sys.executable, __file__, "--model", model, "--text", str(text), "--retriever", retriever]
    command += ["--dtype", dtype, "--device", device]
    facts = {"model": model, "retriever": retriever, "dtype": dtype}
    if model not in SHAPES:
        facts["text"] = text.name
    report = Report(out / "long_context.json", facts, device, budget)
    rows: list[Measured] = []
    for length in numbers("--lengths", lengths, int):
        for system in SYSTEMS:
            what = f"{system} at {length:,} tokens"
            if rows and budget.is_spent:
                report.leave_out(what)
                continue
            if device == "cpu":
                left = [] if seconds is None else ["--seconds", str(max(0.0, budget.left))]
                row = _measured_apart([*command, *left, "--one", f"{system}:{length}"], what)
            else:
                row = _measure(system, length, model, text, retriever, dtype, device, budget)
            rows.append(row)
            if row.tokens < row.length:
                report.leave_out(f"{what} after token {row.tokens:,}")
            report.add({"rows": [asdict(each) for each in rows]}, _ratios(rows))
            typer.echo(
                f"{row.tokens:7,} tokens, {row.system:14s} {row.seconds:8.1f} s, K-V on the device "
                f"{row.device_kv_bytes / 2**20:7.1f} MiB, peak {row.peak_bytes / 2**20:7.1f} MiB"
            )
    if find_spec("matplotlib") is not None:
        _draw([row for row in rows if row.tokens == row.length], model, out / "long_context.png")
    full, memory = ([row for row in rows if row.system == system][-1:] for system in SYSTEMS)
    for one_row, other in zip(full, memory, strict=False):
        if one_row.tokens == other.tokens:
            typer.echo(
                f"At {other.tokens:,} tokens full attention takes {one_row.seconds / other.seconds:.1f} times as long "
                f"as memory, and {one_row.device_kv_bytes / other.device_kv_bytes:.1f} times as much K-V on the device."
            )
    report.end()


def _ratios(rows: list[Measured]) -> list[Ratio]:
    """Return the ratio of the last two rows, if both completed the same length."""
    full, memory = (rows[-2:] + rows)[:2]
    if (full.system, memory.system) != SYSTEMS or full.tokens != memory.tokens:
        return []
    return [Ratio(f"time, memory to full attention, {memory.tokens:,} tokens", memory.seconds / full.seconds)]


def _measured_apart(command: list[str], what: str) -> Measured:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603
    if done.returncode < 0:
        raise SystemExit(
            f"bench: {what} was killed by signal {-done.returncode}, possibly for lack of memory. Use smaller --lengths"
        )
    if done.returncode:
        raise SystemExit(done.returncode)  # the process has printed why
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


class _Peak:
    """Peak memory on top of what was in use at the start: resident, or allocated on a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process = psutil.Process()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
            return
        if sys.platform == "linux":  # otherwise memory freed after loading is still resident
            ctypes.CDLL(None).malloc_trim(0)
        self._before = self._most = self._process.memory_info().rss

    def note(self) -> None:
        """Sample the current use."""
        if self._device.type != "cuda":
            self._most = max(self._most, self._process.memory_info().rss)

    @property
    def extra(self) -> int:
        """Bytes on top of those at the start."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return self._most - self._before


def _measure(
    system: str, length: int, name: str, text: Path, retriever: str, dtype: str, device: str, budget: Budget
) -> Measured:
    model, tokenizer = load(name, dtype=dtype, device=device)
    input_ids = token_ids(model, tokenizer, text, length)
    folder = tempfile.TemporaryDirectory()  # blocks go there, so that only what attention works on is counted
    store = {"disk": folder.name} if device == "cpu" else {"host": "all"}
    config = MemoryConfig(retriever=retriever, store=store)
    decoder = MemoryDecoder(model, tokenizer, config)
    peak = _Peak(model.device)
    bar = tqdm(total=length, unit="tok", desc=f"{system}, {length:,} tokens", leave=False)
    cache, read = DynamicCache(), 0
    started = time.perf_counter()
    with decoder if system == "memory" else torch.no_grad(), steady_kernels(model.device):
        for part in input_ids.split(config.segment_size, dim=1):
            if system == "memory":
                decoder.read(part)
            else:
                model(
                    input_ids=part.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1
                )
            peak.note()
            read += part.shape[1]
            bar.update(part.shape[1])
            if read % _LOOKED == 0 and device.startswith("cuda"):
                torch.cuda.synchronize(device)  # otherwise the host runs far ahead of the device
            if budget.is_spent:
                break
        held = decoder.device_kv_bytes if system == "memory" else _bytes(cache)
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - started
    bar.close()
    folder.cleanup()
    return Measured(system, length, read, seconds, peak.extra, held)


def _bytes(cache: DynamicCache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)  # type: ignore[attr-defined]


def _draw(rows: list[Measured], title: str, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for system in SYSTEMS:
        mine = [row for row in rows if row.system == system]
        lengths = [row.length for row in mine]
        axes[0].plot(lengths, [row.seconds for row in mine], "o-", label=system)
        axes[1].plot(lengths, [row.device_kv_bytes / 2**20 for row in mine], "o-", label=system)
        axes[2].plot(lengths, [row.peak_bytes / 2**20 for row in mine], "o-", label=system)
    axes[0].set(title="time to read", xlabel="tokens", ylabel="seconds")
    axes[1].set(title="K-V on the device", xlabel="tokens", ylabel="MiB")
    axes[2].set(title="peak memory on top of the model's", xlabel="tokens", ylabel="MiB")
    axes[0].legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    try:
        typer.run(main)
    except MemlongError as error:
        raise SystemExit(f"bench: {error}") from error
