"""Read a model's configuration without its weights."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from memlong.decoder.model.loading import source_of
from memlong.decoder.model.quiet_loading import quiet_loading
from memlong.errors import InvalidArgumentError


def read_config(name: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Read the configuration of a model.

    Parameters
    ----------
    name
        A hub id, a folder, a configuration file (JSON), a GGUF file, or a name such as ``"demo"``.
    trust_remote_code
        Whether to run Python code from the folder or repository, as in `load_model`.

    Raises
    ------
    InvalidArgumentError
        If there is no readable configuration, or it needs custom code that is not trusted.
    MissingDependencyError
        If a package that a GGUF file or a name such as ``"demo"`` needs is not installed.
    StorageError
        If the file of ``"demo-gemma"`` cannot be written to the user's cache.
    """
    source, options = (name, {}) if Path(name).suffix == ".json" else source_of(name)
    with quiet_loading():
        try:
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                source, trust_remote_code=trust_remote_code, **options
            )
        except Exception as error:  # a broken file or custom code may raise anything
            if "trust_remote_code" in str(error):
                raise InvalidArgumentError(
                    f"The configuration of {name!r} needs Python code that comes with the model and would run with "
                    "your permissions. Read that code; if you trust it, add --trust-remote-code"
                ) from error
            raise InvalidArgumentError(
                f"Cannot read the configuration of {name!r}: {error}\nGive a hub id, a folder saved by transformers, "
                "a config.json, a GGUF file, 'demo', 'demo-gemma', or a model type from `memlong models`"
            ) from error
    return config
