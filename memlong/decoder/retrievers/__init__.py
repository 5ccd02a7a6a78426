"""The built-in retrievers, registered through the hook that third parties use."""

from __future__ import annotations

from memlong.plugins.hookspecs import Register, hookimpl


@hookimpl
def memlong_register_retrievers(register: Register) -> None:
    """Register the built-in retrievers; none of their modules is imported here."""
    register(
        "sentence-transformers",
        "memlong.decoder.retrievers.sentence:SentenceTransformersRetriever",
        requires=("sentence_transformers",),
        install="pip install 'memlong[sentence-transformers]'",
        description="a sentence-transformers model embeds the text of each chunk",
    )
    register(
        "lm",
        "memlong.decoder.retrievers.lm:LanguageModelRetriever",
        description="recent chunks with shared tokens, weighed by the language model: no second model",
    )
    register(
        "random",
        "memlong.decoder.retrievers.baselines:RandomRetriever",
        description="random chunks: the control of every claim that memory helps",
    )
    register(
        "recent",
        "memlong.decoder.retrievers.baselines:RecentRetriever",
        description="the chunks that left the window last: a baseline",
    )
