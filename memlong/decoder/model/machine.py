"""Choosing the device and dtype of a model, where they are left to memlong."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from memlong.errors import DeviceUnavailableError, InvalidArgumentError

AUTO = "auto"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_NATIVE_BFLOAT16 = (8, 0)  # compute capability of CUDA devices, from Ampere on
_COMPARED = (torch.float32, torch.bfloat16)
_ROWS, _INPUTS, _OUTPUTS = 256, 576, 1536  # a segment through the widest layer of a 135M model
_CLEARLY = 1.1  # less is noise, and float32 has more digits
_TRIES, _LEAST_TRIES, _SECONDS = 7, 2, 0.05


@dataclass(frozen=True)
class Machine:
    """What a model runs on.

    Attributes
    ----------
    device, dtype
        Device and dtype of the model.
    why
        One line: why they were chosen.
    passed_over
        Which GPUs are present but cannot run what memlong needs, and why; usually empty.
    """

    device: torch.device
    dtype: torch.dtype
    why: str
    passed_over: str = ""

    @property
    def names(self) -> tuple[str, str]:
        """Dtype and device as `load_model` takes them."""
        return dtype_name(self.dtype), str(self.device)

    def __str__(self) -> str:
        return f"{' on '.join(self.names)} ({self.why}{self.passed_over})"


def choose_machine(
    dtype: str | torch.dtype = AUTO,
    device: str | torch.device = AUTO,
    *,
    trained: tuple[str, str] | None = None,
    trains: bool = False,
) -> Machine:
    """Choose the device and the dtype that are left open.

    Parameters
    ----------
    dtype
        ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``: what the device computes faster. On a CPU that is
        measured once per process, in some hundredths of a second.
    device
        A torch device: ``"cpu"``, ``"cuda"``, ``"cuda:<number>"`` or ``"mps"``; or ``"auto"``: CUDA, else MPS, else the
        CPU, each if it computes what memlong needs.
    trained
        A dtype that takes precedence over what is fast, and the folder that asks for it.
    trains
        Whether the model is to be trained, for which float16 is too coarse.

    Raises
    ------
    InvalidArgumentError
        If there is no such dtype or device.
    DeviceUnavailableError
        If the device is missing, or cannot run what memlong needs.
    """
    dtype = dtype_name(dtype) if isinstance(dtype, torch.dtype) else dtype
    device = str(device) if isinstance(device, torch.device) else device
    if dtype not in (AUTO, *DTYPES):
        raise InvalidArgumentError(f"dtype must be one of {', '.join((*DTYPES, AUTO))}, got {dtype!r}")
    if device != AUTO:
        target = _named(device)
        chosen, why, problem = _try(target, dtype, trained, trains=trains)
        if problem:
            raise DeviceUnavailableError(
                f"device is {device!r}, which does not compute what memlong needs: {problem}. Use --device cpu"
            )
        return Machine(target, chosen, why)
    passed_over = ""
    for kind, is_there in (("cuda", torch.cuda.is_available), ("mps", torch.backends.mps.is_available)):
        if is_there():
            target = torch.device(kind)
            chosen, why, problem = _try(target, dtype, trained, trains=trains)
            if not problem:
                return Machine(target, chosen, why)
            passed_over += f"; {kind.upper()} does not compute what memlong needs: {problem}"
    cpu = torch.device("cpu")
    chosen, why, _ = _try(cpu, dtype, trained, trains=trains)
    return Machine(cpu, chosen, why, passed_over)


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without ``torch.``."""
    return str(dtype).removeprefix("torch.")


def loading_in(name: str) -> str:
    """Say, for a message, how to load a model in a dtype."""
    return f"load the model in {name}: load_model(..., dtype={name!r}), or --dtype {name}"


def _try(
    device: torch.device, asked: str, trained: tuple[str, str] | None, *, trains: bool
) -> tuple[torch.dtype, str, str]:
    """Return a dtype for the device, why, and what is wrong with the device, if anything is."""
    if asked != AUTO:
        return DTYPES[asked], "as asked", _problem(device, DTYPES[asked])
    fast, why, problem = _fast(device, trains=trains)
    if trained is not None and trained[0] in DTYPES:
        wanted = DTYPES[trained[0]]
        own = f"as {trained[1]} was trained"
        if wanted == fast:
            return wanted, own, problem
        return wanted, f"{own}, but {why}: try --dtype {dtype_name(fast)}", _problem(device, wanted)
    return fast, why, problem


def _fast(device: torch.device, *, trains: bool) -> tuple[torch.dtype, str, str]:
    if device.type == "cpu":
        return *_fast_on_cpu(), ""
    small = torch.float32 if trains else torch.float16
    candidates = [torch.bfloat16, small]
    if device.type == "cuda" and torch.version.hip is None:
        try:
            capability = torch.cuda.get_device_capability(device)
        except (
            RuntimeError,
            AssertionError,
        ) as error:  # such as a driver that is too old, or a device that is taken
            return candidates[0], "", f"{type(error).__name__}: {error}"
        if capability < _NATIVE_BFLOAT16:
            why = f"compute capability {capability[0]}.{capability[1]} has no bfloat16 of its own"
            return small, why, _problem(device, small)
    problems = [_problem(device, each) for each in candidates]
    for dtype, problem in zip(candidates, problems, strict=True):
        if not problem:
            return dtype, f"{device.type.upper()} computes it natively", ""
    return candidates[0], "", problems[0]


def _fast_on_cpu() -> tuple[torch.dtype, str]:
    speedup = bfloat16_speedup()
    if speedup > _CLEARLY:
        return torch.bfloat16, f"this CPU multiplies {speedup:.1f} times as fast in bfloat16 as in float32"
    if 0 < speedup < 1 / _CLEARLY:
        return torch.float32, f"this CPU multiplies {1 / speedup:.1f} times as fast in float32 as in bfloat16"
    return torch.float32, "this CPU multiplies no faster in bfloat16"


def bfloat16_speedup() -> float:
    """Return how many times as fast as in float32 this process multiplies in bfloat16, with the threads it has.

    It is measured: what a processor is said to be able to do is one thing, another is what its libraries make of it.
    """
    return _measured_speedup(torch.get_num_threads())


@functools.cache
def _measured_speedup(threads: int) -> float:  # noqa: ARG001 - part of the cache's key
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        numbers = torch.linspace(
            -1, 1, _ROWS * _INPUTS + _OUTPUTS * _INPUTS, dtype=torch.float32, device="cpu"
        )
        rows = numbers[: _ROWS * _INPUTS].view(_ROWS, _INPUTS)
        weight = numbers[_ROWS * _INPUTS :].view(_OUTPUTS, _INPUTS)
        products = [functools.partial(linear, rows.to(each), weight.to(each)) for each in _COMPARED]
        try:
            for product in products:
                product()  # the first one sets things up
            started = time.perf_counter()
            times: list[tuple[float, ...]] = []
            # In turns, and the best of each: others who use the processor only ever make it slower.
            while len(times) < _TRIES and (
                len(times) < _LEAST_TRIES or time.perf_counter() - started < _SECONDS
            ):
                times.append(tuple(_seconds(product) for product in products))
        except RuntimeError:  # this build of torch has no such product
            return 0.0
    plain, half = (min(column) for column in zip(*times, strict=True))
    return float(plain / half)


def _seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def _named(name: str) -> torch.device:
    expected = "must be 'cpu', 'cuda', 'cuda:<number>', 'mps' or 'auto'"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise InvalidArgumentError(f"device {expected}, got {name!r}") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise InvalidArgumentError(f"device {expected}, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceUnavailableError(
            f"device is {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices here. Use --device cpu, or "
            "install a CUDA build of torch and its driver"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceUnavailableError(
            f"device is {name!r}, but torch sees no Metal GPU here. Use --device cpu, or a Mac with Apple silicon"
        )
    return device


def _problem(device: torch.device, dtype: torch.dtype) -> str:
    """Say what is wrong with a device's arithmetic in a dtype; nothing, if it does what a CPU does."""
    if device.type == "cpu":
        return ""
    try:
        found = _exercise(device, dtype)
    except (RuntimeError, TypeError, AssertionError) as error:
        lines = str(error).splitlines()
        return f"{dtype_name(dtype)}: {lines[0] if lines else type(error).__name__}"
    if not torch.allclose(found, _exercise(torch.device("cpu"), torch.float32), rtol=0.05, atol=0.05):
        return f"{dtype_name(dtype)}: wrong results"
    return ""


@torch.no_grad()
def _exercise(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Do in small what a decoder does with keys: rotate, undo it, choose, attend under a mask. Float32, on the CPU."""
    tokens, width = 32, 16
    numbers = torch.arange(tokens * width, dtype=torch.float32, device=device)
    keys = (numbers / numbers.numel() - 0.5).view(1, 1, tokens, width).to(dtype)
    angles = torch.arange(tokens, dtype=torch.float32, device=device)[:, None] / width
    cos, sin = angles.cos(), angles.sin()
    turned = _turn(keys, cos, sin)
    square = cos.square() + sin.square()
    raw = _turn(turned, cos / square, -sin / square)
    best = raw.sum(dim=3)[0, 0].topk(tokens // 2).indices.sort().values
    chosen = raw.index_select(2, best)
    columns = torch.arange(tokens // 2, dtype=torch.long, device=device)
    hidden = columns[None, :] > columns[:, None]
    mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill(hidden, torch.finfo(dtype).min)
    attended = scaled_dot_product_attention(chosen, chosen, chosen, attn_mask=mask[None, None])
    return linear(attended, chosen[0, 0]).float().cpu()


def _turn(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = keys.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-second, first], dim=-1) * sin).to(keys.dtype)
