"""examples/server.py, asked by the openai client: answers are those of each session alone."""

from __future__ import annotations

import hashlib
import http.client
import importlib
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import openai
import pytest
import torch
import typer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from memlong import MemoryDecoder, SessionPool
from memlong.bank.snapshot.locking import FolderLock
from memlong.corpus import Corpus, Document, remember
from memlong.errors import InvalidArgumentError, SnapshotError
from memlong.evaluation import chat_prompt, end_of_turn, following_turn

TEMPLATE = (
    "{% for turn in messages %}{{ 'word91' if turn.role == 'user' else 'word92' }} {{ turn.content }} word93 "
    "{% endfor %}{% if add_generation_prompt %}word92 {% endif %}"
)


WORDS = ["?", *(f"word{number}" for number in range(96))]


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    yield importlib.import_module("server")
    for name in ("server", "batching", "jobs", "refusals"):
        del sys.modules[name]


@pytest.fixture
def tokenizer():
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", eos_token="word93")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def decoder(llama, tokenizer, small):
    llama.generation_config.eos_token_id = WORDS.index("word93")
    return MemoryDecoder(llama, tokenizer, small())


@pytest.fixture
def corpus(decoder, tmp_path):
    corpus = Corpus.open(tmp_path / "corpus", decoder)
    with decoder:
        remember(decoder, corpus, [Document("a.txt", said(120, 5))])
    decoder.reset()
    return Corpus.load(tmp_path / "corpus")


class Running:
    """The server in a thread, on a port that is free, and a client of it."""

    def __init__(self, server, key):
        self._server = server
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0)

    def tell_to_stop(self):
        self._server.should_exit = True

    def stop(self):
        self.tell_to_stop()
        self._thread.join()
        self.client.close()


@pytest.fixture
def serve(module, decoder, corpus, tmp_path):
    """Start the server, in place of an earlier one, and return a client."""
    running = []

    def start(
        *, budget="1GB", rows=8, most=6, save_seconds=60, api_key=None, key="none", patience=5, more=()
    ):
        while running:
            running.pop().stop()
        pool = SessionPool(decoder, tmp_path / "sessions", budget=budget)
        worker = module.Worker(
            decoder,
            pool,
            {"book": corpus} | dict(more),
            rows=rows,
            prompt_tokens=300,
            save_seconds=save_seconds,
        )
        limits = module.Limits(new_tokens=most, prompt_tokens=300, temperature=0)
        app = module.make_app(worker, name="tiny", limits=limits, api_key=api_key)
        server = module.Server(app, worker, patience=patience, port=0, log_config=None, ws="none")
        running.append(Running(server, key))
        start.worker, start.tell_to_stop, start.stop = worker, running[0].tell_to_stop, running[0].stop
        return running[0].client

    yield start
    for each in running:
        each.stop()


@pytest.fixture
def together(serve, module, monkeypatch):
    """Have the server answer requests, the arguments of `ask` by name, in one batch; return answers or errors."""
    answer = module.Worker._answer

    def asked_together(client, asked):
        gate, batches, found = threading.Event(), [], {}

        def gated(worker, jobs):
            batches.append([job.session for job in jobs])
            assert len(batches) > 1 or gate.wait(60)
            answer(worker, jobs)

        monkeypatch.setattr(module.Worker, "_answer", gated)

        def one(name, options):
            try:
                found[name] = ask(client, **options)
            except openai.APIStatusError as error:
                found[name] = error

        threads = [threading.Thread(target=one, args=("first", {"words": said(3)}))]
        threads[0].start()
        wait_until(lambda: batches)
        for number, each in enumerate(asked.items()):
            threads.append(threading.Thread(target=one, args=each))
            threads[-1].start()
            wait_until(lambda number=number: len(serve.worker._waiting) == number + 1)
        gate.set()
        for each in threads:
            each.join()
        assert batches[1] == [each["session"] for each in asked.values()]
        return found

    return asked_together


class Reading:
    """Reading that can be held after the next segment; how many were read since, and whether one was."""

    def __init__(self):
        self.segments, self.begun, self.may_go_on = 0, threading.Event(), threading.Event()
        self.may_go_on.set()

    def hold(self, client):
        wait_for_turns(client)
        self.segments = 0
        self.begun.clear()
        self.may_go_on.clear()


@pytest.fixture
def reading(module, monkeypatch):
    reading, segments = Reading(), module.Worker._segments

    def counted(worker, rows):
        for segment in segments(worker, rows):
            reading.segments += 1
            reading.begun.set()
            assert reading.may_go_on.wait(60)
            yield segment

    monkeypatch.setattr(module.Worker, "_segments", counted)
    return reading


@pytest.fixture
def latest(module, decoder, monkeypatch):
    """The latest tokens that each session has read, as soon as its turn has ended."""
    latest, end = {}, module.Worker._end_turns

    def ended(worker, jobs, *given):
        end(worker, jobs, *given)
        for job, stream in zip(jobs, decoder._streams.batch.streams, strict=True):
            latest[job.session] = list(stream._recent.token_ids)

    monkeypatch.setattr(module.Worker, "_end_turns", ended)
    return latest


@pytest.fixture
def logged():
    """What the server has logged as errors."""
    logger, handler, records = logging.getLogger("uvicorn.error"), logging.Handler(logging.ERROR), []
    handler.emit = records.append
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


def wait_until(holds):
    ends = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.005)


def wait_for_turns(client):
    """Wait until the turns of answers that clients have got are over: a deletion comes after the batch."""
    client.delete("/sessions/none", cast_to=object)


def folder_of(tmp_path, session):
    return tmp_path / "sessions" / f"session-{hashlib.sha256(session.encode()).hexdigest()}"


def said(count, seed=0):
    numbers = torch.randint(1, 90, (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[number] for number in numbers)


def ask(client, words, session=None, model="tiny", **options):
    extra = {} if session is None else {"session": session}
    extra |= options.pop("extra", {})
    messages = [{"role": "user", "content": words}] if isinstance(words, str) else words
    return client.chat.completions.create(model=model, messages=messages, extra_body=extra, **options)


def alone(decoder, messages, bases=(), most=6):
    """Answers of a session that has the decoder for itself."""
    decoder.reset(bases=bases)
    answers, tokenizer = [], decoder.tokenizer
    with decoder:
        for words in messages:
            if not answers:
                prompt = chat_prompt(tokenizer, [{"role": "user", "content": words}])
            else:
                prompt = following_turn(tokenizer, words)
            output = decoder.generate(prompt, torch.ones_like(prompt), max_new_tokens=most, do_sample=False)
            if output[0, -1] != decoder.model.generation_config.eos_token_id:
                decoder.read(torch.tensor([end_of_turn(tokenizer)]))
            answers.append(tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True))
    decoder.reset()
    return answers


@pytest.mark.parametrize("budget", ["1GB", 0])
def test_sessions_at_once_are_what_they_are_alone(serve, decoder, corpus, budget):
    talks = {f"user {user}": [said(9 + user, 10 * user + turn) for turn in range(3)] for user in range(4)}
    bases = {name: ["book"] if number % 2 else [] for number, name in enumerate(talks)}
    expected = {
        name: alone(decoder, words, [corpus.bank] if bases[name] else []) for name, words in talks.items()
    }
    client, found = serve(budget=budget, rows=3), {}

    def talk(name):
        found[name] = [
            ask(client, words, name, extra={"memory": bases[name]}).choices[0].message.content
            for words in talks[name]
        ]

    threads = [threading.Thread(target=talk, args=(name,)) for name in talks]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert found == expected


def test_what_is_streamed_is_what_is_said_at_once(serve):
    client = serve()
    whole = ask(client, said(20))
    assert whole.usage.prompt_tokens == 23
    assert whole.choices[0].finish_reason in ("length", "stop")
    parts = list(ask(client, said(20), stream=True, stream_options={"include_usage": True}))
    assert parts[-1].usage == whole.usage
    assert len(parts) > 4
    text = "".join(each.choices[0].delta.content or "" for each in parts[:-1])
    assert text == whole.choices[0].message.content
    assert parts[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_a_session_reads_only_what_is_new(serve):
    client = serve()
    first = ask(client, said(12), "a").choices[0].message.content
    ask(client, said(12), "b")
    history = [
        {"role": "user", "content": said(12)},
        {"role": "assistant", "content": first},
        {"role": "user", "content": said(7, 1)},
    ]
    whole, new = ask(client, history, "a"), ask(client, said(7, 1), "b")
    assert whole.choices == new.choices
    assert whole.usage == new.usage
    assert ask(client, history).usage.prompt_tokens > new.usage.prompt_tokens


def test_nothing_is_kept_without_a_session(serve, tmp_path):
    client = serve(budget=0)
    assert ask(client, said(12)).choices == ask(client, said(12)).choices
    assert not list((tmp_path / "sessions").glob("session-*"))


def test_a_header_names_a_session_too(serve):
    client = serve()
    ask(client, said(12), extra_headers={"X-Session": "a"})
    assert client.delete("/sessions/a", cast_to=object)["deleted"]
    with pytest.raises(openai.BadRequestError, match="different sessions"):
        ask(client, said(12), "b", extra_headers={"X-Session": "a"})


def test_seeds_decide_what_is_chosen(serve):
    client = serve(most=20)
    options = {"temperature": 2.0, "top_p": 0.9, "max_tokens": 20}
    one, same, other = (
        ask(client, said(12), seed=seed, **options).choices[0].message.content for seed in (1, 1, 2)
    )
    assert one == same != other


def test_an_answer_ends_where_the_request_says(serve):
    client = serve(most=12)
    whole = ask(client, said(12), max_tokens=1000).choices[0].message.content
    stop = whole.split()[3]
    cut = ask(client, said(12), max_tokens=12, stop=[stop, "nothing"])
    assert cut.choices[0].message.content == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    assert len(ask(client, said(12), max_tokens=2).choices[0].message.content.split()) == 2
    streamed = ask(client, said(12), max_tokens=12, stop=stop, stream=True)
    assert "".join(each.choices[0].delta.content or "" for each in streamed) == whole[: whole.index(stop)]


def test_sessions_outlive_the_server(serve, decoder):
    expected = alone(decoder, [said(30), said(8, 1)])
    assert ask(serve(), said(30), "a").choices[0].message.content == expected[0]
    assert ask(serve(), said(8, 1), "a").choices[0].message.content == expected[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 2}, "n: "),
        ({"logprobs": True}, "logprobs: Extra inputs are not permitted"),
        ({"extra": {"memory": ["nothing"]}}, "memory must name some of book, got 'nothing'"),
        ({"extra": {"session": ""}}, "session_id must be text"),
        ({"temperature": -1}, "temperature: "),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"seed": 10**24}, "seed: "),
        ({"stop": ["a"] * 5}, "stop"),
        ({"extra": {"stream_options": {"else": True}}}, "stream_options.else: Extra inputs"),
    ],
)
def test_what_is_not_supported_is_named(serve, options, message):
    client = serve()
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=message):
            ask(client, said(3), stream=stream, **options)


def test_wrong_messages_are_named(serve):
    client = serve()
    for messages in ([{"role": "assistant", "content": "a"}], [{"role": "system", "content": "a"}]):
        with pytest.raises(openai.BadRequestError, match="must end with what the user says"):
            ask(client, messages)
    with pytest.raises(openai.BadRequestError, match="role"):
        ask(client, [{"role": "tool", "content": "a"}])
    with pytest.raises(openai.BadRequestError, match=r"messages\.0\.name: Extra inputs"):
        ask(client, [{"role": "user", "content": "a", "name": "b"}])
    for words, got in ((305, "308"), (400, "2,742 characters")):
        with pytest.raises(openai.BadRequestError, match=f"at most 300 tokens, got {got}: send less"):
            ask(client, said(words))
    with pytest.raises(openai.BadRequestError, match="model must be 'tiny'"):
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "a"}])


def test_a_template_says_what_it_does_not_take(serve, decoder):
    decoder.tokenizer.chat_template = "{{ raise_exception('No system, please') }}"
    with pytest.raises(openai.BadRequestError, match=r"chat template: No system"):
        ask(serve(), said(3))


def test_what_the_system_says_later_is_refused(serve):
    client, later = serve(), [{"role": "system", "content": "word1"}, {"role": "user", "content": "word2"}]
    ask(client, later, "a")
    for messages in (
        later,
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}, *later],
    ):
        with pytest.raises(openai.BadRequestError, match="at the beginning of a session, and none after"):
            ask(client, messages, "a")


def test_a_token_that_the_model_does_not_read_is_refused(serve, decoder, monkeypatch):
    decoder.tokenizer.add_tokens(["beyond"])
    monkeypatch.setitem(decoder.model_layout.placeholders, WORDS.index("word90"), "an image")
    client = serve()
    for word, why in (("beyond", "is none of the model's"), ("word90", "stands for an image")):
        with pytest.raises(openai.BadRequestError, match=f"got '{word}', which {why}: leave it out"):
            ask(client, f"word1 {word}", "a")
    assert "a" not in serve.worker.pool


def test_a_failure_while_a_batch_is_answered_is_no_requests_fault(
    serve, module, decoder, latest, logged, monkeypatch
):
    def fail(*_, **__):
        raise InvalidArgumentError("input_ids must be something else")

    client = serve()
    ask(client, said(5), "a")
    monkeypatch.setattr(decoder, "generate", fail)
    with pytest.raises(openai.InternalServerError, match="Its session may have read the message"):
        ask(client, said(60, 1), "a")
    wait_for_turns(client)
    assert latest["a"][-1:] == end_of_turn(decoder.tokenizer)
    assert [str(each.exc_info[1]) for each in logged] == ["input_ids must be something else"]


def test_a_choice_that_fails_is_that_of_its_request(serve, module, together, monkeypatch):
    choose = module.Job.choose
    monkeypatch.setattr(
        module.Job, "choose", lambda job, logits: 1 // (job.session != "a") and choose(job, logits)
    )
    found = together(serve(), {name: {"words": said(5), "session": name} for name in "bac"})
    assert "server's log says why" in str(found["a"])
    assert found["a"].response.headers["x-should-retry"] == "false"
    assert found["b"].choices == found["c"].choices


def test_logits_that_are_no_numbers_are_those_of_their_request(serve, together, logged, monkeypatch):
    turns = sys.modules["jobs"].Turns
    call = turns.__call__

    def damage(turns, input_ids, logits):
        is_damaged = torch.tensor([[job.session == "a"] for job in turns._jobs])
        return call(turns, input_ids, logits.masked_fill(is_damaged, torch.nan))

    monkeypatch.setattr(turns, "__call__", damage)
    found = together(serve(), {name: {"words": said(5), "session": name} for name in "bac"})
    assert "server's log says why" in str(found["a"])
    assert found["b"].choices == found["c"].choices
    assert ["got NaN" in str(each.exc_info[1]) for each in logged] == [True]


def test_a_failure_of_a_batch_is_logged_once(serve, module, together, logged, monkeypatch):
    monkeypatch.setattr(module.Worker, "_read", lambda *_: 1 // 0)
    found = together(serve(), {name: {"words": said(5), "session": name} for name in "ab"})
    assert all(isinstance(found[name], openai.InternalServerError) for name in "ab")
    assert len(logged) == 2  # the batch that the fixture begins with, and this one


def test_requests_of_one_batch_end_where_each_says(serve, decoder, together):
    expected = {most: alone(decoder, [said(40 * most, most), said(7, most)], most=most) for most in (2, 4, 6)}
    client = serve()
    for turn in range(2):
        words = {most: said(7 if turn else 40 * most, most) for most in expected}
        asked = {most: {"words": words[most], "session": str(most), "max_tokens": most} for most in expected}
        found = together(client, asked)
        for most, answers in expected.items():
            assert found[most].choices[0].message.content == answers[turn]


def test_many_may_wait_and_the_server_still_answers(serve, module, monkeypatch):
    gate = threading.Event()
    generate = module.Worker._generate
    monkeypatch.setattr(module.Worker, "_generate", lambda *given: gate.wait() and generate(*given))
    client, found = serve(rows=50), []
    threads = [
        threading.Thread(target=lambda name=name: found.append(ask(client, said(3), name)))
        for name in map(str, range(50))
    ]
    for each in threads:
        each.start()
    assert [each.id for each in client.models.list()] == ["tiny"]
    gate.set()
    for each in threads:
        each.join()
    assert len(found) == 50


def test_clients_that_go_away_end_their_requests(serve):
    client = serve(most=100_000)
    with pytest.raises(openai.APITimeoutError):
        ask(client, said(3), "a", timeout=1)
    with ask(client, said(3), "b", stream=True) as events:
        next(iter(events))
    assert client.delete("/sessions/a", cast_to=object)["deleted"]
    assert client.delete("/sessions/b", cast_to=object)["deleted"]


def test_a_session_whose_client_goes_before_anything_is_read_stays_as_it_is(
    serve, module, decoder, latest, monkeypatch
):
    expected, hide = alone(decoder, [said(7), said(9)]), module.Worker._hide_expired

    def go(worker, jobs):
        hide(worker, jobs)
        if jobs[0].messages[0]["content"] == said(1):
            jobs[0].cancel()

    monkeypatch.setattr(module.Worker, "_hide_expired", go)
    client = serve()
    ask(client, said(7), "a")
    wait_for_turns(client)
    before = latest["a"]
    with pytest.raises(openai.APITimeoutError):
        ask(client, said(1), "a", timeout=0.5)
    wait_for_turns(client)
    assert latest["a"] == before
    assert ask(client, said(9), "a").choices[0].message.content == expected[1]


@pytest.mark.parametrize("fails", [False, True])
def test_a_turn_that_is_broken_off_has_one_end(serve, module, decoder, latest, monkeypatch, fails):
    turns = sys.modules["jobs"].Turns
    call, choose = turns.__call__, module.Job.choose

    def break_off(turns, input_ids, logits):
        for job in turns._jobs:
            if job.tokens == 2 and not fails:  # as when a client goes while the model computes
                job.cancel()
        return call(turns, input_ids, logits)

    monkeypatch.setattr(turns, "__call__", break_off)
    monkeypatch.setattr(
        module.Job, "choose", lambda job, logits: 1 // (job.tokens != 2) and choose(job, logits)
    )
    client = serve()
    with pytest.raises(openai.InternalServerError if fails else openai.APITimeoutError):
        ask(client, said(5), "a", timeout=1)
    wait_for_turns(client)
    assert [token in end_of_turn(decoder.tokenizer) for token in latest["a"][-3:]] == [False, False, True]


def test_what_a_client_sent_is_read_no_further_once_it_has_gone(serve, reading):
    client = serve()
    before = ask(client, said(20), "a")
    wait_for_turns(client)
    short = reading.segments
    for name in ("a", "new"):
        reading.hold(client)
        with pytest.raises(openai.APITimeoutError):
            ask(client, said(200), name, timeout=0.5)
        wait_until(lambda: all(job.ended for job in serve.worker._jobs))
        reading.may_go_on.set()
        assert ask(client, said(20), f"after {name}").choices == before.choices
        wait_for_turns(client)
        assert reading.segments == short + 2  # one of what was sent, and the end of the turn
    assert "new" not in serve.worker.pool  # it had not begun


def test_a_server_that_stops_reads_no_further(serve, reading, tmp_path):
    client, found = serve(patience=0), {}
    for name in ("idle", "long"):
        ask(client, said(20), name)

    def one(name, words):
        try:
            ask(client, words, name, stream=name == "long")
        except openai.InternalServerError as error:
            found[name] = error

    reading.hold(client)
    threads = [
        threading.Thread(target=one, args=each) for each in (("long", said(200)), ("waiting", said(3)))
    ]
    threads[0].start()
    assert reading.begun.wait(60)
    threads[1].start()
    wait_until(lambda: serve.worker._waiting)
    serve.tell_to_stop()
    for each in threads:
        each.join()
    wait_until(lambda: list(folder_of(tmp_path, "idle").glob("manifest.json")))
    assert not folder_of(tmp_path, "long").exists()  # it is still being read
    reading.may_go_on.set()
    serve.stop()
    assert reading.segments == 2  # the end of a turn is the second
    assert list(folder_of(tmp_path, "long").glob("manifest.json"))
    for name, retry, message in (
        ("waiting", "true", "has read nothing of the request: send it again"),
        ("long", "false", "may have read a part"),
    ):
        assert found[name].status_code == 503
        assert found[name].response.headers["x-should-retry"] == retry
        assert message in found[name].message


def test_half_a_first_message_is_never_saved(serve, reading, tmp_path, monkeypatch, logged):
    leave, left = SessionPool._leave, threading.Event()

    def leave_slowly(pool, visit):  # so that the pool is closed as soon as the session is idle
        leave(pool, visit)
        if visit.session.name == "half":
            left.set()
            time.sleep(0.2)

    def one():
        with pytest.raises(openai.InternalServerError):
            ask(client, said(200), "half")

    client = serve(patience=0)
    monkeypatch.setattr(SessionPool, "_leave", leave_slowly)
    close = SessionPool.close
    monkeypatch.setattr(SessionPool, "close", lambda pool: left.wait(60) and close(pool))
    reading.hold(client)
    thread = threading.Thread(target=one)
    thread.start()
    assert reading.begun.wait(60)
    serve.tell_to_stop()
    thread.join()
    reading.may_go_on.set()
    serve.stop()
    assert not folder_of(tmp_path, "half").exists()
    assert not logged


def test_a_server_that_stops_waits_for_no_messages_that_are_tokenized(serve, tmp_path, monkeypatch):
    begun, may_go_on, found = threading.Event(), threading.Event(), []

    def slowly(tokenizer, messages):
        begun.set()
        assert may_go_on.wait(60)
        return chat_prompt(tokenizer, messages)

    def one():
        try:
            ask(client, said(3))
        except openai.InternalServerError as error:
            found.append(error)

    client = serve(patience=0)
    ask(client, said(20), "idle")
    wait_for_turns(client)
    monkeypatch.setattr(sys.modules["jobs"], "chat_prompt", slowly)
    threads = [threading.Thread(target=one) for _ in range(os.cpu_count() + 6)]  # more than asyncio's own
    for each in threads:
        each.start()
    assert begun.wait(60)
    time.sleep(0.2)
    serve.tell_to_stop()
    try:
        wait_until(lambda: list(folder_of(tmp_path, "idle").glob("manifest.json")))
    finally:
        may_go_on.set()
    for each in threads:
        each.join()
    assert len(found) == len(threads)
    assert {(each.status_code, each.response.headers["x-should-retry"]) for each in found} == {(503, "true")}


def test_a_signal_lets_an_answer_end(module, decoder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    decoder.model.config.max_position_embeddings = 4096
    decoder.model.save_pretrained("model")
    decoder.tokenizer.save_pretrained("model")
    listening, got, signals = module._listening, [], []
    monkeypatch.setattr(module, "_listening", lambda *given: got.append(listening(*given)) or got[0])
    monkeypatch.setattr(
        module, "Server", partial(module.Server, log_config=None)
    )  # it would keep this stderr
    before = signal.signal(signal.SIGTERM, lambda *given: signals.append(given))

    def one():
        wait_until(lambda: got)
        url = f"http://127.0.0.1:{got[0].getsockname()[1]}/v1"
        with openai.OpenAI(base_url=url, api_key="none") as client:
            for each in ask(client, said(3), "a", "model", max_tokens=50, stream=True):
                got.append(each.choices[0])
                if len(got) == 3:
                    os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=one)
    thread.start()
    try:
        module.main(model="model", sessions=Path("sessions"), port=0, dtype="float32")
    finally:
        thread.join()
        signal.signal(signal.SIGTERM, before)
    assert len(signals) == 1
    assert got[-1].finish_reason == "length"
    assert list(Path("sessions").glob("session-*/manifest.json"))
    printed = capsys.readouterr().out
    assert re.search(rf"^model answers at http://127\.0\.0\.1:\d+/v1, .*{re.escape(str(tmp_path))}", printed)


def test_an_answer_that_fails_is_not_told_as_whole(module, tokenizer, monkeypatch):
    def take_meanwhile(job, name, value):
        object.__setattr__(job, name, value)
        if (name, value) == ("ended", "cancelled"):
            job.take(3, tokenizer, [93])  # as the worker does, when another thread lets the request fail

    job, error = module.Job("a", True, (), [], 5, 0, 1.0, None, (), False), ValueError()
    monkeypatch.setattr(module.Job, "__setattr__", take_meanwhile)
    job.fail(error)
    assert job.said.get_nowait() is error


def test_a_start_that_fails_leaves_no_thread(module, llama, tokenizer, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise BrokenPipeError

    monkeypatch.chdir(tmp_path)
    llama.config.max_position_embeddings = 4096
    llama.save_pretrained("model")
    tokenizer.save_pretrained("model")
    monkeypatch.setattr(module, "print", broken, raising=False)
    with pytest.raises(BrokenPipeError):
        module.main(model="model", sessions=Path("sessions"), port=0, dtype="float32")
    assert "memlong" not in [each.name for each in threading.enumerate()]


def test_many_may_wait_to_delete_and_the_server_still_answers(serve, reading):
    client, found = serve(), []
    reading.hold(client)
    read = threading.Thread(target=ask, args=(client, said(20), "a"))
    read.start()
    assert reading.begun.wait(60)
    told = threading.Thread(target=ask, args=(client, said(3), "b"))
    told.start()
    wait_until(lambda: serve.worker._waiting)
    threads = [
        threading.Thread(target=lambda: found.append(client.delete("/sessions/b", cast_to=object)["deleted"]))
        for _ in range(50)
    ]
    for number, each in enumerate(threads):
        each.start()
        wait_until(lambda number=number: len(serve.worker._waiting) == number + 2)
    assert client.get("/../health", cast_to=object)["memory"] == ["book"]
    reading.may_go_on.set()
    for each in (read, told, *threads):
        each.join()
    assert sorted(found) == [False] * 49 + [True]  # "b" was answered first


def test_a_deletion_that_fails_is_logged(serve, tmp_path, logged):
    client = serve(save_seconds=0)
    ask(client, said(12), "a")
    wait_until(lambda: list(folder_of(tmp_path, "a").glob("manifest.json")))
    with (
        FolderLock(folder_of(tmp_path, "a")),
        pytest.raises(openai.InternalServerError, match="log says why") as failed,
    ):
        client.delete("/sessions/a", cast_to=object)
    assert "may have read" not in failed.value.message
    (record,) = logged
    assert record.getMessage() == "DELETE /v1/sessions/a has failed"
    assert isinstance(record.exc_info[1], SnapshotError)


def test_a_health_that_cannot_be_told_is_logged(serve, logged, monkeypatch):
    client = serve()
    monkeypatch.setattr(SessionPool, "in_memory", property(lambda _: 1 // 0))
    with pytest.raises(openai.InternalServerError, match="log says why"):
        client.get("/../health", cast_to=object)
    wait_until(lambda: logged)  # after the answer
    assert logged[0].exc_info[0] is ZeroDivisionError


def test_what_could_not_be_saved_is_saved_later(serve, module, tmp_path, monkeypatch, logged):
    flush, failures = SessionPool.flush, [SnapshotError("The disk is full")]

    def flush_later(pool):
        if failures:
            raise failures.pop()
        flush(pool)

    monkeypatch.setattr(sys.modules["batching"], "_SOON", 0.01)
    monkeypatch.setattr(SessionPool, "flush", flush_later)
    ask(serve(save_seconds=0), said(12), "a")
    wait_until(lambda: list(folder_of(tmp_path, "a").glob("manifest.json")))
    assert "tries again" in logged[0].getMessage()


def test_sessions_are_saved_now_and_then(serve, tmp_path):
    client = serve(save_seconds=0)
    ask(client, said(12), "a")
    ask(client, said(12), "b")
    assert list((tmp_path / "sessions").glob("session-*/manifest.json"))


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_names_its_sources(serve, corpus, tokenizer, stream):
    client = serve()
    ask(client, said(200, 1), "a", extra={"memory": ["book"]})
    found = ask(client, said(8, 5), "a", stream=stream, extra={"memory": ["book"], "sources": True})
    sources = (list(found)[-1] if stream else found).sources
    assert [each["attention"] for each in sources] == sorted(
        (each["attention"] for each in sources), reverse=True
    )
    assert {each["memory"] for each in sources} == {"book", None}  # and what the session has read
    for each in sources:
        if each["memory"] is not None:
            assert (each["source"], each["title"]) == ("a.txt", "")
            assert each["text"] in said(120, 5)
            assert said(120, 5).split()[each["first_token"]] == each["text"].split()[0]
    assert not hasattr(ask(client, said(3), "a", extra={"memory": ["book"]}), "sources")


@pytest.mark.parametrize("is_in_memory", [True, False])
def test_a_session_that_cannot_go_on_does_not_stop_others(
    serve, decoder, corpus, together, tmp_path, is_in_memory
):
    expected = alone(decoder, [said(40), said(5)])[1]
    client = serve()
    for name in ("plain", "damaged", "well"):
        ask(client, said(40), name)
    ask(client, said(40), "booked", extra={"memory": ["book"]})
    client = client if is_in_memory else serve()
    asked = {name: {"words": said(5), "session": name} for name in ("plain", "booked", "damaged", "well")}
    asked["plain"]["extra"] = {"memory": ["book"]}
    if not is_in_memory:
        files = folder_of(tmp_path, "damaged").iterdir()
        file = max(files, key=lambda path: path.stat().st_size)
        content = file.read_bytes()
        file.write_bytes(content[:-9] + bytes(9))
    found = together(client, asked)
    for name, began, got in (("plain", [], ["book"]), ("booked", ["book"], [])):
        assert isinstance(found[name], openai.BadRequestError)
        assert f"memory must be {began}, as when session '{name}' began, got {got}" in str(found[name])
    assert found["well"].choices[0].message.content == expected
    assert isinstance(found["damaged"], openai.InternalServerError) != is_in_memory


def test_the_sources_are_those_of_the_answer_however_much_was_read(serve, decoder, corpus):
    prompt = chat_prompt(decoder.tokenizer, [{"role": "user", "content": said(200)}])
    decoder.reset(bases=[corpus.bank])
    with decoder, decoder.sources() as recorded:
        decoder.generate(prompt, torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
    decoder.reset()
    found = ask(serve(), said(200), extra={"memory": ["book"], "sources": True}).sources
    expected = [each.mass for each in recorded.chunks if each.id is not None]
    assert [each["attention"] for each in found] == pytest.approx(expected)


def test_the_order_of_corpora_does_not_count(serve, corpus, tmp_path):
    client = serve(more={"another": Corpus.load(tmp_path / "corpus")})
    for names in (["book", "another"], ["another", "book", "another"]):
        assert ask(client, said(5), "a", extra={"memory": names}).choices


@pytest.fixture
def send():
    """Send a body, whole or in pieces, to a server; return the status and the answer."""
    connections = []

    def send(client, body=None, path="/v1/chat/completions", **headers):
        connections.append(http.client.HTTPConnection(client.base_url.host, client.base_url.port))
        headers = {"Content-Type": "application/json"} | headers
        connections[0].request("GET" if body is None else "POST", path, body, headers)
        answer = connections[0].getresponse()
        told = json.loads(answer.read())
        connections.pop().close()
        return answer.status, told

    return send


def test_a_refusal_has_openais_form_whatever_is_wrong(serve, send):
    client = serve()
    for body, message in (
        (
            "{bad",
            "The body must be JSON, got: Expecting property name enclosed in double quotes at character 1",
        ),
        ("", "The body: Field required"),
        ("[]", "The body: Input should be"),
        ('{"messages":' + "[" * 100_000, "parsing the body"),
    ):
        status, told = send(client, body)
        assert status == 400
        assert message in told["error"]["message"]
        assert told["error"]["type"] == "invalid_request_error"
    assert send(client, path="/nothing") == (
        404,
        {"error": {"message": "Not Found", "type": "invalid_request_error", "param": None, "code": None}},
    )


def test_a_body_that_is_too_large_is_not_read(serve, module, send, monkeypatch):
    monkeypatch.setattr(module, "_MOST_BYTES", 1000)
    client, body = serve(), json.dumps({"messages": [{"role": "user", "content": "a" * 1000}]}).encode()
    for sent in (body, iter([body[:800], body[800:]])):
        status, told = send(client, sent)
        assert status == 413
        assert told["error"]["message"] == "The body must have at most 1,000 bytes: send less"
    assert ask(client, said(3)).choices


def test_nothing_is_tokenized_of_what_is_far_too_long(serve, module, monkeypatch):
    monkeypatch.setattr(sys.modules["jobs"], "chat_prompt", None)
    with pytest.raises(openai.BadRequestError, match="at most 300 tokens, got 2,742 characters"):
        ask(serve(), said(400))


def test_many_short_messages_are_too_long_too(serve, module, monkeypatch):
    monkeypatch.setattr(sys.modules["jobs"], "chat_prompt", None)
    client, one = serve(), {"role": "user", "content": ""}
    with pytest.raises(openai.BadRequestError, match="at most 300 tokens, got 301 messages"):
        ask(client, [one] * 301)
    with pytest.raises(openai.BadRequestError, match="messages: List should have at most 10000 items"):
        ask(client, [one] * 10_001)


def test_long_messages_are_tokenized_while_others_are_answered(serve, reading, monkeypatch):
    begun, may_go_on, found = threading.Event(), threading.Event(), {}

    def slowly(tokenizer, messages):
        if messages[0]["content"] == "word1":
            begun.set()
            assert may_go_on.wait(60)
        return chat_prompt(tokenizer, messages)

    def one(words):
        found[words] = ask(client, words).choices

    monkeypatch.setattr(sys.modules["jobs"], "chat_prompt", slowly)
    client = serve()
    reading.hold(client)
    threads = {words: threading.Thread(target=one, args=(words,)) for words in (said(20), "word1")}
    threads[said(20)].start()
    assert reading.begun.wait(60)
    threads["word1"].start()
    assert begun.wait(60)
    reading.may_go_on.set()
    threads[said(20)].join()
    assert client.models.list().data
    assert list(found) == [said(20)]
    may_go_on.set()
    threads["word1"].join()
    assert found["word1"]


def test_one_thread_tokenizes_at_a_time_with_a_tokenizer_that_the_model_does_not_use(
    module, decoder, monkeypatch
):
    tokenizer, now, most = decoder.tokenizer, [], []
    prompts = sys.modules["jobs"].Prompts(tokenizer, decoder.model_layout, 100)

    def watched(given, messages):
        now.append(given)
        most.append(len(now))
        time.sleep(0.01)
        now.remove(given)
        assert given is not tokenizer
        return chat_prompt(given, messages)

    monkeypatch.setattr(sys.modules["jobs"], "chat_prompt", watched)
    with ThreadPoolExecutor(4) as pool:
        said = [[{"role": "user", "content": f"word{number}"}] for number in range(8)]
        list(pool.map(lambda messages: prompts.of(messages, begins=True), said))
    assert most == [1] * 8


def test_a_request_that_waits_for_one_of_its_session_goes_on_with_that(serve, decoder, reading):
    expected = alone(decoder, [said(20), said(7, 1)])
    client, found = serve(), {}

    def one(number, words):
        found[number] = ask(client, words, "a").choices[0].message.content

    reading.hold(client)
    threads = [threading.Thread(target=one, args=each) for each in enumerate((said(20), said(7, 1)))]
    threads[0].start()
    assert reading.begun.wait(60)
    threads[1].start()
    wait_until(lambda: serve.worker._waiting)
    assert not serve.worker._waiting[0].begins
    serve.worker._waiting[0].tokenize(serve.worker._prompts, begins=True)  # as if it had come before
    reading.may_go_on.set()
    for each in threads:
        each.join()
    assert [found[0], found[1]] == expected


def test_texts_of_any_script_name_sessions_and_keys(serve, send):
    client = serve(api_key="schlüssel", key="none")
    body = json.dumps({"messages": [{"role": "user", "content": "word1"}], "session": "größe"}).encode()
    headers = {"X-Session": "größe".encode(), "Authorization": "Bearer schlüssel".encode()}
    assert send(client, body, **headers)[0] == 200
    status, told = send(client, body, **(headers | {"X-Session": "größe".encode("latin-1")}))
    assert (status, told["error"]["message"].split(":")[0]) == (400, "The header X-Session must be UTF-8")
    assert send(client, body, **(headers | {"Authorization": "Bearer schlüssel".encode("latin-1")}))[0] == 401


def test_keys_are_checked(serve):
    assert ask(serve(api_key="right", key="right"), said(3)).choices


def test_wrong_keys_are_refused(serve):
    with pytest.raises(openai.AuthenticationError, match="wrong or missing"):
        ask(serve(api_key="right", key="wrong"), said(3))


def test_sessions_can_be_deleted(serve):
    client = serve()
    ask(client, said(12), "a")
    gone = client.delete("/sessions/a", cast_to=object)
    assert gone == {"id": "a", "object": "session", "deleted": True}
    assert [each.id for each in client.models.list()] == ["tiny"]


def test_a_decoder_without_a_memory_is_refused(module, llama, tokenizer, small):
    decoder = MemoryDecoder(llama, tokenizer, small(backend=None))
    with pytest.raises(InvalidArgumentError, match="backend must be one that stores"):
        module.Worker(decoder, None, {}, rows=1, prompt_tokens=9, save_seconds=0)


def test_a_model_without_a_template_is_refused(module, llama, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer.chat_template = None
    llama.save_pretrained("model")
    tokenizer.save_pretrained("model")
    with pytest.raises(InvalidArgumentError, match="must have a chat template"):
        module.main(model="model")
    for wrong in (["book"], ["a=b", "a=c"]):
        with pytest.raises(InvalidArgumentError, match="must be NAME=DIR"):
            module.main(memory=wrong)
    with pytest.raises(InvalidArgumentError, match="--api-key must not be empty"):
        module.main(api_key="")
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(InvalidArgumentError, match=r"cannot be listened on: Address already in use$"),
    ):
        module.main(model="model", host="127.0.0.1", port=taken.getsockname()[1])


@pytest.mark.skipif(not socket.has_ipv6, reason="this machine has no IPv6")
def test_a_server_listens_on_an_address_of_ipv6(module):
    with module._listening("::1", 0) as listening:
        assert listening.getsockname()[0] == "::1"


def test_a_port_that_is_none_is_wrong_usage(module):
    app = typer.Typer()
    app.command()(module.main)
    result = CliRunner().invoke(app, ["--port", "70000"])
    assert result.exit_code == 2
    assert "65535" in result.output


def test_a_strangers_corpus_chooses_no_place_on_this_machine(module, decoder, corpus, tmp_path):
    evil = Corpus.open(tmp_path / "evil", decoder, notes={"model": "/somewhere/model", "settings": {}})
    evil.save(tmp_path / "evil")
    with pytest.raises(InvalidArgumentError, match="a place on this machine, which no file may choose"):
        module.main(memory=[f"evil={tmp_path / 'evil'}"])


@pytest.mark.slow
def test_the_bench_finds_answers_that_are_those_of_each_session_alone(
    llama, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "bench"))
    serving = importlib.import_module("serving")
    llama.generation_config.eos_token_id = WORDS.index("word93")
    llama.config.max_position_embeddings = 4096
    llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(said(3000), encoding="utf-8")
    serving.main(
        users=3,
        seconds=5,
        budget="1MB",
        rows=2,
        text=tmp_path / "text.txt",
        characters=6000,
        max_tokens=4,
        model=str(tmp_path / "model"),
        seed=0,
        out=tmp_path / "serving.json",
    )
    facts = json.loads((tmp_path / "serving.json").read_text())
    assert facts["differ"] == []
    assert facts["answers"] >= 3
    assert facts["most_bytes_of_sessions"] > 0
