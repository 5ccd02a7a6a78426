"""What a user chooses about training: how long, on how much at once, and which parts learn how fast."""

from __future__ import annotations

import math
from dataclasses import dataclass

from memlong.errors import InvalidArgumentError

_FLOOR = 0.1  # of the learning rate, where the schedule ends
_LARGEST = 1e30  # beyond, float32 overflows


@dataclass(frozen=True)
class TrainingConfig:
    """The settings of a :class:`~memlong.training.Trainer`.

    Parameters
    ----------
    steps
        Steps of the optimizer.
    rows
        Documents that are read side by side, each with a bank of its own.
    document_tokens
        Tokens of an episode: longer documents are cut, and memory begins anew with each.
    lr, gate_lr
        Highest learning rates, of LoRA and maps, and of gates; both follow one schedule: a linear rise over
        ``warmup_steps``, then half a cosine down to a tenth.
    warmup_steps
        Steps of that rise.
    weight_decay
        Of LoRA and maps (AdamW).
    accumulate
        Segments of an optimizer step; an episode's last step may have fewer.
    max_grad_norm
        Gradients longer than that are cut to it.
    lora_rank, lora_alpha
        Width and scale of LoRA (arXiv 2106.09685); rank 0 trains none.
    lora_targets
        Names of linear layers, such as ``("q_proj", "up_proj")``; by default all that an attention module has.
    train_maps, train_gates
        Whether latent maps and gates learn, where the memory has them.
    warmup_stage_steps
        Steps of a first stage: LoRA on all layers and no memory, as MemLong has it (arXiv 2408.16967). Only in it do
        lower layers learn; what they have learned is frozen afterwards. The stage ends with an episode.
    long_range_weight
        What a long-range token weighs beyond the 1 of any other; long-range is what was last met farther back than the
        local window.
    random_share
        Share of retrievals that bring random chunks instead, so that training tells one from the other.
    seed
        Of all that is random.
    checkpoint_every
        Steps between checkpoints, at least: they are written where episodes end.

    Raises
    ------
    InvalidArgumentError
        If a value cannot work, naming the field, the value and what was expected.
    """

    steps: int = 1000
    rows: int = 4
    document_tokens: int = 16_384
    lr: float = 2e-4
    gate_lr: float = 1e-2
    warmup_steps: int = 50
    weight_decay: float = 0.0
    accumulate: int = 4
    max_grad_norm: float = 1.0
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_targets: tuple[str, ...] = ()
    train_maps: bool = True
    train_gates: bool = True
    warmup_stage_steps: int = 0
    long_range_weight: float = 0.0
    random_share: float = 0.0
    seed: int = 0
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        for name, least, most in (
            ("steps", 1, 2**63 - 1),
            ("rows", 1, 4096),
            ("document_tokens", 2, 2**63 - 1),
            ("warmup_steps", 0, 2**63 - 1),
            ("accumulate", 1, 2**63 - 1),
            ("lora_rank", 0, 16_384),
            ("warmup_stage_steps", 0, 2**63 - 1),
            ("seed", 0, 2**63 - 1),
            ("checkpoint_every", 1, 2**63 - 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InvalidArgumentError(f"{name} is {value!r}; expected an integer of at least {least}.")
            if value > most:
                raise InvalidArgumentError(f"{name} is {value}; expected at most {most:,}.")
        for name in ("train_maps", "train_gates"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidArgumentError(f"{name} is {getattr(self, name)!r}; expected True or False.")
        for name in ("lr", "gate_lr", "max_grad_norm", "lora_alpha"):
            self._check_number(name, above=0.0)
        for name in ("weight_decay", "long_range_weight", "random_share"):
            self._check_number(name)
        if self.random_share > 1:
            raise InvalidArgumentError(f"random_share is {self.random_share!r}; expected a share, at most 1.")
        if self.warmup_stage_steps and not self.lora_rank:
            raise InvalidArgumentError(
                f"warmup_stage_steps is {self.warmup_stage_steps}, but lora_rank is 0: there would be nothing to train "
                "in that stage. Set lora_rank, or leave the stage out."
            )
        if not isinstance(self.lora_targets, tuple | list) or not all(
            isinstance(name, str) for name in self.lora_targets
        ):
            raise InvalidArgumentError(
                f"lora_targets is {self.lora_targets!r}; expected a sequence of names."
            )

    def share_of_rate(self, step: int) -> float:
        """The share of the highest learning rate that step number ``step``, from 0, is made with."""
        rise = min(1.0, (step + 1) / (self.warmup_steps + 1))
        progress = min(1.0, max(0, step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        return rise * (_FLOOR + (1 - _FLOOR) * (1 + math.cos(math.pi * progress)) / 2)

    def _check_number(self, name: str, above: float | None = None) -> None:
        value = getattr(self, name)
        is_number = type(value) in (int, float) and value <= _LARGEST
        if not is_number or value < 0 or (above is not None and value <= above):
            wanted = "a number above 0" if above is not None else "a number of at least 0"
            raise InvalidArgumentError(f"{name} is {value!r}; expected {wanted} and at most {_LARGEST:g}.")
