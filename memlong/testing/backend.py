"""The contract of a plugin's backend: it is listed, created by name, and usable by a model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch

from memlong.errors import InvalidArgumentError
from memlong.plugins import PluginManager, Registry, Spec
from memlong.testing.harness import DIM, Suite, random_chunks
from memlong.testing.models import VOCABULARY, tiny_model

if TYPE_CHECKING:
    from memlong.decoder import MemoryDecoder

_CHUNKS = 64
_LIST = """
import json, sys
from memlong.plugins import list_backends
list_backends()
open(sys.argv[1], "w").write(json.dumps(sorted(sys.modules)))
"""


class BackendPluginTests(Suite):
    """The contract of an installed plugin's backend; subclass it and set ``backend``.

    Attributes
    ----------
    backend : str
        Name of the backend; required.
    options : dict
        Options of every bank.
    plugin : object, optional
        The plugin, a module or object with hooks, if it is not installed.
    """

    backend: str
    options: ClassVar[Mapping[str, Any]] = {}
    plugin: ClassVar[object | None] = None

    @property
    def registry(self) -> Registry:
        """Registry of all installed plugins and the one under test."""
        manager = PluginManager(environ={})
        if self.plugin is not None:
            manager.register(self.plugin, name="under-test")
        return Registry(manager)

    @property
    def spec(self) -> Spec:
        """What the plugin registered."""
        return self.registry.backend(self.backend)

    def test_the_backend_is_listed_once(self) -> None:
        """Exactly one plugin registers the name, with a description."""
        found = [spec for spec in self.registry.list_backends() if spec.name == self.backend]
        assert len(found) == 1, f"installed plugins that register {self.backend!r}: {len(found)}"
        assert found[0].description

    def test_what_it_needs_is_installed(self) -> None:
        """`requires` lists import names of installed modules, and `install` how to install them."""
        assert self.spec.missing() == ()
        assert not self.spec.requires or self.spec.install

    def test_listing_imports_no_library(self, tmp_path: Path) -> None:
        """Listing backends imports neither the module of the class nor its required modules."""
        if self.plugin is not None:
            pytest.skip("the plugin is registered in code, so its module may be imported")
        where = os.pathsep.join(path for path in sys.path if path)
        report = tmp_path / "modules.json"  # not stdout, where plugins may print
        subprocess.run(  # noqa: S603 - this very interpreter
            [sys.executable, "-c", _LIST, str(report)], check=True, env={**os.environ, "PYTHONPATH": where}
        )
        unwanted = {self.spec.target.partition(":")[0], *self.spec.requires}
        assert not unwanted & set(json.loads(report.read_text()))

    def test_a_bank_is_made_by_name(self) -> None:
        """`create_bank` creates an empty bank with the given dimension and options."""
        bank = self.registry.create_bank(self.backend, DIM, **self.options, max_chunks=7)
        random_chunks(9).into(bank)
        assert (bank.dim, len(bank)) == (DIM, 7)

    def test_an_unknown_option_is_named(self) -> None:
        """An unknown option is an error that lists the accepted ones."""
        with pytest.raises(InvalidArgumentError, match=r"no option 'colour'.*max_chunks"):
            self.registry.create_bank(self.backend, DIM, colour="blue")

    def test_a_saved_bank_loads_with_its_backend(self, tmp_path: Path) -> None:
        """`load_bank` finds the backend that saved a bank, and any other backend can load it as well."""
        bank = self.registry.create_bank(self.backend, DIM, **self.options)
        chunks = random_chunks(20)
        chunks.into(bank)
        bank.save(tmp_path)
        loaded = self.registry.load_bank(tmp_path)
        assert type(loaded) is type(bank)
        assert loaded.search(chunks.embeddings, 20).ids.sort().values.tolist() == [list(range(20))] * 20
        assert len(self.registry.load_bank(tmp_path, "torch")) == 20

    def test_a_model_reads_with_it_as_with_the_exact_bank(self) -> None:
        """If every chunk is retrieved, a model's logits match those with the torch backend."""
        text = _text(160)
        with self._decoder(self.backend, self.options) as ours, self._decoder("torch", {}) as exact:
            torch.testing.assert_close(ours.read(text), exact.read(text), rtol=1e-5, atol=1e-5)
            assert len(ours.banks[0]) == len(exact.banks[0]) > 20

    def test_a_model_continues_from_a_snapshot(self, tmp_path: Path) -> None:
        """A decoder that is saved and loaded gives the same next logits."""
        from memlong.decoder import MemoryDecoder

        with self._decoder(self.backend, self.options) as before:
            before.read(_text(160))
            before.save(tmp_path)
            expected = before.read(_text(16, seed=1))
        model = tiny_model()
        with MemoryDecoder.load(tmp_path, model, None, before.config, registry=self.registry) as after:
            torch.testing.assert_close(after.read(_text(16, seed=1)), expected, rtol=1e-5, atol=1e-5)

    @contextmanager
    def _decoder(self, backend: str, options: Mapping[str, Any]) -> Iterator[MemoryDecoder]:
        from memlong.decoder import MemoryConfig, MemoryDecoder

        config = MemoryConfig(
            backend=backend,
            backend_options=dict(options),
            retriever="lm",
            chunk_size=4,
            top_k=_CHUNKS,
            local_window=24,
            sink_tokens=2,
            segment_size=8,
        )
        with MemoryDecoder(tiny_model(), None, config, registry=self.registry) as decoder:
            yield decoder


def _text(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(seed))
