"""``memlong train``: train a model to read its memory."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from tqdm import tqdm

from memlong.cli import options
from memlong.cli.answer import escaped, say
from memlong.cli.loading import load, machine_of
from memlong.cli.memory import MemoryOptions, Unset, with_memory, with_training
from memlong.errors import InvalidArgumentError
from memlong.training.config import TrainingConfig

if TYPE_CHECKING:
    from memlong.training import Step


@with_memory(
    without=("gates", "null_chunk", "retrieve_every", "focus_tokens", "answer_cutoff"),
    kv_source="shared",
    retrieval_layers=Unset("with 'shared', every 4th from the memory layer up"),
)
@with_training()
def train(
    *,
    model: options.Model,
    out: Annotated[Path, typer.Option(help="Folder for the trained decoder, checkpoints and loss curve.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(help="UTF-8 text file, or folder of *.txt, *.md and *.py files; repeatable."),
    ] = None,
    join: Annotated[
        bool,
        typer.Option(
            "--join", help="Make each --text folder one document, each file after a line with its path."
        ),
    ] = False,
    dataset: Annotated[
        str | None, typer.Option(help="Hub dataset, or folder of one (needs the datasets package).")
    ] = None,
    dataset_split: Annotated[str, typer.Option(help="Split of the dataset.")] = "train",
    dataset_column: Annotated[str, typer.Option(help="Column with the text.")] = "text",
    training: TrainingConfig,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from the latest checkpoint in --out.")
    ] = False,
    lora: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Trained decoder whose LoRA to begin with, as --maps names maps."
        ),
    ] = None,
    tensorboard: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write TensorBoard logs to this folder.")
    ] = None,
    memory: MemoryOptions,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    seed: options.Seed = 0,
) -> None:
    """Train a model to read its memory: LoRA from the memory layer up, latent maps, gates and a null chunk.

    Documents stream as they do at inference, several in parallel, each with its own memory. Layers below the memory
    layer are frozen. --out receives a trained decoder (for --adapter of other commands) and the loss curve as JSON
    lines and PNG. To resume an interrupted run, repeat the command with --resume.

    Several processes train together, each on a GPU of its own, if accelerate launch or torchrun starts them. --rows
    counts the documents of each. --shard is for a model that does not fit on one GPU.

    \b
    Examples:
      memlong train --model demo --text speeches.txt --out trained
      memlong train --model demo --text books --out trained --memory-layer 14 --retrieval-layers 15,19,23,27
      memlong train --model demo --text books --kv-source latent --maps maps.safetensors --out trained
      memlong train --model demo --text books --out trained --mix needles=1 --mix text=1 --negatives 3
      memlong train --model demo --text books --out trained --gate-init -8 --random-share 0.2 --resume
      memlong train --model demo --text books --out second --lora trained --document-tokens 32768
      memlong train --model demo --text repositories/flask --text repositories/click --join --out trained
      accelerate launch --multi_gpu --num_processes 2 -m memlong train --model demo --text books --out trained
      accelerate launch --multi_gpu --num_processes 2 -m memlong train --model demo --text books --out trained --shard
      memlong perplexity --adapter trained --text novel.txt
      memlong perplexity --adapter trained --text novel.txt --retriever random
    """  # noqa: D301 - the backspace makes the help keep these line breaks
    if not text and dataset is None:
        raise InvalidArgumentError(
            "There is nothing to train on: name files or folders with --text, or a --dataset"
        )
    if memory.typed["backend"] == "none":
        raise InvalidArgumentError(
            "--backend must name a backend, got 'none': without a memory there is nothing to train"
        )
    if lora is not None:
        from memlong.decoder.persistence.pretrained import read_pretrained

        read_pretrained(lora)  # before anything is loaded
    config, training = memory.config(seed), replace(training, seed=seed)
    from memlong.decoder import MemoryDecoder, choose_machine
    from memlong.evaluation import tokenize
    from memlong.training import Trainer, read_dataset, read_documents, usual_retrieval_layers
    from memlong.training.checks import check_settings
    from memlong.training.folder import check_folder, lock
    from memlong.training.processes import Processes

    check_settings(config, training)
    processes = Processes(device)

    def tell(words: str) -> None:
        if processes.is_main:
            say(words)

    if processes.is_main:
        with lock(out) if out.is_dir() else nullcontext():  # no other run uses it
            check_folder(out, resume=resume)
    processes.wait()
    texts = list(read_documents(text or [], join=join))
    if dataset is not None:
        texts += read_dataset(dataset, split=dataset_split, column=dataset_column)
    begun = _begun(out) if resume else None
    if processes.count > 1:  # one choice for all, as each would measure for itself what is fast
        device = str(processes.device)
        dtype = processes.from_main(choose_machine(dtype, device, trained=begun, trains=True).names[0])
        if training.shard:
            device = "cpu"  # until it is divided
    language_model, tokenizer = load(
        model,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        trained=begun,
        trains=True,
        quiet=not processes.is_main,
    )
    if memory.typed["retrieval_layers"] is None:
        config = replace(config, retrieval_layers=usual_retrieval_layers(language_model, config))
    hidden = not processes.is_main
    documents = [
        tokenize(tokenizer, words)[0] for words in tqdm(texts, desc="tokens", unit="text", disable=hidden)
    ]
    decoder = MemoryDecoder(language_model, tokenizer, config)
    trainer = Trainer(decoder, documents, training, folder=out, tensorboard=tensorboard, lora=lora)
    if resume and trainer.ended:
        tell(f"{escaped(str(out))}: training is already complete, and the trained decoder is here")
        processes.leave()
        return
    machine = (f"{processes.count} processes, " if processes.count > 1 else "") + machine_of(language_model)
    tell(
        f"{len(texts):,} documents, {trainer.episodes.tokens:,} tokens, "
        f"{trainer.trainable_parameters:,} trainable parameters, {machine}"
    )
    with tqdm(total=training.steps, unit="step", desc=f"training ({machine})", disable=hidden) as bar:

        def show(step: Step) -> None:
            bar.set_postfix(loss=f"{step.loss:.3f}", refresh=False)
            bar.update()

        made = trainer.run(resume=resume, progress=show)
    tell(f"{escaped(str(out))}: {training.steps:,} steps, final loss {made[-1].loss:.3f}")
    processes.leave()


def _begun(folder: Path) -> tuple[str, str] | None:
    """Return the dtype of the run to resume, and its folder; None if unreadable, which is reported later."""
    from memlong.decoder.persistence.json_file import read_json
    from memlong.training.folder import FACTS, MOST_FACTS, checkpoints

    with suppress(OSError, ValueError, LookupError, TypeError):
        facts = read_json(checkpoints(folder)[-1] / FACTS, MOST_FACTS)
        return str(facts["made_of"]["model.dtype"]), str(folder)
    return None
