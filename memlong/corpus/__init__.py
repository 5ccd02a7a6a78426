"""A corpus: documents that a model has read once, in a memory that many sessions share."""

from memlong.corpus.corpus import Corpus
from memlong.corpus.document import Document, Remembered
from memlong.corpus.reading import remember

__all__ = ["Corpus", "Document", "Remembered", "remember"]
