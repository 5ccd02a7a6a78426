"""Read the configuration of a model, not its weights."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from memlong.decoder.loading import _source as source_of
from memlong.decoder.quiet import quiet_loading
from memlong.errors import InvalidArgumentError


def read_config(name: str) -> PreTrainedConfig:
    """Read the configuration of a model.

    Parameters
    ----------
    name
        A hub id, a folder, a configuration file (JSON), a GGUF file, or ``"demo"``.

    Raises
    ------
    InvalidArgumentError
        If there is none, or transformers does not know its model type.
    MissingDependencyError
        If a package that the file or ``"demo"`` needs is not installed.
    """
    source, options = (name, {}) if Path(name).suffix == ".json" else source_of(name)
    with quiet_loading():
        try:
            config: PreTrainedConfig = AutoConfig.from_pretrained(source, **options)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise InvalidArgumentError(
                f"The configuration of {name!r} could not be read: {error}\nName a hub id, a folder that transformers "
                "saved, a config.json, a GGUF file, 'demo', or one of the model types that `memlong models` lists."
            ) from error
    return config
