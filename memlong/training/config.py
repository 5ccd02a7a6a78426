"""TrainingConfig: the settings of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from memlong.errors import InvalidArgumentError
from memlong.settings import checked, documented, setting

_FLOOR = 0.1  # share of the highest learning rate at the end of the schedule


@documented
@dataclass(frozen=True)
class TrainingConfig:
    """The settings of a `Trainer`.

    Raises
    ------
    InvalidArgumentError
        If a value is invalid; the message names the field, what it must be, and the value.
    """

    steps: int = setting(1000, "Number of optimizer steps.", least=1)
    rows: int = setting(
        4,
        "Documents read in parallel by each process.",
        more="Each has its own bank. With several processes (``accelerate launch``), a step is as large as that of "
        "one process with all their rows.",
        least=1,
        most=4096,
    )
    document_tokens: int = setting(
        16_384, "Documents are split into episodes of this many tokens, each with a fresh memory.", least=2
    )
    accumulate: int = setting(
        4,
        "Segments per optimizer step (gradient accumulation).",
        more="The last step of a document may have fewer.",
        least=1,
    )
    lr: float = setting(
        2e-4,
        "Peak learning rate of LoRA and maps.",
        more="Linear warmup over ``warmup_steps``, then cosine decay to a tenth.",
        above=0,
    )
    gate_lr: float = setting(1e-2, "Peak learning rate of gates.", above=0)
    warmup_steps: int = setting(50, "Steps of learning rate warmup.", least=0)
    weight_decay: float = setting(0.0, "Weight decay of LoRA and maps (AdamW).", least=0)
    max_grad_norm: float = setting(1.0, "Gradient clipping threshold (norm).", above=0)
    lora_rank: int = setting(
        16, "LoRA rank; 0 disables LoRA.", more="See arXiv 2106.09685.", least=0, most=16_384
    )
    lora_alpha: float = setting(32.0, "LoRA scaling (alpha).", above=0)
    lora_targets: tuple[str, ...] = setting(
        (),
        "Linear layers to add LoRA to.",
        unset="those of attention",
        more='Such as ``("q_proj", "up_proj")``.',
        metavar="NAME",
    )
    train_maps: bool = setting(True, "Train the maps of kv_source 'latent'.")
    train_gates: bool = setting(True, "Train the gates, if there are any.")
    warmup_stage_steps: int = setting(
        0,
        "Steps of a first stage with LoRA on all layers and no memory.",
        more="As in MemLong (arXiv 2408.16967). Lower layers train only in this stage and are frozen afterwards. The "
        "stage ends at the end of a document.",
        least=0,
    )
    long_range_weight: float = setting(
        0.0,
        "Extra loss weight of long-range tokens, on top of 1.",
        more="A token is long-range if it last occurred farther back than the local window.",
        least=0,
    )
    random_share: float = setting(
        0.0,
        "Share of retrievals that return random chunks instead.",
        more="This teaches the model to ignore irrelevant chunks.",
        least=0,
        most=1,
    )
    seed: int = setting(0, "Random seed.", least=0, most=2**63 - 1)
    checkpoint_every: int = setting(
        100,
        "Minimum number of steps between checkpoints.",
        more="Checkpoints are written at the end of documents.",
        least=1,
    )

    def __post_init__(self) -> None:
        for name, value in checked(self).items():
            object.__setattr__(self, name, value)
        if self.warmup_stage_steps and not self.lora_rank:
            raise InvalidArgumentError(
                "warmup_stage_steps must be 0 if lora_rank is 0, as there would be nothing to train in that stage, got "
                f"{self.warmup_stage_steps}: set lora_rank, or leave out the stage"
            )

    def share_of_rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0, as a share of the peak."""
        rise = min(1.0, (step + 1) / (self.warmup_steps + 1))
        progress = min(1.0, max(0, step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        return rise * (_FLOOR + (1 - _FLOOR) * (1 + math.cos(math.pi * progress)) / 2)
