"""A backend that breaks a clause of the contract fails the test of that clause, and the failure says which it is."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from memlong.testing import MemoryBankTests
from memlong.testing.index import IndexTests

HERE = Path(__file__).parent
WRONG = {
    bank: test
    for file in ("wrong_banks.py", "wrong_indexes.py")
    for bank, test in runpy.run_path(str(HERE / file))["WRONG"].items()
}
CLAUSE = "Clause of memlong's contract"


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    """What pytest says of each test that failed, by "TestClass.test_name", its parameters left out."""
    chosen = [f"wrong_suites.py::Test{bank.__name__}::{test}" for bank, test in WRONG.items()]
    chosen += [
        f"wrong_suites.py::TestRightIndex::{test}" for test in vars(IndexTests) if test.startswith("test_")
    ]
    said = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--tb=short",
            "-c",
            os.devnull,
            "-p",
            "no:cacheprovider",
            *chosen,
        ],
        cwd=HERE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    found: dict[str, str] = {}
    for part in re.split(r"\n_+ (?=Test)", said)[1:]:
        name = re.match(r"Test\w+\.\w+", part)
        found[name[0]] = found.get(name[0], "") + part
    return found


@pytest.mark.slow
@pytest.mark.parametrize("bank", WRONG, ids=lambda bank: bank.__name__)
def test_the_suite_finds_a_wrong_bank_and_names_the_clause(failures, bank):
    test = WRONG[bank]
    said = failures.get(f"Test{bank.__name__}.{test}", "")
    clause = " ".join(getattr(MemoryBankTests, test).__doc__.split())
    assert CLAUSE in said, f"{bank.__name__} passed {test}"
    assert clause in said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["NamesNothing", "SignFlipped", "StopsGrowing"])
def test_a_failure_for_low_recall_says_what_to_look_at(failures, name):
    (said,) = [each for test, each in failures.items() if test.startswith(f"Test{name}.")]
    assert "Check the metric" in said
    assert "ef, nprobe" in said


@pytest.mark.slow
def test_what_the_wrong_indexes_derive_from_is_right(failures):
    assert not [said for name, said in failures.items() if name.startswith("TestRightIndex.")]


def test_there_are_enough_of_them():
    assert len(WRONG) >= 12
    assert len(set(WRONG.values())) >= 12
