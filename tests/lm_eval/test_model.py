"""The model of the lm-evaluation-harness: equal to transformers' own where all is in the window, and else streamed."""

from __future__ import annotations

import json
from importlib.metadata import entry_points

import numpy as np
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from memlong import MemoryDecoder, load_model
from memlong.errors import InvalidArgumentError
from memlong.evaluation import evaluate_perplexity
from memlong.lm_eval import MemlongLM

SIZES = {"chunk_size": 4, "top_k": 3, "local_window": 24, "sink_tokens": 2, "segment_size": 8}
GREEDY = {"until": [], "max_gen_toks": 6, "do_sample": False}


def words(count, seed=0):
    return " ".join(f"w{number}" for number in np.random.default_rng(seed).integers(90, size=count))


def requests(kind, *arguments):
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


@pytest.fixture
def ours(folder):
    return MemlongLM(str(folder), dtype="float32", **SIZES)


@pytest.fixture
def theirs(folder):
    return HFLM(str(folder), dtype="float32", device="cpu")


@pytest.fixture
def wide(folder):
    """With a window that holds everything."""
    return MemlongLM(str(folder), dtype="float32", **SIZES | {"local_window": 400})


def close(found, expected):
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    likelihoods = ([each for each, _ in pairs] for pairs in (found, expected))
    torch.testing.assert_close(*map(torch.tensor, likelihoods), atol=1e-4, rtol=1e-5)


def test_where_all_is_in_the_window_it_answers_as_transformers_does(wide, theirs):
    texts = [words(60), words(60), words(33, 1), "", words(60)]
    asked = requests("loglikelihood", *((text, f" {words(count)}") for count, text in enumerate(texts, 1)))
    close(wide.loglikelihood(asked), theirs.loglikelihood(asked))
    whole = requests("loglikelihood_rolling", (words(100),), (words(1, 1),), (words(7, 2),))
    torch.testing.assert_close(
        torch.tensor(wide.loglikelihood_rolling(whole)), torch.tensor(theirs.loglikelihood_rolling(whole))
    )
    said = requests("generate_until", *((text, GREEDY) for text in (words(60), words(33, 1), words(5, 2))))
    assert wide.generate_until(said) == theirs.generate_until(said)


def test_every_answer_is_that_of_a_memory_of_its_own(ours):
    shots = words(100)
    prompts = [f"{shots} {words(5, seed)}" for seed in range(1, 4)] + [words(70, 7), words(3, 8)]
    asked = requests("loglikelihood", *((prompt, f" {words(3, 5)}") for prompt in prompts))
    close(ours.loglikelihood(asked), [ours.loglikelihood([each])[0] for each in asked])
    said = requests("generate_until", *((prompt, GREEDY) for prompt in prompts))
    together = ours.generate_until(said)
    assert together == [ours.generate_until([each])[0] for each in said]
    with ours.decoder as decoder:
        decoder.reset()
        ids = torch.tensor([ours.tok_encode(prompts[0])])
        alone = decoder.generate(ids, torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert together[0] == ours.tok_decode(alone[0, ids.shape[1] :].tolist())


def test_documents_are_streamed_and_not_cut(ours):
    text = words(150)
    (found,) = ours.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    with ours.decoder as decoder:
        ids = torch.tensor([[ours.prefix_token_id, *ours.tok_encode(text)]])
        expected = evaluate_perplexity(decoder, ids)
        assert expected.chunks_stored > 0
    assert found == pytest.approx(-expected.nll)


def test_memory_changes_what_a_long_prompt_makes_likely(folder, ours):
    plain = MemlongLM(str(folder), dtype="float32", **SIZES | {"backend": "none", "top_k": 8})
    asked = requests("loglikelihood", (words(200), " w1"))
    assert plain.decoder.config.backend is None
    assert plain.loglikelihood(asked) != ours.loglikelihood(asked)


def test_where_a_bank_evicts_every_prompt_is_stored_whole(folder):
    limits = {"backend_options": {"max_chunks": 6, "eviction": "lru"}}
    ours = MemlongLM(str(folder), dtype="float32", **SIZES, **limits)
    asked = requests("loglikelihood", *((f"{words(100)} {words(40, seed)}", " w1") for seed in range(1, 4)))
    close(ours.loglikelihood(asked), [ours.loglikelihood([each])[0] for each in asked])


def test_an_empty_prompt_is_what_a_text_begins_with(wide):
    begun, empty = wide.generate_until(requests("generate_until", ("<s>", GREEDY), ("", GREEDY)))
    assert begun == empty


@pytest.mark.parametrize(("typed", "rows"), [(3, 3), ("4", 4), ("auto", 8), ("auto:2", 8)])
def test_rows_are_given_as_lm_eval_types_them(folder, typed, rows):
    assert MemlongLM(str(folder), dtype="float32", batch_size=typed, **SIZES)._rows == rows


def test_an_answer_ends_before_a_text_that_ends_it(wide):
    (whole,) = wide.generate_until(requests("generate_until", (words(30, 3), GREEDY)))
    last = whole.split()[-1]
    (cut,) = wide.generate_until(requests("generate_until", (words(30, 3), {**GREEDY, "until": [last]})))
    assert cut == whole[: whole.index(last)]


def test_it_samples_where_it_is_asked_to(wide):
    options = {**GREEDY, "do_sample": True, "temperature": 2.0, "max_gen_toks": 12}
    answers = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        answers += wide.generate_until(requests("generate_until", (words(30), options)))
    assert answers[0] == answers[1] != answers[2]


def test_a_conversation_is_formatted_by_the_models_template(wide, theirs):
    turns = [{"role": "user", "content": "w1 w2"}]
    assert wide.apply_chat_template(turns) == theirs.apply_chat_template(turns)
    assert wide.chat_template() is None
    assert wide.chat_template(True) == wide.tokenizer.chat_template


@pytest.fixture
def task(tmp_path):
    """A folder with a task of multiple choice, from a file."""
    rows = [
        {"text": words(40, seed), "choices": [words(2, 50 + seed), words(2, 90 + seed)], "gold": seed % 2}
        for seed in range(6)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    settings = {
        "task": "choices_of_words",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "task.yaml").write_text(json.dumps(settings), encoding="utf-8")
    return tmp_path


@pytest.mark.slow
def test_lm_eval_runs_it_by_name(folder, task, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tasks = TaskManager(include_path=str(task), include_defaults=False)
    asked = {"tasks": ["choices_of_words"], "task_manager": tasks, "log_samples": True, "bootstrap_iters": 0}
    ours = simple_evaluate(
        model="memlong",
        model_args=f"pretrained={folder},dtype=float32,local_window=400,chunk_size=4",
        device="cpu",
        **asked,
    )
    theirs = simple_evaluate(
        model="hf", model_args=f"pretrained={folder},dtype=float32", device="cpu", **asked
    )
    assert ours["results"] == theirs["results"]
    assert ours["config"]["memory"]["chunk_size"] == 4
    assert get_model("memlong") is MemlongLM


def test_releases_of_lm_eval_to_come_find_it():
    (found,) = entry_points(group="lm_eval.models", name="memlong")
    assert found.load() is MemlongLM


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "pretrained is missing"),
        ({"pretrained": "x", "topk": 8}, "no setting 'topk' .did you mean 'top_k'"),
        ({"pretrained": "x", "backend_options": "m"}, "backend_options must be K=V"),
        ({"pretrained": "x", "batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        (
            {"pretrained": "x", "batch_size": "many"},
            "batch_size must be an integer of at least 1, got 'many'",
        ),
        ({"pretrained": 5}, "must be the name of a model or a decoder with a tokenizer, got int"),
    ],
)
def test_bad_arguments_are_explained(arguments, message):
    with pytest.raises(InvalidArgumentError, match=message):
        MemlongLM(**arguments)


def test_a_decoder_keeps_its_own_settings(folder, small):
    model, tokenizer = load_model(str(folder), dtype="float32")
    decoder = MemoryDecoder(model, tokenizer, small())
    assert MemlongLM(decoder).decoder is decoder
    with pytest.raises(InvalidArgumentError, match="own settings count: leave out top_k"):
        MemlongLM(decoder, top_k=3)


def test_it_works_within_the_decoders_own_block_as_well(ours):
    prompts = (words(60), words(33, 1))
    calls = {
        "loglikelihood": [(prompt, " w1") for prompt in prompts],
        "loglikelihood_rolling": [(prompt,) for prompt in prompts],
        "generate_until": [(prompt, GREEDY) for prompt in prompts],
    }
    for name, arguments in calls.items():
        outside = getattr(ours, name)(requests(name, *arguments))
        with ours.decoder as decoder:
            assert getattr(ours, name)(requests(name, *arguments)) == outside
            assert decoder.is_attached
        assert not decoder.is_attached


@pytest.mark.parametrize("prompt", [words(30), f"{words(30)} \n", "w1", "  ", "<s> w1"])
def test_a_prompt_is_tokenized_once_for_all_its_choices_and_as_lm_eval_does(wide, monkeypatch, prompt):
    pairs = [(prompt, f" {words(count, count)}") for count in range(1, 4)]
    expected = [TemplateLM._encode_pair(wide, *pair) for pair in pairs]
    seen, encode = [], wide.tok_encode
    monkeypatch.setattr(wide, "tok_encode", lambda text: [seen.append(text), encode(text)][1])
    assert [wide._encode_pair(*pair) for pair in pairs] == expected
    assert len(seen) == len(set(seen))
    assert wide._encode_pair(f"w9 {prompt}", " w1") == TemplateLM._encode_pair(wide, f"w9 {prompt}", " w1")


def test_what_lm_eval_adds_counts_where_the_models_arguments_do_not_say(folder):
    added = {"batch_size": 1, "max_batch_size": None, "device": "auto"}
    plain = {"pretrained": str(folder), "dtype": "float32", "local_window": 400, "chunk_size": 4}
    typed = plain | {"batch_size": 2, "device": "cpu", "max_batch_size": 4}
    as_text = ",".join(f"{name}={value}" for name, value in typed.items())
    assert MemlongLM.create_from_arg_string(as_text, added)._rows == 2
    assert MemlongLM.create_from_arg_obj(typed, added)._rows == 2
    assert MemlongLM.create_from_arg_obj(plain, added | {"batch_size": 3})._rows == 3
    assert MemlongLM.create_from_arg_obj(plain)._rows == 1


def test_a_tokenizer_without_an_end_of_text_is_refused(folder, small):
    model, tokenizer = load_model(str(folder), dtype="float32")
    tokenizer.eos_token = None
    with pytest.raises(InvalidArgumentError, match="has no token that ends a text"):
        MemlongLM(MemoryDecoder(model, tokenizer, small()))


def test_settings_that_are_mappings_are_read_from_text(folder):
    found = MemlongLM(
        str(folder),
        dtype="float32",
        backend="hnswlib",
        backend_options="M=8;ef=50",
        store="host=1MB",
        **SIZES,
    )
    assert found.decoder.config.backend_options == {"M": 8, "ef": 50}
    assert found.decoder.config.store == {"host": "1MB"}


def test_where_lm_evals_own_device_is_missing_it_says_where_it_runs(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.warns(UserWarning, match="no CUDA device here, so the model does not run on cuda:0"):
        MemlongLM(str(folder), device="cuda:0", dtype="float32", **SIZES)
