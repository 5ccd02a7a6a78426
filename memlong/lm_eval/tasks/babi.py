"""The questions of bAbI (arXiv 1502.05698), read from its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from memlong.errors import InvalidArgumentError, InvalidTextError
from memlong.evaluation import read_text

_SOURCE = (
    "the archive tasks_1-20_v1-2 of the bAbI project has it as en or en-10k, and "
    "https://huggingface.co/datasets/facebook/babi_qa says where that is"
)


@dataclass(frozen=True)
class Question:
    """A question on a story.

    Attributes
    ----------
    facts
        The story up to the question, in order.
    text
        The question.
    answer
        Its one right answer.
    """

    facts: tuple[str, ...]
    text: str
    answer: str


def read_questions(folder: str | None, task: int) -> list[Question]:
    """Read the test questions of a task.

    Raises
    ------
    InvalidArgumentError
        If no folder is named.
    InvalidTextError
        If it does not hold one file of this task, or the file is not in bAbI's format.
    """
    if not folder:
        raise InvalidArgumentError(
            "BABILong takes its facts from bAbI, and no folder with that is named: "
            f"""--metadata '{{"babi": "tasks_1-20_v1-2/en"}}'; {_SOURCE}"""
        )
    found = sorted(Path(folder).glob(f"qa{task}_*test.txt"))
    if len(found) != 1:
        raise InvalidTextError(
            f"The folder {folder!r} must hold one file of test questions qa{task}_*test.txt, and holds {len(found)}: "
            f"name bAbI's folder in the metadata 'babi'; {_SOURCE}"
        )
    questions = []
    facts: tuple[str, ...] = ()
    for line, written in enumerate(read_text(found[0]).strip().split("\n"), 1):
        number, _, rest = written.partition(" ")
        text, *answer = (part.strip() for part in rest.split("\t"))
        is_asked = "?" in text
        if not number.isdecimal() or not text or len(answer) != (2 if is_asked else 0):
            raise InvalidTextError(
                f"Line {line} of {str(found[0])!r} is not in bAbI's format, such as '1 Mary went home.' or, parted by "
                f"tabs, '2 Where is Mary?', 'home', '1': {written[:80]!r}. Take the file as bAbI has it; {_SOURCE}"
            )
        if number == "1":
            facts = ()
        if is_asked:
            questions.append(Question(facts, text, answer[0]))
        else:
            facts = (*facts, text)
    if not questions:
        raise InvalidTextError(f"{str(found[0])!r} has no questions: take the file as bAbI has it; {_SOURCE}")
    return questions
