"""A class method that refuses to be called on an object, which it would leave unchanged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memlong.errors import InvalidArgumentError

if TYPE_CHECKING:
    of_class = classmethod
else:

    class of_class(classmethod):  # noqa: N801 - as classmethod
        """A class method that makes an object, and says so to a caller who expects it to fill an existing one."""

        def __get__(self, instance: Any, owner: type | None = None) -> Any:
            """Return the method of the class; on an object, a function that raises InvalidArgumentError."""
            if instance is None:
                return super().__get__(instance, owner)
            kind, name = type(instance).__name__, self.__func__.__name__

            def refuse(*_: Any, **__: Any) -> Any:
                raise InvalidArgumentError(
                    f"{name}() makes a new {kind}, and would leave this one as it is: write "
                    f"new = {kind}.{name}(path, ...), and use that"
                )

            return refuse
