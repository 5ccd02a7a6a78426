#!/usr/bin/env bash
# Run the tests marked `gpu`, then the benchmarks, on a machine with a CUDA device, part by part; about 15 minutes.
#
#     bash bench/gpu.sh [OUT]                         results go to OUT, by default out/gpu
#     PARTS="kernels oracles bank" bash bench/gpu.sh  only these parts; `machine` always runs
#     TAR=results.tgz bash bench/gpu.sh               also pack OUT into one file, after each part
#     DEVICE=cpu SMALL=1 bash bench/gpu.sh            run everything on a CPU with tiny sizes, to test the script
#
# Each part has its own time limit, and writes NAME.txt and, if it measures, NAME.json, which is updated after each
# measurement: a part that times out keeps its figures, and the next parts run. Nothing is downloaded. Missing packages
# are installed from wheels in bench/wheels or $WHEELS into $PACKAGES, by default out/packages, without touching Python's
# own packages. What is still missing is listed, and the parts that need it are skipped. The script exits with an error
# if a part failed.
#
# cuDNN attention need not be disabled: memlong chooses among torch's other kernels while its model runs, and the
# benchmarks give plain transformers the same ones.
set -euo pipefail

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
RESULTS=${1:-$ROOT/out/gpu}
PYTHON=${PYTHON:-python3}
WHEELS=${WHEELS:-$ROOT/bench/wheels}
PACKAGES=${PACKAGES:-$ROOT/out/packages}
DEVICE=${DEVICE:-cuda}
SMALL=${SMALL:-0}
TAR=${TAR:-}
ALL="kernels oracles streaming torch_bank faiss_bank bank three_b decoder long_context training"
PARTS=${PARTS:-$ALL}
for name in $PARTS; do
    [[ " machine $ALL " == *" $name "* ]] || {
        echo "gpu.sh: there is no part '$name' in PARTS; there are: $ALL" >&2
        exit 2
    }
done

mkdir -p "$RESULTS" "$PACKAGES"
RESULTS=$(cd -- "$RESULTS" && pwd)
PACKAGES=$(cd -- "$PACKAGES" && pwd)
[[ -z $TAR ]] || TAR=$(realpath -m -- "$TAR")
export PYTHONPATH="$ROOT:$ROOT/backends:$PACKAGES${PYTHONPATH:+:$PYTHONPATH}"
export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
FAILED=()
STARTED=$SECONDS

missing() { # missing MODULE...: those that cannot be imported
    "$PYTHON" - "$@" <<'PY'
import sys
from importlib.util import find_spec

print(" ".join(name for name in sys.argv[1:] if find_spec(name) is None))
PY
}

left_out() { # left_out NAME WHY: say that a requested part is skipped
    [[ " $PARTS " != *" $1 "* ]] || echo "== $1 is skipped: $2"
}

pack() { # everything so far in one file
    [[ -z $TAR ]] || tar -czf "$TAR.writing" -C "$(dirname -- "$RESULTS")" "$(basename -- "$RESULTS")" &&
        { [[ -z $TAR ]] || mv -- "$TAR.writing" "$TAR"; }
}

part() { # part NAME SECONDS COMMAND...: run it if it was asked for, and note if it fails
    local name=$1 seconds=$2 code=0 began=$SECONDS
    shift 2
    [[ " $PARTS " == *" $name "* ]] || return 0
    echo
    echo "== $name (at most $seconds s)"
    rm -f "$RESULTS/$name".{txt,log,json}
    timeout --kill-after=10 "$seconds" "$@" >"$RESULTS/$name.txt" 2>"$RESULTS/$name.log" || code=$?
    tail -n 12 "$RESULTS/$name.txt" | cut -c1-240
    if ((code == 5)) && [[ $DEVICE == cpu && $* == *pytest* ]]; then
        code=0 # nothing to run without a GPU, but all of it could be collected
    fi
    if ((code)); then
        FAILED+=("$name")
        echo "$name ended with $code$( ((code != 124)) || echo ', out of time'); the end of $name.log:"
        tail -n 5 "$RESULTS/$name.log" | tr '\r' '\n' | tail -n 5 | cut -c1-240
    fi
    echo "$name took $((SECONDS - began)) s"
    pack
}

NEEDED=(torch transformers numpy pluggy rich safetensors tqdm typer psutil)
FOR_TESTS=(pytest pytest_timeout)
FOR_TRAINING=(peft accelerate)
OPTIONAL=(faiss hnswlib gguf hypothesis matplotlib)
if [[ -n $(missing "${NEEDED[@]}" "${FOR_TESTS[@]}" "${FOR_TRAINING[@]}" "${OPTIONAL[@]}") ]] &&
    compgen -G "$WHEELS/*.whl" >/dev/null; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$PACKAGES" "$WHEELS"/*.whl
fi
LACKING=$(missing "${NEEDED[@]}")
if [[ -n $LACKING ]]; then
    echo "gpu.sh: these modules are needed, and neither installed nor in $WHEELS: $LACKING" >&2
    exit 2
fi
LACKING=$(missing "${FOR_TESTS[@]}" "${FOR_TRAINING[@]}" "${OPTIONAL[@]}")
[[ -z $LACKING ]] || echo "Not installed; what needs them is skipped: $LACKING"

"$PYTHON" - "$DEVICE" "$RESULTS/machine.json" <<'PY' | tee "$RESULTS/machine.txt"
import json
import os
import platform
import sys
from pathlib import Path

import torch
import transformers

device, path = sys.argv[1:]
if device != "cpu" and not torch.cuda.is_available():
    sys.exit("gpu.sh: torch sees no CUDA device; check the driver with nvidia-smi, or set DEVICE=cpu SMALL=1")
lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
found = {
    "python": platform.python_version(),
    "torch": torch.__version__,
    "transformers": transformers.__version__,
    "processor": lines[0].partition(": ")[2] if lines else platform.machine(),
    "cores": os.cpu_count(),
}
if device != "cpu":
    facts = torch.cuda.get_device_properties(device)
    found |= {
        "device": facts.name,
        "device_gb": facts.total_memory / 1e9,
        "capability": f"{facts.major}.{facts.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
Path(path).write_text(json.dumps(found, indent=2) + "\n")
print("\n".join(f"{name}: {value}" for name, value in found.items()))
PY

HAS_FAISS=0
if [[ $DEVICE != cpu && -z $(missing faiss) ]] &&
    "$PYTHON" -c 'import torch, faiss, sys; sys.exit(not hasattr(faiss, "StandardGpuResources"))' 2>/dev/null; then
    HAS_FAISS=1
fi
TEST=("$PYTHON" -m pytest -v -p no:cacheprovider -p no:benchmark --timeout 60)
if [[ $DEVICE == cpu ]]; then
    ORACLES=(-k "cpu and test_2") # the other files have nothing to run here: that they can be collected is shown
else
    ORACLES=(-m gpu)
fi
BACKENDS=(--backend torch)
((!HAS_FAISS)) || BACKENDS+=(--backend faiss)
ON=(--device "$DEVICE")
if ((SMALL)); then
    KERNELS=(--small)
    BANK=(--sizes 1000 --dims 64)
    THREE_B=(--model random-tiny --tokens 6144,6144 --limit-gb 0)
    DECODER=(--model random-tiny --tokens 512 --new-tokens 4 --training-tokens 512)
    LONG=(--model random-tiny --lengths 2048)
    TRAINING=(--model random-tiny --steps 1 --most-rows 4)
else
    KERNELS=()
    BANK=(--sizes 1000,100000 --dims 384)
    THREE_B=()
    DECODER=(--model random-135m --tokens 8192)
    LONG=(--model random-135m --lengths 8192,16384,32768,65536,131072)
    TRAINING=(--model random-135m)
fi

cd -- "$ROOT"
# First what says whether the rest can be believed; then what has a target; what takes longest last.
part kernels 70 "$PYTHON" bench/attention_kernels.py "${ON[@]}" "${KERNELS[@]}" --seconds 50 --json "$RESULTS/kernels.json"
LACKING=$(missing "${FOR_TESTS[@]}")
if [[ -n $LACKING ]]; then
    for name in oracles streaming torch_bank faiss_bank; do left_out "$name" "not installed: $LACKING"; done
else
    part oracles 100 "${TEST[@]}" "${ORACLES[@]}" tests/decoder/test_oracles_on_devices.py
    part streaming 50 "${TEST[@]}" -m gpu tests/decoder/test_gpu.py
    part torch_bank 40 "${TEST[@]}" -m gpu tests/backends/test_torch_gpu.py
    if ((HAS_FAISS)); then
        part faiss_bank 90 "${TEST[@]}" -m gpu tests/backends/test_faiss_gpu.py
    else
        left_out faiss_bank "there is no FAISS with GPU code, or no GPU"
    fi
fi
part bank 65 "$PYTHON" bench/bank.py "${ON[@]}" "${BACKENDS[@]}" "${BANK[@]}" --seconds 45 --json "$RESULTS/bank.json"
part three_b 190 "$PYTHON" bench/three_b.py "${ON[@]}" "${THREE_B[@]}" --seconds 165 --json "$RESULTS/three_b.json"
part decoder 70 "$PYTHON" bench/decoder.py "${ON[@]}" --index-device "$DEVICE" "${BACKENDS[@]}" "${DECODER[@]}" \
    --seconds 50 --json "$RESULTS/decoder.json"
part long_context 200 "$PYTHON" bench/long_context.py "${ON[@]}" "${LONG[@]}" --seconds 180 --out "$RESULTS"
LACKING=$(missing "${FOR_TRAINING[@]}")
if [[ -n $LACKING ]]; then
    left_out training "not installed: $LACKING"
else
    part training 95 "$PYTHON" bench/training.py "${ON[@]}" "${TRAINING[@]}" --seconds 75 --json "$RESULTS/training.json"
fi

echo
"$PYTHON" bench/results.py "$RESULTS"/*.json >"$RESULTS/table.txt"
echo "$((SECONDS - STARTED)) s in all; what was measured:"
cat "$RESULTS/table.txt"
pack
if ((${#FAILED[@]})); then
    echo "Parts that failed: ${FAILED[*]}"
    exit 1
fi
