"""The bank meets the whole contract of memlong, embedded and on a server."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from milvus_server import Server

from memlong.bank import MemoryBank
from memlong.testing import MemoryBankTests
from memlong.testing.harness import another_configuration
from memlong_milvus.bank import MilvusBank


class Milvus(MemoryBankTests):
    bank_class = MilvusBank
    not_saved = ("uri", "token", "database", "collection", "session", "resume", "kv_device")

    def index_bytes(self, bank: MemoryBank) -> int:
        """The rows of the session that there are, a row being 4 bytes a number."""
        assert isinstance(bank, MilvusBank)
        return 4 * bank.dim * len(bank.rows.held())


@pytest.mark.slow
class TestLite(Milvus):
    """Embedded in this process."""


class OnServer(Milvus):
    """Where a bank is comes from the environment, as for a bank that is loaded from a snapshot."""

    @pytest.fixture(autouse=True)
    def _there(self, server: Server, nowhere_else: None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MEMLONG_MILVUS_URI", server.uri)

    def make(self, **options: Any) -> MemoryBank:
        bank = super().make(**options)
        assert isinstance(bank, MilvusBank)
        assert bank.uri.startswith("http://127.0.0.1:")
        return bank


@another_configuration
@pytest.mark.server
class TestServer(OnServer):
    """As users have it: bounded staleness, and what is younger searched by the bank."""


@another_configuration
@pytest.mark.server
class TestStrongServer(OnServer):
    """Nothing but what the server finds."""

    options: ClassVar = {"consistency": "strong"}
