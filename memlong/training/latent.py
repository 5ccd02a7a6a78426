"""Latent maps in closed form: the few directions of all layers' K-V that matter most for what attention puts out.

A principal component analysis, in coordinates where distances mean what errors do. An error of a key changes logits by
its product with queries, and thereby mixes values; an error of a value goes through the output projection into the
residual stream. Both count relative to the length of that stream, so that layers can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from memlong.decoder.kv.latent import LatentMaps
from memlong.decoder.model.attention import AttentionSlot, evaluating, installed, replaced_attention
from memlong.decoder.model.kernels import Attend, Output
from memlong.decoder.model.layer_names import parse_layers, ranges
from memlong.decoder.model.layout import ModelLayout
from memlong.decoder.model.probe import probe
from memlong.decoder.model.rope import AngleCache
from memlong.errors import InvalidArgumentError, UnsupportedModelError

_SMALLEST = 1e-4  # directions that matter less than this, beside the most important one, are not told apart


def fit_latent_maps(
    model: PreTrainedModel,
    passages: Sequence[Tensor],
    *,
    dim: int = 1152,
    layers: str = "all",
    progress: Callable[[int], None] | None = None,
    seed: int = 0,
) -> LatentMaps:
    """Find maps between the K-V of a model's layers and one vector a token.

    Parameters
    ----------
    model
        A model that memory can be attached to.
    passages
        Token ids [1, tokens] of text like that which is to be remembered, about as long as a local window each; 16
        passages of 1,024 tokens do. All are held in memory at once: 4 bytes for every number of their K-V.
    dim
        Width of the vector; even, less than the number of tokens, and at most that of the numbers it stands for.
    layers
        The retrieval layers, as `MemoryConfig` has them.
    progress
        Called with the number of tokens of each passage read.
    seed
        Of the randomised decomposition (Halko, Martinsson and Tropp, arXiv 0909.4061).

    Raises
    ------
    InvalidArgumentError
        If there is too little text for ``dim``, a layer does not exist, or keys or values are not finite.
    UnsupportedModelError
        If memory cannot be attached to the model, or its attention has no linear output projection.
    """
    layout = probe(model)
    chosen = parse_layers(layers, layout.full_attention_layers, layout.layers)
    if any(layout.layers[layer].is_made or layout.layers[layer].keys_second for layer in chosen):
        raise UnsupportedModelError(
            f"{type(model).__name__} makes its keys and values of what its cache holds (such as a latent vector), and "
            "maps are for models whose cache holds keys and values themselves."
        )
    if not layout.alike(chosen):
        raise UnsupportedModelError(
            f"{type(model).__name__} has keys and values of several shapes in the layers {ranges(chosen)}; latent maps "
            "need one. Name layers that are alike."
        )
    for passage in passages:
        if not isinstance(passage, Tensor) or passage.ndim != 2:
            raise InvalidArgumentError(
                "passages holds what is no tensor of token ids [1, tokens]; give a list of such tensors, one a passage."
            )
    tokens = sum(passage.shape[1] for passage in passages)
    if not isinstance(dim, int) or dim < 2 or dim % 2 or dim >= tokens:
        raise InvalidArgumentError(
            f"dim is {dim} for {tokens} tokens of text; expected an even number of at least 2, and more tokens than "
            "that."
        )
    most = len(chosen) * layout.layers[chosen[0]].shape.numbers
    if dim > most:
        raise InvalidArgumentError(
            f"dim is {dim}, but the keys and values of a token in {len(chosen)} layers are {most} numbers; expected at "
            "most that."
        )
    watch = _Watch(layout, chosen)
    for passage in passages:
        watch.read(model, passage)
        if progress is not None:
            progress(passage.shape[1])
    states = watch.states()  # [tokens, 2, layers, kv_heads, head_dim]
    if not bool(states.isfinite().all()):
        raise InvalidArgumentError(
            f"{type(model).__name__} makes keys or values that are not finite: its weights are damaged, or its dtype "
            "does not hold them. Load it in float32 or bfloat16."
        )
    mean = states.mean(dim=0)
    states -= mean
    key_scale, value_scale = _importance(states, watch)
    states[:, 0] *= key_scale
    states[:, 1] = torch.einsum("nlhd,lhde->nlhe", states[:, 1], value_scale)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # A few columns more than are kept, for precision.
        _, _, directions = torch.svd_lowrank(states.flatten(1), q=min(dim + 8, *states.flatten(1).shape))
    basis = directions[:, :dim].reshape(*mean.shape, dim)
    encode, decode = torch.empty_like(basis), torch.empty_like(basis)
    encode[0], decode[0] = key_scale[..., None] * basis[0], basis[0] / key_scale[..., None]
    encode[1] = torch.einsum("lhde,lher->lhdr", value_scale, basis[1])
    decode[1] = torch.einsum("lhde,lher->lhdr", torch.linalg.inv(value_scale), basis[1])
    return LatentMaps(chosen, mean, encode, decode)


def _importance(states: Tensor, watch: _Watch) -> tuple[Tensor, Tensor]:
    """What an error matters: of keys by channel [layers, kv_heads, head_dim], of values as a matrix for each head."""
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
class _Watch(AttentionSlot):
    """K-V, queries and output projections of some layers, noted down while a model reads."""

    layout: ModelLayout
    layers: tuple[int, ...]
    query_energy: dict[int, list[Tensor]] = field(default_factory=dict)
    residual: dict[int, list[Tensor]] = field(default_factory=dict)
    projections: dict[int, Tensor] = field(default_factory=dict)
    _parts: dict[int, list[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    @torch.no_grad()
    def read(self, model: PreTrainedModel, passage: Tensor) -> None:
        """Let the model read a passage [1, tokens] on its own."""
        positions = torch.arange(passage.shape[1], device=passage.device)[None]
        self._angles = AngleCache(positions)
        hooks = [
            part.register_forward_hook(self._note_projection(layer))
            for layer in self.layers
            for part in self.layout.layers[layer].module.modules()
            if isinstance(part, nn.Linear)
        ]
        try:
            with evaluating(model), installed(self, self.layout.modules), replaced_attention(model):
                output = model(
                    input_ids=passage, use_cache=False, output_hidden_states=True, logits_to_keep=1
                )
        finally:
            for hook in hooks:
                hook.remove()
        missing = [layer for layer in self.layers if layer not in self.projections]
        if missing:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no linear output projection in the attention of layers {missing}, from "
                "which it is seen what values do."
            )
        for layer in self.layers:
            lengths = output.hidden_states[layer][0].float().norm(dim=-1)
            self.residual.setdefault(layer, []).append(lengths.median().cpu())  # sink tokens are far longer

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
        """Note down what comes, and let the model attend as it does."""
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
        """Un-rotated keys, and values, of all that was read: [tokens, 2, layers, kv_heads, head_dim], float32."""
        return torch.stack([torch.cat(self._parts[layer]) for layer in self.layers], dim=2)

    def _note_projection(self, layer: int) -> Callable[[nn.Module, Any, Any], None]:
        """Of an attention module's linear maps, the output projection is called last."""

        def note(part: nn.Module, _inputs: Any, _output: Any) -> None:
            self.projections[layer] = cast("Tensor", part.weight).detach().float().cpu()

        return note
