"""A model's ``generate()`` while a memory is attached: it warns, or is the decoder's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import MethodType
from typing import Any
from weakref import ref

from torch import Tensor
from transformers import PreTrainedModel

from memlong.bank.warn import warn_caller
from memlong.decoder.model.replacing import replaced


@contextmanager
def warning_in_generate(model: PreTrainedModel) -> Iterator[None]:
    """Warn where the model's own ``generate()`` is called, which does not use the memory."""
    before = vars(model).get("generate")
    place = ref(model)

    kind: Any = type(model)

    @wraps(kind.generate)
    def generate(self: Any, *args: Any, **options: Any) -> Any:
        if self is not place():  # a copy of the model, which has no memory
            return type(self).generate(self, *args, **options)
        warn_caller(
            "model.generate() does not use the attached memory: call decoder.generate(), or wrap the call in "
            "`with decoder.replacing_generate():`",
        )
        return kind.generate(self, *args, **options) if before is None else before(*args, **options)

    # Bound, so that a deepcopy of the model has it bound to the copy.
    with replaced(model, "generate", MethodType(generate, model)):
        yield


@contextmanager
def generating_with(model: PreTrainedModel, decoder_generate: Callable[..., Any]) -> Iterator[None]:
    """Let the model's ``generate()`` call a decoder's, with arguments as transformers takes them."""

    def generate(
        this: Any,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        **options: Any,
    ) -> Any:
        options |= {"logits_processor": logits_processor, "stopping_criteria": stopping_criteria}
        if this is not model:  # a copy, which has no memory
            return type(this).generate(this, inputs, generation_config, **options)
        input_ids = options.pop("input_ids", inputs)
        return decoder_generate(input_ids, generation_config=generation_config, **options)

    with replaced(model, "generate", MethodType(generate, model)):
        yield
