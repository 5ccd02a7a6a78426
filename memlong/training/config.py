"""TrainingConfig: the settings of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

from memlong.errors import InvalidArgumentError
from memlong.settings import checked, documented, setting

_LARGEST_SHARE = 1e30  # sums of larger ones may overflow
_FLOOR = 0.1  # share of the highest learning rate at the end of the schedule

TEXT = "text"
"""The kind of episodes that documents are cut into."""

RECALL = ("dictionary", "needles", "passkey", "repeat", "variables")
"""Kinds of episodes that are generated."""


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
    mix: dict[str, float] = setting(
        dict,
        "Share of episodes of each kind.",
        unset="text alone",
        more="Besides ``text``, the kinds are generated, with the text as filler: ``needles``, ``dictionary``, "
        "``passkey``, ``variables`` and ``repeat`` ask for what has left the local window, and only answers are "
        "trained on; a token of one counts as much as ten of text.",
        metavar="KIND=SHARE",
        example="needles=1",
    )
    questions: int = setting(
        4,
        "Most questions that a segment of a generated episode begins with.",
        more="They retrieve together: ask no more of them than ``top_k`` chunks can answer.",
        least=1,
    )
    accumulate: int = setting(
        4,
        "Segments per optimizer step (gradient accumulation).",
        more="The last step of a document may have fewer.",
        least=1,
    )
    lr: float = setting(
        2e-4,
        "Peak learning rate of LoRA, maps and the null chunk.",
        more="Linear warmup over ``warmup_steps``, then cosine decay to a tenth.",
        above=0,
    )
    gate_lr: float = setting(1e-2, "Peak learning rate of gates.", above=0)
    warmup_steps: int = setting(50, "Steps of learning rate warmup.", least=0)
    weight_decay: float = setting(0.0, "Weight decay of LoRA, maps and the null chunk (AdamW).", least=0)
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
    gradient_chunks: int = setting(
        0,
        "Latest chunks of a row that gradients reach beyond their stored form, to train what makes it.",
        more="The K-V of these chunks is kept beside the bank, and the encoding of the maps of kv_source 'latent' is "
        "trained as well as the decoding. They are read as they were before a store of int8 or float8 rounded them.",
        least=0,
    )
    null_chunk: bool = setting(
        False,
        "Train a null chunk, read in place of one of top_k wherever any is retrieved.",
        more="It takes up what helps whatever chunks hold, so that what is left to learn is to read their content. It "
        "begins as the first chunk of the text.",
    )
    only_found: bool = setting(
        False,
        "Train only on answers whose fact is in a chunk retrieved.",
        more="Other answers can only be guessed. What is logged is the loss of all.",
    )
    train_gates: bool = setting(True, "Train the gates, if there are any.")
    gradient_checkpointing: bool = setting(
        False,
        "Run layers again in the backward pass instead of keeping what they computed.",
        more="The losses are the same; it takes less memory and more time.",
    )
    shard: bool = setting(
        False,
        "Divide the frozen weights among the processes (FSDP).",
        more="Each holds its share, and gathers a layer's weights from the others while it runs the layer. The losses "
        "are the same. Has no effect in a single process.",
    )
    warmup_stage_steps: int = setting(
        0,
        "Steps of a first stage with LoRA on all layers and no memory.",
        more="As in MemLong (arXiv 2408.16967). Lower layers train only in this stage and are frozen afterwards. The "
        "stage ends at the end of a document, and reads text alone, whatever the ``mix``.",
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
    negatives: int = setting(
        0,
        "Maximum number of other rows whose chunks are mixed with those of a row.",
        more="It grows from 1 over the first half of the steps. Up to half of the chunks that a row would read are "
        "replaced by those of other rows that match its query best, so that it learns to tell content apart (Focused "
        "Transformer, arXiv 2307.03170). Needs as many rows, and one more.",
        least=0,
        most=4096,
    )
    contrast: float = setting(
        0.0,
        "Also read each segment with other rows' chunks, and cap loss weights at this; 0 turns it off.",
        more="The loss of a token is weighted by how much better it is predicted with the chunks retrieved: by "
        "exp(loss with foreign chunks - loss), at most this, as in LongCE (arXiv 2410.23771). The mean difference, the "
        "gain, is logged. Takes one more forward pass of each segment. At least 1, if not 0.",
        least=0,
    )
    distill: float = setting(
        0.0,
        "Share of distillation in the loss of tokens that need recall.",
        more="There, the loss is the divergence from what the model itself predicts with full attention over the whole "
        "episode: on answers, and where full attention predicts a token better by half a nat. Needs "
        "``document_tokens`` within the length that the model was trained on.",
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
        for kind, share in self.mix.items():
            if kind not in (TEXT, *RECALL) or not _is_share(share):
                is_text = isinstance(share, str)
                raise InvalidArgumentError(
                    f"mix must give shares above 0 of some of {', '.join(map(repr, (TEXT, *RECALL)))}, got "
                    f"{share!r:.80} of {kind!r:.80}"
                    + (
                        ": give a number, and each kind by itself (--mix needles=1 --mix text=1)"
                        if is_text
                        else ""
                    )
                )
        # In one order, so that the same shares give the same episodes.
        object.__setattr__(self, "mix", {kind: float(self.mix[kind]) for kind in sorted(self.mix)})
        if 0 < self.contrast < 1:
            raise InvalidArgumentError(
                f"contrast must be 0 or at least 1, as it caps the weight of a token, got {self.contrast}"
            )
        if self.rows < max(self.negatives + 1, 2 if self.contrast else 1):
            what = f"negatives {self.negatives}" if self.negatives else f"contrast {self.contrast}"
            raise InvalidArgumentError(
                f"rows must be at least {max(2, self.negatives + 1)} with {what}, as foreign chunks are those of other "
                f"rows, got {self.rows}"
            )
        if self.warmup_stage_steps and not self.lora_rank:
            raise InvalidArgumentError(
                "warmup_stage_steps must be 0 if lora_rank is 0, as there would be nothing to train in that stage, got "
                f"{self.warmup_stage_steps}: set lora_rank, or leave out the stage"
            )

    def negatives_at(self, step: int) -> int:
        """Return from how many other rows chunks may come in a step, counted from 0."""
        return min(self.negatives, math.ceil(2 * self.negatives * (step + 1) / self.steps))

    def share_of_rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0, as a share of the peak."""
        rise = min(1.0, (step + 1) / (self.warmup_steps + 1))
        progress = min(1.0, max(0, step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        return rise * (_FLOOR + (1 - _FLOOR) * (1 + math.cos(math.pi * progress)) / 2)


def _is_share(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < value <= _LARGEST_SHARE  # type: ignore[operator]
