"""Train tiny models; a launcher starts this in several processes, a test calls `train` in one.

python tests/training/together.py FOLDER ROWS CASE... [--resume] [--kill STEP PROCESS] [--other PROCESS]
"""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import torch

from memlong import MemoryConfig, MemoryDecoder
from memlong.testing import VOCABULARY, tiny_model
from memlong.training import Step, Trainer, TrainingConfig, fit_latent_maps
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
}
LENGTHS = (33, 200, 57, 121, 96, 32, 75)
"""Tokens of the documents: rows end at different segments, one of them with a token that nothing follows."""


def trainer(case: str, folder: Path, rows: int, **changes: Any) -> Trainer:
    memory, training = CASES[case]
    model = tiny_model()
    generator = torch.Generator().manual_seed(0)
    phrases = [torch.randint(3, VOCABULARY, (40,), generator=generator) for _ in LENGTHS]
    documents = [phrase.repeat(5)[:length] for phrase, length in zip(phrases, LENGTHS, strict=True)]
    if memory["kv_source"] == "latent":
        maps = folder.with_name(f"{folder.name}-{os.getpid()}.safetensors")
        fit_latent_maps(model, [documents[1][None]], dim=32, layers=memory["retrieval_layers"]).save(maps)
        memory = {**memory, "maps": str(maps)}
    decoder = MemoryDecoder(model, None, MemoryConfig(**MEMORY, **memory))
    return Trainer(
        decoder, documents, TrainingConfig(**{**TRAINING, **training, "rows": rows, **changes}), folder=folder
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("rows", type=int)
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--kill", type=int, help="the main process kills itself at this step")
    parser.add_argument("--other", type=int, help="this process has another seed")
    given = parser.parse_args()
    processes = Processes("cpu")

    def kill(step: Step) -> None:
        if step.step == given.kill:
            os.kill(os.getpid(), signal.SIGKILL)

    for case in given.cases:
        changes = {"seed": 1} if given.other == processes.index else {}
        run = trainer(case, given.folder / case, given.rows, **changes)
        run.run(resume=given.resume, progress=kill)
    processes.leave()


if __name__ == "__main__":
    main()
