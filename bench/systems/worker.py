"""A process that reads with a model in another Python, for packages that need another transformers."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import torch
from transformers import PreTrainedModel

from memlong.decoder.model.quiet_loading import quiet_loading
from memlong.errors import MemlongError, MissingDependencyError


class Worker:
    """A script that loads a model's folder, and answers each line of JSON with one.

    Parameters
    ----------
    python
        The interpreter of the other environment.
    script
        What it runs, with the folder, the model's dtype and device, and a number of threads. It says
        ``{"ready": true}`` when it has loaded the model.
    model, tokenizer
        What is saved for it. Its folder is kept until `close`.

    Raises
    ------
    MissingDependencyError
        If there is no such interpreter, or the script ends before it is ready.
    """

    def __init__(self, python: str, script: Path, model: PreTrainedModel, tokenizer: Any) -> None:
        self._folder = TemporaryDirectory()
        self._errors = TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - `close` does
        self._process: subprocess.Popen[str] | None = None
        place = f"--dtype={str(model.dtype).removeprefix('torch.')}", f"--device={model.device}"
        # -I: neither the variables that this process was given nor the script's folder decide what is imported.
        command = [
            python,
            "-I",
            str(script),
            self._folder.name,
            *place,
            f"--threads={torch.get_num_threads()}",
        ]
        try:
            with quiet_loading():
                model.save_pretrained(self._folder.name)
            if tokenizer is not None:
                plain = deepcopy(tokenizer)
                plain.chat_template = (
                    None  # prompts are texts, of which a package may take a part for the template's
                )
                plain.save_pretrained(self._folder.name)
            self._start(command)
        except BaseException:
            self.close()
            raise

    def ask(self, told: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the process answers.

        Raises
        ------
        MemlongError
            If it answers with an error, or ends.
        """
        process = self._process
        if process is None or process.stdin is None:
            raise MemlongError("The worker was closed: make a new one")
        with suppress(BrokenPipeError):  # it has ended, and its last words tell why
            process.stdin.write(json.dumps(told) + "\n")
            process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process, and remove the folder."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(BrokenPipeError):
                        pipe.close()
        self._errors.close()
        self._folder.cleanup()

    def _start(self, command: list[str]) -> None:
        try:
            self._process = subprocess.Popen(  # noqa: S603 - the user named it
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, encoding="utf-8"
            )
            self._answer()
        except (OSError, MemlongError) as error:
            raise MissingDependencyError(
                f"{command[0]} cannot run {Path(command[2]).name}: {error}"
            ) from error

    def _answer(self) -> dict[str, Any]:
        process = self._process
        line = process.stdout.readline() if process is not None and process.stdout is not None else ""
        if not line:
            self._errors.seek(0)
            last = self._errors.read().strip().rpartition("\n")[2]
            raise MemlongError(f"the process ended: {last or 'it said nothing'}")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise MemlongError(found["error"])
        return found
