"""The systems that benches compare: plain windows, memories, what people take instead, and controls.

All have the part of `MemoryDecoder`'s interface that the benches use, so that they read the same tokens.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from memlong import MemoryConfig
from memlong.errors import InvalidArgumentError
from memlong.plugins.options import accepted_options
from memlong.settings import key_values
from systems.alternative import ABILITIES

FULL = "full"
MEMORY = "memory"
KINDS = {
    MEMORY: "memlong:MemoryDecoder",
    # Retrieved chunks as text in the prompt.
    "text": "systems.rag:RagAsText",
    # Full attention over K-V of so many bits, by transformers and optimum-quanto.
    "quantized-4": "systems.quantized:FourBits",
    "quantized-2": "systems.quantized:TwoBits",
    # As many single tokens as a memory attends to, which each token chooses itself in each layer and head, as FoT does.
    "nearest-keys": "systems.nearest:NearestKeys",
    # Full attention to a prompt, of which as much K-V is kept as a memory attends to; they only answer prompts.
    "kvpress-snapkv": "systems.kvpress:SnapKv",
    "kvpress-expected": "systems.kvpress:ExpectedAttention",
    "kvpress-kvzip": "systems.kvpress:KvZip",
    # Sentences of a prompt that the question attends to, read again; it only answers prompts.
    "infini-retri": "systems.kvpress:InfiniRetri",
    # A control: a memory with the chunks of another text.
    "foreign": "systems.foreign:ForeignMemory",
    # An upper bound, which chooses chunks by the tokens to be predicted.
    "oracle": "systems.oracle:PeekingOracle",
}
_RETRIEVAL = 2
"""Raised where the same settings retrieve other chunks than before, so that runs cached before are not taken."""

_GIVEN = ("model", "tokenizer", "config")
_NEXT_SETTING = re.compile(r",\s*(?=\w+\s*=)")  # a value may hold commas
_EXAMPLE = "'shared 8: kv_source=shared, top_k=8'"


@dataclass(frozen=True)
class System:
    """A decoder with these settings.

    Attributes
    ----------
    name
        What tables call it.
    config
        What it retrieves, and how.
    kind
        What reads with them, of `KINDS`.
    options
        What else that takes.
    """

    name: str
    config: MemoryConfig
    kind: str = MEMORY
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def family(self) -> str:
        """Systems of one family differ in size, the number that ends their names."""
        return "window" if self.name == FULL else re.sub(r"\s*\d+$", "", self.name)

    @property
    def settings(self) -> dict[str, Any]:
        """Settings other than the defaults, so that a setting that is added leaves cached runs valid."""
        usual = asdict(MemoryConfig())
        found = {key: value for key, value in asdict(self.config).items() if value != usual[key]}
        return found if self.kind == MEMORY else {**found, **self.options, "kind": self.kind}

    @property
    def facts(self) -> dict[str, Any]:
        """What a cached run depends on: the settings, the content of files that they name, and how it retrieves."""
        files = {
            key: hashlib.sha256(Path(value).read_bytes()).hexdigest()
            for key, value in self.settings.items()
            if isinstance(value, str) and Path(value).is_file()
        }
        own = {} if self.kind == MEMORY else getattr(_maker(self.kind), "facts", dict)()
        how = {} if self.config.backend is None else {"retrieval": _RETRIEVAL}
        return {**self.settings, **own, **files, **how}

    def decoder(self, model: PreTrainedModel, tokenizer: Any) -> Any:
        """Return what reads with these settings: a `MemoryDecoder`, or what has its interface."""
        return _maker(self.kind)(model, tokenizer, self.config, **self.options)


def built_in(
    base: MemoryConfig, windows: Sequence[int], chunks: Sequence[int], full: int | None
) -> list[System]:
    """Return plain windows, full attention over ``full`` tokens unless None, and memories of so many chunks.

    The first is the plain window of ``base``, with which all others are compared.
    """
    plain = replace(base, backend=None, position_mode=None)
    sizes = [base.local_window, *sorted({*windows} - {base.local_window})]
    found = [System(f"window {size}", replace(plain, local_window=size)) for size in sizes]
    if full is not None:
        # At true positions, so that the window may have room for a segment that never comes.
        room = full + base.segment_size
        everything = replace(plain, local_window=room, position_mode="original")
        found.append(System(FULL, everything))
    return found + [System(f"{base.retriever} {count}", replace(base, top_k=count)) for count in chunks]


def described(text: str, base: MemoryConfig) -> System:
    """Return the system that ``NAME: key=value, key=value`` describes, by what it has other than ``base``.

    Keys are settings of `MemoryConfig`, ``kind``, one of `KINDS`, and that kind's own options.

    Raises
    ------
    InvalidArgumentError
        If the text has another form, or the settings do not work.
    """
    name, colon, settings = text.partition(":")
    if not colon or not name.strip() or not settings.strip():
        raise InvalidArgumentError(
            f"--system must be NAME: key=value, key=value, such as {_EXAMPLE}, got {text!r}"
        )
    given: dict[str, Any] = key_values("--system", _NEXT_SETTING.split(settings.strip()), example=_EXAMPLE)
    kind = given.pop("kind", MEMORY)
    if not isinstance(kind, str) or kind not in KINDS:
        raise InvalidArgumentError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    own = () if kind == MEMORY else accepted_options(_maker(kind), besides=_GIVEN)
    options = {key: given.pop(key) for key in own if key in given}
    return System(name.strip(), MemoryConfig(**{**asdict(base), **given}), kind, options)


def all_different(systems: Sequence[System]) -> list[System]:
    """Return the systems; InvalidArgumentError if two have one name."""
    names = [each.name for each in systems]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InvalidArgumentError(f"Systems must have different names, got {twice[0]!r} twice: rename one")
    return list(systems)


def check_able(
    systems: Sequence[System], model: PreTrainedModel, tokenizer: Any, needs: Iterable[str]
) -> None:
    """Make each system once, so that what it lacks is known before others are measured.

    Raises
    ------
    InvalidArgumentError
        If a system cannot do what a bench needs.
    MemlongError
        If it cannot be made.
    """
    for each in systems:
        able = getattr(each.decoder(model, tokenizer), "abilities", ABILITIES)
        missing = sorted({*needs} - able)
        if missing:
            raise InvalidArgumentError(
                f"{each.name!r} (kind={each.kind!r}) cannot {' or '.join(missing)} here: leave it out, or measure only "
                f"what it can do ({', '.join(sorted(able))})"
            )


def reads_whole(system: System) -> bool:
    """Whether a system needs as many positions as a text has tokens."""
    return system.kind != MEMORY and bool(_maker(system.kind).reads_whole)


def _maker(kind: str) -> type[Any]:
    module, _, name = KINDS[kind].partition(":")
    found: type[Any] = getattr(import_module(module), name)
    return found
