"""Honest evaluation: perplexity, long-range tokens, recall, and intervals for comparisons."""

from memlong.evaluation.bootstrap import Ratio, perplexity_ratio
from memlong.evaluation.long_range import long_range_tokens
from memlong.evaluation.perplexity import Perplexity, evaluate_perplexity
from memlong.evaluation.recall import recall_at_k
from memlong.evaluation.text import read_text, tokenize

__all__ = [
    "Perplexity",
    "Ratio",
    "evaluate_perplexity",
    "long_range_tokens",
    "perplexity_ratio",
    "read_text",
    "recall_at_k",
    "tokenize",
]
