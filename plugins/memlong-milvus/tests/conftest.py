"""What the tests share: servers that start once, and stop in any case."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from milvus_server import INSTALL, Server, is_installed


@pytest.fixture(autouse=True)
def nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ignore the Milvus that the environment names."""
    monkeypatch.delenv("MEMLONG_MILVUS_URI", raising=False)
    monkeypatch.delenv("MEMLONG_MILVUS_TOKEN", raising=False)


@pytest.fixture(scope="session")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server's programs are unpacked, once."""
    if not is_installed():
        pytest.skip(f"no Milvus server is installed: {INSTALL}")
    return tmp_path_factory.mktemp("binaries")


@pytest.fixture(scope="session")
def server(binaries: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that all tests share."""
    yield from _served(Server(tmp_path_factory.mktemp("milvus"), binaries=binaries))


@pytest.fixture
def own_server(binaries: Path, tmp_path: Path) -> Iterator[Server]:
    """A server of the test's own, to be killed."""
    yield from _served(Server(tmp_path / "milvus", binaries=binaries))


@pytest.fixture
def secured_server(binaries: Path, tmp_path: Path) -> Iterator[Server]:
    """A server that asks for a password."""
    yield from _served(Server(tmp_path / "milvus", binaries=binaries, secured=True))


def _served(server: Server) -> Iterator[Server]:
    try:
        server.start()
        yield server
    finally:
        server.stop()
