"""Train tiny models; a launcher starts this in several processes, a test calls `train` in one.

python tests/training/together.py FOLDER ROWS CASE... [--shard] [--resume] [--kill STEP] [--other PROCESS]
    [--lora FOLDER]
"""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from memlong import MemoryConfig, MemoryDecoder
from memlong.architectures import Architecture, tiny_model_of
from memlong.testing import VOCABULARY, tiny_model
from memlong.training import Step, Trainer, TrainingConfig, fit_latent_maps, teacher
from memlong.training.documents import Episode, Source
from memlong.training.processes import Processes

MEMORY = {
    "backend": "torch",
    "retriever": "lm",
    "chunk_size": 4,
    "top_k": 3,
    "local_window": 24,
    "sink_tokens": 2,
    "segment_size": 8,
}
TRAINING = {
    "steps": 12,
    "document_tokens": 100,
    "accumulate": 2,
    "warmup_steps": 0,
    "lora_rank": 4,
    "lora_alpha": 8.0,
    "lr": 2e-3,
    "checkpoint_every": 3,
}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "shared": (
        {"kv_source": "shared", "retrieval_layers": "2-3", "gate_init": -1.0},
        {"long_range_weight": 2.0, "random_share": 0.3, "warmup_stage_steps": 5},
    ),
    # No parameter has a gradient before the first retrieval, which a short document ends before.
    "maps": (
        {"kv_source": "latent", "retrieval_layers": "2-3", "gate_init": 0.0},
        {"lora_rank": 0, "accumulate": 3, "weight_decay": 0.1},
    ),
    "layer": ({"kv_source": "layer", "retrieval_layers": "all"}, {"accumulate": 1}),
    # Of the rows of a segment, some have retrieved nothing, and teach LoRA nothing.
    "with-memory": ({"kv_source": "shared", "retrieval_layers": "2-3", "adapter_for": "memory"}, {}),
}
TRIED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # A process has chunks to contrast when the other has none yet, and layers run again in the backward pass.
    "contrast": (
        {"kv_source": "layer", "retrieval_layers": "1,3", "gate_init": -1.0},
        {"contrast": 4.0, "gradient_checkpointing": True},
    ),
    # Only some episodes have a token that counts, and the teacher reads some of them in fewer pieces.
    "answers": (
        {"kv_source": "latent", "retrieval_layers": "2-3", "gate_init": 0.0},
        {"distill": 0.5, "lora_targets": ("up_proj",), "null_chunk": True, "gradient_chunks": 4},
    ),
    # Rows of different lengths run one after the other.
    "convolution": ({"kv_source": "layer", "retrieval_layers": "all"}, {"accumulate": 1}),
    # Several layers use the same weights. No segment is of one token: transformers cannot backpropagate through that.
    "shared-block": (
        {"kv_source": "layer", "retrieval_layers": "all", "segment_size": 12},
        {"accumulate": 1},
    ),
    "experts": ({"kv_source": "layer", "retrieval_layers": "all"}, {"accumulate": 1}),
    "images": ({"kv_source": "layer", "retrieval_layers": "all"}, {"accumulate": 1}),
}
"""More cases, with losses that chunks of the rows of one process have a part in, or on other models."""

MODELS = {
    "convolution": ("lfm2", "Lfm2ForCausalLM"),
    "shared-block": ("zamba2", "Zamba2ForCausalLM"),
    "experts": ("qwen3_moe", "Qwen3MoeForCausalLM"),
    "images": ("gemma3", "Gemma3ForConditionalGeneration"),
}
LENGTHS = (33, 200, 57, 121, 96, 32, 75)
"""Tokens of the documents: rows end at different segments, one of them with a token that nothing follows."""


class Answers:
    """Episodes of which two in three are trained on: on a few tokens at the end, which ask for the beginning."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __getitem__(self, number: int) -> Episode:
        tokens = self._source[number].tokens
        weights = torch.zeros(len(tokens))
        if number % 3:
            weights[-number % 5 - 3 :] = 1
        return Episode(tokens, weights, {(len(tokens) - 1) // 8 * 8: tokens[:5].tolist()})


def trainer(case: str, folder: Path, rows: int, lora: Path | None = None, **changes: Any) -> Trainer:
    memory, training = {**CASES, **TRIED}[case]
    model = tiny_model_of(Architecture(*MODELS[case])) if case in MODELS else tiny_model()
    generator = torch.Generator().manual_seed(0)
    phrases = [torch.randint(3, VOCABULARY, (40,), generator=generator) for _ in LENGTHS]
    documents = [phrase.repeat(5)[:length] for phrase, length in zip(phrases, LENGTHS, strict=True)]
    if memory["kv_source"] == "latent":
        maps = folder.with_name(f"{folder.name}-{os.getpid()}.safetensors")
        fit_latent_maps(model, [documents[1][None]], dim=32, layers=memory["retrieval_layers"]).save(maps)
        memory = {**memory, "maps": str(maps)}
    decoder = MemoryDecoder(model, None, MemoryConfig(**{**MEMORY, **memory}))
    config = TrainingConfig(**{**TRAINING, **training, "rows": rows, **changes})
    made = Trainer(decoder, documents, config, folder=folder, lora=lora)
    if case == "answers":
        made._source = Answers(made._source)
    return made


def bytes_held(parameter: torch.nn.Parameter) -> int:
    """Return the bytes of a frozen parameter that this process holds."""
    mine = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return 0 if parameter.requires_grad else mine.nbytes


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("rows", type=int)
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--shard", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--kill", type=int, help="the main process kills itself at this step")
    parser.add_argument("--other", type=int, help="this process has another seed")
    parser.add_argument("--lora", type=Path, help="begin with the LoRA of this decoder")
    given = parser.parse_args()
    processes = Processes("cpu")
    teacher._PIECE = 32

    def kill(step: Step) -> None:
        if step.step == given.kill:
            os.kill(os.getpid(), signal.SIGKILL)

    for case in given.cases:
        changes: dict[str, Any] = {"shard": given.shard}
        if given.other == processes.index:
            changes["seed"] = 1
        run = trainer(case, given.folder / case, given.rows, given.lora, **changes)
        if given.shard:
            held = sum(map(bytes_held, run.decoder.model.parameters()))
            (given.folder / f"{case}.{processes.index}.bytes").write_text(str(held))
        run.run(resume=given.resume, progress=kill)
    processes.leave()


if __name__ == "__main__":
    main()
