"""Sessions: whose a chunk is, by name for people, by numbers for the engine."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass

from memlong.bank import Ids
from memlong.errors import InvalidArgumentError

LEAST_UNNAMED = 1 << 62
"""Numbers of sessions without a name begin here."""

_LONGEST_NAME = 256
_KEY_DIGITS = 32
_UNNAMED = 1 << 127


@dataclass(frozen=True)
class Session:
    """The memory of one token stream among many in a collection.

    Attributes
    ----------
    name : str
        As its user calls it.
    named : bool
        Whether a user did; otherwise the name is random, and nobody else's.
    key : str
        A bit that says whether there is a name, and 127 of its hash, in hexadecimal: no two names share it.
    """

    name: str
    named: bool
    key: str

    @classmethod
    def of(cls, name: str | None) -> Session:
        """Return the session of this name, or one with a random name.

        Raises
        ------
        InvalidArgumentError
            If the name is empty or too long.
        """
        if name is None:
            random = f"unnamed-{secrets.token_hex(16)}"
            return cls(random, named=False, key=_key(random, named=False))
        if not 0 < len(name) <= _LONGEST_NAME:
            raise InvalidArgumentError(
                f"session must be text of 1 to {_LONGEST_NAME} characters, such as a user's id, got {name!r}"
            )
        return cls(name, named=True, key=_key(name, named=True))

    @classmethod
    def of_key(cls, key: str) -> Session:
        """Return the session of a key, whatever its name is."""
        return cls(key, named=int(key, 16) < _UNNAMED, key=key)

    @property
    def number(self) -> int:
        """The first 63 bits of the key, for filters on integers.

        Two of a million names share theirs with a probability of 1 in 10 million. A search then finds rows of
        both, and `ids_of` leaves out those of the other.
        """
        return int(self.key[:16], 16) >> 1

    def partition(self, count: int) -> int:
        """Return which of `count` partitions it is in."""
        return self.number % count

    def keys_of(self, ids: Ids) -> list[str]:
        """Return the primary keys of chunks."""
        return [f"{self.key}/{chunk_id}" for chunk_id in ids.tolist()]

    def ids_of(self, keys: list[str]) -> list[int]:
        """Return the chunk ids in primary keys, of those that are this session's."""
        prefix = f"{self.key}/"
        return [int(key[len(prefix) :]) for key in keys if key.startswith(prefix)]


def _key(name: str, *, named: bool) -> str:
    digest = int(hashlib.sha256(name.encode()).hexdigest()[:_KEY_DIGITS], 16)
    return f"{digest & (_UNNAMED - 1) if named else digest | _UNNAMED:0{_KEY_DIGITS}x}"
