"""Attaching a memory to a model, and detaching it without a trace."""

from __future__ import annotations

from contextlib import ExitStack

from transformers import PreTrainedModel

from memlong.decoder.config import AdapterFor
from memlong.decoder.interrupts import uninterrupted
from memlong.decoder.model.adapters import acting_with_memory
from memlong.decoder.model.attention import (
    AttentionSlot,
    check_free,
    evaluating,
    installed,
    replaced_attention,
)
from memlong.decoder.model.generate_method import warning_in_generate
from memlong.decoder.model.layout import ModelLayout
from memlong.errors import MemlongError


class Attachment:
    """Whether a model's attention goes through a memory.

    Parameters
    ----------
    model, model_layout
        The model and its layers.
    adapter_for
        Whether the model's adapters act on ``"all"`` rows, or on those with ``"memory"``.

    Attributes
    ----------
    slot
        Where the model's attention looks for memory.
    is_attached
        Whether it does.
    """

    def __init__(
        self, model: PreTrainedModel, model_layout: ModelLayout, adapter_for: AdapterFor = "all"
    ) -> None:
        self.slot = AttentionSlot()
        self._model = model
        self._model_layout = model_layout
        self._adapter_for = adapter_for
        self._changes = ExitStack()
        self.is_attached = False

    def attach(self) -> None:
        """Let the model's attention go through the memory.

        Raises
        ------
        UnsupportedModelError
            If another decoder is attached, the model's attention cannot be replaced, or its adapters cannot be told
            when to act.
        """
        check_free(self._model)
        try:
            with uninterrupted(), ExitStack() as stack:
                stack.enter_context(evaluating(self._model))
                stack.enter_context(installed(self.slot, self._model_layout.modules))
                stack.enter_context(replaced_attention(self._model))
                stack.enter_context(warning_in_generate(self._model))
                if self._adapter_for == "memory":
                    stack.enter_context(acting_with_memory(self._model, self.slot))
                self._changes = stack.pop_all()
                self.is_attached = True
        except BaseException:  # including a deferred Ctrl-C: a block that is not entered is not left
            self.detach()
            raise

    def detach(self) -> None:
        """Restore the model."""
        with uninterrupted():
            self.is_attached = False
            self._changes.close()

    def check(self) -> None:
        """Raise MemlongError unless the memory is attached."""
        if not self.is_attached:
            raise MemlongError(
                "The decoder is not attached to its model: stream and generate inside `with decoder:`"
            )
