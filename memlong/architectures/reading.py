"""Read the configuration of a model, not its weights."""

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
        A hub id, a folder, a configuration file (JSON), a GGUF file, or ``"demo"``.
    trust_remote_code
        Whether Python code that the folder or the repository brings may run, as for `load_model`.

    Raises
    ------
    InvalidArgumentError
        If there is none, or it needs code of its own that is not trusted.
    MissingDependencyError
        If a package that the file or ``"demo"`` needs is not installed.
    """
    source, options = (name, {}) if Path(name).suffix == ".json" else source_of(name)
    with quiet_loading():
        try:
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                source, trust_remote_code=trust_remote_code, **options
            )
        except Exception as error:  # what a broken file, or code that it brings, comes to is not foreseeable
            if "trust_remote_code" in str(error):
                raise InvalidArgumentError(
                    f"The model {name!r} comes with Python code of its own, without which its configuration cannot be "
                    "read. That code would run on this machine, with all your rights. Read it; if you trust it: "
                    "--trust-remote-code."
                ) from error
            raise InvalidArgumentError(
                f"The configuration of {name!r} could not be read: {error}\nName a hub id, a folder that transformers "
                "saved, a config.json, a GGUF file, 'demo', or one of the model types that `memlong models` lists."
            ) from error
    return config
