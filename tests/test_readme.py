"""What the README shows is real: its Python compiles against public names, its commands and options exist."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
import typer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from memlong.cli.app import make_app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    line
    for kind, block in BLOCKS
    if kind == "bash"
    for line in block.splitlines()
    if line.startswith("memlong ")
]


@pytest.mark.parametrize("code", [block for kind, block in BLOCKS if kind == "python"])
def test_python_imports_public_names(code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for name in node.names:
                assert name.name in module.__all__


def test_the_python_under_use_it_runs(tmp_path, monkeypatch, capsys):
    code = next(block for kind, block in BLOCKS if kind == "python" and "load_model" in block)
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("call me a whale and " * 600, encoding="utf-8")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=9, max_position_embeddings=4096, **sizes))
    words = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(["?", "call", "me", "a", "whale", "and"])}, "?")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    monkeypatch.setattr("memlong.load_model", lambda name: (model.eval(), tokenizer), raising=False)
    exec(compile(code, "README.md", "exec"), {})  # noqa: S102
    assert "chunks remembered" in capsys.readouterr().out


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_and_options_exist(line):
    _, command, *words = shlex.split(line, comments=True)
    known = typer.main.get_command(make_app()).commands[command]
    options = {option for parameter in known.params for option in parameter.opts} | {"--help"}
    assert {word for word in words if word.startswith("--")} <= options


@pytest.mark.parametrize("target", sorted(set(re.findall(r"make (\w+)", README)) - {"and"}))
def test_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)


@pytest.mark.parametrize(
    "page", ["README.md", "docs/how-it-works.md", "docs/snapshots.md", "docs/results/README.md"]
)
def test_links_lead_to_files(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if link.startswith("http"):
            continue
        name, _, section = link.partition("#")
        target = (ROOT / page).parent / name
        assert target.exists(), link
        titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), flags=re.M) if section else []
        assert not section or section in {title.lower().replace(" ", "-") for title in titles}, link
