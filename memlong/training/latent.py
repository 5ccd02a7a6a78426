"""Fit latent maps in closed form: the few directions of all layers' K-V that matter most for attention's output.

This is a principal component analysis in coordinates where distances measure the effect of errors. An error in a key
changes attention logits by its product with queries, and so the mix of values; an error in a value passes through the
output projection into the residual stream. Both are measured relative to the norm of that stream, which makes layers
comparable. Where one layer's K-V is the latent vector, only the way back is fitted, by ridge regression.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from memlong.bank.store.copying import to_device
from memlong.decoder.kv.latent import LatentMaps
from memlong.decoder.model.kernels import Attend, Output
from memlong.decoder.model.layer_names import parse_layers, ranges
from memlong.decoder.model.layout import ModelLayout
from memlong.decoder.model.probe import probe
from memlong.decoder.model.rope import AngleCache
from memlong.errors import InvalidArgumentError, UnsupportedModelError
from memlong.training.projections import ProjectionWatch, check_passages

_USUAL = 1152  # dimension of a latent vector
_RIDGE = 1e-3  # of the mean variance of a memory layer's K-V
_SMALLEST = 1e-4  # floor on a direction's importance, relative to the most important one


def fit_latent_maps(
    model: PreTrainedModel,
    passages: Sequence[Tensor],
    *,
    dim: int | None = None,
    memory_layer: int | None = None,
    layers: str = "all",
    progress: Callable[[int], None] | None = None,
    seed: int = 0,
) -> LatentMaps:
    """Fit maps between the K-V of a model's layers and one latent vector per token.

    Parameters
    ----------
    model
        A model that memory can be attached to.
    passages
        Token ids [1, tokens], on any device, of text similar to what will be stored, each about as long as a local
        window; 16 passages of 1,024 tokens suffice. Their K-V is held in RAM as float32.
    dim
        Dimension of the latent vector: even, less than the number of tokens, and at most the number of values it
        replaces. By default 1,152, or the size of the memory layer's K-V.
    memory_layer
        One of the retrieval layers, whose keys and values are then the latent vector as they are: the K-V that MemLong
        shares among all (arXiv 2408.16967), read by each layer through a map of its own, which is fitted by ridge
        regression.
    layers
        The retrieval layers, as in `MemoryConfig`.
    progress
        Called with the number of tokens in each passage.
    seed
        Random seed of the randomized SVD (Halko, Martinsson and Tropp, arXiv 0909.4061).

    Raises
    ------
    InvalidArgumentError
        If a passage is not token ids of the model, there is too little text for ``dim``, a layer does not exist,
        ``dim`` and ``memory_layer`` are both given, or keys or values are not finite.
    UnsupportedModelError
        If memory does not attach to the model, or its attention has no linear output projection.
    """
    layout = probe(model)
    chosen = parse_layers(layers, layout.full_attention_layers, layout.layers)
    if any(layout.layers[layer].is_made or layout.layers[layer].keys_second for layer in chosen):
        raise UnsupportedModelError(
            f"Latent maps need a model whose cache holds keys and values, but {type(model).__name__} computes them "
            "from something else, such as a latent vector: use kv_source='layer'"
        )
    if not layout.alike(chosen):
        raise UnsupportedModelError(
            f"Latent maps need layers with keys and values of one shape, but {type(model).__name__} has several in the "
            f"layers {ranges(chosen)}: choose layers of one shape"
        )
    check_passages(passages, layout)
    tokens = sum(passage.shape[1] for passage in passages)
    if memory_layer is not None:
        dim = _size_of(memory_layer, chosen, layout, dim)
    elif dim is None:
        dim = _USUAL
    if not isinstance(dim, int) or dim < 2 or dim % 2 or dim >= tokens:
        raise InvalidArgumentError(
            f"dim must be an even integer of at least 2, and less than the {tokens} tokens of text, got {dim}: give "
            "more text, or a smaller dim"
        )
    most = len(chosen) * layout.layers[chosen[0]].shape.numbers
    if dim > most:
        raise InvalidArgumentError(
            f"dim must be at most {most}, the size of a token's keys and values in {len(chosen)} layers, got {dim}"
        )
    watch = _Watch(layout, chosen)
    device = cast("torch.device", model.get_input_embeddings().weight.device)
    for passage in passages:
        watch.read(model, to_device(passage.long(), device))
        if progress is not None:
            progress(passage.shape[1])
    states = watch.states()  # [tokens, 2, layers, kv_heads, head_dim]
    if not bool(states.isfinite().all()):
        raise InvalidArgumentError(
            f"Keys and values of {type(model).__name__} must be finite: its weights are damaged, or its dtype "
            "overflows. Load it in float32 or bfloat16"
        )
    mean = states.mean(dim=0)
    states -= mean
    if memory_layer is not None:
        return _of_one_layer(chosen, mean, states, chosen.index(memory_layer))
    key_scale, value_scale = _importance(states, watch)
    states[:, 0] *= key_scale
    states[:, 1] = torch.einsum("nlhd,lhde->nlhe", states[:, 1], value_scale)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # A few more columns than are kept, for precision.
        _, _, directions = torch.svd_lowrank(states.flatten(1), q=min(dim + 8, *states.flatten(1).shape))
    basis = directions[:, :dim].reshape(*mean.shape, dim)
    encode, decode = torch.empty_like(basis), torch.empty_like(basis)
    encode[0], decode[0] = key_scale[..., None] * basis[0], basis[0] / key_scale[..., None]
    encode[1] = torch.einsum("lhde,lher->lhdr", value_scale, basis[1])
    decode[1] = torch.einsum("lhde,lher->lhdr", torch.linalg.inv(value_scale), basis[1])
    return LatentMaps(chosen, mean, encode, decode)


def _size_of(memory_layer: int, chosen: tuple[int, ...], layout: ModelLayout, dim: int | None) -> int:
    if memory_layer not in chosen:
        raise InvalidArgumentError(
            f"memory_layer must be one of the retrieval layers {ranges(chosen)}, got {memory_layer}"
        )
    size = layout.layers[memory_layer].shape.numbers
    if dim is not None and dim != size:
        raise InvalidArgumentError(
            f"dim must be left out with memory_layer, whose K-V has {size} numbers, got {dim}"
        )
    return size


def _of_one_layer(layers: tuple[int, ...], mean: Tensor, states: Tensor, place: int) -> LatentMaps:
    """Return maps whose latent vector is the K-V of the layer at a place.

    ``states`` [tokens, 2, layers, kv_heads, head_dim] are centered.
    """
    latent = states[:, :, place].flatten(1)
    dim = latent.shape[1]
    gram = latent.T @ latent
    gram.diagonal().add_(_RIDGE * float(gram.diagonal().mean()))
    decode = torch.linalg.solve(gram, latent.T @ states.flatten(1)).T.reshape(*mean.shape, dim).contiguous()
    encode = torch.zeros_like(decode)
    same = torch.eye(dim, dtype=decode.dtype, device=decode.device).view(*mean[:, place].shape, dim)
    encode[:, place] = same
    decode[:, place] = same
    return LatentMaps(layers, mean, encode, decode)


def _importance(states: Tensor, watch: _Watch) -> tuple[Tensor, Tensor]:
    """Return how much errors matter: of keys per channel [layers, kv_heads, head_dim], of values a matrix per head."""
    key_scales, value_scales = [], []
    for place, layer in enumerate(watch.layers):
        projection = watch.projections[layer]
        query, residual = (
            torch.stack(each[layer]).mean(dim=0) for each in (watch.query_energy, watch.residual)
        )
        heads, width = query.shape[0], query.shape[1]
        kv_heads = states.shape[3]
        group = heads // kv_heads
        into = projection.T.reshape(kv_heads, group, width, -1)  # [kv_heads, group, head_dim, hidden]
        metric = torch.einsum("hgdo,hgeo->hde", into, into) / residual**2
        spread = torch.einsum("nhd,hde,nhe->h", states[:, 1, place], metric, states[:, 1, place]) / len(
            states
        )
        energy = query.view(kv_heads, group, width).sum(dim=1) * spread[:, None] / group
        key_scales.append(energy.sqrt().clamp_min(_SMALLEST * float(energy.sqrt().max())))
        lengths, axes = torch.linalg.eigh(metric)
        lengths = lengths.clamp_min(_SMALLEST * float(lengths.max())).sqrt()
        value_scales.append(axes @ torch.diag_embed(lengths) @ axes.mT)
    return torch.stack(key_scales), torch.stack(value_scales)


@dataclass(eq=False)
class _Watch(ProjectionWatch):
    """Records K-V, queries and output projections of some layers while a model reads."""

    query_energy: dict[int, list[Tensor]] = field(default_factory=dict)
    residual: dict[int, list[Tensor]] = field(default_factory=dict)
    _parts: dict[int, list[Tensor]] = field(default_factory=dict)

    @torch.no_grad()
    def read(self, model: PreTrainedModel, passage: Tensor) -> None:
        """Run the model on a passage [1, tokens] on its device."""
        positions = torch.arange(passage.shape[1], device=passage.device)[None]
        self._angles = AngleCache(positions)
        output = self.run(model, passage, output_hidden_states=True)
        for layer in self.layers:
            lengths = output.hidden_states[layer][0].float().norm(dim=-1)
            self.residual.setdefault(layer, []).append(
                lengths.median().cpu()
            )  # the median, as sink tokens have far larger norms

    def attend(
        self,
        base: Attend,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> Output:
        """Record the inputs, and compute the model's own attention."""
        layer = self.layout.readers[module][-1]
        if layer in self.layers:
            rope = self.layout.layers[layer].rope
            raw = rope.unrotate(key, self._angles.of(rope))
            both = torch.stack([raw[0], value[0]]).permute(2, 0, 1, 3)  # [tokens, 2, kv_heads, head_dim]
            self._parts.setdefault(layer, []).append(both.float().cpu())
            scaled = query[0].float() * float(options.get("scaling") or query.shape[-1] ** -0.5)
            self.query_energy.setdefault(layer, []).append(scaled.square().mean(dim=1).cpu())
        return base(module, query, key, value, attention_mask, **options)

    def states(self) -> Tensor:
        """Return all unrotated keys, and values, as float32 [tokens, 2, layers, kv_heads, head_dim]."""
        return torch.stack([torch.cat(self._parts[layer]) for layer in self.layers], dim=2)
