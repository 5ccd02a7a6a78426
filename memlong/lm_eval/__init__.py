"""The lm-evaluation-harness with a memory: importing this registers the model ``memlong``."""

from memlong.lm_eval.model import MemlongLM

__all__ = ["MemlongLM"]
