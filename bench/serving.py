"""Many sessions of examples/server.py at once: whether each answer is the one that the session gives alone.

Starts the server on a free port; each user sends a passage of a text and then questions, one after the other, through
the openai client, while the server's memory is watched. Afterwards each session is repeated with a decoder for itself.

    python bench/serving.py --users 20 --seconds 300 --budget 1GB --json out/serving.json
"""

from __future__ import annotations

import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import openai
import psutil
import torch
import typer
from results import write
from tqdm import tqdm

from memlong import MemoryConfig, MemoryDecoder, load_model
from memlong.bank.sizes import byte_count
from memlong.evaluation import chat_prompt, end_of_turn, following_turn, read_text

SERVER = Path(__file__).parent.parent / "examples" / "server.py"
QUESTIONS = ["What comes next?", "Name one thing from the text.", "Go on.", "What did I send first?", "Why?"]


@dataclass
class User:
    """A session: what was sent and answered, the seconds of answers and their first pieces, and what error ended it."""

    name: str
    sent: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    error: str | None = None


@dataclass
class Watch:
    """The most that the server took while it was watched, in bytes."""

    resident: int = 0
    sessions: int = 0
    in_memory: int = 0


def main(
    users: Annotated[int, typer.Option(min=1, help="Sessions at once.")] = 20,
    seconds: Annotated[float, typer.Option(min=1, help="For how long they ask.")] = 300,
    budget: Annotated[str, typer.Option(help="The server's budget for sessions.")] = "1GB",
    rows: Annotated[int, typer.Option(min=1, help="Requests that go through the model together.")] = 8,
    text: Annotated[Path, typer.Option(help="What users send passages of.")] = Path(typing.__file__),
    characters: Annotated[int, typer.Option(min=1, help="Of a passage.")] = 6000,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 16,
    model: Annotated[str, typer.Option(help="Hub id, folder, GGUF file or 'demo'.")] = "demo",
    seed: Annotated[int, typer.Option(help="Random seed of what users send.")] = 0,
    out: Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")] = None,
) -> None:
    """Serve many sessions at once, and repeat each alone."""
    words, chance = read_text(text), random.Random(seed)  # noqa: S311 - not for secrets
    all_users = [User(f"user {number}") for number in range(users)]
    passages = [words[at : at + characters] for at in (chance.randrange(len(words)) for _ in all_users)]
    with tempfile.TemporaryDirectory() as place:
        port = free_port()
        command = [sys.executable, str(SERVER), "--model", model, "--port", str(port), "--rows", str(rows)]
        command += ["--sessions", place, "--budget", budget, "--dtype", "float32"]
        with (
            Path(place, "log").open("w") as log,
            subprocess.Popen(command, stdout=log, stderr=log) as process,  # noqa: S603
        ):
            try:
                url = f"http://127.0.0.1:{port}"
                wait_for(url, process)
                empty = psutil.Process(process.pid).memory_info().rss
                watch = talk(all_users, passages, url, model, seconds, max_tokens, process.pid)
            finally:
                process.terminate()
    differ = repeat(all_users, model, max_tokens)
    errors = [
        {"user": user.name, "turn": len(user.answers), "error": user.error}
        for user in all_users
        if user.error
    ]
    answers = [each for user in all_users for each in user.answers]
    waits = [each for user in all_users for each in user.seconds]
    firsts = [each for user in all_users for each in user.first]
    print(
        f"{users} sessions, {len(answers)} answers in {seconds:.0f} s; {len(differ)} differ from the session alone"
    )
    for each in errors:
        print(f"{each['user']} got no answer {each['turn'] + 1}: {each['error']}")
    if answers:
        print(
            f"first piece after {statistics.median(firsts):.1f} s, an answer {statistics.median(waits):.1f} s (medians)"
        )
    print(f"sessions in memory: at most {watch.in_memory}, {watch.sessions / 1e6:,.0f} MB of {budget}")
    print(f"server: {empty / 1e6:,.0f} MB without sessions, at most {watch.resident / 1e6:,.0f} MB with them")
    facts = {
        "users": users,
        "seconds": seconds,
        "rows": rows,
        "model": model,
        "characters": characters,
        "max_tokens": max_tokens,
        "answers": len(answers),
        "least_answers_of_a_session": min(len(user.answers) for user in all_users),
        "differ": differ,
        "errors": errors,
        "median_seconds": statistics.median(waits) if waits else None,
        "median_seconds_to_first_piece": statistics.median(firsts) if firsts else None,
        "budget_bytes": byte_count("budget", budget),
        "most_bytes_of_sessions": watch.sessions,
        "most_sessions_in_memory": watch.in_memory,
        "resident_bytes_before": empty,
        "most_resident_bytes": watch.resident,
    }
    write(out, facts, [])
    if errors or differ:
        raise SystemExit(1)


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_for(url: str, process: subprocess.Popen[Any], seconds: float = 300) -> None:
    """Wait until the server answers, but no longer than so many seconds."""
    ends = time.monotonic() + seconds
    while process.poll() is None:
        if time.monotonic() > ends:
            raise SystemExit(
                f"serving: the server has not answered within {seconds:g} s; see what python examples/server.py says"
            )
        try:
            health(url, seconds)
        except openai.APIConnectionError:
            time.sleep(0.5)
        else:
            return
    raise SystemExit("serving: the server has ended; see what python examples/server.py says")


def health(url: str, seconds: float = 600) -> dict[str, Any]:
    """Return what the server says of its sessions."""
    with openai.OpenAI(base_url=url, api_key="none", timeout=seconds, max_retries=0) as client:
        return typing.cast("dict[str, Any]", client.get("/health", cast_to=object))


def talk(
    users: list[User],
    passages: list[str],
    url: str,
    model: str,
    seconds: float,
    max_tokens: int,
    pid: int,
) -> Watch:
    """Let all users ask at once until the time is over; return the most that the server took."""
    ends = time.monotonic() + seconds
    watch, bar = Watch(), tqdm(desc="answers", unit="")

    def ask(user: User, passage: str) -> None:
        try:
            converse(user, passage)
        except Exception as error:  # noqa: BLE001 - whatever it is, the user got no answer
            user.error = f"{type(error).__name__}: {error}"

    def converse(user: User, passage: str) -> None:
        chance = random.Random(user.name)  # noqa: S311 - not for secrets
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600, max_retries=0) as client:
            while time.monotonic() < ends:
                words = chance.choice(QUESTIONS) if user.sent else f"{passage}\n\nWhat is this?"
                started, pieces, first = time.monotonic(), [], None
                events = client.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": words}],
                    max_tokens=max_tokens,
                    temperature=0,
                    stream=True,
                    extra_body={"session": user.name},
                )
                for event in events:
                    first = first or time.monotonic() - started
                    pieces.append(event.choices[0].delta.content or "")
                user.sent.append(words)
                user.answers.append("".join(pieces))
                user.seconds.append(time.monotonic() - started)
                user.first.append(first or user.seconds[-1])
                bar.update()

    threads = [threading.Thread(target=ask, args=each) for each in zip(users, passages, strict=True)]
    for each in threads:
        each.start()
    process = psutil.Process(pid)
    while any(each.is_alive() for each in threads):
        watch.resident = max(watch.resident, process.memory_info().rss)
        now = health(url)
        watch.sessions = max(watch.sessions, now["bytes"])
        watch.in_memory = max(watch.in_memory, now["in_memory"])
        time.sleep(0.5)
    bar.close()
    return watch


def repeat(users: list[User], model: str, max_tokens: int) -> list[dict[str, Any]]:
    """Repeat each session alone; return the answers that differ."""
    language_model, tokenizer = load_model(model, dtype="float32", device="cpu")
    ends, differ = language_model.generation_config.eos_token_id, []
    ends = ends if isinstance(ends, list) else [ends]
    with MemoryDecoder(language_model, tokenizer, MemoryConfig()) as decoder:
        for user in tqdm(users, desc="alone", unit="session"):
            decoder.reset()
            for number, (words, answer) in enumerate(zip(user.sent, user.answers, strict=True)):
                if number:
                    prompt = following_turn(tokenizer, words)
                else:
                    prompt = chat_prompt(tokenizer, [{"role": "user", "content": words}])
                output = decoder.generate(
                    prompt, torch.ones_like(prompt), max_new_tokens=max_tokens, do_sample=False, num_beams=1
                )
                if output[0, -1] not in ends:  # it was cut off
                    decoder.read(torch.tensor([end_of_turn(tokenizer)]))
                alone = tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)
                if alone != answer:
                    differ.append({"user": user.name, "turn": number, "served": answer, "alone": alone})
    return differ


if __name__ == "__main__":
    typer.run(main)
