"""Which settings of a memory can be trained, and from which length of text on."""

from __future__ import annotations

from memlong.decoder import MemoryConfig
from memlong.decoder.kv.null_chunk import retrieved_chunks
from memlong.errors import InvalidArgumentError
from memlong.training.config import TEXT, TrainingConfig
from memlong.training.recall import first_asking


def check_settings(memory: MemoryConfig, training: TrainingConfig) -> None:
    """Reject settings with which no memory would be read.

    Raises
    ------
    InvalidArgumentError
        If there is no backend, no text would read from memory, episodes are too short to read from it or to ask for
        anything, LoRA would not act, or too few chunks are retrieved to mix others in.
    """
    if memory.backend is None:
        raise InvalidArgumentError(
            "backend must be a name for training, got None: there would be no memory to read"
        )
    if memory.retrieve_for != "all" and (TEXT in training.mix or not training.mix):
        raise InvalidArgumentError(
            "retrieve_for must be 'all' for training on text, got 'answers': no text would read from memory. Set mix "
            "to kinds that ask for facts (--mix needles=1)"
        )
    if training.only_found and not set(training.mix) - {TEXT}:
        raise InvalidArgumentError(
            "only_found must be False without a mix that asks for facts, as nothing would be left out, got True: add "
            "one (--mix needles=1)"
        )
    if memory.adapter_for != "all" and training.warmup_stage_steps:
        raise InvalidArgumentError(
            "warmup_stage_steps must be 0 with adapter_for 'memory', as LoRA would not act in a stage without memory, "
            f"got {training.warmup_stage_steps}"
        )
    if training.document_tokens < least_tokens(memory):
        raise InvalidArgumentError(
            f"document_tokens must be at least {least_tokens(memory)}, with local_window {memory.local_window} and "
            f"segment_size {memory.segment_size}, got {training.document_tokens}: set it to several times that, or "
            "lower local_window"
        )
    asking = first_asking(memory.segment_size, memory.local_window)
    if set(training.mix) - {TEXT} and training.document_tokens <= asking:
        raise InvalidArgumentError(
            f"document_tokens must be above {asking}, from where on what has left the local window of "
            f"{memory.local_window} tokens can be asked for, got {training.document_tokens}: set it to several "
            "times that"
        )
    chunks = retrieved_chunks(memory, beside_null_chunk=training.null_chunk or memory.null_chunk is not None)
    if training.negatives and chunks < 2:
        raise InvalidArgumentError(
            f"top_k must be at least {2 + memory.top_k - chunks} with negatives, which replace at most half of the "
            f"chunks, got {memory.top_k}"
        )


def least_tokens(memory: MemoryConfig) -> int:
    """Return the length of the shortest episode that reads from memory, in tokens."""
    return memory.local_window + memory.segment_size
