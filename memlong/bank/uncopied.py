"""A base for objects that must not be copied: two would share what only one may own."""

from __future__ import annotations

from typing import ClassVar, NoReturn

from memlong.errors import MemlongError


class Uncopied:
    """Refuses copy, deepcopy and pickle; a subclass says why, and what to do instead, in ``why_uncopied``."""

    why_uncopied: ClassVar[str]

    def __reduce_ex__(self, _: object) -> NoReturn:
        raise MemlongError(f"A {type(self).__name__} cannot be copied or pickled: {self.why_uncopied}")
