"""Load the class or function of a spec, with errors that name the plugin at fault."""

from __future__ import annotations

import importlib
import inspect

from memlong.errors import InvalidArgumentError, MemlongError, MissingDependencyError, PluginError
from memlong.plugins.names import explained, text_of
from memlong.plugins.spec import Spec
from memlong.uri import scheme_of, scrubbed, without_credentials


def load_class(spec: Spec, *bases: type) -> type:
    """Import and return the class of ``spec``.

    Parameters
    ----------
    spec
        What a plugin registered.
    *bases
        The class must derive from one of these, if any are given.

    Raises
    ------
    MissingDependencyError
        If a required module is not installed, or fails to import.
    PluginError
        If the target does not exist, fails to import, or is not a concrete class derived from one of ``bases``.
    """
    found = _load(spec)
    if not isinstance(found, type):
        raise fault(spec, f"its target {spec.target!r} must be a class, got {type(found).__name__}")
    if bases and not issubclass(found, bases):
        names = " or ".join(each.__name__ for each in bases)
        raise fault(spec, f"its target {spec.target!r} must be a subclass of {names}")
    if inspect.isabstract(found):
        unmet = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
        raise fault(spec, f"its target {spec.target!r} does not implement {unmet}")
    return found


def read_uri(spec: Spec, uri: str) -> tuple[str, dict[str, object]]:
    """Turn a URI into a backend and options, with the function registered for its scheme.

    Raises
    ------
    PluginError, MissingDependencyError
        As in `load_class`; also if the function breaks its contract.
    InvalidArgumentError
        If the function rejects the URI.
    """
    function = _load(spec)
    if not callable(function) or isinstance(function, type):
        raise fault(spec, f"its target {spec.target!r} must be a function, got {type(function).__name__}")
    try:
        found = function(uri)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        said = text_of(error)
        cause = error if said == scrubbed(said, uri) else None
        if isinstance(error, MemlongError):
            if cause is error:
                raise
            # Not chained: a traceback would show the original text, with its secrets.
            raise InvalidArgumentError(scrubbed(said, uri)) from None
        what = f"{spec.target!r} raises {type(error).__name__} for {without_credentials(uri)!r}"
        raise fault(spec, what) from cause
    match found:
        case (str() as backend, dict() as held) if scheme_of(backend) is None:
            if all(isinstance(each, str) for each in held):
                return backend, held
    raise fault(spec, f"{spec.target!r} must return a pair of a backend's name and a dict of options")


def _load(spec: Spec) -> object:
    for required in spec.requires:
        _import_requirement(spec, required)
    module = _import_target(spec)
    try:
        found = getattr(module, spec.target.partition(":")[2], None)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise fault(spec, f"its target {spec.target!r} fails to load: {explained(error)}") from error
    if found is None:
        raise fault(spec, f"its target {spec.target!r} does not exist")
    return found


def _import_requirement(spec: Spec, module: str) -> None:
    try:
        importlib.import_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # including SystemExit, and whatever native bindings raise
        if isinstance(error, ModuleNotFoundError) and error.name and _is_same_or_inside(module, error.name):
            raise _lacks(spec, module) from error
        raise MissingDependencyError(
            f"{_needs(spec, module)} is installed but fails to import: {explained(error)}{_remedy(spec)}"
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
        raise fault(spec, f"its module {module!r} fails to import: {explained(error)}") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise fault(spec, f"its module {module!r} fails to import: {explained(error)}") from error


def _is_same_or_inside(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


def _lacks(spec: Spec, module: str) -> MissingDependencyError:
    return MissingDependencyError(f"{_needs(spec, module)} is not installed{_remedy(spec)}")


def _needs(spec: Spec, module: str) -> str:
    return f"{spec.kind} {spec.name!r} (plugin {spec.plugin!r}) needs {module!r}, which"


def _remedy(spec: Spec) -> str:
    return f".\nInstall it with: {spec.install}" if spec.install else ""


def fault(spec: Spec, what: str) -> PluginError:
    """Return the error for a plugin that breaks its contract."""
    return PluginError(
        f"Cannot load the {spec.kind} {spec.name!r}: {what}. Report this to the authors of plugin {spec.plugin!r}; to "
        f"disable the plugin, set MEMLONG_DISABLE_PLUGINS={spec.plugin}"
    )
