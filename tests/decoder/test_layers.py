"""A decoder reads over bases as it reads over one bank with all their chunks."""

from __future__ import annotations

import pytest
import torch

from memlong import LayeredBank, MemoryDecoder, SnapshotError, create_bank, load_bank
from memlong.errors import InvalidArgumentError

TOP = 1 << 52


def read_on(decoder, ids):
    with decoder:
        found = [(segment.logits, segment.retrievals[0]) for segment in decoder.stream(ids)]
    retrieved = [[] if each is None else each.ids.tolist() for _, each in found]
    return torch.cat([logits for logits, _ in found], dim=1), retrieved


@pytest.fixture
def books(llama, small, text, tmp_path):
    """Two folders, each with the memory of a text, and the banks in them."""
    folders = []
    for number in range(2):
        decoder = MemoryDecoder(llama, None, small())
        read_on(decoder, text(70, seed=5 + number))
        decoder.flush()
        decoder.banks[0].save(tmp_path / f"book {number}")
        folders.append(tmp_path / f"book {number}")
    return folders


def merged(banks, bank):
    for each in banks:
        found = each.fetch(each.ids)
        bank.add(each.embeddings.embeddings, found.keys, found.values, found.spans)
        bank.origin = each.origin
    return bank


@pytest.mark.parametrize("position_mode", ["before-window", "compressed", "zero"])
def test_logits_and_ids_are_those_of_one_bank(llama, small, text, books, backend, position_mode):
    config = small(backend=backend, position_mode=position_mode)
    bases = [load_bank(folder, lazy=True) for folder in books]
    over, whole = MemoryDecoder(llama, None, config), MemoryDecoder(llama, None, config)
    one = create_bank("torch", bases[0].dim)
    whole.reset(banks=[merged(bases, one)])
    over.reset(bases=bases)
    (logits, ids), (expected, theirs) = read_on(over, text(60, seed=9)), read_on(whole, text(60, seed=9))
    sizes = [len(base) for base in bases]
    named = [*range(sizes[0]), *range(1 << 40, (1 << 40) + sizes[1]), *range(TOP, TOP + 99)]
    if backend == "torch":  # the others may find others
        assert ids == [[named[each] for each in row] for row in theirs]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert isinstance(over.banks[0], LayeredBank)
    assert len(over.banks[0].top) == len(one) - sum(sizes) > 0
    answers = []
    for each in (over, whole):
        with each:
            answers.append(each.generate(text(7, seed=3), max_new_tokens=9, do_sample=False, remember=False))
    if backend == "torch":
        assert torch.equal(*answers)
    assert [len(base) for base in bases] == sizes


def test_rows_have_their_own_top_over_common_bases(llama, small, text, books):
    decoder = MemoryDecoder(llama, None, small())
    base = load_bank(books[0], lazy=True)
    decoder.reset(bases=[base])
    both = text(60, rows=2, seed=9)
    together, _ = read_on(decoder, both)
    assert [bank.bases for bank in decoder.banks] == [(base,)] * 2
    assert decoder.banks[0].top is not decoder.banks[1].top
    for row in range(2):
        alone = MemoryDecoder(llama, None, small())
        alone.reset(bases=[base])
        torch.testing.assert_close(
            read_on(alone, both[row : row + 1])[0], together[row : row + 1], atol=1e-5, rtol=0
        )


def test_a_session_over_bases_goes_on_from_its_folder(llama, small, text, books, tmp_path):
    decoder = MemoryDecoder(llama, None, small())
    decoder.reset(bases=[load_bank(folder) for folder in books])
    read_on(decoder, text(61, seed=9))
    decoder.save(tmp_path / "session")
    with pytest.raises(SnapshotError, match="was saved over 2 bases, got 0"):
        MemoryDecoder.load(tmp_path / "session", llama, None, small())
    again = [load_bank(folder, lazy=True) for folder in books]
    other = MemoryDecoder.load(tmp_path / "session", llama, None, small(), bases=again)
    more = text(50, seed=10)
    expected, actual = read_on(decoder, more), read_on(other, more)
    assert torch.equal(expected[0], actual[0])
    assert expected[1] == actual[1]
    other.save(tmp_path / "session")  # only what is new
    alone = MemoryDecoder.load(tmp_path / "session", llama, None, small(), any_bases=True)
    assert not alone.banks[0].bases


def retrieved(decoder):
    """The stream's retrieved chunks of bases."""
    (stream,) = decoder._streams.batch.streams
    ids = [] if stream.memory is None else stream.memory.ids
    assert list(ids) == sorted(stream.retrieval.ids.tolist())
    return [each for each in ids if each < TOP]


@pytest.mark.parametrize("change", ["grown", "shrunk", "replaced"])
def test_a_session_goes_on_over_a_base_that_has_changed(llama, small, text, books, tmp_path, change):
    decoder, base = MemoryDecoder(llama, None, small(top_k=6)), load_bank(books[0])
    decoder.reset(bases=[base])
    read_on(decoder, text(61, seed=9))
    decoder.save(tmp_path / "session")
    had = retrieved(decoder)
    assert len(had) > 1
    gone = had[:1]
    if change != "grown":
        base.remove(gone if change == "shrunk" else had)
    if change != "shrunk":
        other = load_bank(books[1])
        found = other.fetch(other.ids)
        base.add(other.embeddings.embeddings, found.keys, found.values, found.spans)
    base.save(books[0])
    base = load_bank(books[0], lazy=True)
    loaded = MemoryDecoder.load(tmp_path / "session", llama, None, small(top_k=6), bases=[base])
    assert retrieved(loaded) == {"grown": had, "shrunk": had[1:], "replaced": []}[change]
    if change == "grown":  # as a conversation that went on while the base grew
        decoder.use_banks([LayeredBank(decoder.banks[0].top, [base])])
        expected, actual = (read_on(each, text(50, seed=10)) for each in (decoder, loaded))
        assert torch.equal(expected[0], actual[0])
        assert expected[1] == actual[1]
    else:
        again = MemoryDecoder.load(
            tmp_path / "session", llama, None, small(top_k=6), bases=[base], any_bases=True
        )
        (logits, ids), (others, theirs) = (read_on(each, text(50, seed=10)) for each in (loaded, again))
        assert torch.equal(logits, others)
        assert ids == theirs
        assert not {each for row in ids for each in row} & set(gone)


def test_what_was_retrieved_of_other_bases_is_not_taken_for_chunks_of_these(
    llama, small, text, books, tmp_path
):
    decoder = MemoryDecoder(llama, None, small(top_k=6))
    decoder.reset(bases=[load_bank(books[0])])
    read_on(decoder, text(61, seed=9))
    decoder.save(tmp_path / "session")
    assert retrieved(decoder)
    for bases in ([load_bank(books[1])], []):
        with pytest.raises(SnapshotError, match="was saved over"):
            decoder.restore(tmp_path / "session", bases=bases)
        decoder.restore(tmp_path / "session", bases=bases, any_bases=True)
        assert not retrieved(decoder)
        read_on(decoder, text(20, seed=3))


def test_bases_of_another_model_are_refused(tiny_model, llama, small, text, books):
    decoder = MemoryDecoder(tiny_model(seed=7), None, small())
    base = load_bank(books[0])
    with pytest.raises(InvalidArgumentError, match="another model filled"):
        decoder.reset(bases=[base])
    decoder.reset(bases=[base], any_model=True)
    ours = MemoryDecoder(llama, None, small())
    with pytest.raises(InvalidArgumentError, match="banks and bases are both given"):
        ours.reset(banks=[base], bases=[base])
    with pytest.raises(InvalidArgumentError, match="hold one bank twice"):
        ours.reset(bases=[base, base])


def test_the_top_knows_which_model_filled_it(llama, small, text, books):
    decoder = MemoryDecoder(llama, None, small())
    decoder.reset(bases=[load_bank(books[0])])
    read_on(decoder, text(60, seed=9))
    assert decoder.banks[0].top.origin == decoder.banks[0].bases[0].origin is not None


def test_rows_never_share_what_is_written_to(llama, small, books):
    decoder = MemoryDecoder(llama, None, small())
    base, other = (load_bank(folder) for folder in books)
    top = create_bank("torch", base.dim)
    for banks in (
        [LayeredBank(top, [base]), LayeredBank(top, [base])],
        [top, LayeredBank(create_bank("torch", base.dim), [top])],
    ):
        with pytest.raises(InvalidArgumentError, match="rows never share a bank that is written to"):
            decoder.reset(banks=banks)
    with pytest.raises(InvalidArgumentError, match="bases must be a sequence"):
        decoder.reset(bases=base)
    in_place = MemoryDecoder(llama, None, small(position_mode="original"))
    with pytest.raises(InvalidArgumentError, match="must not be 'original' over bases"):
        in_place.reset(bases=[other])
