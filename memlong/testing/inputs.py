"""The contract of arguments: which are accepted, which are rejected, and that none is modified."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from memlong.errors import DeviceUnavailableError, InvalidArgumentError
from memlong.testing.harness import (
    BLOCK,
    DIM,
    BankSuite,
    assert_same_state,
    random_chunks,
    random_vectors,
    state_of,
    whatever_the_options,
)

NOT_FINITE = [float("nan"), float("inf"), float("-inf")]
FORMS: dict[str, Callable[[torch.Tensor], Any]] = {
    "float16": torch.Tensor.half,
    "bfloat16": torch.Tensor.bfloat16,
    "float64": torch.Tensor.double,
    "numpy float16": lambda t: t.numpy().astype(np.float16),
    "numpy float32": torch.Tensor.numpy,
    "numpy float64": lambda t: t.numpy().astype(np.float64),
    "big-endian": lambda t: t.numpy().astype(">f4"),
    "column-major": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "every other": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
    "negative strides": lambda t: t.numpy()[::-1].copy()[::-1],
    "expanded": lambda t: t[:1].expand(len(t), *t.shape[1:]),
    "with gradient": lambda t: t.clone().requires_grad_(),
    "read-only": lambda t: _read_only(t.numpy()),
}


def _read_only(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    copy = array.copy()
    copy.flags.writeable = False
    return copy


def _plain(value: Any) -> torch.Tensor:
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))
    return value.detach().clone()  # type: ignore[no-any-return]


class InputTests(BankSuite):
    """Arguments that callers may pass."""

    @whatever_the_options
    @pytest.mark.parametrize("form", FORMS)
    def test_any_float_array_is_accepted_unmodified(self, form: str) -> None:
        """Any float dtype, strides and kind of array works, and no argument is modified."""
        chunks, bank, plain_bank = random_chunks(20), self.make(), self.make()
        vectors, keys, values = (
            FORMS[form](each) for each in (chunks.embeddings, chunks.keys, chunks.values)
        )
        plain = [_plain(each) for each in (vectors, keys, values)]
        bank.add(vectors, keys, values, chunks.spans)
        plain_bank.add(plain[0].float(), plain[1], plain[2], chunks.spans)
        queries = FORMS[form](random_vectors(4, seed=1))
        before = _plain(queries)
        got, expected = bank.retrieve(queries, 3), plain_bank.retrieve(before.float(), 3)
        torch.testing.assert_close(got.scores, expected.scores, rtol=1e-6, atol=1e-6)
        assert torch.equal(got.keys[:, 0], plain[1][got.ids[:, 0]])
        assert torch.equal(got.values[:, 0], plain[2][got.ids[:, 0]])
        for shape, was in zip([vectors, keys, values, queries], [*plain, before], strict=True):
            assert torch.equal(_plain(shape), was)

    @whatever_the_options
    @pytest.mark.parametrize("spans", [torch.Tensor.int, torch.Tensor.numpy, torch.Tensor.tolist])
    def test_spans_may_be_any_integers(self, spans: Callable[[torch.Tensor], Any]) -> None:
        """Tensors, arrays and pairs are all accepted."""
        bank, chunks = self.make(), random_chunks(3)
        bank.add(chunks.embeddings, chunks.keys, chunks.values, spans(chunks.spans))
        got = bank.retrieve(chunks.embeddings, 1)
        assert torch.equal(got.spans[:, 0], chunks.spans)

    @whatever_the_options
    def test_later_changes_by_the_caller_do_not_reach_the_bank(self) -> None:
        """The bank keeps copies."""
        bank, chunks = self.make(), random_chunks(6)
        own = [each.clone() for each in (chunks.embeddings, chunks.keys, chunks.values, chunks.spans)]
        bank.add(own[0], own[1], own[2], own[3])
        before = state_of(bank)
        for each in own:
            each.zero_()
        assert_same_state(before, bank)
        got = bank.retrieve(chunks.embeddings, 1)
        assert torch.equal(got.keys[:, 0], chunks.keys)
        assert torch.equal(got.values[:, 0], chunks.values)
        assert torch.equal(got.spans[:, 0], chunks.spans)

    @whatever_the_options
    @pytest.mark.parametrize("value", NOT_FINITE)
    @pytest.mark.parametrize("name", ["embeddings", "keys", "values"])
    def test_non_finite_values_are_rejected(self, name: str, value: float) -> None:
        """NaN or infinity in `add` is an error that names the argument; the bank is unchanged."""
        bad = random_chunks(3, seed=1)
        getattr(bad, name).view(3, -1)[1, 2] = value
        self._refused(bad.__dict__, rf"{name}.*finite")

    @whatever_the_options
    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            (
                "embeddings",
                torch.zeros(3, DIM + 1),
                rf"embeddings must have shape \[n, {DIM}\], got \[3, 33\]",
            ),
            ("embeddings", torch.zeros(DIM), "embeddings must have shape"),
            (
                "embeddings",
                torch.zeros(3, DIM, dtype=torch.int64),
                "embeddings must be .* float dtype, got .*int64",
            ),
            ("embeddings", [[0.0] * DIM] * 3, "embeddings must be a torch tensor or NumPy array"),
            ("embeddings", torch.zeros(2, DIM), r"keys must have shape \[2, layers"),
            ("keys", torch.zeros(3, 2, 2, 3), r"keys must have shape \[3, layers, .*got \[3, 2, 2, 3\]"),
            ("keys", torch.zeros(3, *BLOCK[:3], 5), "values must have the shape of keys"),
            (
                "values",
                torch.zeros(3, *BLOCK).half(),
                "values must have the dtype of keys, .* got torch.float16",
            ),
            ("values", torch.zeros(3, *BLOCK, dtype=torch.int32), "values must be .* float dtype"),
            ("spans", [[0, 1]], r"spans must have shape \[3, 2\].*got \[1, 2\]"),
            (
                "spans",
                [[0, 1], [5, 5], [6, 7]],
                r"spans\[1\] must be \[start, end\) with 0 <= start < end, got \[5, 5\]",
            ),
            ("spans", [[0, 1], [-3, 5], [6, 7]], r"spans\[1\] must be .* got \[-3, 5\]"),
            ("spans", torch.ones(3, 2), "spans must hold integers, got Tensor of torch.float32"),
        ],
    )
    def test_wrong_arguments_of_add_are_named(self, name: str, value: Any, message: str) -> None:
        """The error names the argument, what it must be and its value; the bank is unchanged."""
        self._refused({**random_chunks(3, seed=1).__dict__, name: value}, message)

    @whatever_the_options
    @pytest.mark.parametrize("other", [torch.zeros(1, 1, *BLOCK[1:]), torch.zeros(1, *BLOCK).half()])
    def test_chunks_of_another_shape_or_dtype_are_rejected(self, other: torch.Tensor) -> None:
        """The first `add` fixes the shape and dtype of chunks."""
        chunks = random_chunks(1, seed=1)
        self._refused({**chunks.__dict__, "keys": other, "values": other}, "of the bank's first add")

    @whatever_the_options
    @pytest.mark.parametrize("method", ["search", "retrieve", "exact_search"])
    @pytest.mark.parametrize(
        ("queries", "k", "message"),
        [
            (torch.zeros(2, DIM), 0, "k must be an integer of at least 1, got 0"),
            (torch.zeros(2, DIM), -4, "k must be an integer of at least 1, got -4"),
            (torch.zeros(2, DIM), 2.0, r"k must be an integer of at least 1, got 2\.0"),
            (torch.zeros(2, DIM), True, "k must be an integer of at least 1, got True"),
            (torch.zeros(2, DIM), None, "k must be an integer of at least 1, got None"),
            (torch.zeros(2, DIM - 1), 1, rf"queries must have shape \[n, {DIM}\], got \[2, 31\]"),
            (torch.zeros(DIM), 1, "queries must have shape"),
            (torch.full((2, DIM), torch.nan), 1, r"queries must be finite, got nan at \[0, 0\]"),
            (torch.zeros(2, DIM, dtype=torch.int32), 1, "queries must be .* float dtype"),
            ("what is it?", 1, "queries must be a torch tensor or NumPy array"),
        ],
    )
    def test_wrong_arguments_of_a_search_are_named(
        self, method: str, queries: Any, k: Any, message: str
    ) -> None:
        """The error names the argument, what it must be and its value; the bank is unchanged."""
        bank, _ = self.filled(5)
        before = state_of(bank)
        with pytest.raises(InvalidArgumentError, match=message):
            getattr(bank, method)(queries, k)
        assert_same_state(before, bank)

    @whatever_the_options
    @pytest.mark.parametrize("metric", ["inner_product", "l2"])
    def test_vectors_too_long_for_float32_are_rejected(self, metric: str) -> None:
        """Vectors whose products would overflow float32 are an error."""
        bank, chunks = self.make(metric=metric), random_chunks(1)
        with pytest.raises(InvalidArgumentError, match="whose products fit into float32"):
            bank.add(chunks.embeddings * 1e20, chunks.keys, chunks.values, chunks.spans)
        assert len(bank) == 0

    @whatever_the_options
    @pytest.mark.parametrize("scale", [1e-40, 1e-300, 1e30, 1e300])
    def test_length_does_not_matter_under_cosine(self, scale: float) -> None:
        """Under cosine, only the direction of a vector counts."""
        bank, chunks = self.make(metric="cosine"), random_chunks(4)
        bank.add(chunks.embeddings.double() * scale, chunks.keys, chunks.values, chunks.spans)
        found = bank.search(chunks.embeddings, 1)
        assert found.ids[:, 0].tolist() == [0, 1, 2, 3]
        assert found.scores[:, 0].tolist() == pytest.approx([1.0] * 4)

    @pytest.mark.parametrize("dim", [0, -3, 2.0, "8", 2**31, 2**70])
    def test_dim_must_be_a_positive_int(self, dim: Any) -> None:
        """A `dim` that is not a positive int, or above the limit of snapshots (2**20), is an error."""
        with pytest.raises(
            InvalidArgumentError, match=r"dim must be an integer (of at least 1|from 1 to 1048576)"
        ):
            self.bank_class(dim, **self.options)

    @whatever_the_options
    def test_unknown_metrics_are_rejected(self) -> None:
        """The error lists the available metrics."""
        with pytest.raises(InvalidArgumentError, match="cosine, inner_product, l2, got 'hamming'"):
            self.make(metric="hamming")

    def test_unusable_devices_are_rejected(self) -> None:
        """A bank never falls back to another device."""
        with pytest.raises(DeviceUnavailableError, match="xpu"):
            self.make(device="xpu")
        with pytest.raises(InvalidArgumentError, match="warp drive"):
            self.make(device="warp drive")

    def _refused(self, arguments: dict[str, Any], message: str) -> None:
        bank, _ = self.filled(5)
        before = state_of(bank)
        with pytest.raises(InvalidArgumentError, match=message):
            bank.add(**arguments)
        assert_same_state(before, bank)
        assert random_chunks(1, seed=2).into(bank).tolist() == [5]
