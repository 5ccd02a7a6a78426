"""A corpus: documents that a model has read once, in a memory that many sessions share."""

from memlong.corpus.corpus import Corpus
from memlong.corpus.document import About, Document, Remembered
from memlong.corpus.reading import Outcome, remember

__all__ = ["About", "Corpus", "Document", "Outcome", "Remembered", "remember"]
