"""``memlong train``: let a model learn to read its memory."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from tqdm import tqdm

from memlong.cli import options
from memlong.cli.answer import say, shown
from memlong.cli.loading import load, told
from memlong.errors import InvalidArgumentError

if TYPE_CHECKING:
    from memlong.training import Step


def train(
    model: options.Model,
    out: Annotated[Path, typer.Option(help="Folder for the trained decoder, checkpoints and the curve.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(help="UTF-8 text file, or folder of *.txt, *.md and *.py; repeatable."),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Dataset of the hub, or folder (needs the package datasets).")
    ] = None,
    dataset_split: Annotated[str, typer.Option(help="Part of the dataset.")] = "train",
    dataset_column: Annotated[str, typer.Option(help="Column that holds its text.")] = "text",
    steps: Annotated[int, typer.Option(help="Steps of the optimizer.")] = 1000,
    rows: Annotated[int, typer.Option(help="Documents read side by side.")] = 4,
    document_tokens: Annotated[
        int, typer.Option(help="Tokens after which a document is cut and memory begins anew.")
    ] = 16_384,
    accumulate: Annotated[int, typer.Option(help="Segments of an optimizer step.")] = 4,
    lr: Annotated[float, typer.Option(help="Highest learning rate, of LoRA and maps.")] = 2e-4,
    gate_lr: Annotated[float, typer.Option(help="Highest learning rate of gates.")] = 1e-2,
    warmup_steps: Annotated[int, typer.Option(help="Steps in which the rate rises.")] = 50,
    weight_decay: Annotated[float, typer.Option(help="Of LoRA and maps.")] = 0.0,
    max_grad_norm: Annotated[float, typer.Option(help="Longer gradients are cut to it.")] = 1.0,
    lora_rank: Annotated[int, typer.Option(help="Width of LoRA; 0 trains none.")] = 16,
    lora_alpha: Annotated[float, typer.Option(help="Scale of LoRA.")] = 32.0,
    lora_target: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Linear layers with LoRA; repeatable  [default: attention's]"),
    ] = None,
    train_maps: Annotated[bool, typer.Option(help="Whether the maps of 'latent' learn.")] = True,
    train_gates: Annotated[bool, typer.Option(help="Whether gates learn, where there are any.")] = True,
    warmup_stage_steps: Annotated[
        int, typer.Option(help="Steps before, with LoRA on all layers and no memory.")
    ] = 0,
    long_range_weight: Annotated[
        float, typer.Option(help="What long-range tokens weigh beyond the 1 of others.")
    ] = 0.0,
    random_share: Annotated[
        float, typer.Option(help="Share of retrievals that bring random chunks instead.")
    ] = 0.0,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints, at least.")] = 100,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the latest checkpoint in --out.")
    ] = False,
    tensorboard: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write curves for tensorboard, too.")
    ] = None,
    backend: options.Backend = "torch",
    backend_option: options.BackendOption = None,
    retriever: options.RetrieverName = "lm",
    retriever_option: options.RetrieverOption = None,
    store: options.StoreOption = None,
    kv_source: options.KvSource = "shared",
    memory_layer: options.MemoryLayer = None,
    maps: options.Maps = None,
    gate_init: options.GateInit = None,
    retrieval_layers: Annotated[
        str | None,
        typer.Option(
            help="'all', or such as '15-29' or '3,7,11'  [default: of 'shared' every 4th from the memory layer up]"
        ),
    ] = None,
    chunk_size: options.ChunkSize = 128,
    top_k: options.TopK = 8,
    neighbours: options.Neighbours = 0,
    local_window: options.LocalWindow = 1024,
    sink_tokens: options.SinkTokens = 4,
    segment_size: options.SegmentSize = 256,
    query_tokens: options.QueryTokens = None,
    position_mode: options.PositionMode = "zero",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    seed: options.Seed = 0,
) -> None:
    """Train a model to read a memory: LoRA on the layers above it, the maps of 'latent', and gates.

    Documents are streamed as they will be, several side by side, each with a memory of its own. The layers below the
    memory stay as they are. --out then holds a decoder for --adapter of perplexity and generate, and the loss curve as
    JSON lines and PNG. A run that was interrupted goes on by the same command with --resume.

    \b
    Examples:
      memlong train --model demo --text speeches.txt --out trained
      memlong train --model demo --text books --out trained --memory-layer 14 --retrieval-layers 15,19,23,27
      memlong train --model demo --text books --kv-source latent --maps maps.safetensors --out trained
      memlong train --model demo --text books --out trained --gate-init -8 --random-share 0.2 --resume
      memlong perplexity --adapter trained --text novel.txt
      memlong perplexity --adapter trained --text novel.txt --retriever random
    """  # noqa: D301 - the backspace makes the help keep these line breaks
    if not text and dataset is None:
        raise InvalidArgumentError(
            "There is nothing to train on: name files or folders by --text, or a --dataset."
        )
    if backend == "none":
        raise InvalidArgumentError("--backend is none, so there is no memory to train on: name a backend.")
    config = options.memory_config(
        backend,
        backend_option,
        retriever,
        retriever_option,
        store,
        seed,
        kv_source=kv_source,
        memory_layer=memory_layer,
        maps=maps,
        gate_init=gate_init,
        retrieval_layers=retrieval_layers or "all",
        chunk_size=chunk_size,
        top_k=top_k,
        neighbours=neighbours,
        local_window=local_window,
        sink_tokens=sink_tokens,
        segment_size=segment_size,
        query_tokens=query_tokens,
        position_mode=position_mode,
    )
    from memlong.decoder import MemoryDecoder
    from memlong.evaluation import tokenize
    from memlong.training import Trainer, TrainingConfig, read_dataset, read_documents, usual_retrieval_layers
    from memlong.training.folder import check_folder, lock
    from memlong.training.trainer import check_settings

    training = TrainingConfig(
        steps=steps,
        rows=rows,
        document_tokens=document_tokens,
        lr=lr,
        gate_lr=gate_lr,
        warmup_steps=warmup_steps,
        weight_decay=weight_decay,
        accumulate=accumulate,
        max_grad_norm=max_grad_norm,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        lora_targets=tuple(lora_target or ()),
        train_maps=train_maps,
        train_gates=train_gates,
        warmup_stage_steps=warmup_stage_steps,
        long_range_weight=long_range_weight,
        random_share=random_share,
        seed=seed,
        checkpoint_every=checkpoint_every,
    )
    check_settings(config, training)
    with lock(out) if out.is_dir() else nullcontext():  # no other run is at work in it
        check_folder(out, resume=resume)
    texts = list(read_documents(text or []))
    if dataset is not None:
        texts += read_dataset(dataset, split=dataset_split, column=dataset_column)
    begun = _begun(out) if resume else None
    language_model, tokenizer = load(
        model, dtype=dtype, device=device, trust_remote_code=trust_remote_code, trained=begun, trains=True
    )
    if retrieval_layers is None:
        config = replace(config, retrieval_layers=usual_retrieval_layers(language_model, config))
    documents = [tokenize(tokenizer, words)[0] for words in tqdm(texts, desc="tokens", unit="text")]
    decoder = MemoryDecoder(language_model, tokenizer, config)
    trainer = Trainer(decoder, documents, training, folder=out, tensorboard=tensorboard)
    if resume and trainer.ended:
        say(f"{shown(str(out))}: the run has ended, and its decoder is here")
        return
    say(
        f"{len(texts):,} documents, {trainer.episodes.tokens:,} tokens, {trainer.learning:,} numbers learn, "
        f"{told(language_model)}"
    )
    with tqdm(total=steps, unit="step", desc=f"training ({told(language_model)})") as bar:

        def show(step: Step) -> None:
            bar.set_postfix(loss=f"{step.loss:.3f}", refresh=False)
            bar.update()

        made = trainer.run(resume=resume, progress=show)
    say(f"{shown(str(out))}: {steps:,} steps, last loss {made[-1].loss:.3f}")


def _begun(folder: Path) -> tuple[str, str] | None:
    """Dtype of the run that the folder holds a checkpoint of, and the folder; what is wrong with it is told later."""
    from memlong.decoder.json_file import read_json
    from memlong.training.folder import FACTS, MOST_FACTS, checkpoints

    with suppress(OSError, ValueError, LookupError, TypeError):
        facts = read_json(checkpoints(folder)[-1] / FACTS, MOST_FACTS)
        return str(facts["made_of"]["model.dtype"]), str(folder)
    return None
