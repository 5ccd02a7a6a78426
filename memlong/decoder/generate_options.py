"""Options of generate() that a memory can take, and what transformers infers from them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from memlong.bank.validate import whole_number
from memlong.errors import InvalidArgumentError
from memlong.settings import nearest

_REFUSED = {
    "assistant_model": "assisted decoding takes tokens back",
    "prompt_lookup_num_tokens": "prompt lookup takes tokens back",
    "assistant_early_exit": "assisted decoding takes tokens back",
    "inputs_embeds": "the streams are made of tokens",
    "inputs": "a prompt is given as input_ids",
    "cache_implementation": "the streams are the cache",
    "output_attentions": "attention goes over memory and window, whose columns have no place in the text",
    "output_hidden_states": "the prompt is read in segments, of which only the last logits are kept",
}
_COUNTS = {  # and the least of each
    "max_new_tokens": 1,
    "min_new_tokens": 0,
    "max_length": 1,
    "min_length": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
}
_NUMBERS = ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty", "max_time")
_FLAGS = ("do_sample", "use_cache", "return_dict_in_generate", "output_scores", "output_logits")
_NO_TEXT = re.compile(r"pixel|image|video|audio|speech|input_features")


def check_generate_options(model: PreTrainedModel, options: dict[str, Any]) -> None:
    """Refuse options that need a cache of transformers' own, and wrong values of those that decide what streams read.

    Raises
    ------
    InvalidArgumentError
        Naming the option and the reason.
    """
    config = options.get("generation_config")
    if config is not None and not isinstance(config, GenerationConfig):
        raise InvalidArgumentError(f"generation_config must be a GenerationConfig, got {config!r}")
    options.setdefault(
        "cache_implementation", getattr(config, "cache_implementation", None)
    )  # not the model's own
    for name, value in options.items():
        if _NO_TEXT.search(name) and value is not None:
            raise InvalidArgumentError(
                f"{name} does not work with a memory, which holds text only. Leave it out, or generate with the model "
                "itself, outside `with decoder:`"
            )
    for name, least in _COUNTS.items():
        value = _setting(model, options, name)
        if value is not None:
            whole_number(name, value, at_least=least)
    for name in _FLAGS:
        check_flag(name, _setting(model, options, name), or_none=True)
    for name in _NUMBERS:
        value = _setting(model, options, name)
        if value is not None and (not isinstance(value, Real) or isinstance(value, bool)):
            raise InvalidArgumentError(f"{name} must be a number, got {value!r}")
    streamer = options.get("streamer")
    if streamer is not None and not all(callable(getattr(streamer, each, None)) for each in ("put", "end")):
        raise InvalidArgumentError(
            f"streamer must have put() and end(), as transformers' TextStreamer, got {streamer!r}"
        )
    for name in ("pad_token_id", "eos_token_id"):
        _check_tokens(name, _setting(model, options, name))
    for name in ("logits_processor", "stopping_criteria"):
        given = options.get(name)
        if not isinstance(given, list | tuple | None):
            raise InvalidArgumentError(f"{name} must be a list of callables, got {given!r}")
        odd = next((each for each in given or () if not callable(each)), None)
        if odd is not None:
            raise InvalidArgumentError(f"{name} must hold callables, got {odd!r}")
    for name, reason in _REFUSED.items():
        value = _setting(model, options, name)
        if isinstance(value, Tensor) or value:
            raise InvalidArgumentError(
                f"{name} does not work with a memory: {reason}. Leave it out, or generate with the model itself, "
                "outside `with decoder:`"
            )


def check_flag(name: str, value: object, *, or_none: bool = False) -> None:
    """Refuse what is neither True nor False.

    Raises
    ------
    InvalidArgumentError
        Naming the option and the value.
    """
    if not (isinstance(value, bool) or (or_none and value is None)):
        raise InvalidArgumentError(f"{name} must be True or False, got {value!r}")


def _check_tokens(name: str, value: Any) -> None:
    tokens = value.flatten().tolist() if isinstance(value, Tensor) else value
    if tokens is None:
        return
    for token in tokens if isinstance(tokens, list | tuple) else [tokens]:
        if not isinstance(token, Integral) or isinstance(token, bool):
            raise InvalidArgumentError(f"{name} must be a token id, or a list of them, got {value!r}")


def named(error: ValueError, model: PreTrainedModel, options: Mapping[str, Any]) -> ValueError:
    """Return the error for an option that transformers does not know, with the closest that it does; or this one."""
    if "model_kwargs" not in str(error):
        return error
    unknown = [name for name in options if repr(name) in str(error)]
    known = model.generation_config.to_dict()
    close = [f"{name!r}{nearest(name, known)}" for name in unknown]
    return InvalidArgumentError(f"generate() has no option {', '.join(close)}") if unknown else error


def inferred_mask(model: PreTrainedModel, input_ids: Tensor, options: dict[str, Any]) -> Tensor | None:
    """Return the mask [rows, tokens] that transformers infers from padding in a prompt, or None."""
    padding, ends = (_setting(model, options, name) for name in ("pad_token_id", "eos_token_id"))
    padding, ends = (
        each.flatten().tolist() if isinstance(each, Tensor) else each for each in (padding, ends)
    )
    padding = padding[0] if isinstance(padding, list) and padding else padding
    stops = {ends} if isinstance(ends, int) else set(ends or ())
    if not isinstance(padding, int) or padding in stops or not bool((input_ids == padding).any()):
        return None
    return (input_ids != padding).long()


def _setting(model: PreTrainedModel, options: dict[str, Any], name: str) -> Any:
    if name in options:
        return options[name]
    given = getattr(options.get("generation_config"), name, None)
    return getattr(model.generation_config, name, None) if given is None else given
