"""What a user chooses about training: how long, on how much at once, and which parts learn how fast."""

from __future__ import annotations

import math
from dataclasses import dataclass

from memlong.errors import InvalidArgumentError
from memlong.settings import checked, documented, setting

_FLOOR = 0.1  # of the learning rate, where the schedule ends


@documented
@dataclass(frozen=True)
class TrainingConfig:
    """The settings of a `Trainer`.

    Raises
    ------
    InvalidArgumentError
        If a value cannot work, naming the field, what it must be and the value.
    """

    steps: int = setting(1000, "Steps of the optimizer.", least=1)
    rows: int = setting(
        4, "Documents read side by side.", more="Each has a bank of its own.", least=1, most=4096
    )
    document_tokens: int = setting(
        16_384, "Tokens after which a document is cut and memory begins again.", least=2
    )
    accumulate: int = setting(
        4, "Segments of an optimizer step.", more="The last step of a document may have fewer.", least=1
    )
    lr: float = setting(
        2e-4,
        "Highest learning rate of LoRA and maps.",
        more="It rises linearly over ``warmup_steps``, then falls along half a cosine to a tenth.",
        above=0,
    )
    gate_lr: float = setting(1e-2, "Highest learning rate of gates.", above=0)
    warmup_steps: int = setting(50, "Steps in which the rate rises.", least=0)
    weight_decay: float = setting(0.0, "Weight decay of LoRA and maps (AdamW).", least=0)
    max_grad_norm: float = setting(1.0, "Norm at which gradients are clipped.", above=0)
    lora_rank: int = setting(
        16, "Rank of LoRA; 0 trains none.", more="See arXiv 2106.09685.", least=0, most=16_384
    )
    lora_alpha: float = setting(32.0, "Scale of LoRA.", above=0)
    lora_targets: tuple[str, ...] = setting(
        (),
        "Linear layers with LoRA.",
        unset="attention's",
        more='Such as ``("q_proj", "up_proj")``.',
        metavar="NAME",
    )
    train_maps: bool = setting(True, "Train the maps of kv_source 'latent'.")
    train_gates: bool = setting(True, "Train the gates, where there are any.")
    warmup_stage_steps: int = setting(
        0,
        "Steps of a first stage, with LoRA on all layers and no memory.",
        more="MemLong has it (arXiv 2408.16967). Only in it do lower layers learn; what they have learned is frozen "
        "afterwards. The stage ends with a document.",
        least=0,
    )
    long_range_weight: float = setting(
        0.0,
        "What long-range tokens weigh beyond the 1 of others.",
        more="A token is long-range if it was last met farther back than the local window.",
        least=0,
    )
    random_share: float = setting(
        0.0,
        "Share of retrievals that bring random chunks instead.",
        more="Training then tells one from the other.",
        least=0,
        most=1,
    )
    seed: int = setting(0, "Random seed.", least=0, most=2**63 - 1)
    checkpoint_every: int = setting(
        100, "Steps between checkpoints, at least.", more="They are written where documents end.", least=1
    )

    def __post_init__(self) -> None:
        for name, value in checked(self).items():
            object.__setattr__(self, name, value)
        if self.warmup_stage_steps and not self.lora_rank:
            raise InvalidArgumentError(
                f"warmup_stage_steps must be 0 where lora_rank is 0, as there would be nothing to train in that stage, "
                f"got {self.warmup_stage_steps}: set lora_rank, or leave the stage out."
            )

    def share_of_rate(self, step: int) -> float:
        """The share of the highest learning rate that step number ``step``, from 0, is made with."""
        rise = min(1.0, (step + 1) / (self.warmup_steps + 1))
        progress = min(1.0, max(0, step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        return rise * (_FLOOR + (1 - _FLOOR) * (1 + math.cos(math.pi * progress)) / 2)
