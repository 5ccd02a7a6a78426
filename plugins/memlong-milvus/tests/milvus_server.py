"""A real Milvus server for the tests: started on loopback in a folder of its own, killed and started again."""

from __future__ import annotations

import importlib.util
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

PACKAGE = "milvus"
INSTALL = "pip install 'milvus==2.3.5'"
_COMPONENTS = (
    "proxy",
    "rootCoord",
    "queryCoord",
    "queryNode",
    "indexCoord",
    "indexNode",
    "dataCoord",
    "dataNode",
)
_ETCD = """\
name: default
listen-client-urls: http://127.0.0.1:{clients}
advertise-client-urls: http://127.0.0.1:{clients}
listen-peer-urls: http://127.0.0.1:{peers}
initial-advertise-peer-urls: http://127.0.0.1:{peers}
initial-cluster: default=http://127.0.0.1:{peers}
"""
# Without it the embedded etcd takes ports 2379 and 2380, regardless of Milvus's own settings, so a second server on the
# machine, or one next to another etcd, exits at once.


def is_installed() -> bool:
    """Whether the package that brings the server is there; imports nothing."""
    return importlib.util.find_spec(PACKAGE) is not None


class Server:
    """One Milvus, stand-alone, with all it keeps under a folder.

    Parameters
    ----------
    folder : Path
        Where it keeps everything; it starts again with what is there.
    binaries : Path, optional
        Where its programs are unpacked, if they are not there; servers may share them. By default in its folder.
    secured : bool, default False
        Whether it asks for a user and a password, at first root:Milvus.
    """

    def __init__(self, folder: Path, *, binaries: Path | None = None, secured: bool = False) -> None:
        self.folder = folder
        self._binaries = binaries or folder
        self._secured = secured
        self._process: subprocess.Popen[bytes] | None = None
        self._ports: dict[str, int] = {}
        self._health_port = 0

    @property
    def _etcd(self) -> Path:
        return self.folder / "configs" / "etcd.yaml"

    @property
    def uri(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._ports['proxy_port']}"

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._process is not None
        return self._process.pid

    def start(self, *, wait: float = 120.0) -> None:
        """Start it, on the ports it had before if there were any, and wait until it is well."""
        if not self._ports:
            self._set_up()
        binary = self._binaries / "bin" / "milvus"
        environment: dict[str, Any] = {
            **os.environ,
            "DEPLOY_MODE": "STANDALONE",
            "ETCD_CONFIG_PATH": str(self._etcd),
            "METRICS_PORT": str(self._health_port),
            "MILVUS_RUN_DIR": str(self.folder / "run"),
            "LD_LIBRARY_PATH": f"{binary.parent}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        }
        with (self.folder / "logs" / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [str(binary), "run", "standalone"], cwd=self.folder, env=environment, stdout=log, stderr=log
            )
        self._await_health(wait)

    def _set_up(self) -> None:
        from milvus import MilvusServerConfig, _initialize_data_files

        names = [name for name in MilvusServerConfig().configurable_items if name.endswith("_port")]
        *ports, self._health_port, clients, peers = _free_ports(len(names) + 3)
        self._ports = dict(zip(names, ports, strict=True))
        config = MilvusServerConfig(data_dir=str(self.folder), **self._ports)
        for component in _COMPONENTS:
            config.set(f"{component}.ip", "127.0.0.1")
        config.set("authorization_enabled", self._secured)
        config.resolve()
        self._etcd.write_text(_ETCD.format(clients=clients, peers=peers))
        _initialize_data_files(str(self._binaries))

    def kill(self) -> None:
        """End it as a power cut would."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        Path(f"/tmp/milvus/server_id_{self.pid}").unlink(missing_ok=True)  # noqa: S108 - the server's choice
        self._process = None

    def stop(self) -> None:
        """End it, if it runs; nothing of it is needed any more."""
        if self._process is not None:
            self.kill()

    def _await_health(self, wait: float) -> None:
        assert self._process is not None
        url, until = f"http://127.0.0.1:{self._health_port}/healthz", time.monotonic() + wait
        while time.monotonic() < until:
            if self._process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(url, timeout=5) as answer:
                    if b"OK" in answer.read():
                        return
            except (urllib.error.URLError, OSError):
                pass
            time.sleep(0.2)
        self.stop()
        log = (self.folder / "logs" / "server.log").read_text(errors="replace")[-2000:]
        raise RuntimeError(f"Milvus did not start within {wait:.0f} s:\n{log}")


def _free_ports(count: int) -> list[int]:
    """Return ports below those that the system gives to clients: a server that starts again finds them free."""
    ports: list[int] = []
    while len(ports) < count:
        port = secrets.choice(range(12_000, 30_000))
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("127.0.0.1", port))
            if port not in ports:
                ports.append(port)
    return ports


if __name__ == "__main__":
    server = Server(Path(sys.argv[1]), secured="--secured" in sys.argv)
    server.start()
    print(server.uri, server.pid, flush=True)  # noqa: T201
    try:
        while True:
            time.sleep(1)
    finally:
        server.stop()
