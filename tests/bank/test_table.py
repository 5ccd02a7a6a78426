"""The table against plain lists."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from memlong.bank.index.table import ChunkTable

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(0, 90)),
        st.tuples(st.just("oldest"), st.integers(0, 90)),
        st.tuples(st.just("some"), st.integers(1, 9)),
        st.tuples(st.just("undo"), st.integers(0, 5)),
        st.tuples(st.just("clear"), st.just(0)),
    ),
    max_size=30,
)


@settings(max_examples=80, deadline=None)
@given(steps=STEPS, seed=st.integers(0, 99))
def test_any_history_leaves_the_rows_it_should(steps, seed):
    rng = np.random.default_rng(seed)
    table, ids, next_id = ChunkTable(2), [], 0
    for step, number in steps:
        if step == "append":
            new = np.arange(next_id, next_id + number)
            vectors = np.stack([new, -new], axis=1).astype(np.float32)
            table.append(new, vectors, np.stack([new, new + 1], axis=1))
            ids, next_id = ids + new.tolist(), next_id + number
        elif step == "oldest":
            table.remove(np.arange(min(number, len(ids))))
            ids = ids[number:]
        elif step == "some":
            rows = np.flatnonzero(rng.random(len(ids)) < number / 10)
            table.remove(rows)
            ids = np.delete(ids, rows).tolist()
        elif step == "undo":
            rows, new = table.rows, np.arange(next_id, next_id + number)
            table.append(new, np.ones((number, 2), np.float32), np.ones((number, 2), np.int64))
            table.remove(np.flatnonzero(rng.random(len(table)) < 0.5))
            table.restore(rows)
        else:
            table.clear()
            ids = []
        assert table.ids.tolist() == ids
        assert table.embeddings.tolist() == [[i, -i] for i in ids]
        assert table.squared_norms.tolist() == [2.0 * i * i for i in ids]
        assert table.spans.tolist() == [[i, i + 1] for i in ids]
        assert table.rows_of(np.array([*ids, 10**6, -1])).tolist() == [*range(len(ids)), -1, -1]
        assert table.embeddings.flags.c_contiguous


def test_evicting_the_oldest_does_not_let_the_arrays_grow():
    table = ChunkTable(1)
    for first in range(0, 10_000, 10):
        new = np.arange(first, first + 10)
        table.append(new, np.zeros((10, 1), np.float32), np.zeros((10, 2), np.int64))
        table.remove(np.arange(max(len(table) - 100, 0)))
    assert len(table) == 100
    assert table.rows.capacity <= 512
