"""Asking for a name brings the class, or an error that says whose fault it is and what to do."""

from __future__ import annotations

import importlib
import sys

import pytest

from memlong.bank.base import MemoryBank
from memlong.errors import InvalidArgumentError, MissingDependencyError, PluginError, UnknownNameError
from memlong.plugins import PluginManager, Registry, Spec, create_bank, hookimpl, list_backends


class Plugin:
    """Registers whatever it is given."""

    def __init__(self, *specs: dict[str, object], kind: str = "backend") -> None:
        self._specs, self._kind = specs, kind

    @hookimpl
    def memlong_register_backends(self, register):
        for spec in self._specs if self._kind == "backend" else ():
            register(**spec)

    @hookimpl
    def memlong_register_retrievers(self, register):
        for spec in self._specs if self._kind == "retriever" else ():
            register(**spec)


@pytest.fixture
def registry(site) -> Registry:
    return Registry(PluginManager())


@pytest.fixture
def module(site, request):
    """``module("x = 1")`` writes an importable module and returns its name."""
    names: list[str] = []

    def write(source: str) -> str:
        name = f"fake_target_{len(names)}_{abs(hash(request.node.name))}"
        (site / f"{name}.py").write_text(source)
        importlib.invalidate_caches()
        names.append(name)
        return name

    yield write
    for name in names:
        sys.modules.pop(name, None)


def with_backend(registry: Registry, target: str, **more: object) -> Registry:
    registry.manager.register(Plugin({"name": "acme", "target": target, **more}), name="acme-plugin")
    return registry


# Names


def test_a_bank_is_created_by_name(registry):
    bank = registry.create_bank("torch", 4)
    assert isinstance(bank, MemoryBank)
    assert bank.dim == 4
    assert len(bank) == 0


def test_the_functions_work_without_and_with_a_registry(registry, module):
    assert {"torch", "faiss", "hnswlib"} <= {spec.name for spec in list_backends()}
    assert isinstance(create_bank("torch", 4), MemoryBank)
    with_backend(registry, "acme:Bank")
    assert "acme" in {spec.name for spec in list_backends(registry)}
    assert "acme" not in {spec.name for spec in list_backends()}
    with pytest.raises(PluginError):
        create_bank("acme", 4, registry=registry)


def test_an_unknown_name_suggests_and_lists(registry):
    with pytest.raises(UnknownNameError) as caught:
        registry.create_bank("fais", 4)
    message = str(caught.value)
    assert message.startswith("There is no backend 'fais'. Did you mean 'faiss'? Known: ")
    assert all(f"'{name}'" in message for name in ("torch", "faiss", "hnswlib"))


def test_an_unknown_retriever_is_told_apart_from_a_backend(registry):
    with pytest.raises(UnknownNameError, match=r"There is no retriever 'torch'\."):
        registry.retriever("torch")


def test_an_unknown_name_names_the_plugins_that_failed(install):
    install("broken-memory", entry="broken", module="fake_broken", source="raise RuntimeError('no key')")
    with pytest.raises(UnknownNameError) as caught:
        Registry().backend("gizmo")
    assert (
        "It may belong to a plugin that did not load: plugin 'broken' (broken-memory 1.0) failed: RuntimeError: no key"
        in str(caught.value)
    )


def test_the_name_of_a_plugin_that_failed_says_so_first(install):
    install("acme-memory", entry="acme", module="fake_acme", source="raise RuntimeError('no key')")
    with pytest.raises(PluginError) as caught:
        Registry().backend("acme")
    assert str(caught.value) == (
        "The backend 'acme' is not available: plugin 'acme' (acme-memory 1.0) failed: RuntimeError: no key"
    )
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_the_name_of_a_built_in_that_is_disabled_says_so(site):
    registry = Registry(PluginManager(environ={"MEMLONG_DISABLE_PLUGINS": "memlong_torch"}))
    with pytest.raises(PluginError, match=r"'memlong_torch' .* is disabled: disabled by MEMLONG_DISABLE"):
        registry.create_bank("torch", 4)


# Conflicts


def test_two_plugins_with_one_name_are_both_named_and_others_go_on(install_good, install):
    install_good("acme")
    install_good("beta", backend="acme")
    install_good("zeta")
    registry = Registry()
    with pytest.raises(PluginError) as caught:
        registry.backend("acme")
    assert str(caught.value) == (
        "The backend 'acme' is registered by several plugins: 'acme' (acme-memory 1.0), "
        "'beta' (beta-memory 1.0). Disable all but one, for example with MEMLONG_DISABLE_PLUGINS=beta"
    )
    assert registry.backend("zeta").plugin == "zeta"
    conflicts = {report.name: report.conflicts for report in registry.manager.reports if report.conflicts}
    assert conflicts == {
        "acme": ("backend 'acme' is also registered by plugin 'beta' (beta-memory 1.0)",),
        "beta": ("backend 'acme' is also registered by plugin 'acme' (acme-memory 1.0)",),
    }


def test_what_the_message_says_resolves_the_conflict(install_good):
    install_good("acme")
    install_good("beta", backend="acme")
    registry = Registry(PluginManager(environ={"MEMLONG_DISABLE_PLUGINS": "beta"}))
    assert registry.backend("acme").plugin == "acme"


def test_a_third_party_that_claims_torch_is_a_conflict_not_a_takeover(install_good):
    install_good("torch")
    with pytest.raises(PluginError, match=r"'memlong_torch' \(built-in\), 'torch' \(torch-memory 1\.0\)"):
        Registry().create_bank("torch", 4)
    assert isinstance(
        create_bank(
            "torch", 4, registry=Registry(PluginManager(environ={"MEMLONG_DISABLE_PLUGINS": "torch"}))
        ),
        MemoryBank,
    )


def test_one_plugin_name_in_two_distributions_is_resolved_by_distribution(install):
    source = (
        "from memlong.plugins.hookspecs import hookimpl\n"
        "@hookimpl\n"
        "def memlong_register_backends(register):\n"
        "    register('acme', 'acme:Bank')\n"
    )
    for who in ("one", "two"):
        install(f"{who}-memory", entry="acme", module=f"fake_{who}", source=source)
    with pytest.raises(PluginError, match=r"for example with MEMLONG_DISABLE_PLUGINS=two-memory$"):
        Registry().backend("acme")
    registry = Registry(PluginManager(environ={"MEMLONG_DISABLE_PLUGINS": "two-memory"}))
    assert registry.backend("acme").name == "acme"


# Libraries


def test_a_missing_library_comes_with_its_command(registry):
    with_backend(registry, "acme:Bank", requires=("no_such_library",), install="pip install acme")
    with pytest.raises(MissingDependencyError) as caught:
        registry.create_bank("acme", 4)
    assert str(caught.value) == (
        "backend 'acme' (plugin 'acme-plugin') needs 'no_such_library', which is not installed.\n"
        "Install it with: pip install acme"
    )
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_a_library_that_does_not_import_gives_its_own_reason(registry, module):
    library = module("raise RuntimeError('libcudart.so.12: cannot open shared object file')")
    with_backend(registry, "acme:Bank", requires=(library,), install="pip install acme")
    with pytest.raises(MissingDependencyError) as caught:
        registry.create_bank("acme", 4)
    assert "is installed but fails to import: RuntimeError: libcudart.so.12" in str(caught.value)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_library_the_plugin_forgot_to_declare_is_named(registry, module):
    with_backend(registry, f"{module('import no_such_library')}:Bank")
    with pytest.raises(MissingDependencyError, match="needs 'no_such_library', which is not installed"):
        registry.create_bank("acme", 4)


def test_listing_imports_no_library(registry, module):
    library = module("raise RuntimeError('imported')")
    with_backend(registry, f"{library}:Bank", requires=(library,))
    assert registry.backend("acme").missing() == ()
    assert library not in sys.modules


def test_a_library_that_ends_the_program_does_not(registry, module):
    library = module("raise SystemExit(0)")
    with_backend(registry, f"{library}:Bank", requires=(library,))
    with pytest.raises(MissingDependencyError, match="is installed but fails to import: SystemExit: 0"):
        registry.create_bank("acme", 4)


@pytest.mark.parametrize("name", [None, 3, b"torch", ["torch"]])
def test_what_is_no_name_is_refused(registry, name):
    with pytest.raises(UnknownNameError, match="name of a backend must be text, such as 'my-index', got "):
        registry.create_bank(name, 4)
    with pytest.raises(UnknownNameError, match="name of a retriever must be text"):
        registry.retriever(name)


def test_a_huge_name_is_told_in_brief(registry):
    for ask in (registry.retriever, lambda name: registry.create_bank(name, 4)):
        with pytest.raises(UnknownNameError) as caught:
            ask("x" * 10**6)
        assert len(str(caught.value)) < 500


def test_an_unknown_name_among_very_many_is_told_in_brief(registry):
    for plugin in range(20):
        many = [{"name": f"a{plugin}.{number}", "target": "a:B"} for number in range(1000)]
        registry.manager.register(Plugin(*many), name=f"plugin{plugin}")
    with pytest.raises(UnknownNameError, match=r"no backend 'name'.* and 19,9.. more") as caught:
        registry.backend("name")
    assert len(str(caught.value)) < 2_000


# Targets


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("", "its target '{target}' does not exist"),
        ("def Bank(dim): ...", "its target '{target}' must be a class, got function"),
        ("class Bank: ...", "its target '{target}' must be a subclass of Index or MemoryBank"),
        ("from memlong.bank.base import MemoryBank as Bank", "its target '{target}' does not implement "),
        ("1 / 0", "fails to import: ZeroDivisionError: division by zero"),
        ("raise SystemExit(0)", "fails to import: SystemExit: 0"),
        ("class Panic(BaseException): ...\nraise Panic('rust')", "fails to import: Panic: rust"),
        ("def __getattr__(name): raise SystemExit", "its target '{target}' fails to load: SystemExit"),
    ],
)
def test_a_bad_target_is_the_plugins_fault(registry, module, source, reason):
    target = f"{module(source)}:Bank"
    with_backend(registry, target)
    with pytest.raises(PluginError) as caught:
        registry.create_bank("acme", 4)
    message = str(caught.value)
    assert message.startswith("Cannot load the backend 'acme': ")
    assert reason.format(target=target) in message
    assert "plugin 'acme-plugin'" in message


def test_a_module_that_is_not_there_is_the_plugins_fault(registry):
    with_backend(registry, "no_such_module_anywhere.bank:Bank")
    with pytest.raises(PluginError, match=r"its module 'no_such_module_anywhere\.bank' does not exist"):
        registry.create_bank("acme", 4)


# Options


def test_an_unknown_option_is_named_before_anything_is_built(registry):
    with pytest.raises(InvalidArgumentError) as caught:
        registry.create_bank("torch", 4, metrics="cosine")
    assert str(caught.value).startswith(
        "There is no option 'metrics' of backend 'torch'. Did you mean 'metric'? It accepts: "
    )


# Retrievers


def test_a_retriever_is_loaded_by_name_and_its_base_is_checked(registry, module):
    name = module("class Base: ...\nclass Words(Base): ...\nclass Other: ...")
    plugin = Plugin(
        {"name": "words", "target": f"{name}:Words"},
        {"name": "other", "target": f"{name}:Other"},
        kind="retriever",
    )
    registry.manager.register(plugin, name="mine")
    words = registry.load_retriever_class("words")
    assert words.__name__ == "Words"
    assert registry.load_retriever_class("words", words.__base__) is words
    with pytest.raises(PluginError, match="must be a subclass of Base"):
        registry.load_retriever_class("other", words.__base__)


def test_a_retriever_is_described_without_being_imported(registry):
    spec = registry.retriever("sentence-transformers")
    assert spec == Spec(
        kind="retriever",
        name="sentence-transformers",
        target="memlong.decoder.retrievers.sentence:SentenceTransformersRetriever",
        plugin="memlong_retrievers",
        requires=("sentence_transformers",),
        install="pip install 'memlong[sentence-transformers]'",
        description=spec.description,
    )
