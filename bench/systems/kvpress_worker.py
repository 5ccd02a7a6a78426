"""A process that answers prompts with kvpress or InfiniRetri: run by `systems.kvpress`, in their Python.

It is told where the model's folder is, reads one JSON object a line from its input, and writes one for each:

    {"context": [ids], "question": [ids], "method": "snapkv", "kept": 2048, "never": [ids]}
        -> {"token": id}: the first of the answer; the question is read after the context was compressed
    {"never": [ids]}
        -> {"token": id}: the next

A token is the likeliest, but for those that are never said. What goes wrong is {"error": "..."}.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

_SENTENCE = 400  # characters at most, of which a question takes the beginning

PRESSES = {"expected": "ExpectedAttentionPress", "kvzip": "KVzipPress", "snapkv": "SnapKVPress"}


class Answer:
    """The answer to one prompt, token by token."""

    def __init__(self, model: Any, asked: dict[str, Any]) -> None:
        self._model, self._cache = model, DynamicCache()
        self._position, self._next = 0, asked["context"] + asked["question"]
        self._is_masked = False
        if len(asked["context"]) <= asked["kept"]:
            return
        if asked["method"] in PRESSES:
            self._position, self._next = len(asked["context"]), asked["question"]
            # Its masks are keys that no query may like, of which there are none for many queries at once.
            self._is_masked = asked["method"] == "kvzip"
            _compress(model, self._cache, asked)
        else:
            self._next = _retrieved(model, asked)

    def token(self, never: list[int]) -> int:
        """Return what comes next."""
        step = 1 if self._is_masked else len(self._next)
        for begin in range(0, len(self._next), step):
            read = torch.tensor([self._next[begin : begin + step]], device=self._model.device)
            end = self._position + read.shape[1]
            logits = self._model(
                input_ids=read,
                past_key_values=self._cache,
                position_ids=torch.arange(self._position, end, device=read.device)[None],
                logits_to_keep=1,
            ).logits[0, -1]
            self._position = end
        if bool(logits.isnan().any()):
            raise ValueError("the model's logits must be numbers, got NaN")
        logits[never] = float("-inf")
        token = int(logits.argmax())
        self._next = [token]
        return token


def _compress(model: Any, cache: DynamicCache, asked: dict[str, Any]) -> None:
    """Read a context into a cache that keeps so many tokens of it."""
    import kvpress

    context = torch.tensor([asked["context"]], device=model.device)
    ratio = 1 - (asked["kept"] + 0.5) / context.shape[1]  # half a token more, as kvpress rounds down
    with getattr(kvpress, PRESSES[asked["method"]])(compression_ratio=ratio)(model):
        model.model(input_ids=context, past_key_values=cache)


def _retrieved(model: Any, asked: dict[str, Any]) -> list[int]:
    """Return the prompt that InfiniRetri makes of a context and a question.

    Its window is half of what is kept, and its top k in the default's proportion to the window; but it keeps whole
    sentences, however long. Where a prompt is longer than what is kept and the question, it begins again with half
    of k.
    """
    from infini_retri import InfiniRetri

    tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path)
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"  # it always uses one: the text as it is
    context, question = (tokenizer.decode(asked[name]) for name in ("context", "question"))
    context, question = whole_sentences(context, question)
    window, room = asked["kept"] // 2, asked["kept"] + len(asked["question"])
    chosen = window * 300 // 1024
    prompts: list[list[int]] = []

    def note(_module: Any, _args: Any, given: dict[str, Any]) -> None:
        prompts.append(given["input_ids"][0].tolist())

    def answer(**given: Any) -> torch.Tensor:  # instead of the model, which does so later, token by token
        note(None, None, given)
        found: torch.Tensor = given["input_ids"]
        return found

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    usual = model.config._attn_implementation  # noqa: SLF001 - nothing public tells
    model.set_attn_implementation("eager")
    model.generate = answer
    try:
        while True:
            prompts.clear()
            reader = InfiniRetri(model, tokenizer, topk=chosen, window_length=window)
            reader.generate(context=context, question=question, prompt="{context}\n\n{question}")
            if max(map(len, prompts)) <= room or chosen <= 1:
                return prompts[-1]
            chosen //= 2
    finally:
        del model.generate
        model.set_attn_implementation(usual)
        hook.remove()


def whole_sentences(context: str, question: str) -> tuple[str, str]:
    """Return both, the question with all of its first sentence: InfiniRetri looks for whole ones."""
    begin = max(0, len(context) - _SENTENCE)
    ends = [*re.finditer(r"[.?!](?=\s)|\n", context[begin:] + question[:1])]
    cut = min(begin + ends[-1].end(), len(context)) if ends else len(context)
    return context[:cut], context[cut:] + question


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
