"""Test the core with the lowest versions that pyproject.toml names, and on other Pythons: ``make test-versions``.

Every setting gets an environment of its own in out/versions, made by uv, which keeps what it downloads in its cache.
An interpreter that is not on this machine is skipped, and the last lines say so. Where PyPI has torch for CUDA alone
that is some 3 GB the first time; ``UV_TORCH_BACKEND=cpu`` takes the small build instead, from an index of torch's own.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "out" / "versions"
TOOLS = ("hypothesis", "psutil", "pytest", "pytest-timeout", "pytest-xdist")
EXTRAS = ("faiss", "hnswlib")
SHOWN = (
    "torch",
    "transformers",
    "numpy",
    "safetensors",
    "pluggy",
    "typer",
    "rich",
    "tqdm",
    "faiss-cpu",
    "hnswlib",
)
CORE = (
    "tests/bank",
    "tests/plugins",
    "tests/cli/test_backends.py",
    "tests/cli/test_bank.py",
    "tests/backends/test_conformance.py",
    "tests/decoder/test_oracles.py",
)
# For Pythons between the lowest and the newest, which run all of CORE: what Python itself has a part in, such as
# processes, threads, interrupts, finalizers, signatures and files, and each backend once.
BETWEEN = (
    "tests/bank/snapshot/test_interrupts.py",
    "tests/bank/snapshot/test_save_load.py",
    "tests/bank/test_base.py",
    "tests/bank/test_copies.py",
    "tests/bank/test_forks.py",
    "tests/bank/test_interrupts.py",
    "tests/bank/test_lock.py",
    "tests/bank/test_objects.py",
    "tests/bank/test_parallel.py",
    "tests/bank/test_pool.py",
    "tests/plugins",
    "tests/cli/test_backends.py",
    "tests/cli/test_bank.py",
    "tests/backends/test_conformance.py::TestTorch",
    "tests/backends/test_conformance.py::TestFaissFlat",
    "tests/backends/test_conformance.py::TestHnswlib",
    "tests/decoder/test_oracles.py",
)
CHOICE = ("-m", "not slow", "--brief")
# Of old libraries that call what is deprecated in the newest ones that they work with.
FORGIVEN = ("-W", "ignore::DeprecationWarning")


@dataclass(frozen=True)
class Setting:
    """A Python, and which versions of the libraries go with it."""

    python: str
    lowest: bool = False

    @property
    def name(self) -> str:
        return f"{self.python}-lowest" if self.lowest else self.python

    @property
    def libraries(self) -> str:
        return "the lowest versions in pyproject.toml" if self.lowest else "the versions in constraints.txt"


SETTINGS = (Setting("3.11", lowest=True), Setting("3.12"), Setting("3.13"), Setting("3.14"))
TESTS = dict.fromkeys(SETTINGS, BETWEEN) | dict.fromkeys((SETTINGS[0], SETTINGS[-1]), CORE)


def uv(*arguments: object) -> str:
    """Run uv and return what it printed; where it fails, end with what it complains of."""
    done = _uv(*arguments)
    if done.returncode:
        sys.exit(f"uv {' '.join(map(str, arguments))}\n{done.stderr}")
    return done.stdout.strip()


def interpreter(version: str) -> str | None:
    """The path of a Python of this version, or None."""
    return _uv("python", "find", "--no-project", "--no-python-downloads", version).stdout.strip() or None


def _uv(*arguments: object) -> subprocess.CompletedProcess[str]:
    program = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        sys.exit("uv is not installed: pip install uv")
    found = Path.home().glob(
        ".pyenv/versions/*/bin"
    )  # where pyenv keeps those that it does not put on the path
    path = os.pathsep.join([*map(str, found), os.environ["PATH"]])
    return subprocess.run(
        [program, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def tools() -> list[str]:
    """What pyproject.toml asks for of the packages that the tests need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [line for line in project["optional-dependencies"]["dev"] if line.partition(">=")[0] in TOOLS]


def make(setting: Setting, python: str) -> Path:
    """Make the environment of a setting, and return its Python."""
    place = FOLDER / setting.name
    uv("venv", "--clear", "--python", python, place)
    ours, wanted, chosen = place / "bin" / "python", place / "tools.in", place / "requirements.txt"
    wanted.write_text("\n".join(tools()), encoding="utf-8")
    how = ["--resolution=lowest-direct"] if setting.lowest else ["--constraint=constraints.txt"]
    how += [f"--extra={extra}" for extra in EXTRAS]
    uv("pip", "compile", "--python", ours, *how, "--output-file", chosen, "pyproject.toml", wanted)
    uv("pip", "install", "--python", ours, "--requirement", chosen)
    uv("pip", "install", "--python", ours, "--no-deps", "--editable", ".")
    return ours


def versions(python: Path) -> str:
    """The versions of the libraries that are installed there, in a line."""
    lines = uv("pip", "freeze", "--python", python).splitlines()
    found = dict(line.split("==") for line in lines if "==" in line)
    return ", ".join(f"{name} {found[name]}" for name in SHOWN if name in found)


def run_tests(python: Path, tests: tuple[str, ...], more: list[str]) -> tuple[bool, str]:
    """Run tests, and return whether they passed, with pytest's closing line."""
    command = [
        python,
        "-m",
        "pytest",
        "-q",
        "--numprocesses=logical",
        "--dist=worksteal",
        *CHOICE,
        *tests,
        *more,
    ]
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=kept | threads, stdout=subprocess.PIPE, text=True
    ) as process:
        last = ""
        for line in process.stdout or ():
            print(line, end="", flush=True)
            last = line.strip() or last
    return process.returncode == 0, re.sub(r"^=+ | =+$", "", last)


def main() -> int:
    """Go through the settings, and say what was tested; 1 if a test failed, or nothing could be tested."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(each.name for each in SETTINGS)}")
    parser.add_argument("--pytest", action="append", default=[], help="one more argument for pytest")
    given = parser.parse_args()
    unknown = set(given.names) - {each.name for each in SETTINGS}
    if unknown:
        parser.error(f"there is no setting {', '.join(sorted(unknown))}")
    chosen = [each for each in SETTINGS if not given.names or each.name in given.names]
    pythons = {each: interpreter(each.python) for each in chosen}
    here = [each for each in chosen if pythons[each]]
    print(f"Making environments in {FOLDER}", flush=True)
    with ThreadPoolExecutor(2) as pool:  # what has no wheel is compiled, on one core each
        made = dict(zip(here, pool.map(lambda each: make(each, pythons[each]), here), strict=True))
    said, passed = [], []
    for setting in chosen:
        what = f"Python {setting.python}, {setting.libraries}"
        if setting not in made:
            said.append(
                f"{what}: SKIPPED, uv finds no Python {setting.python} (uv python install {setting.python})"
            )
            continue
        found = versions(made[setting])
        print(f"{what} ({found})", flush=True)
        ok, closing = run_tests(
            made[setting], TESTS[setting], [*(FORGIVEN if setting.lowest else ()), *given.pytest]
        )
        passed.append(ok)
        said.append(f"{what} ({found}): {closing}")
    print("\n".join(said))
    return 0 if passed and all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
