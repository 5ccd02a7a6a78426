"""What README and docs show is real: hooks, commands, options and links exist, and Python runs as it stands there.

A block of Python that is a fragment says so: its first line is a comment ``# fragment: why``, or it has ``...`` where
code is to go. A block with a title is a file; a page that has such files is a walk, of which every step is taken.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from memlong.cli.app import make_app
from memlong.plugins import hookspecs

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md"))]
FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
API = (
    "memlong",
    "memlong.errors",
    "memlong.bank",
    "memlong.decoder",
    "memlong.settings",
    "memlong.training",
    "memlong.plugins",
    "memlong.testing",
    "memlong.evaluation",
    "memlong.lm_eval",
)
OFFLINE = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, the file that it is (or none), and its text."""

    page: str
    language: str
    file: str | None
    text: str

    @property
    def is_fragment(self) -> bool:
        return self.text.startswith("# fragment: ") or any(
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and node.value.value is ...
            for node in ast.walk(ast.parse(self.text))
        )

    @property
    def commands(self) -> list[str]:
        lines = self.text.replace("\\\n", " ").splitlines()
        plain = [re.sub(r"^(\w+=\S* +)+", "", line).replace("[OPTIONS]", "") for line in lines]
        plain = [re.sub(r"^accelerate launch .* -m (?=memlong )", "", line) for line in plain]
        return [line for line in plain if line.startswith("memlong ")]


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


BLOCKS = {page: [Block(page, *match.groups()) for match in FENCE.finditer(read(page))] for page in PAGES}
WALKS = [page for page in PAGES if any(block.file for block in BLOCKS[page])]
PYTHON = [block for page in PAGES for block in BLOCKS[page] if block.language == "python"]
COMMANDS = sorted({line for page in PAGES for block in BLOCKS[page] for line in block.commands})


def command_of(words: list[str]) -> tuple[Any, list[str]]:
    """The command that these words begin with, and the words after it."""
    command = typer.main.get_command(make_app())
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    return command, words


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- what is named exists ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.page)
def test_python_imports_what_is_public(block):
    own = {Path(other.file).parent.name for other in BLOCKS[block.page] if other.file}
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] not in own:
            module = importlib.import_module(node.module)
            public = getattr(module, "__all__", None) or vars(module)
            assert {name.name for name in node.names} <= set(public)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_and_options_exist(line):
    command, words = command_of(shlex.split(line, comments=True)[1:])
    context = command.make_context("memlong", [], resilient_parsing=True)
    context.resilient_parsing = False  # it was for the missing options; from here on nothing is forgiven
    given, left, _ = command.make_parser(context).parse_args(list(words))  # raises on an unknown option
    if command.context_settings.get("allow_extra_args"):
        from lm_eval._cli import HarnessCLI

        HarnessCLI()._parser.parse_args(
            left if left[0] == "ls" else ["run", *left]
        )  # exits on an unknown option
    else:
        assert not left
    if "help" not in given and "version" not in given and not getattr(command, "commands", None):
        assert not [
            each.name for each in command.params if each.required and given.get(each.name) in (None, ())
        ]


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("memlong perplexity --modle demo --text book.txt", "--modle"),
        ("memlong perplexity --model demo", "text"),
        ("memlong bank info one two", "two"),
        ("memlong forget", "forget"),
    ],
)
def test_a_command_that_cannot_be_typed_is_noticed(line, wrong):
    with pytest.raises(Exception, match=wrong):
        test_commands_and_options_exist(line)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_titles(page):
    text = FENCE.sub("", read(page))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("http"):
            continue
        name, _, section = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        assert not section or section in anchors(target), link


def anchors(path: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


# --- what exists is named ---------------------------------------------------------------------------------------------


HOOKS = {name: hook for name, hook in vars(hookspecs).items() if name.startswith("memlong_register_")}


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_stands_in_the_docs_as_it_is(name):
    signature = str(inspect.signature(HOOKS[name])).replace("'", "")
    assert f"def {name}{signature}:" in read("docs/plugins.md")


def test_what_register_takes_stands_in_the_docs():
    table = re.findall(r"^\| `([a-z]+)(=[^`]*)?` \|", read("docs/plugins.md"), flags=re.MULTILINE)
    parameters = list(inspect.signature(hookspecs.Register.__call__).parameters.values())[1:]
    expected = [
        (each.name, "" if each.default is each.empty else f"={each.default!r}".replace("'", '"'))
        for each in parameters
    ]
    assert table == expected


def test_the_page_of_the_command_line_is_what_the_commands_are():
    made = script("docs/_site/commands.py").page()
    assert read("docs/cli.md") == made, "rewrite it: python docs/_site/commands.py"


@pytest.mark.parametrize("module", API)
def test_every_public_name_is_in_the_api_pages(module):
    shown = {name for page in PAGES for name in re.findall(r"^::: (\S+)$", read(page), flags=re.MULTILINE)}
    names = {name for name in importlib.import_module(module).__all__ if name != "__version__"}
    assert not {name for name in names if not {f"{module}.{name}", f"memlong.{name}"} & shown}


# --- what is shown runs -----------------------------------------------------------------------------------------------


def tiny_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A random model, and a tokenizer of five words, that "demo" stands for here."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=9, max_position_embeddings=4096, **sizes)).eval()
    words = {word: number for number, word in enumerate(["?", "call", "me", "a", "whale", "and"])}
    tokens = Tokenizer(models.WordLevel(words, "?"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="?")
    turns = "{% for turn in messages %} call {{ turn.content }}{% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %} me{% endif %}"
    return model, tokenizer


@pytest.fixture
def tiny_demo(tmp_path, monkeypatch):
    """An empty folder with a book in it, and a tiny random model where "demo" is asked for."""
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("call me a whale and " * 600, encoding="utf-8")
    model, tokenizer = tiny_model()
    monkeypatch.setattr("memlong.load_model", lambda name: (model, tokenizer), raising=False)


def run(page: str) -> dict[str, Any]:
    """Run the Python of a page, its blocks one after the other, and return what they leave."""
    names: dict[str, Any] = {"__name__": "page"}
    for block in BLOCKS[page]:
        if block.language == "python" and not block.is_fragment:
            exec(compile(block.text, page, "exec"), names)  # noqa: S102
    return names


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default `max_length`")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page not in WALKS and any(block.page == page for block in PYTHON)]
)
def test_python_runs(page, tiny_demo):
    assert run(page)


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory):
    """The environment of somebody who has installed memlong, pip and pytest, in a place of their own."""
    for package in ("hatchling", "editables"):
        pytest.importorskip(package, reason="pip builds packages with it, and may not download it here")
    place = tmp_path_factory.mktemp("newcomer")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    site = next(place.glob("lib/python*/site-packages"))
    folders = [ROOT, ROOT / "backends", *(path for path in sys.path if path.endswith("site-packages"))]
    site.joinpath("installed.pth").write_text("".join(f"{folder}\n" for folder in folders), encoding="utf-8")
    for name, code in {
        "pip": "import runpy; runpy.run_module('pip', run_name='__main__')",
        "memlong": "from memlong.cli import main; main()",
    }.items():
        program = place / "bin" / name
        program.write_text(f"#!{place}/bin/python\n{code}\n", encoding="utf-8")
        program.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
    # What pip would download is there already: memlong, and the build backend.
    settings = {f"PIP_NO_{what}": "1" for what in ("INDEX", "DEPS")}
    settings |= {"PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return {**kept, **OFFLINE, **settings, "PATH": f"{place}/bin:{os.environ['PATH']}"}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", WALKS)
def test_a_walk_works_as_written(page, newcomer, tmp_path):
    """All of it, but with a tiny random model for the demo's, which takes 15 seconds to load."""
    for part in tiny_model():
        part.save_pretrained(tmp_path / "tiny")
    (tmp_path / "book.txt").write_text("The whale was white, and the sea was wide. " * 40, encoding="utf-8")
    steps = [block for block in BLOCKS[page] if block.language != "python" or not block.is_fragment]
    python: list[str] = []
    for step in steps:
        if step.file:
            path = tmp_path / step.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(step.text, encoding="utf-8")
            continue
        if step.language == "bash":
            text = step.text.replace("--model demo", "--model tiny")
            typed = ["bash", "-euo", "pipefail", "-c", text]
        else:
            python.append(step.text)
            typed = ["python", "-c", "\n".join(python)]
        done = subprocess.run(typed, cwd=tmp_path, env=newcomer, capture_output=True, text=True)
        assert done.returncode == 0, f"{step.text}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
def test_the_site_builds_without_the_network_or_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    settings = {**os.environ, **OFFLINE, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    built = list((tmp_path / "site").rglob("*.html"))
    assert len(built) > len(PAGES)
    for path in built:
        page = path.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"([^\"]+)", page)
        assert not [address for address in loaded if "://" in address or address.startswith("//")]
        assert any(address.endswith("iframe-worker.js") for address in loaded)  # search from a folder
        assert not re.findall(r":(?:class|meth|func|attr|mod|exc|data):`?", page)
    assert (tmp_path / "site/search/search_index.js").is_file()
    decoder = (tmp_path / "site/api/memlong.html").read_text(encoding="utf-8")
    assert re.search(r'<a [^>]*href="#memlong\.MemoryConfig"><code>MemoryConfig</code></a>', decoder)


@pytest.mark.parametrize("page", PAGES)
def test_no_page_holds_a_placeholder(page):
    assert not re.findall(r"^[A-Z]{4,}$", read(page), flags=re.MULTILINE)
