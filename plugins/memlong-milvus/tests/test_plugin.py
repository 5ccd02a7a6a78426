"""The backend as memlong has it: by name, by URI, on the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from memlong import Registry
from memlong.testing import BackendPluginTests
from memlong_milvus.bank import MilvusBank


class TestPlugin(BackendPluginTests):
    backend = "milvus"


def test_a_uri_makes_a_bank(tmp_path: Path) -> None:
    bank = Registry().create_bank(f"milvus+lite://{tmp_path}/memory.db?session=me&ef=99", 8)
    assert isinstance(bank, MilvusBank)
    assert bank.session == "me"
    assert bank.uri == f"{tmp_path}/memory.db"


@pytest.mark.parametrize("scheme", ["milvus", "milvus+http", "milvus+https", "milvus+lite"])
def test_each_scheme_is_registered_once(scheme: str) -> None:
    assert [spec.name for spec in Registry().list_uri_schemes()].count(scheme) == 1


def test_listing_backends_imports_no_milvus() -> None:
    script = "import sys, memlong; memlong.list_backends(); print('pymilvus' in sys.modules or 'grpc' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "False"
