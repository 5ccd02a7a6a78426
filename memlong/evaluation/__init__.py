"""Evaluation: perplexity, long-range tokens, recall, needle, in-context learning, and confidence intervals."""

from memlong.evaluation.bootstrap import Accuracy, Ratio, accuracy_interval, perplexity_ratio
from memlong.evaluation.examples import Example, Task, draw_task, read_examples
from memlong.evaluation.icl import Shots, evaluate_icl
from memlong.evaluation.long_range import long_range_tokens
from memlong.evaluation.needle import Cell, evaluate_needle, passkey_prompt
from memlong.evaluation.perplexity import Perplexity, evaluate_perplexity, token_losses
from memlong.evaluation.recall import recall_at_k
from memlong.evaluation.text import chat_turn, read_text, tokenize

__all__ = [
    "Accuracy",
    "Cell",
    "Example",
    "Perplexity",
    "Ratio",
    "Shots",
    "Task",
    "accuracy_interval",
    "chat_turn",
    "draw_task",
    "evaluate_icl",
    "evaluate_needle",
    "evaluate_perplexity",
    "long_range_tokens",
    "passkey_prompt",
    "perplexity_ratio",
    "read_examples",
    "read_text",
    "recall_at_k",
    "token_losses",
    "tokenize",
]
