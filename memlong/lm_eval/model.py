"""A language model with a memory, as the lm-evaluation-harness asks models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from os import PathLike
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, StoppingCriteria

from memlong.bank.validate import whole_number
from memlong.bank.warn import warn_caller
from memlong.decoder import MemoryConfig, MemoryDecoder, load_model
from memlong.errors import InvalidArgumentError, MissingDependencyError
from memlong.evaluation import token_losses
from memlong.evaluation.numbers import checked_logits
from memlong.lm_eval.prefixes import one_by_one, shared_prefixes
from memlong.settings import default_of, key_values, metadata_of

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import (
        handle_stop_sequences,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
    from lm_eval.utils import simple_parse_args_string
except ImportError as error:
    raise MissingDependencyError(
        f"memlong.lm_eval needs the lm-evaluation-harness ({error}): pip install 'memlong[lm-eval]'"
    ) from error

_ENDLESS = 1 << 40
_AUTO = 8
_LM_EVALS_DEFAULT = "cuda:0"  # where no device is named


@register_model("memlong")
class MemlongLM(TemplateLM):  # type: ignore[misc]
    """A model with a memory, for `lm_eval.simple_evaluate` and the command line of lm-eval.

    Every request begins with an empty memory. Prompts are streamed, never cut; what several have in common at their
    beginning is read once, and the continuations of a prompt are scored side by side. The end of a prompt is the query,
    as for `MemoryDecoder.generate`.

    Parameters
    ----------
    pretrained
        As `load_model` takes it; or a decoder with a tokenizer, whose settings then count. It may be attached; its
        streams are reset.
    adapter
        A trained decoder, as `MemoryDecoder.from_pretrained` takes it.
    tokenizer
        Another tokenizer: a folder or a hub id.
    batch_size
        Continuations of a prompt that are scored side by side; ``"auto"`` is 8.
    dtype, device, trust_remote_code
        As for `load_model`; ``device=None`` is ``"auto"``.
    max_gen_toks
        Tokens to generate where a task does not say.
    add_bos_token
        Whether texts begin with the tokenizer's token for that; None is what the tokenizer does itself.
    prefix_token_id
        What an empty prompt is replaced by; None is the token that begins a text, or else the one that ends it.
    chat_template_args
        Passed to the chat template.
    **memory
        Settings of `MemoryConfig`; ``backend="none"`` is the plain window. Where a setting is a mapping, text such as
        ``"m=16;ef_search=64"`` will do.

    Raises
    ------
    InvalidArgumentError
        If there is no such model or setting.
    MissingDependencyError
        If a package is not installed.

    Examples
    --------
    >>> lm_eval.simple_evaluate(model="memlong", model_args="pretrained=demo", tasks=["piqa"])  # doctest: +SKIP
    """

    def __init__(
        self,
        pretrained: str | PathLike[str] | MemoryDecoder | None = None,
        *,
        adapter: str | None = None,
        tokenizer: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,  # noqa: ARG002 - lm-eval passes it to every model
        dtype: str = "auto",
        device: str | None = None,
        trust_remote_code: bool = False,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        **memory: Any,
    ) -> None:
        super().__init__()
        self._rows = _rows_of(batch_size)
        if pretrained is not None and not isinstance(pretrained, str | PathLike):
            if getattr(pretrained, "tokenizer", None) is None or not hasattr(pretrained, "score"):
                raise InvalidArgumentError(
                    "pretrained must be the name of a model or a decoder with a tokenizer, got "
                    f"{type(pretrained).__name__}: give MemoryDecoder(model, tokenizer, config)"
                )
            if adapter is not None or memory:
                given = [*(["adapter"] if adapter is not None else []), *memory]
                raise InvalidArgumentError(
                    f"pretrained is a decoder, whose own settings count: leave out {', '.join(given)}"
                )
            self.decoder = pretrained
        else:
            if device == _LM_EVALS_DEFAULT and not torch.cuda.is_available():
                warn_caller(f"torch sees no CUDA device here, so the model does not run on {device}")
                device = None
            place = {"dtype": dtype, "device": device or "auto", "trust_remote_code": trust_remote_code}
            self.decoder = _opened(pretrained, adapter, memory, place)
        self.tokenizer = self.decoder.tokenizer
        if tokenizer is not None:
            self.tokenizer = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=trust_remote_code)
        if self.tokenizer.eos_token_id is None:
            raise InvalidArgumentError(
                "The tokenizer has no token that ends a text, by which lm-eval ends answers: set tokenizer.eos_token"
            )
        self._device = next(self.decoder.model.parameters()).device
        self._name = str(getattr(self.tokenizer, "name_or_path", "") or type(self.tokenizer).__name__)
        self._new_tokens = whole_number("max_gen_toks", max_gen_toks, at_least=1)
        self._adds_bos = add_bos_token
        self._prefix_token_id = prefix_token_id
        self._chat_template_args = dict(chat_template_args or {})
        self._last_prompt: tuple[str, list[int]] = ("", [])

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> MemlongLM:
        """Make a model of ``model_args`` as text."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> MemlongLM:
        """Make a model of ``model_args``, which count before what lm-eval adds: batch sizes and the device."""
        added = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**(added | arg_dict))

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What an empty prompt is replaced by."""
        if self._prefix_token_id is not None:
            return self._prefix_token_id
        beginning = self.tokenizer.bos_token_id
        return self.eot_token_id if beginning is None else int(beginning)

    @property
    def max_length(self) -> int:
        """Tokens that a prompt may have: memory has no limit."""
        return _ENDLESS

    @property
    def max_gen_toks(self) -> int:
        """Tokens to generate where a task does not say."""
        return self._new_tokens

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, by which lm-eval caches requests."""
        return self._name.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval writes into its results."""
        parameters = sum(each.numel() for each in self.decoder.model.parameters())
        return {"model_num_parameters": parameters, "memory": self.decoder.config.as_dict()}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the token ids of a text."""
        adds = self._adds_bos if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and string.startswith(self.tokenizer.decode([self.prefix_token_id])):
            adds = False
        options = {} if adds is None else {"add_special_tokens": adds}
        ids: list[int] = self.tokenizer(string, verbose=False, **options).input_ids
        return ids

    def tok_decode(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as the text that the model was trained on."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self._chat_template_args,
        )
        return text

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a prompt and of what follows, as lm-eval does, but those of a prompt once in a row."""
        prompt = context.rstrip()
        known, tokens = self._last_prompt
        if known != prompt:
            tokens = self.tok_encode(prompt)
            self._last_prompt = prompt, tokens
        return tokens, self.tok_encode(context + continuation)[len(tokens) :]

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for number, (_texts, prompt, _continuation) in enumerate(requests):
            by_prompt.setdefault(tuple(prompt), []).append(number)
        prompts = list(by_prompt)
        answers: dict[int, tuple[float, bool]] = {}
        with self._attached(), _bar("loglikelihood", len(requests), disable_tqdm) as bar:
            for place, rest in self._read_to_the_rest(prompts):
                numbers = by_prompt[prompts[place]]
                found = self.decoder.score(
                    _row(rest), [requests[each][2] for each in numbers], rows=self._rows
                )
                for number, likelihood in zip(numbers, found, strict=True):
                    checked_logits(None, likelihood.tokens)
                    answer = float(likelihood.tokens.double().sum()), bool(likelihood.is_greedy.all())
                    answers[number] = answer
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
                bar.update(len(numbers))
        return [answers[number] for number in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole documents, each streamed from its beginning to its end."""
        answers = []
        with self._attached(), _bar("loglikelihood_rolling", len(requests), disable_tqdm) as bar:
            for (text,) in (request.args for request in requests):
                losses = token_losses(self.decoder, _row([self.prefix_token_id, *self.tok_encode(text)]))
                answers.append(-float(losses.sum()))
                self.cache_hook.add_partial("loglikelihood_rolling", (text,), answers[-1])
                bar.update()
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what the model answers to each prompt, up to the first of the texts that end an answer."""
        prompts = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
        answers: dict[int, str] = {}
        with self._attached(), _bar("generate_until", len(requests), disable_tqdm) as bar:
            for number, rest in self._read_to_the_rest(prompts):
                text, options = requests[number].args
                answers[number] = self._answer(rest, options)
                self.cache_hook.add_partial("generate_until", (text, options), answers[number])
                bar.update()
        return [answers[number] for number in range(len(requests))]

    def _attached(self) -> AbstractContextManager[Any]:
        """Return the decoder to enter, unless its own `with` block is around."""
        return nullcontext() if getattr(self.decoder, "is_attached", False) else self.decoder

    @property
    def _evicts(self) -> bool:
        """Whether a bank may evict chunks: then what follows a shared beginning must be stored, too."""
        config = self.decoder.config
        return bool(config.store) or not {"max_chunks", "max_bytes"}.isdisjoint(config.backend_options)

    def _answer(self, prompt: Sequence[int], given: Mapping[str, Any]) -> str:
        options: dict[str, Any] = dict(normalize_gen_kwargs(dict(given), self.max_gen_toks))
        until = handle_stop_sequences(options.pop("until"), self.tokenizer.decode([self.eot_token_id]))
        if not options["do_sample"]:
            options.pop("temperature", None)
        row = _row(prompt)
        said = self.decoder.generate(
            row,
            torch.ones_like(row),
            remember=False,
            max_new_tokens=options.pop("max_gen_toks"),
            stopping_criteria=[_Until(self, until, len(prompt))],
            logits_processor=[checked_logits],
            pad_token_id=self.eot_token_id,
            **options,
        )
        text = self.tok_decode(said[0, len(prompt) :].tolist())
        answer: str = postprocess_generated_text(text, until, None)
        return answer

    def _read_to_the_rest(self, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, Sequence[int]]]:
        """Read what prompts begin with; yield the index of each prompt whose turn it is, and its last tokens."""
        for group in one_by_one(prompts) if self._evicts else shared_prefixes(prompts):
            self.decoder.reset()
            if group.prefix:
                self.decoder.read(_row(group.prefix))
            for number in group.prompts:
                yield number, prompts[number][len(group.prefix) :]


class _Until(StoppingCriteria):
    """Ends an answer of one row when it holds one of some texts."""

    def __init__(self, model: MemlongLM, texts: Sequence[str], prompt: int) -> None:
        self._decode, self._texts, self._prompt = model.tok_decode, [each for each in texts if each], prompt

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # noqa: ARG002
        """Whether it does [1]."""
        said = self._decode(input_ids[0, self._prompt :].tolist())
        return torch.tensor([any(each in said for each in self._texts)], device=input_ids.device)


def _opened(
    pretrained: str | PathLike[str] | None,
    adapter: str | None,
    memory: Mapping[str, Any],
    place: Mapping[str, Any],
) -> MemoryDecoder:
    settings = dict(memory)
    for each in fields(MemoryConfig):
        value = settings.get(each.name)
        if default_of(each) == {} and isinstance(value, str):
            settings[each.name] = key_values(each.name, value.split(";"), as_text=metadata_of(each).texts)
    if settings.get("backend") == "none":
        settings["backend"] = None
    if adapter is not None:
        model, tokenizer = (None, None) if pretrained is None else load_model(pretrained, **place)
        return MemoryDecoder.from_pretrained(adapter, model, tokenizer, changes=settings, **place)
    if pretrained is None:
        raise InvalidArgumentError(
            "pretrained is missing: name a hub id, a folder, a GGUF file or 'demo', as in model_args='pretrained=demo'"
        )
    config = MemoryConfig(**settings)
    model, tokenizer = load_model(pretrained, **place)
    return MemoryDecoder(model, tokenizer, config)


def _rows_of(batch_size: int | str) -> int:
    """Return a number of rows, which lm-eval passes as text, and which may be ``auto`` or ``auto:N``."""
    if isinstance(batch_size, str):
        if batch_size.partition(":")[0] == "auto":
            return _AUTO
        batch_size = int(batch_size) if batch_size.isdecimal() else batch_size
    return whole_number("batch_size", batch_size, at_least=1)


def _row(tokens: Sequence[int]) -> torch.Tensor:
    return torch.tensor([list(tokens)], dtype=torch.long, device="cpu")


def _bar(what: str, total: int, disabled: bool) -> tqdm[Any]:
    return tqdm(total=total, desc=f"Running {what} requests", disable=disabled)
