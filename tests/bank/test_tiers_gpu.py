"""TieredStore between a CUDA device, page-locked memory and the disk: the right bytes, and no wait for the device."""

from __future__ import annotations

import random
import warnings

import pytest
import torch

from memlong.bank import TieredStore

pytestmark = pytest.mark.gpu

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device", allow_module_level=True)

SHAPE = (4, 2, 64, 64)
BLOCK = 2 * 4 * 2 * 64 * 64 * 2


@pytest.fixture(params=["host", "device-host", "disk", "host-disk", "all"])
def store(request, tmp_path):
    return TieredStore(
        **{
            "host": {"host": "all"},
            "device-host": {"device": 3 * BLOCK, "host": "all"},
            "disk": {"disk": tmp_path},
            "host-disk": {"host": 5 * BLOCK, "disk": tmp_path},
            "all": {"device": 2 * BLOCK, "host": 4 * BLOCK, "disk": tmp_path},
        }[request.param]
    )


@pytest.fixture
def no_waits():
    """Have torch raise where the host would wait for the device, once this is called."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that this mode is a prototype
        yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def block(number):
    return torch.full((1, *SHAPE), float(number), dtype=torch.bfloat16, device="cuda")


def test_blocks_come_back_on_any_stream_while_others_leave(store):
    choice, held = random.Random(0), []  # noqa: S311 - nothing secret
    streams = [torch.cuda.Stream() for _ in range(3)]
    seen = []
    for number in range(150):
        with torch.cuda.stream(choice.choice(streams)):
            states = block(number)
            store.put([number], states, -states)
        held.append(number)
        if len(held) > 12:
            leaving = choice.sample(held, 2)
            store.remove(leaving)
            held = [each for each in held if each not in leaving]
        wanted = choice.sample(held, min(4, len(held)))
        stream = choice.choice(streams)
        for other in streams:
            stream.wait_stream(other)  # for the device's own tier, whose order is the caller's
        with torch.cuda.stream(stream):
            keys, values = store.get(wanted)
            seen.append((wanted, (keys + values).abs().amax(), keys[:, 0, 0, 0, 0].clone()))
    torch.cuda.synchronize()
    for wanted, difference, numbers in seen:
        assert float(difference) == 0
        assert numbers.tolist() == wanted  # whole numbers up to 256 are themselves in bfloat16


def test_a_host_tier_stores_and_fetches_without_a_wait(no_waits):
    store = TieredStore(host="all")
    states = torch.cat([block(number) for number in range(6)])
    no_waits()
    store.put(range(6), states, -states)
    keys, _ = store.get([4, 0, 5])
    store.remove([1, 2])
    store.put([6], states[:1], states[:1])
    torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(keys.cpu(), states.cpu()[[4, 0, 5]])


def test_the_disk_is_read_without_a_wait(no_waits, tmp_path):
    store = TieredStore(host=2 * BLOCK, disk=tmp_path)
    states = torch.cat([block(number) for number in range(6)])
    store.put(range(6), states, -states)
    torch.cuda.synchronize()
    no_waits()
    keys, values = store.get([0, 1, 3])
    torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(keys.cpu(), states.cpu()[[0, 1, 3]])
    assert torch.equal(values.cpu(), -keys.cpu())


def test_what_is_peeked_at_is_what_was_stored(store):
    states = torch.cat([block(number) for number in range(6)])
    store.put(range(6), states, -states)
    for number, (keys, values) in enumerate(store.peek(range(6))):
        assert torch.equal(keys.cpu(), states[number].cpu())
        assert torch.equal(values.cpu(), -keys.cpu())
