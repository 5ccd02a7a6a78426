"""Oracle 6: streams that were saved go on, in a fresh process, as if nothing had happened."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from memlong import MemoryConfig, MemoryDecoder, SnapshotError, create_bank, load_bank
from memlong.decoder.kv.sources import LayerSource
from memlong.decoder.model import weights
from memlong.errors import InvalidArgumentError, MemlongError


def read_on(decoder, ids, mask=None):
    """Logits of what follows, and what each row retrieved."""
    logits, found = [], []
    with decoder:
        for segment in decoder.stream(ids, mask):
            logits.append(segment.logits)
            found.append([None if each is None else each.ids.tolist() for each in segment.retrievals])
    return torch.cat(logits, dim=1), found


@pytest.fixture
def ragged(text):
    """101 and 90 tokens, which end within a segment and within a chunk, and 60 that follow."""
    ids, mask = text(101, rows=2), torch.ones(2, 101, dtype=torch.long)
    mask[1, :11] = 0
    return ids, mask, text(60, rows=2, seed=1)


@pytest.mark.parametrize("lazy", [False, True])
def test_streams_go_on_as_if_nothing_had_happened(tiny_model, architecture, small, ragged, tmp_path, lazy):
    model, (ids, mask, more) = tiny_model(architecture), ragged
    sight = {} if architecture != "Mistral-sliding" else {"local_window": 20}
    decoder = MemoryDecoder(model, None, small(**sight))
    read_on(decoder, ids, mask)
    decoder.save(tmp_path / "streams")
    other = MemoryDecoder.load(tmp_path / "streams", model, None, small(**sight), lazy=lazy)
    assert other.tokens_read == decoder.tokens_read == (101, 90)
    expected, actual = read_on(decoder, more), read_on(other, more)
    assert torch.equal(expected[0], actual[0])
    assert expected[1] == actual[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"backend": None},
        {"position_mode": "overlaid"},
        {"position_mode": "before-window"},
        {"kv_source": "shared"},
        {"gate_init": -1.0},
        {"store": {"host": "all"}},
    ],
)
def test_every_mode_goes_on(llama, small, ragged, tmp_path, changes):
    ids, mask, more = ragged
    decoder = MemoryDecoder(llama, None, small(**changes))
    read_on(decoder, ids, mask)
    decoder.save(tmp_path)
    expected = read_on(decoder, more)
    actual = read_on(MemoryDecoder.load(tmp_path, llama, None, small(**changes)), more)
    assert torch.equal(expected[0], actual[0])
    assert expected[1] == actual[1]


def test_an_answer_is_the_same(llama, small, text, tmp_path):
    decoder = MemoryDecoder(llama, None, small())
    read_on(decoder, text(90))
    decoder.save(tmp_path)
    other = MemoryDecoder.load(tmp_path, llama, None, small())
    answers = []
    for each in (decoder, other):
        with each:
            answers.append(each.generate(text(10, seed=4), max_new_tokens=20, do_sample=False))
    assert torch.equal(*answers)


GO_ON = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
from memlong import MemoryConfig, MemoryDecoder
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32").eval()
more = torch.tensor(json.loads(sys.argv[3]))
for folder in sys.argv[4:]:
    for config in json.loads(sys.argv[2]):
        with MemoryDecoder.load(folder, model, None, MemoryConfig(**config), trust_index=True) as decoder:
            segments = list(decoder.stream(more))
        ids = [each.ids.tolist() for segment in segments for each in segment.retrievals if each]
        print(json.dumps([ids, torch.cat([segment.logits for segment in segments], dim=1)[0, :, :5].tolist()]))
"""


@pytest.mark.slow
def test_a_fresh_process_goes_on_from_any_backend_in_any_other(llama, small, text, tmp_path):
    llama.save_pretrained(tmp_path / "model")
    more, expected, folders = text(40, seed=1), [], []
    configs = [small(backend=name) for name in ("torch", "faiss", "hnswlib")]
    for config in configs:
        decoder = MemoryDecoder(llama, None, config)
        read_on(decoder, text(150))
        folders.append(tmp_path / config.backend)
        decoder.save(folders[-1])
        logits, found = read_on(decoder, more)
        ids = [each for segment in found for each in segment if each]
        expected += [[ids, logits[0, :, :5].tolist()]] * len(configs)
    command = [sys.executable, "-c", GO_ON, tmp_path / "model", json.dumps([*map(asdict, configs)])]
    command += [json.dumps(more.tolist()), *folders]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [json.loads(line) for line in said.splitlines()] == expected


def test_saving_again_writes_what_is_new(llama, small, text, tmp_path):
    decoder = MemoryDecoder(llama, None, small())
    read_on(decoder, text(400))
    decoder.save(tmp_path)
    before = {path.name: path.stat().st_size for path in tmp_path.glob("blocks-*")}
    read_on(decoder, text(8, seed=3))
    decoder.save(tmp_path)
    after = {path.name: path.stat().st_size for path in tmp_path.glob("blocks-*")}
    assert before.items() <= after.items()
    assert sum(after.values()) - sum(before.values()) < 3 * decoder.layout.nbytes
    assert len(list(tmp_path.glob("streams-*"))) == 1


def test_a_bank_of_a_row_can_be_had_by_itself(llama, small, ragged, tmp_path):
    ids, mask, _ = ragged
    decoder = MemoryDecoder(llama, None, small())
    read_on(decoder, ids, mask)
    decoder.save(tmp_path)
    assert len(load_bank(tmp_path, row=1)) == len(decoder.banks[1])
    with pytest.raises(InvalidArgumentError, match="holds 2 banks: say which with row"):
        load_bank(tmp_path)
    with pytest.raises(InvalidArgumentError, match="row is 2"):
        load_bank(tmp_path, row=2)


@pytest.fixture
def saved(llama, small, text, tmp_path):
    decoder = MemoryDecoder(llama, None, small())
    read_on(decoder, text(90))
    decoder.save(tmp_path / "streams")
    return tmp_path / "streams"


def refusal(saved, model, config):
    with pytest.raises(SnapshotError, match="was saved with another model or other settings") as caught:
        MemoryDecoder.load(saved, model, None, config)
    assert str(saved) in str(caught.value)
    return str(caught.value).partition("what differs: ")[2].partition(". Use")[0]


def test_other_weights_are_refused(tiny_model, small, saved):
    assert refusal(saved, tiny_model("Llama", seed=1), small()) == "weights"


def test_one_tensor_that_was_trained_is_refused(llama, small, saved):
    with torch.no_grad():
        llama.model.layers[2].self_attn.v_proj.weight += 1e-3
    assert refusal(saved, llama, small()) == "weights"


def test_a_few_numbers_that_were_trained_are_refused(llama, small, saved):
    MemoryDecoder(llama, None, small()).fingerprint()
    with torch.no_grad():
        llama.model.embed_tokens.weight[5, :2] += 1e-3
    assert refusal(saved, llama, small()) == "weights"


def test_weights_that_stay_are_read_once(llama, small, monkeypatch):
    decoder = MemoryDecoder(llama, None, small())
    before = decoder.fingerprint()
    read = weights.digest_of
    monkeypatch.setattr(
        weights, "digest_of", lambda tensors, most=None: read(tensors, most) if most else "read again"
    )
    assert decoder.fingerprint() == before
    llama.model.embed_tokens.weight.data[0] += 1  # which torch does not count
    assert decoder.fingerprint()["weights"] == "read again"


def test_another_rotation_is_refused(llama, small, saved):
    llama.config.rope_parameters["rope_theta"] = 5e5
    assert refusal(saved, llama, small()) == (
        "rope_parameters.rope_theta (10000.0 when it was saved, 500000.0 now)"
    )


def test_another_dtype_is_refused(llama, small, saved):
    said = refusal(saved, llama.to(torch.bfloat16), small())
    assert said == "dtype ('float32' when it was saved, 'bfloat16' now)"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"retrieval_layers": "1-2"},
            "memory_layers ([0, 1, 2, 3] when it was saved, [1, 2] now), retrieval",
        ),
        ({"kv_source": "shared"}, "kv_source ('layer' when it was saved, 'shared' now)"),
        ({"chunk_size": 8}, "chunk_size (4 when it was saved, 8 now)"),
        ({"sink_tokens": 0}, "sink_tokens (2 when it was saved, 0 now)"),
        ({"retriever": "random"}, "retriever"),
        ({"gate_init": 0.0}, "gates"),
        ({"retriever_options": {"pairs": 0.25}}, '{"pairs": 0.25}'),
    ],
)
def test_other_settings_are_refused(llama, small, saved, changes, said):
    assert said in refusal(saved, llama, small(**changes))


def test_what_does_not_matter_may_be_another(llama, small, saved, tmp_path):
    changes = {"backend": "hnswlib", "top_k": 5, "backend_options": {"M": 8, "max_chunks": 5}}
    decoder = MemoryDecoder.load(saved, llama, None, small(**changes))
    assert len(decoder.banks[0]) == 5


def test_another_model_can_be_forced(tiny_model, small, saved, text):
    decoder = MemoryDecoder.load(saved, tiny_model("Llama", seed=1), None, small(), any_model=True)
    read_on(decoder, text(9))
    assert decoder.tokens_read == (99,)


def test_a_model_of_other_shapes_cannot(tiny_model, small, saved):
    with pytest.raises(SnapshotError, match=r"banks that this decoder cannot use: .*of shape") as caught:
        MemoryDecoder.load(saved, tiny_model("GPT-NeoX"), None, small(), any_model=True)
    assert "damaged" not in str(caught.value)


def test_streams_of_other_sizes_cannot(llama, small, saved):
    with pytest.raises(SnapshotError, match=r"token 90.*any_model=True does not change that"):
        MemoryDecoder.load(saved, llama, None, small(sink_tokens=0), any_model=True)


def test_a_refusal_leaves_the_decoder_as_it_was(tiny_model, small, saved, text):
    decoder = MemoryDecoder(tiny_model("Llama", seed=1), None, small())
    read_on(decoder, text(50))
    with pytest.raises(SnapshotError):
        decoder.restore(saved)
    assert decoder.tokens_read == (50,)


def test_nothing_read_is_nothing_to_save(llama, small, tmp_path):
    with pytest.raises(MemlongError, match="nothing to save"):
        MemoryDecoder(llama, None, small()).save(tmp_path)


def test_a_bank_alone_is_no_stream(llama, small, tmp_path):
    create_bank("torch", 8).save(tmp_path)
    with pytest.raises(SnapshotError, match=r"holds a bank.*load_bank"):
        MemoryDecoder.load(tmp_path, llama, None, small())


def test_a_bank_is_not_saved_over_streams(saved):
    with pytest.raises(SnapshotError, match="holds the snapshot of a decoder, and this is one of a bank"):
        create_bank("torch", 8).save(saved)


def test_the_fingerprint_names_what_it_is_made_of(llama, small):
    decoder = MemoryDecoder(llama, None, small())
    found = decoder.fingerprint()
    assert isinstance(decoder.source, LayerSource)
    assert found["memory_layers"] == [0, 1, 2, 3]
    assert json.loads(json.dumps(found)) == found
    assert found == MemoryDecoder(llama, None, MemoryConfig(**asdict(small(top_k=9)))).fingerprint()


def test_tokens_that_are_not_the_models_are_refused(llama, small, text, tmp_path):
    decoder = MemoryDecoder(llama, None, small())
    read_on(decoder, text(90))
    row = decoder._streams.batch.streams[0]
    row._recent = replace(row._recent, token_ids=(*row._recent.token_ids[:-1], 9999))
    decoder.save(tmp_path)
    with pytest.raises(SnapshotError, match="tokens of row 0 are not the model's"):
        MemoryDecoder.load(tmp_path, llama, None, small())


def test_a_longer_query_begins_where_the_text_at_hand_does(llama, small, text, tmp_path):
    decoder = MemoryDecoder(llama, None, small(query_tokens=2))
    read_on(decoder, text(200))
    decoder.save(tmp_path)
    other = MemoryDecoder.load(tmp_path, llama, None, small(query_tokens=150))
    query = other._streams.batch.streams[0].query()
    assert query.end == 200
    assert list(query.token_ids) == text(200)[0, query.start :].tolist()


@pytest.mark.parametrize(
    ("fact", "value", "message"),
    [
        ("departed", True, "departed must be int, got True"),
        ("departed", 1.0, r"departed must be int, got 1\.0"),
        ("departed", 3, "cannot be at token 90"),
        ("recent_start", 10**6, "cannot be at token"),
        ("storing_from", "0", "storing_from must be int or NoneType, got '0'"),
        ("has_memory", 1, "has_memory must be bool, got 1"),
        ("query_start", True, "query_start must be int, got True"),
        ("query_start", 0, "query"),
    ],
)
def test_facts_that_cannot_be_are_refused(llama, small, text, tmp_path, monkeypatch, fact, value, message):
    decoder = MemoryDecoder(llama, None, small())
    read_on(decoder, text(90))
    row = decoder._streams.batch.streams[0]
    facts = row.facts() | {fact: value}
    monkeypatch.setattr(row, "facts", lambda: facts)
    decoder.save(tmp_path)
    with pytest.raises(SnapshotError, match=f"holds no streams of this decoder.*{message}"):
        MemoryDecoder.load(tmp_path, llama, None, small())


@pytest.mark.parametrize(
    ("start", "query", "message"),
    [
        (-1, [1, 2], "a query of 2 tokens cannot be of token -1"),
        (91, [1, 2], "a query of 2 tokens cannot be of token 91"),
        (90, [], "a query of 0 tokens cannot be of token 90"),
        (90, [97], "tokens of row 0 are not the model's"),
        (90, [1.0], r"query must be torch\.int64"),
        (None, [1, 2], "there is a query, but not where it was given"),
    ],
)
def test_a_query_that_cannot_be_is_refused(llama, small, text, tmp_path, monkeypatch, start, query, message):
    decoder = MemoryDecoder(llama, None, small())
    read_on(decoder, text(90))
    row = decoder._streams.batch.streams[0]
    facts, held = (
        row.facts() | {"query_start": start},
        row.tensors() | {"query": torch.tensor(query, dtype=None if query else torch.int64)},
    )
    monkeypatch.setattr(row, "facts", lambda: facts)
    monkeypatch.setattr(row, "tensors", lambda: held)
    decoder.save(tmp_path)
    with pytest.raises(SnapshotError, match=f"holds no streams of this decoder.*{message}"):
        MemoryDecoder.load(tmp_path, llama, None, small())


def test_a_window_whose_tokens_do_not_ascend_is_refused(llama, small, text, tmp_path):
    decoder = MemoryDecoder(llama, None, small())
    read_on(decoder, text(90))
    tokens = decoder._streams.batch.window.tokens
    tokens[0, 3:5] = tokens[0, 4:2:-1]
    decoder.save(tmp_path)
    with pytest.raises(SnapshotError, match="window does not hold, in order, what precedes token 90"):
        MemoryDecoder.load(tmp_path, llama, None, small())


def test_lazy_and_a_store_do_not_go_together(llama, small, saved):
    with pytest.raises(InvalidArgumentError, match="lazy leaves keys and values in the snapshot"):
        MemoryDecoder.load(saved, llama, None, small(store={"host": "all"}), lazy=True)


def test_most_bytes_limit_the_whole(llama, small, saved):
    with pytest.raises(SnapshotError, match="more than most_bytes, 1,000"):
        MemoryDecoder.load(saved, llama, None, small(), most_bytes=1000)


def test_streams_that_were_cut_are_named(llama, small, saved):
    (file,) = Path(saved).glob("streams-*")
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(SnapshotError, match=file.name):
        MemoryDecoder.load(saved, llama, None, small())
