"""Evaluation: perplexity, long-range tokens, recall, needle, and confidence intervals."""

from memlong.evaluation.bootstrap import Ratio, perplexity_ratio
from memlong.evaluation.long_range import long_range_tokens
from memlong.evaluation.needle import Answer, Cell, Filler, evaluate_needle, passkey_prompt
from memlong.evaluation.perplexity import Perplexity, evaluate_perplexity, token_losses
from memlong.evaluation.recall import recall_at_k
from memlong.evaluation.share import Share
from memlong.evaluation.text import (
    chat_prompt,
    chat_turn,
    end_of_turn,
    following_turn,
    read_text,
    tokenize,
)

__all__ = [
    "Answer",
    "Cell",
    "Filler",
    "Perplexity",
    "Ratio",
    "Share",
    "chat_prompt",
    "chat_turn",
    "end_of_turn",
    "evaluate_needle",
    "evaluate_perplexity",
    "following_turn",
    "long_range_tokens",
    "passkey_prompt",
    "perplexity_ratio",
    "read_text",
    "recall_at_k",
    "token_losses",
    "tokenize",
]
