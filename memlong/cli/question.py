"""Tokenize the prompt of a command."""

from __future__ import annotations

from typing import Any

from memlong.errors import InvalidArgumentError


def question_of(
    tokenizer: Any, prompt: str, *, chat: bool, begins: bool, control_tokens: bool = False
) -> Any:
    """Return the token ids [1, tokens] of a prompt, in the chat template or as it is.

    Raises
    ------
    InvalidArgumentError
        If it is empty, or there is no chat template.
    InvalidTextError
        If it is not UTF-8.
    """
    from memlong.evaluation import chat_turn, tokenize

    if not chat:
        found = tokenize(tokenizer, prompt, begins=begins, control_tokens=control_tokens)
        if not found.shape[1]:
            raise InvalidArgumentError("--prompt must not be empty: give at least one word to continue")
        return found
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidArgumentError(
            "--chat needs a model with a chat template, and this one has none: leave it out, or use an instruct model"
        )
    return chat_turn(tokenizer, prompt, begins=begins)
