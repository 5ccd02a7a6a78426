"""Reading a long text: streaming with memory beside full attention, in time and in memory.

Each measurement runs in a process of its own, so that its resident memory is its own; both read the same
tokens, in segments, and predict the next one. The memory's blocks are on disk.

    python bench/long_context.py
    python bench/long_context.py --lengths 2048,8192 --out out
"""

from __future__ import annotations

import ctypes
import gc
import inspect
import json
import platform
import subprocess
import sys
import tempfile
import time
import typing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import psutil
import torch
import typer
from tqdm import tqdm
from transformers import DynamicCache

from memlong import MemoryConfig, MemoryDecoder, load_model
from memlong.cli.values import numbers
from memlong.errors import InvalidTextError, MemlongError
from memlong.evaluation import read_text, tokenize
from memlong.evaluation.environment import versions

TEXT = Path(inspect.getfile(typing)).with_name("_pydecimal.py")
SYSTEMS = ("full attention", "memory")


@dataclass(frozen=True)
class Measured:
    """One system at one length; the peak is of resident memory, beyond that of the loaded model."""

    system: str
    length: int
    seconds: float
    peak_bytes: int
    device_kv_bytes: int


def main(
    model: Annotated[str, typer.Option(help="Hub id, folder, GGUF file, or 'demo'.")] = "demo",
    text: Annotated[Path, typer.Option(help="UTF-8 text; by default Python's own _pydecimal.py.")] = TEXT,
    lengths: Annotated[str, typer.Option(help="Tokens, separated by commas.")] = "2048,8192,16384,32768",
    retriever: Annotated[str, typer.Option(help="Retriever by name.")] = "lm",
    dtype: Annotated[str, typer.Option(help="'float32', 'bfloat16' or 'float16'.")] = "bfloat16",
    out: Annotated[Path, typer.Option(help="Folder for the JSON file and the picture.")] = Path("out"),
    one: Annotated[
        str | None, typer.Option(help="Measure 'SYSTEM:LENGTH' in this process.", hidden=True)
    ] = None,
) -> None:
    """Set streaming with memory beside full attention."""
    if one is not None:
        system, length = one.rsplit(":", 1)
        print(json.dumps(asdict(_measure(system, int(length), model, text, retriever, dtype))))
        return
    out.mkdir(parents=True, exist_ok=True)
    read_text(text)
    rows: list[Measured] = []
    for length in numbers("--lengths", lengths, int):
        for system in SYSTEMS:
            command = [sys.executable, __file__, "--one", f"{system}:{length}", "--model", model]
            command += ["--text", str(text), "--retriever", retriever, "--dtype", dtype]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603
            if done.returncode < 0:
                raise SystemExit(
                    f"bench: {system} at {length:,} tokens was ended by signal {-done.returncode}, as happens where "
                    "memory runs out. Use smaller --lengths."
                )
            if done.returncode:
                raise SystemExit(done.returncode)  # and the process has said why
            rows.append(Measured(**json.loads(done.stdout.splitlines()[-1])))
            row = rows[-1]
            typer.echo(
                f"{row.length:7,} tokens, {row.system:14s} {row.seconds:8.1f} s, K-V on the device "
                f"{row.device_kv_bytes / 2**20:7.1f} MiB, peak {row.peak_bytes / 2**20:7.1f} MiB"
            )
    result = {
        "model": model,
        "text": text.name,
        "retriever": retriever,
        "dtype": dtype,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": versions(),
        "rows": [asdict(row) for row in rows],
    }
    (out / "long_context.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    _draw(rows, f"{model} on {text.name}", out / "long_context.png")
    full, memory = rows[-2], rows[-1]
    typer.echo(
        f"At {memory.length:,} tokens full attention takes {full.seconds / memory.seconds:.1f} times the time of "
        f"memory, and {full.device_kv_bytes / memory.device_kv_bytes:.1f} times its K-V on the device."
    )


def _measure(system: str, length: int, name: str, text: Path, retriever: str, dtype: str) -> Measured:
    model, tokenizer = load_model(name, dtype=dtype)
    input_ids = tokenize(tokenizer, read_text(text), length)
    if input_ids.shape[1] < length:
        raise InvalidTextError(
            f"The text has {input_ids.shape[1]:,} tokens, fewer than {length:,}: give a longer one."
        )
    folder = tempfile.TemporaryDirectory()  # blocks on disk: what is resident is what attention works on
    config = MemoryConfig(retriever=retriever, store={"disk": folder.name})
    decoder = MemoryDecoder(model, tokenizer, config)
    gc.collect()
    if sys.platform == "linux":  # what loading took and gave back is still resident otherwise
        ctypes.CDLL(None).malloc_trim(0)
    bar = tqdm(total=length, unit="tok", desc=f"{system}, {length:,} tokens", leave=False)
    process = psutil.Process()
    before = peak = process.memory_info().rss
    started = time.perf_counter()
    if system == "full attention":
        cache = DynamicCache()
        with torch.no_grad():
            for part in input_ids.split(config.segment_size, dim=1):
                model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
                peak = max(peak, process.memory_info().rss)
                bar.update(part.shape[1])
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)  # type: ignore[attr-defined]
    else:
        with decoder:
            for segment in decoder.stream(input_ids, logits="last"):
                peak = max(peak, process.memory_info().rss)
                bar.update(segment.tokens.shape[1])
            held = decoder.device_kv_bytes
    seconds = time.perf_counter() - started
    bar.close()
    folder.cleanup()
    return Measured(system, length, seconds, peak - before, held)


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
    axes[2].set(title="peak resident memory beyond the model's", xlabel="tokens", ylabel="MiB")
    axes[0].legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    try:
        typer.run(main)
    except MemlongError as error:
        raise SystemExit(f"bench: {error}") from error
