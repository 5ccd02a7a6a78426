"""Commands that are killed at random moments, or run side by side, and what they leave behind, a line of JSON a trial.

python tests/cli/killed.py remember|chat|ask FOLDER TIMES SEED, with the options of the model as JSON on stdin
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from memlong.bank.snapshot.manifest import has_manifest, read_manifest
from memlong.bank.snapshot.tending import verify
from memlong.bank.snapshot.tensors import read_streams
from memlong.cli.app import make_app
from memlong.corpus import Corpus, reading
from memlong.corpus.table import check_documents
from memlong.decoder import MemoryDecoder

FILES = 8
LINES = [" ".join(f"word{(turn + each * each) % 90}" for each in range(9)) for turn in range(5)]


class Commands:
    """Runs commands in processes of their own, forked from this one, which has imported everything."""

    def __init__(self, options: Sequence[str]) -> None:
        self._options = options

    def start(self, command: str, *words: str, said: str = "", times: int = 1) -> int:
        """Begin a process that runs a command, some times over; return its id."""
        child = os.fork()
        if child:
            return child
        try:
            reading._PATIENCE = 0  # save after each document
            for _ in range(times):
                sys.stdin = io.StringIO(said)
                with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                    make_app()([command, *self._options, *words], standalone_mode=False)
        except BaseException as error:  # noqa: BLE001 - a forked process ends here, whatever happened
            print(repr(error), file=sys.__stderr__, flush=True)
            os._exit(1)
        os._exit(0)

    def run(self, command: str, *words: str, said: str = "") -> float:
        """Run a command to its end; return the seconds."""
        started = time.monotonic()
        assert ended(self.start(command, *words, said=said)) == 0
        return time.monotonic() - started

    def kill(self, after: float, command: str, *words: str, said: str = "") -> bool:
        """Kill a command after some seconds; return whether that came before its end."""
        child = self.start(command, *words, said=said)
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
        return ended(child) == -signal.SIGKILL


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def is_clean(folder: Path) -> bool:
    """Whether a folder holds what its manifest names, and nothing else."""
    named = {file.name for file in read_manifest(folder).files} | {"manifest.json"}
    return {path.name for path in folder.iterdir()} == named


def content(folder: Path) -> dict[str, Any]:
    """All that a corpus knows of each document, apart from where its chunks are."""
    corpus, found = Corpus.load(folder), {}
    for each in corpus.documents:
        chunks = corpus.bank.fetch(list(range(each.first_id, each.first_id + each.chunks)))
        told = each.as_json() | {"first_id": None}
        found[each.source] = (told, corpus.tokens_of(each.source), chunks.keys, chunks.values, chunks.spans)
    assert len(corpus.bank) == sum(each.chunks for each in corpus.documents)
    return found


def are_equal(ours: tuple[Any, ...], theirs: tuple[Any, ...]) -> bool:
    return ours[0] == theirs[0] and all(map(torch.equal, ours[1:], theirs[1:]))


def write_notes(seed: int) -> None:
    rng = random.Random(seed)  # noqa: S311
    Path("notes").mkdir()
    for number in range(FILES):
        words = (f"word{rng.randrange(90)}" for _ in range(rng.randint(20, 60)))
        Path("notes", f"{number}.txt").write_text(" ".join(words), encoding="utf-8")


def remember_trials(commands: Commands, times: int, rng: random.Random) -> Iterator[dict[str, object]]:
    took = commands.run("remember", "--out", "whole", "notes")
    whole, out = content(Path("whole")), Path("out")
    for _ in range(times):
        shutil.rmtree(out, ignore_errors=True)
        was_killed = commands.kill(rng.uniform(0.1, 1) * took, "remember", "--out", "out", "notes")
        found, in_the_middle = {}, out.exists() and not has_manifest(out)
        if has_manifest(out):
            verify(out, check_documents=check_documents)
            found, in_the_middle = content(out), not is_clean(out)
        commands.run("remember", "--out", "out", "notes")
        verify(out, check_documents=check_documents)
        after = content(out)
        yield {
            "was_killed": was_killed,
            "in_the_middle": in_the_middle,
            "documents": len(found),
            "is_whole": all(are_equal(found[each], whole[each]) for each in found),
            "is_complete": after.keys() == whole.keys(),
            "is_the_same": all(are_equal(after[each], whole[each]) for each in after),
            "is_clean": is_clean(out),
        }


def session_state(folder: Path) -> list[Any] | None:
    """What tells the states of a session apart; None before the first."""
    if not has_manifest(folder):
        return None
    verify(folder)
    manifest = read_manifest(folder)
    assert manifest.extra is not None
    recent = read_streams(folder, manifest.extra.file)["row.0.recent"].tolist()
    return [manifest.banks[0].next_id, manifest.banks[0].count, manifest.extra.facts["rows"], recent]


def chat_trials(commands: Commands, times: int, rng: random.Random) -> Iterator[dict[str, object]]:
    commands.run("remember", "--out", "base", "notes")
    words, folder = ("--memory", "base", "--max-new-tokens", "6", "--session"), Path("talk")
    lines = [f"{line}\n" for line in LINES]
    states = [None]
    for line in lines:
        commands.run("chat", *words, "whole", said=line)
        states.append(session_state(Path("whole")))
    took = commands.run("chat", *words, "other", said="".join(lines))
    for _ in range(times):
        shutil.rmtree(folder, ignore_errors=True)
        was_killed = commands.kill(rng.uniform(0.1, 1) * took, "chat", *words, "talk", said="".join(lines))
        state = session_state(folder)
        in_the_middle = folder.exists() and not (has_manifest(folder) and is_clean(folder))
        is_one = state in states
        goes_on = is_one and state != states[-1]
        if goes_on:
            commands.run("chat", *words, "talk", said="".join(lines[states.index(state) :]))
        yield {
            "was_killed": was_killed,
            "in_the_middle": in_the_middle,
            "turns": states.index(state) if is_one else -1,
            "is_old_or_new": is_one,
            "is_the_same": session_state(folder) == states[-1],
            "is_clean": is_clean(folder) or not goes_on,  # the next save removes the rest
        }


def ask_trials(commands: Commands, times: int, _rng: random.Random) -> Iterator[dict[str, object]]:
    """Ask while another process removes the last document, and reads it again."""
    last = f"notes/{FILES - 1}.txt"
    words = ("--memory", "base", "--prompt", "word1 word2 word3", "--max-new-tokens", "8", "--top-k", "20")

    def answer(name: str) -> list[Any]:
        (told,) = json.loads(Path(name).read_text(encoding="utf-8"))["answers"]
        return [told["answer"], sorted([each["source"], each["first_token"]] for each in told["sources"])]

    def state(name: str) -> list[Any]:
        commands.run("ask", *words, "--json", name)
        return answer(name)

    commands.run("remember", "--out", "base", "notes")
    full = state("full.json")
    commands.run("remember", "--out", "base", "--forget", last)
    less = state("less.json")
    assert full != less
    commands.run("remember", "--out", "base", "notes")
    assert state("again.json") == full
    for number in range(times):
        changing = os.fork()
        if not changing:
            for _ in range(3):
                commands.run("remember", "--out", "base", "--forget", last)
                commands.run("remember", "--out", "base", "notes")
            os._exit(0)
        seen, codes = [], []
        while os.waitpid(changing, os.WNOHANG) == (0, 0):
            codes.append(ended(commands.start("ask", *words, "--json", "now.json")))
            seen.append(answer("now.json"))
        yield {
            "asked": len(seen),
            "never_fails": not any(codes),
            "is_old_or_new": all(each in (full, less) for each in seen),
            "is_the_same": state(f"after {number}.json") == full,
        }


def main(kind: str, folder: Path, times: int, seed: int) -> None:
    torch.set_num_threads(1)
    os.chdir(folder)
    commands, rng = Commands(json.load(sys.stdin)), random.Random(seed)  # noqa: S311
    MemoryDecoder.generate  # noqa: B018 - imported before the first fork
    write_notes(seed)
    trials = {"remember": remember_trials, "chat": chat_trials, "ask": ask_trials}[kind]
    for each in trials(commands, times, rng):
        print(json.dumps(each), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
