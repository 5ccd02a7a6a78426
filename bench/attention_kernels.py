"""Which attention kernel torch picks for memory-sized inputs, and how long it takes: warm, and at a new key length.

Every token and every segment has a new key length, for which cuDNN builds a plan. Three settings are compared: torch's
default, memlong's selection, and cuDNN alone. The mask is additive, as needed for rows with unequal memory, or
`causal_lower_right`. Gradients are checked as well: whether they are finite (at a key length divisible by 128, and at
one that is 64 longer), and whether a bias, such as a gate, receives one.

    python bench/attention_kernels.py --device cuda --json out/kernels.json
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from ratios import Ratio
from results import Budget, Report
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from memlong.decoder.model.kernels import steady_kernels
from memlong.decoder.model.machine import DTYPES

Kernels = Callable[[], AbstractContextManager[None]]
"""Context manager that limits torch's choice of kernel."""


@dataclass(frozen=True)
class Shape:
    """Number of query and K-V heads, head dimension, and number of queries and keys."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    queries: int
    keys: int


SHAPES = (
    Shape("135M, a segment", 9, 3, 64, 256, 2308),
    Shape("135M, a token", 9, 3, 64, 1, 2053),
    Shape("3B, a segment", 32, 32, 100, 512, 2564),
    Shape("3B, a token", 32, 32, 100, 1, 2053),
    Shape("3B, a segment, heads padded", 32, 32, 104, 512, 2564),
    Shape("1B, a segment", 32, 8, 64, 256, 2308),
)
TINY = (Shape("tiny, a segment", 4, 2, 64, 32, 164), Shape("tiny, a token", 4, 2, 100, 1, 133))


@dataclass(frozen=True)
class Row:
    """Milliseconds of the first call, of calls at a new key length, and of repeated calls; None without a kernel."""

    shape: str
    dtype: str
    mask: str
    kernels: str
    taken: str
    first_ms: float | None = None
    new_length_ms: float | None = None
    warm_ms: float | None = None
    error: float | None = None


def main(
    dtype: Annotated[str, typer.Option(help="Dtypes, comma-separated.")] = "bfloat16,float32",
    device: Annotated[str, typer.Option(help="'cpu', 'cuda' or 'cuda:N'.")] = "cpu",
    small: Annotated[bool, typer.Option("--small", help="Use tiny shapes, to test that it runs.")] = False,
    seconds: Annotated[
        float | None,
        typer.Option(help="Approximate time limit in seconds; parts that are skipped are listed."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the result to this file.")
    ] = None,
) -> None:
    """Name the kernels that attention uses, and time them."""
    report = Report(json_file, {}, device, Budget(seconds))
    settings: dict[str, Kernels] = {
        "torch's choice": nullcontext,
        "memlong's": lambda: steady_kernels(torch.device(device)),
    }
    if device != "cpu":
        settings["cuDNN"] = lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION)
    shapes = TINY if small else SHAPES
    rows: list[Row] = []
    gradients: list[dict[str, Any]] = []
    for name in dtype.split(","):
        for kernels, within in settings.items():
            what = f"gradients in {name} by {kernels}"
            if report.budget.is_spent:
                report.leave_out(what)
                continue
            gradients += _gradients(shapes[0], DTYPES[name], device, kernels, within)
            report.add({"gradients": gradients})
            typer.echo(f"{what}: " + "; ".join(f"{each['what']}: {each['found']}" for each in gradients[-3:]))
        for shape in shapes:
            for mask in ("additive", "lower right"):
                for kernels, within in settings.items():
                    if report.budget.is_spent:
                        report.leave_out(f"{shape.name}, {name}, {mask}, {kernels}")
                        continue
                    row = _measured(shape, name, mask, kernels, within, device)
                    rows.append(row)
                    report.ratios = _ratios(rows)
                    report.add({"rows": [asdict(each) for each in rows]})
                    typer.echo(_line(row))
    report.end()


def _line(row: Row) -> str:
    told = f"{row.shape:28s} {row.dtype:9s} {row.mask:12s} {row.kernels:15s} {row.taken:12s}"
    if row.error is None:
        return told
    return (
        f"{told} first {row.first_ms:8.2f} ms, new length {row.new_length_ms:8.3f} ms, warm {row.warm_ms:7.3f} ms, "
        f"error {row.error:.1e}"
    )


def _ratios(rows: list[Row]) -> list[Ratio]:
    """Return the cost of memlong's choice relative to torch's, at new key lengths, as in decoding."""
    by_kernels = {(row.shape, row.dtype, row.mask, row.kernels): row.new_length_ms for row in rows}
    found = []
    for row in rows:
        other = by_kernels.get((row.shape, row.dtype, row.mask, "torch's choice"))
        if row.kernels == "memlong's" and row.new_length_ms and other:
            what = f"a new length, memlong's kernels to torch's choice, {row.shape}, {row.dtype}, {row.mask}"
            found.append(Ratio(what, row.new_length_ms / other))
    return found


def _measured(shape: Shape, dtype: str, mask: str, kernels: str, within: Kernels, device: str) -> Row:
    facts = (shape.name, dtype, mask, kernels)
    query, key, value = _states(shape, shape.keys, DTYPES[dtype], device)
    lengths = [shape.keys - number for number in range(6)]
    masks = [_mask(mask, query, keys) for keys in lengths]  # created once per forward call, for all layers
    exact = _attend(
        query.double(), key.double(), value.double(), _mask("additive", query.double(), shape.keys)
    )

    def attend(number: int) -> Tensor:
        keys = lengths[number]
        return _attend(query, key[:, :, :keys], value[:, :, :keys], masks[number])

    def timed(number: int) -> float:
        _wait(device)
        started = time.perf_counter()
        attend(number)
        _wait(device)
        return 1000 * (time.perf_counter() - started)

    try:
        with torch.no_grad(), within():
            first = timed(1)
            new = median(timed(number) for number in range(2, len(lengths)))
            with Kernel() as kernel:
                output = attend(0)
            warm = median(timed(0) for _ in range(10))
    except RuntimeError as error:  # no kernel supports this shape
        return Row(*facts, f"none: {str(error).splitlines()[0][:60]}")
    distance = (output.double() - exact).norm() / exact.norm()
    return Row(*facts, kernel.name, first, new, warm, float(distance))


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    """Compute causal attention, aligned so that the last query attends to the last key."""
    grouped = query.shape[1] // key.shape[1]
    if type(mask) is Tensor and grouped > 1:  # as transformers does with a mask
        key, value = (states.repeat_interleave(grouped, dim=1) for states in (key, value))
    enable = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=enable)


def _mask(kind: str, query: Tensor, keys: int) -> Any:
    if kind == "additive":
        return _additive(query, keys)
    return causal_lower_right(query.shape[2], keys) if query.shape[2] > 1 else None


def _additive(query: Tensor, keys: int) -> Tensor:
    queries = query.shape[2]
    visible = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    hidden = torch.zeros(1, 1, queries, keys + -keys % 8, dtype=query.dtype, device=query.device)[..., :keys]
    return hidden.masked_fill_(~visible, torch.finfo(query.dtype).min)


def _states(shape: Shape, keys: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    sizes = ((shape.heads, shape.queries), (shape.kv_heads, keys), (shape.kv_heads, keys))
    return [
        torch.randn(1, heads, tokens, shape.head_dim, generator=generator, dtype=dtype, device=device)
        for heads, tokens in sizes
    ]


def _gradients(
    shape: Shape, dtype: torch.dtype, device: str, kernels: str, within: Kernels
) -> list[dict[str, Any]]:
    """Return NaN gradients at two key lengths, and whether a bias on the memory's columns gets a gradient."""
    found = []
    least = shape.keys // 128 * 128
    for keys in (least, least + 64):
        query, key, value = _states(shape, keys, dtype, device)
        query, key = 5 * query.abs(), -5 * key.abs()  # exponentials that sum to almost zero
        for states in (query, key, value):
            states.requires_grad_()

        def check_finite(states: tuple[Tensor, ...] = (query, key, value), keys: int = keys) -> str:
            _attend(states[0], states[1], states[2], _additive(states[0], keys)).sum().backward()
            count = sum(int((~each.grad.isfinite()).sum()) for each in states if each.grad is not None)
            return f"{count} not finite" if count else "all finite"

        found.append({"what": f"{keys} keys", "found": _tried(check_finite, within)})
    query, key, value = _states(shape, least, dtype, device)
    grouped = shape.heads // shape.kv_heads
    key, value = (states.repeat_interleave(grouped, dim=1) for states in (key, value))
    query.requires_grad_()  # as in memlong: otherwise the kernel saves nothing for the bias's gradient
    bias = torch.zeros(1, shape.heads, 1, 1, dtype=dtype, device=device, requires_grad=True)

    def learn() -> str:
        mask = _additive(query, least).expand(-1, shape.heads, -1, -1)
        half = least // 2
        gated = torch.cat([mask[..., :half] + bias, mask[..., half:]], dim=-1)
        scaled_dot_product_attention(query, key, value, attn_mask=gated).sum().backward()
        return "learns" if bias.grad is not None and bool(bias.grad.isfinite().all()) else "does not learn"

    found.append({"what": "a bias", "found": _tried(learn, within)})
    dtype_name = str(dtype).removeprefix("torch.")
    return [{"dtype": dtype_name, "kernels": kernels, **each} for each in found]


def _tried(act: Callable[[], str], within: Kernels) -> str:
    try:
        with within():
            return act()
    except RuntimeError as error:
        return f"error: {str(error).splitlines()[0][:80]}"


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


class Kernel(TorchDispatchMode):
    """Records which kernel attention uses; separate matrix products and softmax are the math kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "math"

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and record its name if it is an attention kernel."""
        for kind in ("flash", "efficient", "cudnn", "fused"):
            if f"_{kind}_attention" in operation._schema.name:  # noqa: SLF001
                self.name = kind
        return operation(*args, **(kwargs or {}))


if __name__ == "__main__":
    typer.run(main)
