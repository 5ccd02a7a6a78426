"""The processes of a training run: each reads some of the documents, and their gradients are summed.

The model is not wrapped in DistributedDataParallel, as a decoder reads segment by segment, and processes read different
numbers of segments. Instead, the gradients of the few trainable parameters are summed once per optimizer step. Each
process holds the whole model, unless `memlong.training.shards` divides it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor, distributed, nn

from memlong.errors import InvalidArgumentError, MemlongError, MissingDependencyError

_LAUNCHED = {"FSDP": "--use_fsdp", "DEEPSPEED": "--use_deepspeed", "MEGATRON_LM": "--use_megatron_lm"}


class Processes:
    """The processes that train together, as one of them sees them.

    They are those that ``accelerate launch`` or ``torchrun`` started, or this one alone. All must call the same methods
    in the same order; each call waits for the others.

    Parameters
    ----------
    device
        Device that this process computes on, or ``"auto"``.

    Attributes
    ----------
    count
        Number of processes.
    index
        Number of this process, from 0.
    device
        Device of this process, which no other uses except for the CPU; None if there is only one process, which may
        use any.

    Raises
    ------
    InvalidArgumentError
        If the launcher is to divide the model (FSDP, DeepSpeed or Megatron-LM), there are more of them than GPUs, or
        ``device`` is another process's or unsuitable for several processes.
    MissingDependencyError
        If accelerate is not installed.
    MemlongError
        In the methods: if another process has ended. A launcher then ends the rest.
    """

    def __init__(self, device: str | torch.device = "auto") -> None:
        if find_spec("accelerate") is None:
            raise MissingDependencyError(
                "Training needs the package accelerate: pip install 'memlong[train]'"
            )
        _check_launch()
        from accelerate import PartialState

        kind = str(device).partition(":")[0]
        state = PartialState(cpu=kind == "cpu" or (kind == "auto" and _is_on_cpu()))
        self.count, self.index = int(state.num_processes), int(state.process_index)
        self.device: torch.device | None = None
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if self.count < launched:
            raise InvalidArgumentError(
                f"device must be 'cpu', or 'cuda' where there are GPUs, to train in {launched} processes, got "
                f"{str(device)!r}: choose one of these, or start one process"
            )
        if self.count > 1:
            self.device = torch.device(state.device if state.device.type != "cpu" else "cpu")  # not cpu:0
            _check_device(str(device), self.device, int(state.local_process_index))

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.index == 0

    def wait(self) -> None:
        """Wait for all processes to come here."""
        float(self.sum(torch.zeros((), device=self.device)))

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run a block in the main process, and when it is done, in the others."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of the processes' tensors, without gradient; all have one shape and dtype."""
        tensor = tensor.detach()
        if self.count > 1:
            tensor = tensor.clone()
            with self._told():
                distributed.all_reduce(tensor)
        return tensor

    def all_of(self, numbers: Sequence[int]) -> list[int]:
        """Return the integers of all processes, in the processes' order; each has as many."""
        if self.count == 1:
            return list(numbers)
        table = torch.zeros(self.count, len(numbers), dtype=torch.int64, device=self.device)
        table[self.index] = torch.tensor(numbers, device=self.device)
        found: list[int] = self.sum(table).flatten().tolist()
        return found

    def most_of(self, numbers: Sequence[int]) -> list[int]:
        """Return the largest of each of the integers in all processes; each has as many."""
        found = self.all_of(numbers)
        return [max(found[place :: len(numbers)]) for place in range(len(numbers))]

    def from_main(self, text: str) -> str:
        """Return the main process's text."""
        if self.count == 1:
            return text
        own = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self.device)
        size = self.all_of([len(own)])[0]
        theirs = own if self.is_main else own.new_empty(size)
        with self._told():
            distributed.broadcast(theirs, src=0)
        return bytes(theirs.tolist()).decode()

    def tensor_from_main(self, tensor: Tensor) -> Tensor:
        """Return the main process's tensor, without gradient; all have one shape and dtype."""
        return self.sum(tensor if self.is_main else torch.zeros_like(tensor))

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by the sum over all processes, in one exchange.

        Parameters are of one dtype. One that has no gradient in some processes gets that of the others; if it has none
        anywhere, the optimizer must not touch it, and it still has none.
        """
        if self.count == 1:
            return
        learning = [parameter for parameter in parameters if parameter.requires_grad]
        gradients = [each.grad if each.grad is not None else torch.zeros_like(each) for each in learning]
        given = torch.tensor([float(each.grad is not None) for each in learning]).to(gradients[0])
        total = self.sum(torch.cat([*(each.flatten() for each in gradients), given]))
        *sums, givers = total.split([*(each.numel() for each in learning), len(learning)])
        for parameter, each, count in zip(learning, sums, givers.tolist(), strict=True):
            parameter.grad = each.view_as(parameter) if count else None

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """Say so if the others are lost in a block in which a model exchanges its weights with them."""
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
                raise
            raise self._lost() from error

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # of a connection
            raise self._lost() from error

    def _lost(self) -> MemlongError:
        return MemlongError(
            f"Process {self.index} has lost the others: one of them has ended, and its own message says why. "
            "Resume once that is fixed"
        )

    def leave(self) -> None:
        """Close the connections at the end of the program; `torch.distributed` complains of open ones."""
        if self.count > 1:
            distributed.destroy_process_group()


def _check_launch() -> None:
    for name, option in _LAUNCHED.items():
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise InvalidArgumentError(
                f"Training must be launched without {option}, as each process reads documents of its own, and memlong "
                "itself divides the frozen weights if it is asked to: leave it out, choose --multi_gpu or no "
                "distributed training in `accelerate config`, and add --shard (TrainingConfig(shard=True)) for a model "
                "that does not fit on one device"
            )


def _is_on_cpu() -> bool:
    asked = os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
    return asked or not torch.cuda.is_available()


def _check_device(asked: str, device: torch.device, local_index: int) -> None:
    if device.type == "cuda" and local_index >= torch.cuda.device_count():
        raise InvalidArgumentError(
            f"--num_processes must be at most {torch.cuda.device_count()}, the number of GPUs of this machine, as each "
            f"process needs one, got at least {local_index + 1}: start fewer, and set rows to what fits on a GPU"
        )
    if asked not in ("auto", device.type, f"{device.type}:{device.index or 0}"):
        raise InvalidArgumentError(
            f"device must be {str(device)!r} in this process, number {local_index} on its machine, got {asked!r}: "
            f"load the model with load_model(..., device={str(device)!r}), or leave --device at 'auto'"
        )
