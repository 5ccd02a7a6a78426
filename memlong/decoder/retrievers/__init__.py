"""The built-in retrievers, registered through the same hook as third-party ones."""

from __future__ import annotations

from memlong.plugins.hookspecs import Register, hookimpl


@hookimpl
def memlong_register_retrievers(register: Register) -> None:
    """Register the built-in retrievers without importing their modules."""
    register(
        "sentence-transformers",
        "memlong.decoder.retrievers.sentence:SentenceTransformersRetriever",
        requires=("sentence_transformers",),
        install="pip install 'memlong[sentence-transformers]'",
        description="embeds the text of chunks with a sentence-transformers model",
    )
    register(
        "lm",
        "memlong.decoder.retrievers.lm:LanguageModelRetriever",
        description="token overlap weighted by the language model, plus recency; no second model",
    )
    register(
        "hybrid",
        "memlong.decoder.retrievers.hybrid:HybridRetriever",
        description="fuses the rankings of others, such as lm and sentence-transformers",
    )
    register(
        "random",
        "memlong.decoder.retrievers.baselines:RandomRetriever",
        description="random chunks: the control for every claim that memory helps",
    )
    register(
        "recent",
        "memlong.decoder.retrievers.baselines:RecentRetriever",
        description="the most recent chunks outside the window: a baseline",
    )
