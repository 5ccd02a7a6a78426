"""The lm-evaluation-harness with a memory: importing this registers the model ``memlong``."""

from pathlib import Path

from memlong.lm_eval.model import MemlongLM

__all__ = ["TASKS", "MemlongLM"]

TASKS = Path(__file__).parent / "tasks"
"""Folder with the groups of tasks ``ruler_local``, ``babilong_local`` and others, for lm-eval's ``include_path``."""
