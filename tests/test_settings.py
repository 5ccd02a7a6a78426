"""Settings that are declared once: what is checked, said and documented follows from their fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import pytest

from memlong import MemoryConfig
from memlong.errors import InvalidArgumentError
from memlong.settings import checked, documented, metadata_of, setting
from memlong.training import TrainingConfig


@documented
@dataclass
class Kitchen:
    """What a cook chooses.

    Raises
    ------
    InvalidArgumentError
        Never.
    """

    cups: int = setting(2, "Cups of rice.", least=1, most=9)
    heat: float | None = setting(None, "Heat of the stove.", unset="what it was", above=0, more="In watts.")
    pan: Literal["iron", "steel"] = setting("iron", "The pan.")
    lid: bool = setting(True, "Whether there is a lid.")
    herbs: tuple[str, ...] = setting((), "Herbs.", metavar="NAME")
    extras: Mapping[str, Any] = setting(dict, "Other things.", metavar="K=V")
    name: str | None = setting(None, "Name of the dish.")


def test_the_docstring_is_made_of_the_fields():
    assert "    heat\n        Heat of the stove. By default, what it was. In watts.\n" in Kitchen.__doc__
    assert Kitchen.__doc__.index("Parameters") < Kitchen.__doc__.index("Raises")


@pytest.mark.parametrize("settings", [MemoryConfig, TrainingConfig])
def test_every_setting_says_what_it_is_within_its_bounds(settings):
    for each in fields(settings):
        assert metadata_of(each).help.endswith(".")
        assert f"    {each.name}\n" in settings.__doc__
    settings()


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"cups": np.int64(3)}, ("cups", 3)),
        ({"heat": 2}, ("heat", 2)),
        ({"herbs": ["mint"]}, ("herbs", ("mint",))),
        ({"pan": "steel"}, ("pan", "steel")),
    ],
)
def test_good_values_are_taken_as_pythons_own(values, found):
    name, value = found
    assert checked(Kitchen(**values))[name] == value
    assert type(checked(Kitchen(**values))[name]) is type(value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cups": 0}, "cups must be an integer from 1 to 9, got 0"),
        ({"cups": True}, "cups must be an integer from 1 to 9, got True"),
        ({"cups": "3"}, "cups must be an integer from 1 to 9, got '3'"),
        ({"cups": None}, "cups must be an integer from 1 to 9, got None"),
        ({"cups": 10**5000}, "cups must be an integer from 1 to 9, got a number with thousands of digits"),
        (
            {"heat": 10**400},
            "heat must be a number above 0 and at most 9223372036854775807, or None, got 1000",
        ),
        ({"heat": 0.0}, "heat must be a number above 0, or None, got 0.0"),
        ({"heat": float("inf")}, r"heat must be a number above 0 and at most 1e\+30, or None, got inf"),
        ({"pan": ["iron"]}, r"pan must be one of 'iron', 'steel', got \['iron'\]"),
        ({"lid": 1}, "lid must be True or False, got 1"),
        ({"herbs": "mint"}, "herbs must be a sequence of names, got 'mint'"),
        ({"herbs": [1]}, r"herbs must be a sequence of names, got \[1\]"),
        ({"extras": [("key", "secret")]}, "extras must be a mapping from option to value, got a list"),
        ({"name": 3}, "name must be text, or None, got 3"),
    ],
)
def test_what_cannot_be_used_is_named(values, message):
    with pytest.raises(InvalidArgumentError, match=message):
        checked(Kitchen(**values))
