"""What a trainer reads: text, or a mix of it and generated episodes."""

from __future__ import annotations

from torch import Tensor

from memlong.decoder import MemoryDecoder
from memlong.training.config import TEXT, TrainingConfig
from memlong.training.documents import Episodes, Mixture, Source
from memlong.training.recall import RecallEpisodes


def make_source(
    decoder: MemoryDecoder, config: TrainingConfig, text: Episodes, documents: list[Tensor]
) -> Source:
    """Return the episodes that the settings ask for; ``text`` alone without a mix."""
    if not config.mix:
        return text
    memory = decoder.config
    sources: dict[str, Source] = {
        kind: text
        if kind == TEXT
        else RecallEpisodes(
            kind,
            decoder.tokenizer,
            documents,
            tokens=config.document_tokens,
            segment_size=memory.segment_size,
            local_window=memory.local_window,
            seed=config.seed,
            questions=config.questions,
        )
        for kind in config.mix
    }
    return Mixture(sources, config.mix, config.seed)
