"""The contract of a backend's own options: each is saved and loaded, and rejects invalid values."""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from inspect import Parameter
from pathlib import Path
from typing import Any, ClassVar

from memlong.bank import MemoryBank
from memlong.bank.snapshot.options import refused_option
from memlong.errors import MemlongError
from memlong.plugins.options import option_parameters
from memlong.testing.harness import BankSuite, random_chunks

_SECONDS, _BYTES = 5.0, 2**30
_NUMBERS = (-(10**9), 10**9, 2**31, 2**63)


class OptionTests(BankSuite):
    """The options that only this class has, read from its signature."""

    not_saved: ClassVar[Collection[str]] = ()

    def test_the_options_are_saved(self) -> None:
        """Snapshots save all options except those in `not_saved`, and `saved_options` lists what a file may set."""
        own, options = own_options(self.bank_class), self.make().options_to_save()
        forgotten = sorted(own.keys() - options.keys() - set(self.not_saved))
        assert not forgotten, (
            f"options_to_save does not return {forgotten}, so a loaded bank has their defaults. Return them, or list "
            "in `not_saved` what a file must not contain: addresses, credentials, paths"
        )
        assert not options.keys() & set(self.not_saved)
        given = {name: value for name, value in self.options.items() if name in own}
        assert given.items() <= {**given, **options}.items()
        assert not refused_option(self.bank_class, options, self.bank_class.saved_options)

    def test_other_options_come_back(self, tmp_path: Path) -> None:
        """Options with non-default values survive saving and loading."""
        bounds = self.bank_class.saved_options
        for name, parameter in own_options(self.bank_class).items():
            usual, most = self.options.get(name, parameter.default), bounds.get(name, 0)
            for other in () if name in self.not_saved else _others(usual):
                is_too_much = most is not None and other > most
                bank = None if is_too_much else self._made(name, other)
                if bank is None:
                    continue
                assert bank.options_to_save()[name] == other
                random_chunks(5).into(bank)
                bank.save(tmp_path / name)
                loaded = self.bank_class.load(tmp_path / name)
                assert loaded.options_to_save() == bank.options_to_save()
                break

    def test_invalid_options_are_rejected(self) -> None:
        """A value of the wrong type, NaN, negative or far too large is a MemlongError, at once.

        A number that is harmless at any size, such as a seed, has the bound None in `saved_options`.
        """
        wrong = [
            f"{name}={value!r} {outcome}"
            for name, parameter in own_options(self.bank_class).items()
            for value in absurd_values(parameter, self.bank_class.saved_options.get(name, 0) is not None)
            if (outcome := self._outcome(name, value))
        ]
        assert not wrong, "; ".join(wrong) + " (expected an InvalidArgumentError, as whole_number() raises)"

    def _made(self, name: str, value: object) -> MemoryBank | None:
        try:
            return self.make(**{name: value})
        except MemlongError:
            return None

    def _outcome(self, name: str, value: object) -> str:
        """Return how the class fails to reject a value; empty if it rejects it."""
        started = time.perf_counter()
        try:
            with _little_memory():
                self.make(**{name: value})
        except MemlongError:
            seconds = time.perf_counter() - started
            return f"is rejected only after {seconds:.1f} s" if seconds > _SECONDS else ""
        except Exception as error:  # noqa: BLE001 - any other error is a failure
            return f"raises {type(error).__name__}: {error}"
        return "is accepted"


def own_options(bank_class: type[MemoryBank]) -> Mapping[str, Parameter]:
    """Return the options of a class beyond those of every bank."""
    common = option_parameters(MemoryBank).keys()
    found = option_parameters(bank_class).items()
    return {name: parameter for name, parameter in found if name not in common}


def absurd_values(parameter: Parameter, has_bound: bool) -> list[Any]:
    """Return invalid values for an option, judging by its annotation, or else its default."""
    said = str(parameter.annotation) if parameter.annotation is not Parameter.empty else ""
    kinds = set(re.findall(r"\b(bool|int|float|str)\b", said)) or {type(parameter.default).__name__}
    values: list[Any] = [math.nan]
    if "bool" not in kinds:
        values.append(True)
    if "str" not in kinds and kinds & {"bool", "int", "float"}:
        values.append("many")
    if "int" in kinds and "float" not in kinds:
        values += _NUMBERS if has_bound else _NUMBERS[:1]
    return values


def _others(usual: object) -> tuple[Any, ...]:
    match usual:
        case bool():
            return (not usual,)
        case int():
            return (usual + 1, 2 * usual, usual - 1, usual // 2)
        case float():
            return (usual / 2, 2 * usual, usual + 1)
    return ()


@contextmanager
def _little_memory() -> Iterator[None]:
    """Limit further allocations to a gigabyte (on Linux), as an invalid option may request much more."""
    if sys.platform != "linux":
        yield
        return
    import resource

    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [each for each in (soft, hard) if each != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([held + _BYTES, *limits]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
