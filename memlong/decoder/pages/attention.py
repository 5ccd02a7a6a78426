"""Attention to the local window and to chosen pages of the retrieved tokens, in one softmax."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from memlong.decoder.model.head_names import has_plain_heads
from memlong.decoder.model.layout import ModelLayout
from memlong.decoder.pages.choice import PageBudget, Sketch, choose_pages
from memlong.decoder.pages.room import LayerRoom

COMPILED = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of a model that `attend_compiled` serves; of what is retrieved, it computes in float32."""

_FEW = 4  # queries for which matrix products do not pay
_PER_THREAD = 32  # queries that are worth a thread


def why_not_compiled(model_layout: ModelLayout, layers: tuple[int, ...], like: Tensor) -> str | None:
    """Say why `attend_compiled` does not serve these layers, for K-V like ``like``; None if it does."""
    if like.device.type != "cpu":
        return f"the model is on {like.device}, not on a CPU"
    if like.dtype not in COMPILED:
        return f"the model is {like.dtype}, not {' or '.join(map(str, COMPILED))}"
    shapes = [model_layout.layers[layer].shape for layer in layers]
    if not has_plain_heads(model_layout, layers) or any(each.head_dim != each.value_dim for each in shapes):
        return "this model's retrieval layers do not attend to K-V heads of their own, of one width"
    try:
        import numba  # noqa: F401 - it may be there and not work
    except ImportError as error:
        return f"numba is missing ({error}): install it with pip install 'memlong[numba]'"
    return None


def page_mask(
    query: Tensor, key: Tensor, sketch: Sketch, budget: PageBudget, scale: float | None, mask: Tensor
) -> Tensor:
    """Return a mask [rows, heads, queries, keys] that hides all pages that a query does not choose.

    With it, any attention computes what `attend_compiled` does.

    Parameters
    ----------
    query
        [rows, heads, queries, head_dim].
    key
        [rows, kv_heads, keys, head_dim]; the retrieved tokens come first.
    sketch
        Of the retrieved keys.
    budget
        How many of them a query attends to.
    scale
        Factor of the products; None is 1 / sqrt(head_dim).
    mask
        What hides keys anyway, and gates [rows, 1 or heads, queries, keys].
    """
    kv_heads, size = key.shape[1], budget.page_size
    memory, lowest = sketch.pages * size, torch.finfo(mask.dtype).min
    scale = query.shape[3] ** -0.5 if scale is None else scale
    hidden = mask[:, 0, :, :memory] <= lowest / 2
    visible = ~hidden.unflatten(2, (-1, size)).all(dim=3)
    chosen = choose_pages((query * scale).unflatten(1, (kv_heads, -1)), sketch, budget, visible)
    return hide_others(mask, chosen, sketch.pages, size, query.shape[1] // kv_heads)


def hide_others(mask: Tensor, chosen: Tensor, pages: int, size: int, group: int) -> Tensor:
    """Return a mask [rows, heads, queries, keys] that also hides all pages but the ``chosen``.

    Parameters
    ----------
    mask
        [rows, 1 or heads, queries, keys]; the retrieved tokens come first.
    chosen
        Pages [rows, kv_heads, queries, pages].
    pages, size
        How many pages there are, and tokens of each.
    group
        Query heads of a K-V head.
    """
    rows, kv_heads, queries, _ = chosen.shape
    seen = torch.zeros(rows, kv_heads, queries, pages, dtype=torch.bool, device=chosen.device)
    seen = seen.scatter_(3, chosen, value=True).repeat_interleave(size, dim=3)
    seen = functional.pad(seen, (0, mask.shape[3] - pages * size), value=True)
    seen = seen.repeat_interleave(group, dim=1)
    return mask.expand(rows, group * kv_heads, -1, -1).masked_fill(~seen, torch.finfo(mask.dtype).min)


@torch.no_grad()
def attend_compiled(
    query: Tensor,
    window: tuple[Tensor, Tensor],
    memory: LayerRoom,
    heads: Sequence[int],
    budget: PageBudget,
    scale: float | None,
    mask: Tensor | None,
    gates: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Attend to window and chosen pages by kernels of their own, whose softmaxes are then joined.

    For queries that may all choose any page.

    Parameters
    ----------
    query
        [rows, heads, queries, head_dim].
    window
        Keys and values [rows, kv_heads, columns, width].
    memory
        What the room holds for the layer.
    heads
        The K-V heads that attend to memory; empty for all of them.
    budget
        How many of the tokens a query attends to.
    scale
        Factor of the products; None is 1 / sqrt(head_dim).
    mask
        Of the window [rows, 1, queries, columns]; None where all of it is visible.
    gates
        What is added to logits of memory [heads]; None for nothing.

    Returns
    -------
    tuple
        Output [rows, queries, heads, head_dim], as of attention functions of transformers, and the pages that each
        query chose [rows, memory heads, queries, pages]; None for all.
    """
    kv_heads = window[0].shape[1]
    scale = query.shape[3] ** -0.5 if scale is None else scale
    local, of_window = _flash(query, *window, attn_mask=mask, scale=scale)
    dtype, query, local = query.dtype, query.float(), local.float()
    if query.shape[2] <= _FEW and not budget.covers(memory.tokens):
        of_few = _joined_for_few(query, local, of_window, kv_heads, memory, heads, budget, scale, gates)
        return of_few[0].to(dtype), of_few[1]
    # From here on, [rows, kv_heads, group, queries, ...].
    query, local, of_window = (each.unflatten(1, (kv_heads, -1)) for each in (query, local, of_window))
    asked, near, its_logsumexp = query, local, of_window
    where = torch.tensor(heads, device="cpu")
    if heads:
        asked, near, its_logsumexp = (each.index_select(1, where) for each in (asked, local, of_window))
    chosen: Tensor | None = None
    if budget.covers(memory.tokens):
        far, of_memory = (
            each.unflatten(1, (len(heads) or kv_heads, -1))
            for each in _flash(asked.flatten(1, 2), memory.keys, memory.values, scale=scale)
        )
    else:
        asked = asked * scale
        chosen = choose_pages(asked, memory.sketch(), budget)
        far, of_memory = _attend_to(chosen, asked, memory.keys, memory.values, budget.page_size)
    if gates is not None:
        bias = gates.unflatten(0, (kv_heads, -1))
        of_memory = of_memory + (bias[where] if heads else bias)[None, :, :, None]
    joined = torch.lerp(near, far, torch.sigmoid(of_memory - its_logsumexp)[..., None])
    output = local.index_copy_(1, where, joined) if heads else joined
    return output.flatten(1, 2).transpose(1, 2).to(dtype).contiguous(), chosen


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001 - the one that returns logsumexp


def _joined_for_few(
    query: Tensor,
    local: Tensor,
    of_window: Tensor,
    kv_heads: int,
    memory: LayerRoom,
    heads: Sequence[int],
    budget: PageBudget,
    scale: float,
    gates: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return what `attend_compiled` does, for few queries and by one kernel."""
    from memlong.decoder.pages.kernel import joiner_of

    held = memory.group
    kept, page_size, pages = held.sketch.shape[4:]
    rows, query_heads, queries, width = query.shape
    join = joiner_of(width, query_heads // kv_heads, kept, page_size, pages)
    output = local.transpose(1, 2).contiguous()
    where = np.array(heads or range(kv_heads))
    chosen = np.empty((rows, len(where), queries, min(budget.pages, memory.slots * pages)), np.int64)
    join(
        query.contiguous().numpy(),
        scale,
        np.zeros(query_heads, np.float32) if gates is None else gates.detach().float().numpy(),
        where,
        memory.slots,
        held.arrays,
        memory.place,
        chosen,
        output.numpy(),
        of_window.contiguous().numpy(),
    )
    return output, torch.from_numpy(chosen)


def _attend_to(chosen: Tensor, query: Tensor, key: Tensor, value: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return output [rows, kv_heads, group, queries, width] of each query's own pages, and logsumexp without width."""
    from memlong.decoder.pages.kernel import kernel_of

    query = query.transpose(2, 3).contiguous()  # [rows, kv_heads, queries, group, head_dim]
    rows, kv_heads, queries, group, width = query.shape
    output = torch.empty_like(query)
    logsumexp = query.new_empty(rows, kv_heads, queries, group)
    kernel = kernel_of(width, group, size)
    parts = min(torch.get_num_threads(), max(1, queries // _PER_THREAD))

    def attend(row: int, head: int, part: int) -> None:
        some = slice(part * queries // parts, (part + 1) * queries // parts)
        theirs = (each[row, head, some].numpy() for each in (query, chosen, output, logsumexp))
        asked, pages, *result = theirs
        kernel(asked, key[row, head].numpy(), value[row, head].numpy(), pages, *result)

    tasks = product(range(rows), range(kv_heads), range(parts))
    if parts == 1:
        for task in tasks:
            attend(*task)
    else:
        with ThreadPoolExecutor(parts) as pool:
            list(pool.map(lambda task: attend(*task), tasks))
    return output.transpose(2, 3), logsumexp.transpose(2, 3)
