"""Plugins: the hooks, the plugins that implement them, and the registry of backends and retrievers."""

from memlong.plugins.hookspecs import Register, hookimpl
from memlong.plugins.manager import PluginManager
from memlong.plugins.registry import Registry, create_bank, list_backends, load_bank
from memlong.plugins.report import PluginReport
from memlong.plugins.spec import Spec

__all__ = [
    "PluginManager",
    "PluginReport",
    "Register",
    "Registry",
    "Spec",
    "create_bank",
    "hookimpl",
    "list_backends",
    "load_bank",
]
