"""Loading: from a spec to the class or function behind it, with an error that says whose fault it is."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable

from memlong.errors import MissingDependencyError, PluginError
from memlong.plugins.names import explained
from memlong.plugins.spec import Spec


def load_class(spec: Spec, base: type | None = None) -> type:
    """Import and return the class behind ``spec``.

    Parameters
    ----------
    spec
        What a plugin registered.
    base
        What the class must derive from; any class will do if left out.

    Raises
    ------
    MissingDependencyError
        If a module the spec requires is not installed, or is and raises when imported.
    PluginError
        If the target is not there, does not import or is not a concrete class derived from ``base``.
    """
    found = _load(spec)
    if not isinstance(found, type):
        raise fault(spec, f"its target {spec.target!r} is not a class but {type(found).__name__}")
    if base is not None and not issubclass(found, base):
        raise fault(spec, f"its target {spec.target!r} is not a subclass of {base.__name__}")
    if inspect.isabstract(found):
        unmet = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
        raise fault(spec, f"its target {spec.target!r} leaves abstract: {unmet}")
    return found


def load_function(spec: Spec) -> Callable[..., object]:
    """Import and return the function behind ``spec``; raises as `load_class` does."""
    found = _load(spec)
    if not callable(found) or isinstance(found, type):
        raise fault(spec, f"its target {spec.target!r} is not a function but {type(found).__name__}")
    return found


def _load(spec: Spec) -> object:
    for required in spec.requires:
        _import_requirement(spec, required)
    module = _import_target(spec)
    try:
        found = getattr(module, spec.target.partition(":")[2], None)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise fault(spec, f"its target {spec.target!r} cannot be had: {explained(error)}") from error
    if found is None:
        raise fault(spec, f"its target {spec.target!r} does not exist")
    return found


def _import_requirement(spec: Spec, module: str) -> None:
    try:
        importlib.import_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit, too, and what bindings to other languages raise
        if isinstance(error, ModuleNotFoundError) and error.name and _is_same_or_inside(module, error.name):
            raise _lacks(spec, module) from error
        raise MissingDependencyError(
            f"{_needs(spec, module)} is installed but does not import: {explained(error)}{_remedy(spec)}"
        ) from error


def _import_target(spec: Spec) -> object:
    module = spec.target.partition(":")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        absent = error.name or ""
        if _is_same_or_inside(module, absent):
            raise fault(spec, f"its module {module!r} does not exist") from error
        if absent.partition(".")[0] != module.partition(".")[0]:
            raise _lacks(spec, absent) from error
        raise fault(spec, f"its module {module!r} does not import: {explained(error)}") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise fault(spec, f"its module {module!r} does not import: {explained(error)}") from error


def _is_same_or_inside(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


def _lacks(spec: Spec, module: str) -> MissingDependencyError:
    return MissingDependencyError(f"{_needs(spec, module)} is not installed.{_remedy(spec)}")


def _needs(spec: Spec, module: str) -> str:
    return f"{spec.kind} {spec.name!r} (plugin {spec.plugin!r}) needs {module!r}, which"


def _remedy(spec: Spec) -> str:
    return f"\nInstall it with: {spec.install}" if spec.install else ""


def fault(spec: Spec, what: str) -> PluginError:
    """Return the error for a plugin that does not keep its part of the bargain."""
    return PluginError(
        f"{spec.kind} {spec.name!r} cannot be loaded: {what}. This is for the authors of plugin "
        f"{spec.plugin!r} to mend; MEMLONG_DISABLE_PLUGINS={spec.plugin} turns the plugin off"
    )
