"""Sessions: whose a chunk is, by name for people and by number for Milvus."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass

from memlong.bank import Ids
from memlong.errors import InvalidArgumentError

LEAST_UNNAMED = 1 << 62
"""Numbers of sessions without a name begin here."""

_LONGEST_NAME, _KEY_DIGITS, _UNNAMED = 256, 32, 1 << 127


@dataclass(frozen=True)
class Session:
    """The memory of one token stream among many in a collection.

    Attributes
    ----------
    name : str
        As its user calls it, or random.
    named : bool
        Whether a user named it.
    key : str
        128 bits in hexadecimal, no two sessions' the same: whether it has a name, and 127 bits of its hash.
    """

    name: str
    named: bool
    key: str

    @classmethod
    def of(cls, name: str | None) -> Session:
        """Return the session of this name, or one with a random name; InvalidArgumentError for an odd one."""
        if name is not None and not 0 < len(name) <= _LONGEST_NAME:
            raise InvalidArgumentError(
                f"session must be text of 1 to {_LONGEST_NAME} characters, such as a user's id, got {name!r}"
            )
        known = f"unnamed-{secrets.token_hex(16)}" if name is None else name
        digest = int(hashlib.sha256(known.encode()).hexdigest()[:_KEY_DIGITS], 16)
        marked = digest | _UNNAMED if name is None else digest & (_UNNAMED - 1)
        return cls(known, name is not None, f"{marked:0{_KEY_DIGITS}x}")

    @classmethod
    def of_key(cls, key: str) -> Session:
        """Return the session of a key, whatever its name is."""
        return cls(key, named=int(key, 16) < _UNNAMED, key=key)

    @property
    def number(self) -> int:
        """The first 63 bits of the key, for filters on integers.

        Two of a million names share theirs with a probability of 1 in 10 million. A search then finds rows of both, and
        `ids_of` leaves out those of the other.
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
