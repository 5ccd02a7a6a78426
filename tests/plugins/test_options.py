"""The options of a class are read from its constructors, up to the one that passes nothing on."""

from __future__ import annotations

import pytest

from memlong.errors import InvalidArgumentError
from memlong.plugins.options import accepted_options, check_options


class Base:
    def __init__(self, dim, *, metric="cosine", capacity=None): ...


class Passing(Base):
    def __init__(self, dim, *, probes=1, **bank_options):
        super().__init__(dim, **bank_options)


class Closed(Base):
    def __init__(self, dim, *, probes=1):
        super().__init__(dim)


class Inheriting(Passing):
    pass


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (Base, ("metric", "capacity")),
        (Passing, ("probes", "metric", "capacity")),
        (Inheriting, ("probes", "metric", "capacity")),
        (Closed, ("probes",)),
        (type("Bare", (), {}), ()),
    ],
)
def test_options_are_collected_across_the_mro(cls, options):
    assert accepted_options(cls, besides=("dim",)) == options


def check(cls, *given: str) -> None:
    check_options("backend 'x'", cls, given, besides=("dim",))


def test_an_unknown_option_is_named_with_the_nearest_and_all_that_are_accepted():
    message = (
        r"^There is no option 'metrik' of backend 'x'\. Did you mean 'metric'\? "
        r"It accepts: 'metric', 'capacity'$"
    )
    with pytest.raises(InvalidArgumentError, match=message):
        check(Base, "metrik")


def test_where_nothing_is_accepted_the_message_says_so():
    with pytest.raises(
        InvalidArgumentError, match=r"^There is no option 'a' of backend 'x'\. It accepts: none$"
    ):
        check(type("Bare", (), {}), "a")


def test_known_options_pass():
    check(Passing, "metric", "probes")


class Needing(Base):
    def __init__(self, dim, *, uri, **bank_options):
        super().__init__(dim, **bank_options)


class Giving(Needing):
    def __init__(self, dim, **options):
        super().__init__(dim, uri="here", **options)


def test_an_option_that_is_needed_is_asked_for():
    message = r"^The option 'uri' of backend 'x' is missing\. It accepts: 'uri', 'metric', 'capacity'$"
    with pytest.raises(InvalidArgumentError, match=message):
        check(Needing, "metric")
    check(Needing, "uri")


def test_what_a_constructor_gives_its_base_is_not_asked_for():
    check(Giving)
