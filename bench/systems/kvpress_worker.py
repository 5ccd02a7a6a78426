"""A process that compresses prompts' K-V with kvpress, and answers them: run by `systems.kvpress`, in kvpress's Python.

It is told where the model's folder is, reads one JSON object a line from its input, and writes one for each:

    {"context": [ids], "question": [ids], "press": "snapkv", "kept": 2048, "never": [ids]}
        -> {"token": id}: the first of the answer; the question is read after the context was compressed
    {"never": [ids]}
        -> {"token": id}: the next

A token is the likeliest, but for those that are never said. What goes wrong is {"error": "..."}.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

import torch
from kvpress import ExpectedAttentionPress, KVzipPress, SnapKVPress
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging

PRESSES = {"expected": ExpectedAttentionPress, "kvzip": KVzipPress, "snapkv": SnapKVPress}


class Answer:
    """The answer to one prompt, token by token."""

    def __init__(self, model: Any, asked: dict[str, Any]) -> None:
        self._model, self._next = model, asked["question"]
        self._position = len(asked["context"])
        self._cache = DynamicCache()
        context = torch.tensor([asked["context"]], device=model.device)
        kept = asked["kept"]
        # Half a token more, as kvpress rounds down.
        ratio = max(0.0, 1 - (kept + 0.5) / self._position) if kept < self._position else 0.0
        if self._position:
            with PRESSES[asked["press"]](compression_ratio=ratio)(model):
                model.model(input_ids=context, past_key_values=self._cache)

    def token(self, never: list[int]) -> int:
        """Return what comes next."""
        end = self._position + len(self._next)
        logits = self._model(
            input_ids=torch.tensor([self._next], device=self._model.device),
            past_key_values=self._cache,
            position_ids=torch.arange(self._position, end, device=self._model.device)[None],
            logits_to_keep=1,
        ).logits[0, -1]
        if bool(logits.isnan().any()):
            raise ValueError("the model's logits must be numbers, got NaN")
        logits[never] = float("-inf")
        token = int(logits.argmax())
        self._position, self._next = end, [token]
        return token


@torch.no_grad()
def main() -> None:
    """Answer prompts until there are no more."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--threads", type=int, required=True)
    given = parser.parse_args()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # others print, too
    torch.set_num_threads(given.threads)
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(given.folder, dtype=given.dtype).to(given.device).eval()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    answer = None
    for line in sys.stdin:
        told = json.loads(line)
        try:
            answer = Answer(model, told) if "context" in told else answer
            if answer is None:
                raise ValueError("nothing has been asked")
            said: dict[str, Any] = {"token": answer.token(told["never"])}
        except Exception as error:  # noqa: BLE001 - the other process tells it
            said = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(said), file=answers, flush=True)


if __name__ == "__main__":
    main()
