"""Memory attaches to every architecture of the installed transformers and is right there, or is refused.

Each is tried with a tiny random model; see docs/models.md for what comes of it.
"""

from __future__ import annotations

import re
from itertools import chain
from pathlib import Path

import pytest
import transformers

from memlong import MemoryConfig, MemoryDecoder
from memlong.architectures import (
    architectures,
    encoder_decoders,
    of_model_type,
    tiny_model_of,
    try_architecture,
)
from memlong.cli.models import line
from memlong.errors import MemlongError

PAGE = Path(__file__).parents[2] / "docs/models.md"
WRITTEN_FOR, WORK, REFUSED, FAIL = re.search(
    r"transformers (\S+), (\d+) work, (\d+) are refused, (\d+) fail\.", PAGE.read_text(encoding="utf-8")
).groups()
IS_WRITTEN_FOR_THIS = transformers.__version__ == WRITTEN_FOR

WORKING = {
    "dense": (
        "llama",
        "qwen2",
        "qwen3",
        "mistral",
        "gemma",
        "phi",
        "phi3",
        "gpt_neox",
        "smollm3",
        "olmo2",
        "granite",
    ),
    "experts": ("mixtral", "qwen3_moe", "glm4_moe", "minimax_m2", "ernie4_5_moe", "hunyuan_v1_moe"),
    "sliding": (
        "gemma2",
        "gemma3_text",
        "olmo3",
        "cohere2",
        "exaone4",
        "gpt_oss",
        "mimo_v2_flash",
        "modernbert-decoder",
    ),
    "multimodal": (
        "gemma3",
        "gemma3n",
        "gemma4",
        "mistral3",
        "qwen2_vl",
        "qwen2_5_vl",
        "qwen3_vl",
        "llava",
        "llava_next",
        "llava_onevision",
        "internvl",
        "idefics3",
        "glm4v",
        "voxtral",
    ),
    "hybrid": (
        "qwen3_next",
        "qwen3_5",
        "qwen3_5_moe",
        "granitemoehybrid",
        "bamba",
        "falcon_h1",
        "lfm2",
        "lfm2_moe",
        "nemotron_h",
        "zamba2",
        "olmo_hybrid",
        "kimi_linear",
    ),
    "shared K-V": ("gemma3n_text", "gemma4_text"),
    "latent": ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu", "longcat_flash"),
    "several calls in a layer": ("diffllama", "jetmoe", "hrm_text"),
}
REFUSALS = {
    "gpt2": "rotary positions",
    "mamba": "does not attend to keys and values",
    "llama4": "chunks of the text",
    "doge": "mask of its own",
    "jamba": "several tokens",
    "recurrent_gemma": "state of its own",
    "deepseek_v32": "an index of its own",
    "blip-2": "pixel_values",
}
NAMED = {*chain(*WORKING.values()), *REFUSALS}


@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(
            each,
            id=f"{each.model_type}-{each.class_name}",
            marks=() if each.model_type in NAMED else pytest.mark.slow,
        )
        for each in architectures()
    ],
)
def test_memory_is_right_or_refused(architecture):
    trial = try_architecture(architecture)
    assert trial.status in ("works", "refused"), trial.reason
    assert (trial.status == "works") == (not trial.reason)
    assert "Traceback" not in trial.reason
    assert (
        not trial.is_unmade or architecture.model_type == "gemma4_assistant"
    )  # which has no cache of its own
    if trial.status == "refused" and not trial.is_unmade:
        with pytest.raises(MemlongError):  # whatever it computes in
            MemoryDecoder(tiny_model_of(architecture).bfloat16(), None, MemoryConfig(local_window=384))
    if IS_WRITTEN_FOR_THIS:
        assert alike(line(trial)) in map(alike, PAGE.read_text(encoding="utf-8").splitlines()), (
            "docs/models.md says something else: memlong models --markdown docs/models.md"
        )


@pytest.mark.parametrize("model_types", WORKING.values(), ids=list(WORKING))
@pytest.mark.skipif(not IS_WRITTEN_FOR_THIS, reason="docs/models.md is of another version of transformers")
def test_what_people_run_works(model_types):
    rows = page_rows()
    assert not {name: rows[name] for name in model_types if rows[name] != {"works"}}


@pytest.mark.parametrize(("model_type", "reason"), REFUSALS.items(), ids=list(REFUSALS))
def test_a_refusal_names_what_is_the_matter(model_type, reason):
    for architecture in of_model_type(model_type):
        trial = try_architecture(architecture)
        assert (trial.status, reason in trial.reason) == ("refused", True), trial.reason


def test_at_least_eighty_five_work_and_none_fails():
    assert int(WORK) >= 85
    assert int(FAIL) == 0
    if IS_WRITTEN_FOR_THIS:
        assert int(WORK) + int(REFUSED) == len(architectures())
        assert all(f"`{name}`" in PAGE.read_text(encoding="utf-8") for name in encoder_decoders())
    statuses = [
        status for found in PAGE.read_text(encoding="utf-8").splitlines() for status in status_of(found)
    ]
    assert (statuses.count("works"), statuses.count("refused")) == (int(WORK), int(REFUSED))


def page_rows() -> dict[str, set[str]]:
    """What the page says of each model type, of all of its classes."""
    rows: dict[str, set[str]] = {}
    for found in PAGE.read_text(encoding="utf-8").splitlines():
        for status in status_of(found):
            rows.setdefault(found.split(" | ")[0].removeprefix("| "), set()).add(status)
    return rows


def status_of(found: str) -> list[str]:
    return [cell for cell in found.split(" | ")[2:3] if cell in ("works", "refused", "fails")]


def alike(found: str) -> str:
    """A row without its figures, which rounding may change from one machine to another."""
    return re.sub(r"\d+(\.\d+)?(e-?\d+)?%?", "#", found)
