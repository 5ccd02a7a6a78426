"""Eviction policies come in by a hook, as backends do, and snapshots remember them by name."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from memlong.bank.eviction import EvictionPolicy, Fifo
from memlong.errors import InvalidArgumentError, PluginError, UnknownNameError
from memlong.plugins import PluginManager, Registry, hookimpl


class Newest(EvictionPolicy):
    """Evict the newest chunks."""

    name = "newest"

    def select(self, usage, capacity):
        return usage.ids[capacity:]


class Nameless(Newest):
    """Has no name of its own."""


class Impostor(Newest):
    name = "fifo"


class Choosy(Newest):
    name = "choosy"

    def __init__(self, share):
        self.share = share


class Plugin:
    def __init__(self, **policies):
        self.policies = policies

    @hookimpl
    def memlong_register_eviction_policies(self, register):
        for name, policy in self.policies.items():
            register(name, f"{__name__}:{policy.__name__}")


@pytest.fixture
def registry(site, monkeypatch) -> Registry:
    module = ModuleType(__name__)  # this one is not to be imported by its name
    module.__dict__.update(globals())
    monkeypatch.setitem(sys.modules, __name__, module)
    manager = PluginManager()
    manager.register(Plugin(newest=Newest, nameless=Nameless, choosy=Choosy), name="acme")
    return Registry(manager)


def fill(bank, count):
    blocks = torch.zeros(count, 1, 1, 2, 2)
    start = bank.next_id
    bank.add(torch.eye(4)[:count], blocks, blocks, [(start + i, start + i + 1) for i in range(count)])


def test_a_bank_evicts_by_a_policy_of_a_plugin(registry):
    bank = registry.create_bank("torch", 4, max_chunks=2, eviction="newest")
    fill(bank, 4)
    assert bank.ids.tolist() == [0, 1]


def test_built_in_policies_are_registered_by_the_same_hook(registry):
    names = [spec.name for spec in registry.list_eviction_policies()]
    assert names == ["fifo", "lru", "retrieval_frequency", "newest", "nameless", "choosy"]
    assert isinstance(registry.eviction_policy("fifo"), Fifo)


def test_an_unknown_policy_suggests_and_lists(registry):
    with pytest.raises(UnknownNameError, match=r"no eviction policy 'newst'\. Did you mean 'newest'\?"):
        registry.create_bank("torch", 4, eviction="newst")


def test_a_policy_must_bear_the_name_it_is_registered_by(registry):
    with pytest.raises(PluginError, match="must have name = 'nameless'"):
        registry.eviction_policy("nameless")


def test_a_policy_must_be_made_without_arguments(registry):
    with pytest.raises(PluginError, match="must be constructible without arguments"):
        registry.eviction_policy("choosy")


def test_a_saved_bank_gets_its_policy_back(registry, tmp_path):
    bank = registry.create_bank("torch", 4, max_chunks=2, eviction="newest")
    fill(bank, 2)
    bank.save(tmp_path / "bank")
    loaded = registry.load_bank(tmp_path / "bank")
    fill(loaded, 2)
    assert loaded.ids.tolist() == [0, 1]


def test_a_saved_bank_says_which_policy_is_missing(registry, tmp_path):
    registry.create_bank("torch", 4, eviction="newest").save(tmp_path / "bank")
    with pytest.raises(InvalidArgumentError, match="eviction policy 'newest', which is not installed"):
        Registry(PluginManager()).load_bank(tmp_path / "bank")
    assert len(Registry(PluginManager()).load_bank(tmp_path / "bank", eviction="lru")) == 0


@pytest.mark.parametrize("policy", [Impostor(), Nameless()])
def test_a_policy_without_a_name_of_its_own_is_not_taken_for_another(registry, tmp_path, policy):
    registry.create_bank("torch", 4, eviction=policy).save(tmp_path / "bank")
    with pytest.raises(InvalidArgumentError, match="custom eviction policy"):
        registry.load_bank(tmp_path / "bank")
