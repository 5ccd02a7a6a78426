"""Sessions of one decoder, side by side and in turns: each is what it is alone."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from memlong import BankPool, MemlongError, MemoryDecoder, SessionPool, SnapshotError, create_bank, load_bank
from memlong.errors import InvalidArgumentError, OtherBasesError


def turns_of(text, names, rounds, seed=0):
    """A schedule: which sessions go on together, and with which tokens."""
    chance = np.random.default_rng(seed)
    for number in range(rounds):
        some = chance.permutation(names)[: chance.integers(1, len(names) + 1)].tolist()
        yield {name: text(int(chance.integers(3, 30)), seed=10 * number + names.index(name)) for name in some}


def padded(prompts):
    width = max(each.shape[1] for each in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, each in enumerate(prompts):
        ids[row, width - each.shape[1] :] = each[0]
        mask[row, width - each.shape[1] :] = 1
    return ids, mask


def answer(decoder, prompts, **options):
    ids, mask = padded(prompts)
    output = decoder.generate(ids, mask, max_new_tokens=3, do_sample=False, pad_token_id=0, **options)
    return output[:, ids.shape[1] :]


def test_each_session_is_what_it_is_alone(tiny_model, architecture, small, text, tmp_path):
    decoder = MemoryDecoder(tiny_model(architecture), None, small())
    read = {"a": [], "b": [], "c": []}
    budget = 0 if len(architecture) % 2 else "1GB"  # on disk after each turn, or in memory
    with decoder, SessionPool(decoder, tmp_path / "pool", budget=budget) as pool:
        for turn in turns_of(text, list(read), 4):
            with pool.sessions(*turn):
                said = answer(decoder, list(turn.values()))
            for name, tokens in zip(turn, said, strict=True):
                read[name].append((turn[name], tokens))
        for name, turns in read.items():
            decoder.reset()
            for prompt, tokens in turns:
                mine = answer(decoder, [prompt])[0]  # it ends at its end, and not at that of the longest
                assert [*mine.tolist(), *[0] * (len(tokens) - len(mine))] == tokens.tolist()
            last = text(9, seed=9)
            expected, seen = decoder.read(last), decoder.tokens_read
            decoder.reset()
            with pool.sessions(name):
                torch.testing.assert_close(decoder.read(last), expected, rtol=1e-4, atol=1e-5)
                assert decoder.tokens_read == seen


@pytest.fixture
def decoder(llama, small):
    with MemoryDecoder(llama, None, small()) as decoder:
        yield decoder


@pytest.fixture
def pool(decoder, tmp_path):
    with SessionPool(decoder, tmp_path / "pool", budget="1GB") as pool:
        yield pool


def test_a_later_pool_goes_on(decoder, text, tmp_path):
    decoder.read(text(100))
    expected = decoder.read(text(20, seed=1))
    decoder.reset()
    with SessionPool(decoder, tmp_path / "pool", budget="1GB") as pool, pool.sessions("a"):
        decoder.read(text(100))
    with SessionPool(decoder, tmp_path / "pool", budget="1GB") as pool:
        assert "a" in pool
        assert (len(pool), pool.in_memory) == (1, 0)
        with pool.sessions("b", "a"):
            assert decoder.tokens_read == (0, 100)
            ids, mask = padded([text(3), text(20, seed=1)])
            torch.testing.assert_close(decoder.read(ids, mask)[1:], expected)
        assert pool.in_memory == 2
        with pool.sessions("b"):
            assert decoder.tokens_read == (3,)


def test_an_idle_session_on_disk_is_a_saved_decoder(decoder, text, tmp_path):
    with SessionPool(decoder, tmp_path / "pool", budget=0) as pool:
        with pool.sessions("a"):
            decoder.read(text(100))
        assert pool.in_memory == pool.nbytes == 0
        (folder,) = (tmp_path / "pool").glob("session-*")
    decoder.restore(folder)
    assert decoder.tokens_read == (100,)


def test_the_budget_is_of_windows_and_banks(decoder, text, tmp_path):
    with SessionPool(decoder, tmp_path / "one", budget="1GB") as pool:
        with pool.sessions("a"):
            decoder.read(text(100))
            bank = decoder.banks[0].resident_bytes
            assert pool.nbytes == bank  # the window is the decoder's
        one = pool.nbytes
        assert one > bank > 0
    with SessionPool(decoder, tmp_path / "pool", budget=2 * one) as pool:
        for name in "abcab":
            with pool.sessions(name):
                decoder.read(text(100) if not decoder.tokens_read[0] else text(1))
            assert pool.nbytes <= 2 * one
        assert len(pool) == 3


def test_sessions_lie_over_bases(decoder, text, tmp_path):
    decoder.read(text(100))
    decoder.flush()
    decoder.banks[0].save(tmp_path / "base")
    base, other = (load_bank(tmp_path / "base", lazy=True) for _ in range(2))
    decoder.reset(bases=[base])
    expected = decoder.read(text(30, seed=1))
    decoder.reset()
    plain = decoder.read(text(30, seed=1))
    decoder.reset()
    for budget in ("1GB", 0):
        with SessionPool(decoder, tmp_path / f"pool-{budget}", budget=budget) as pool:
            ids = torch.cat([text(30, seed=1)] * 2)
            with pool.sessions("a", "b", bases={"a": [base]}):
                torch.testing.assert_close(decoder.read(ids), torch.cat([expected, plain]))
                assert decoder.banks[0].bases == (base,)
            held = len(base)
            with pool.sessions("b", "a", bases={"a": [base]}):
                assert decoder.tokens_read == (30, 30)
            assert len(base) == held
            if budget:
                with pytest.raises(OtherBasesError, match="lies over 1 bases, and those given are others"):
                    pool.sessions("a", bases={"a": [other]}).__enter__()
            for name, mine, known in (("a", [], [base]), ("a", [base, other], [base]), ("b", [base], [])):
                with pytest.raises(OtherBasesError, match=f"lies over {len(known)} bases") as refused:
                    pool.sessions(name, bases={name: mine}).__enter__()
                assert refused.value.bases == tuple(each.identity for each in known)
            with pool.sessions("a", bases={"a": [base]}):
                assert decoder.tokens_read == (30,)


def test_nothing_is_saved_of_a_temporary_session(decoder, text, tmp_path):
    with SessionPool(decoder, tmp_path / "pool", budget=0) as pool:
        for _ in range(2):
            with pool.sessions("a", "b", temporary=["b"]):
                decoder.read(text(50).repeat(2, 1))
            assert list(tmp_path.glob("pool/session-*")) == [pool._folder_of("a")]
            assert "b" not in pool
        with pool.sessions("a", "b"):
            assert decoder.tokens_read == (100, 0)
        for wrong, message in (("a", "temporary must name new sessions, got 'a'"), ("c", "given for 'c'")):
            with pytest.raises(InvalidArgumentError, match=message):
                pool.sessions("a", temporary=[wrong]).__enter__()


def test_a_temporary_session_may_be_kept_after_all(decoder, pool, text):
    temporary = {"a", "b"}
    with pool.sessions("a", "b", temporary=temporary):
        decoder.read(text(50).repeat(2, 1))
        temporary.remove("a")
    with pool.sessions("a", "b"):
        assert decoder.tokens_read == (50, 0)


def test_an_error_in_the_block_loses_nothing(decoder, pool, text):
    def fail():
        with pool.sessions("a"):
            decoder.read(text(50))
            decoder.read(text(5) - 100)

    with pytest.raises(InvalidArgumentError, match="must be from 0 to 96"):
        fail()
    with pool.sessions("a"):
        assert decoder.tokens_read == (50,)


def test_a_block_may_flush(decoder, pool, text):
    with pool.sessions("a"):
        decoder.read(text(50))
        decoder.flush()
    with pool.sessions("a"):
        assert decoder.tokens_read == (0,)
        assert len(decoder.banks[0]) == 12


@pytest.mark.parametrize("name", ["reset", "restore", "use_banks"])
def test_other_streams_in_the_block_are_refused_at_its_end(decoder, pool, text, tmp_path, name):
    decoder.read(text(30))
    decoder.save(tmp_path / "other")
    decoder.reset()

    def go_astray():
        with pool.sessions("a"):
            decoder.read(text(50))
            given = {"restore": [tmp_path / "other"], "use_banks": [[decoder.new_bank()]]}
            getattr(decoder, name)(*given.get(name, []))
            decoder.read(text(5))

    with pytest.raises(MemlongError, match="given other streams or banks"):
        go_astray()
    with pool.sessions("a"):
        assert decoder.tokens_read == (55 if name == "use_banks" else 50,)


def test_a_stream_of_no_session_is_not_lost(decoder, pool, text):
    decoder.read(text(30))
    with pytest.raises(MemlongError, match="belongs to no session"):
        pool.sessions("a").__enter__()
    assert decoder.tokens_read == (30,)
    decoder.reset()


def test_a_session_of_another_model_is_refused(tiny_model, small, text, tmp_path):
    for seed in (0, 1):
        with (
            MemoryDecoder(tiny_model(seed=seed), None, small()) as decoder,
            SessionPool(decoder, tmp_path / "pool", budget=0) as pool,
        ):
            if not seed:
                with pool.sessions("a"):
                    decoder.read(text(30))
                continue
            with pytest.raises(SnapshotError, match="another model or other settings"):
                pool.sessions("a").__enter__()
            with pool.sessions("b"):
                decoder.read(text(3))


def test_the_plain_window_has_sessions_too(llama, small, text, tmp_path):
    with (
        MemoryDecoder(llama, None, small(backend=None)) as decoder,
        SessionPool(decoder, tmp_path, budget=0) as pool,
    ):
        with pool.sessions("a"):
            expected = decoder.read(text(50))
        decoder.read(text(40))
        again = decoder.read(text(50)[:, 40:])
        torch.testing.assert_close(again, expected)
        decoder.reset()
        with pool.sessions("a"):
            assert decoder.tokens_read == (50,)


@pytest.mark.parametrize("names", [(), ("a", "a"), ("",), (5,)], ids=str)
def test_wrong_names_are_refused(pool, names):
    with pytest.raises(InvalidArgumentError, match=r"each once|must be text"):
        pool.sessions(*names).__enter__()


def test_blocks_do_not_nest(decoder, pool, text):
    with pool.sessions("a"):
        for wrong in (pool.sessions("b").__enter__, pool.flush):
            with pytest.raises(MemlongError, match="Leave the block"):
                wrong()
        with pytest.raises(InvalidArgumentError, match="in use"):
            pool.delete("a")
    pool.flush()
    assert not pool.delete("a")


def test_threads_wait_for_one_another(decoder, pool, text):
    ids, expected, found = text(40), {}, {}
    for name in "abcd":
        decoder.reset()
        for part in ids.split(10, dim=1):
            expected[name] = decoder.read(part)
    decoder.reset()

    def serve(name):
        for part in ids.split(10, dim=1):
            with pool.sessions(name):
                found[name] = decoder.read(part)

    threads = [threading.Thread(target=serve, args=(name,)) for name in expected]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    for name, logits in expected.items():
        assert torch.equal(found[name], logits)


def test_a_deleted_session_is_gone(decoder, text, tmp_path):
    with SessionPool(decoder, tmp_path / "pool", budget=0) as pool:
        with pool.sessions("a", "b"):
            decoder.read(text(30, rows=2))
        assert pool.delete("a")
        assert "a" not in pool
        with pool.sessions("a", "b"):
            assert decoder.tokens_read == (0, 30)


def test_a_bank_that_is_dropped_from_memory_refuses_changes(decoder, text, tmp_path):
    with SessionPool(decoder, tmp_path / "pool", budget=0) as pool:
        with pool.sessions("a"):
            decoder.read(text(100))
            bank = decoder.banks[0]
        with pytest.raises(MemlongError, match="saved this session and dropped it"):
            bank.remove(bank.ids)


def test_a_session_of_a_bank_pool_is_none_of_a_decoder(decoder, tmp_path):
    with (
        BankPool(tmp_path, lambda: create_bank("torch", 4), load_bank, budget=0) as banks,
        banks.session("a") as bank,
    ):
        bank.add(torch.ones(1, 4), *torch.ones(2, 1, 1, 1, 2, 4), [[0, 2]])
    with (
        SessionPool(decoder, tmp_path, budget=0) as pool,
        pytest.raises(SnapshotError, match="holds a bank, and no streams"),
    ):
        pool.sessions("a").__enter__()


def test_a_session_of_two_rows_is_refused(decoder, text, tmp_path):
    with SessionPool(decoder, tmp_path / "pool", budget=0) as pool:
        with pool.sessions("a"):
            decoder.read(text(30))
        (folder,) = (tmp_path / "pool").glob("session-*")
        decoder.read(text(30, rows=2))
        decoder.save(folder)
        decoder.reset()
        with pytest.raises(SnapshotError, match="must hold one row, got 2"):
            pool.sessions("a").__enter__()


def test_only_a_decoder_has_sessions(llama, tmp_path):
    with pytest.raises(InvalidArgumentError, match="must be a MemoryDecoder"):
        SessionPool(llama, tmp_path, budget=0)


PROGRAM = """
import sys, torch
from memlong import MemoryConfig, MemoryDecoder, SessionPool
from memlong.testing.models import tiny_model

decoder = MemoryDecoder(tiny_model("Llama"), None, MemoryConfig(**eval(sys.argv[2])))
with decoder, SessionPool(decoder, sys.argv[1], budget=0) as pool:
    while True:
        for name in ("a", "b"):
            with pool.sessions(name):
                decoder.read(torch.arange(7)[None] + 3 + sum(decoder.tokens_read) % 50)
        print(flush=True)
"""


@pytest.mark.slow
def test_a_kill_leaves_each_session_whole(tiny_model, small, tmp_path):
    settings = small().as_dict()
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "pool"), repr(settings)]
    seen = 0
    for rounds, delay in ((1, 0.0), (2, 0.013), (3, 0.029)):
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            for _ in range(rounds):
                assert process.stdout.readline()
            time.sleep(delay)
            process.kill()
        with (
            MemoryDecoder(tiny_model("Llama"), None, small()) as decoder,
            SessionPool(decoder, tmp_path / "pool", budget="1GB") as pool,
        ):
            for name in ("a", "b"):
                with pool.sessions(name):
                    (tokens,) = decoder.tokens_read
                    found = decoder.read(torch.arange(7)[None] + 3 + tokens % 50)
                assert tokens % 7 == 0
                assert tokens >= seen
                decoder.reset()
                for start in range(0, tokens + 7, 7):
                    expected = decoder.read(torch.arange(7)[None] + 3 + start % 50)
                decoder.reset()
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            seen += 7 * rounds
