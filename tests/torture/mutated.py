"""Snapshots and adapters, changed in their structure by a seed, each loaded and judged: one line of JSON a case.

python tests/torture/mutated.py FOLDER FIRST COUNT
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import random
import resource
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from mutations import mutate_folder, mutate_json, mutate_tensors, raw_json
from transformers import PreTrainedModel

from memlong import MemoryConfig, MemoryDecoder, Registry, create_bank
from memlong.architectures.tiny import tiny_model_of
from memlong.decoder.kv.latent import LatentMaps
from memlong.errors import MemlongError
from memlong.testing import tiny_model
from memlong.testing.harness import DIM, random_chunks, random_vectors

SECONDS, BYTES = 10, 2 << 30  # that a case may take
COUNT = 24
Rng = random.Random

BANKS: dict[str, tuple[str, dict[str, Any]]] = {
    "torch": ("torch", {}),
    "faiss": ("faiss", {}),
    "faiss-hnsw": ("faiss", {"index": "HNSW16"}),
    "hnswlib": ("hnswlib", {"initial_capacity": 8}),
    "usearch": ("usearch", {}),
}
SIZES: dict[str, Any] = {"chunk_size": 4, "top_k": 3, "local_window": 24, "sink_tokens": 2, "segment_size": 8}
STREAMS: dict[str, tuple[Callable[[], PreTrainedModel], MemoryConfig]] = {
    "layer": (tiny_model, MemoryConfig(**SIZES)),
    "plain": (tiny_model, MemoryConfig(**SIZES, backend=None)),
    "sliding": (lambda: tiny_model("Gemma3"), MemoryConfig(**SIZES, backend="hnswlib", kv_source="shared")),
    "states": (lambda: tiny_model_of("qwen3_next"), MemoryConfig(**SIZES, backend="faiss", position_mode="original")),
}  # fmt: skip
ADAPTERS = {"lora": {}, "maps": {"kv_source": "latent"}}


def text(tokens: int, rows: int = 1) -> torch.Tensor:
    return torch.randint(3, 97, (rows, tokens), generator=torch.Generator().manual_seed(tokens))


class Target:
    """What is loaded: how it is made, and what must come of it."""

    def __init__(self, place: Path, name: str) -> None:
        self.place, self.name = place, name

    def make(self, folder: Path) -> None:
        raise NotImplementedError

    def mutate(self, folder: Path, rng: Rng) -> tuple[str, bool]:
        """Change a folder; return what was done, and whether what is loaded may be other data now."""
        raise NotImplementedError

    def use(self, folder: Path, rng: Rng) -> Any:
        """Load and use it; return what may not differ unless it may."""
        raise NotImplementedError


class Snapshot(Target):
    def mutate(self, folder: Path, rng: Rng) -> tuple[str, bool]:
        kind = rng.choice(["manifest", "manifest", "manifest", "tensors", "tensors", "folder", "raw"])
        path = folder / "manifest.json"
        data = json.loads(path.read_bytes())
        del data["sha256"]
        if kind == "folder":
            return mutate_folder(folder, rng), False
        if kind == "raw":
            path.write_bytes(raw_json(rng))
            return kind, False
        if kind == "manifest":
            part = rng.choice(self.parts(data))
            said = mutate_json(part, rng)
        else:
            record = rng.choice([each for each in self.files(data) if each["name"].endswith("safetensors")])
            content, said = mutate_tensors((folder / record["name"]).read_bytes(), rng)
            (folder / record["name"]).write_bytes(content)
            record["nbytes"], record["sha256"] = len(content), hashlib.sha256(content).hexdigest()
            said = f"{record['name']}: {said}"
        body = json.dumps(data, indent=1)
        digest = hashlib.sha256(body.encode()).hexdigest()
        path.write_text(f'{body[:-2]},\n "sha256": "{digest}"\n}}\n')
        return said, True

    def parts(self, data: dict[str, Any]) -> list[Any]:
        """Parts of a manifest that are worth changing as often as all of it."""
        bank = data["banks"][0] if data["banks"] else data
        extra = data["extra"]["facts"] if data["extra"] else bank
        return [data, bank, extra, extra.get("fingerprint", bank), extra.get("rows", bank)]

    def files(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        found = [data["extra"]["file"]] * 6 if data["extra"] else []
        for bank in data["banks"]:
            found += [
                bank["state"],
                *(each[kind] for each in bank["segments"] for kind in ("chunks", "blocks")),
            ]
        return found


class Bank(Snapshot):
    registry = Registry()

    def make(self, folder: Path) -> None:
        name, options = BANKS[self.name]
        bank = create_bank(name, DIM, max_chunks=100, **options)
        for first in (0, COUNT // 2):
            random_chunks(COUNT // 2, seed=first, first=first).into(bank)
            bank.retrieve(random_vectors(2, seed=first), 3)
            bank.save(folder)

    def use(self, folder: Path, rng: Rng) -> Any:
        lazy, into = rng.random() < 0.3, rng.choice([None, None, "torch", BANKS[self.name][0]])
        bank = self.registry.load_bank(folder, into, lazy=lazy)
        ids = bank.ids.tolist()
        held = bank.fetch(ids) if ids else None
        bank.retrieve(torch.randn(3, bank.dim), 5)
        seen = None if held is None else (ids, held.keys.clone(), held.values.clone())
        if held is not None:
            bank.add(torch.randn(1, bank.dim), held.keys[:1], held.values[:1], held.spans[:1])
        bank.save(self.place / "again")
        self.registry.load_bank(self.place / "again", kv_device="cpu")
        return seen


class Streams(Snapshot):
    def __init__(self, place: Path, name: str) -> None:
        super().__init__(place, name)
        make, self.config = STREAMS[name]
        self.model = make()

    def make(self, folder: Path) -> None:
        with MemoryDecoder(self.model, None, self.config) as decoder:
            for tokens in (60, 5):
                decoder.read(text(tokens, rows=2))
                decoder.save(folder)

    def use(self, folder: Path, rng: Rng) -> Any:
        kind = {
            "lazy": rng.random() < 0.3 and self.config.backend is not None,
            "any_model": rng.random() < 0.3,
        }
        with MemoryDecoder.load(folder, self.model, None, self.config, **kind) as decoder:
            rows = len(decoder.tokens_read)
            if not rows:
                return None
            logits = [decoder.read(text(1, rows=2)[:1].repeat(rows, 1))]
            logits += [decoder.read(text(30, rows=2)[:1].repeat(rows, 1))]
            decoder.generate(text(3, rows=2)[:1].repeat(rows, 1), max_new_tokens=9, do_sample=False)
            if not all(bool(each.isfinite().all()) for each in logits):
                raise AssertionError("logits that are not finite")
            decoder.save(self.place / "again")
        return logits


class Adapter(Target):
    def __init__(self, place: Path, name: str) -> None:
        super().__init__(place, name)
        self.model = tiny_model()
        self.state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def make(self, folder: Path) -> None:
        model, options = tiny_model(), dict(ADAPTERS[self.name])
        lora = peft.LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], alpha_pattern={"v_proj": 2}, init_lora_weights=False
        )
        model.add_adapter(lora)
        if options:
            shape = (2, 4, 2, 12)
            generator = torch.Generator().manual_seed(0)
            mean, *maps = (torch.randn(*shape, *more, generator=generator) for more in ((), (8,), (8,)))
            LatentMaps((0, 1, 2, 3), mean, *maps).save(folder.parent / "made.safetensors")
            options["maps"] = str(folder.parent / "made.safetensors")
        MemoryDecoder(model, None, MemoryConfig(**SIZES, gate_init=-1.0, **options)).save_pretrained(folder)

    def mutate(self, folder: Path, rng: Rng) -> tuple[str, bool]:
        path = rng.choice(sorted(folder.iterdir()))
        kind = rng.choice(["structure", "structure", "structure", "structure", "folder", "raw"])
        if kind == "folder":
            return mutate_folder(folder, rng), True
        if path.suffix == ".json":
            if kind == "raw":
                path.write_bytes(raw_json(rng))
                return f"raw {path.name}", True
            data = json.loads(path.read_bytes())
            said = mutate_json(data["memory"] if "memory" in data and rng.random() < 0.7 else data, rng)
            path.write_text(json.dumps(data))
        else:
            content, said = mutate_tensors(path.read_bytes(), rng)
            path.write_bytes(content)
        return f"{path.name}: {said}", True

    def use(self, folder: Path, rng: Rng) -> Any:
        before = {name: type(module) for name, module in self.model.named_modules()}
        try:
            decoder = MemoryDecoder.from_pretrained(folder, self.model, None)
        except MemlongError:
            after = {name: type(module) for name, module in self.model.named_modules()}
            state = self.model.state_dict()
            if before != after or state.keys() != self.state.keys():
                self.model = tiny_model()
                raise AssertionError("a refused adapter has left something in the model") from None
            if not all(torch.equal(state[name], each) for name, each in self.state.items()):
                self.model = tiny_model()
                raise AssertionError("a refused adapter has changed weights") from None
            raise
        self.model = tiny_model()
        with decoder:
            logits = decoder.read(text(60))
        if not bool(logits.isfinite().all()):
            raise AssertionError("logits that are not finite")
        return logits


def targets(place: Path) -> list[Target]:
    found: list[Target] = [Bank(place, name) for name in BANKS]
    found += [Streams(place, name) for name in STREAMS]
    return found + [Adapter(place, name) for name in ADAPTERS]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def judge(target: Target, folder: Path, rng: Rng, right: Any, *, may_differ: bool) -> tuple[str, str]:
    try:
        found = target.use(folder, rng)
    except MemlongError as error:
        said = str(error)
        if len(said) > 10_000:
            return "A LONG MESSAGE", said
        return ("refused" if "\x1b" not in said else "ESCAPES IN THE MESSAGE"), said
    except Exception as error:  # noqa: BLE001
        return "ERROR", f"{type(error).__name__}: {error}"[:3000]
    is_same = same(right, found)
    return ("same" if is_same else "other" if may_differ else "WRONG DATA"), ""


def highest() -> int:
    """The most memory that the process had since `forget_highest`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return 0


def forget_highest() -> None:
    with Path("/proc/self/clear_refs").open("w") as file:
        file.write("5")


@contextmanager
def bounded() -> Iterator[None]:
    """Let the process take no more memory than it has, and what a case may take."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + BYTES, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def main(place: Path, first: int, count: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    here = place / f"work-{first}"
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir(parents=True)
    all_targets, rights = targets(here), {}
    for target in all_targets:
        pristine = here / "pristine" / type(target).__name__ / target.name
        pristine.parent.mkdir(parents=True, exist_ok=True)
        target.make(pristine)
        for seed in range(6):
            shutil.rmtree(here / "again", ignore_errors=True)
            rights[target] = target.use(pristine, random.Random(seed))  # noqa: S311 - and all is imported
    for case in range(first, first + count):
        rng = random.Random(case)  # noqa: S311
        target = all_targets[case % len(all_targets)]
        kind = f"{type(target).__name__} {target.name}"
        work = here / "now"
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(here / "again", ignore_errors=True)
        shutil.copytree(here / "pristine" / type(target).__name__ / target.name, work)
        line: dict[str, Any] = {"case": case, "target": kind}
        print(json.dumps(line | {"outcome": "began"}), flush=True)
        said, may_differ = target.mutate(work, rng)
        line["mutation"] = said
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        forget_highest()
        before, began = highest(), time.monotonic()
        with bounded():
            outcome, words = judge(target, work, rng, rights[target], may_differ=may_differ)
        line |= {"outcome": outcome, "said": words[:3000], "seconds": round(time.monotonic() - began, 3)}
        faulthandler.cancel_dump_traceback_later()
        line["megabytes"] = (highest() - before) >> 20
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
