"""The suite for a plugin's backend passes for the backends that come with memlong."""

from typing import ClassVar

from memlong.testing import BackendPluginTests


class TestTorch(BackendPluginTests):
    backend = "torch"


class TestFaiss(BackendPluginTests):
    backend = "faiss"
    options: ClassVar = {"index": "HNSW32"}


class TestHnswlib(BackendPluginTests):
    backend = "hnswlib"
