"""The options of a `MilvusBank`: how to search, and whose memory it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from memlong.errors import InvalidArgumentError
from memlong.settings import documented, setting

Consistency = Literal["strong", "bounded", "eventually"]


@documented
@dataclass(frozen=True)
class MilvusOptions:
    """How a bank asks Milvus, and whose memory it is; where Milvus is, and the credentials, are not among these."""

    collection: str | None = setting(
        None,
        "Collection that holds the rows; made if it is not there.",
        unset="one for each dim and kind of metric, as ``memlong_384_ip``",
        is_saved=False,
    )
    session: str | None = setting(
        None,
        "Name of the session, which then stays.",
        unset="a random one, which ends with the bank",
        is_saved=False,
    )
    resume: bool = setting(
        False,
        "Continue the session if it exists.",
        more="Without it, a session that holds chunks is refused.",
        is_saved=False,
    )
    consistency: Consistency = setting(
        "bounded",
        "How current a server's answers are.",
        more="A strong one waits, some 0.2 seconds, for all that was written. The bank finds what it added itself at "
        "once in any case.",
    )
    staleness: float = setting(
        10.0,
        "Seconds that a search may lag behind if it is not strong; more than the server's gracefulTime (5).",
        least=0,
        most=1e6,
        most_of_strangers=3600,
    )
    M: int = setting(
        16, "Links of the HNSW graph of a new collection.", least=2, most=2048, most_of_strangers=64
    )
    ef_construction: int = setting(
        200, "Effort of building it.", least=1, most=32_768, most_of_strangers=1024
    )
    ef: int = setting(
        64,
        "Effort of searching; a search never uses less than it needs.",
        least=1,
        most=32_768,
        most_of_strangers=4096,
    )
    partitions: int = setting(
        16,
        "Partitions of a new collection.",
        more="A session is in one of them, and a search looks only there.",
        least=1,
        most=1024,
        most_of_strangers=64,
    )
    timeout: float = setting(
        10.0, "Seconds that one attempt of a call may take.", above=0, most=1e6, most_of_strangers=60
    )
    attempts: int = setting(
        5, "How often a call is tried while Milvus does not answer.", least=1, most=100, most_of_strangers=10
    )
    readers: int = setting(
        8, "Threads that read and write keys and values.", least=1, most=256, most_of_strangers=64
    )
    kv_device: str = setting(
        "cpu",
        "Device of a resumed session's keys and values, until others are added.",
        is_saved=False,
    )

    def __post_init__(self) -> None:
        if self.resume is True and self.session is None:
            raise InvalidArgumentError("resume continues a session: name it, as session='…'")
        try:
            torch.device(self.kv_device if isinstance(self.kv_device, str) else "cpu")
        except RuntimeError as error:
            raise InvalidArgumentError(
                f"kv_device must be the name of a torch device, such as 'cpu', got {self.kv_device!r}"
            ) from error
