#!/usr/bin/env bash
# The tests marked `gpu`, and then the benchmarks, on a machine with a CUDA device; under 8 minutes in all.
#
#     bash bench/gpu.sh [OUT]               results go to OUT, by default out/gpu: a JSON file a part, and table.txt
#     DEVICE=cpu SMALL=1 bash bench/gpu.sh  the whole script on a CPU, with tiny sizes: whether it runs
#
# Nothing is downloaded. What is not installed is taken from wheels: those in the folder bench/wheels, or $WHEELS. They go
# to OUT/packages, and leave Python's own packages alone. What is missing still is named, and the parts that can do without
# it run. The script ends with an error if a part did.
set -euo pipefail

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
OUT=${1:-$ROOT/out/gpu}
PYTHON=${PYTHON:-python3}
WHEELS=${WHEELS:-$ROOT/bench/wheels}
DEVICE=${DEVICE:-cuda}
SMALL=${SMALL:-0}

mkdir -p "$OUT"
OUT=$(cd -- "$OUT" && pwd)
rm -f "$OUT"/*.json "$OUT"/table.txt
export PYTHONPATH="$ROOT:$ROOT/backends:$OUT/packages${PYTHONPATH:+:$PYTHONPATH}"
export TOKENIZERS_PARALLELISM=false
FAILED=()

missing() { # missing MODULE...: those that cannot be imported
    "$PYTHON" - "$@" <<'PY'
import sys
from importlib.util import find_spec

print(" ".join(name for name in sys.argv[1:] if find_spec(name) is None))
PY
}

part() { # part NAME SECONDS COMMAND...: run it, and note if it fails
    local name=$1 seconds=$2 code=0
    shift 2
    echo
    echo "== $name (at most $seconds s)"
    timeout --kill-after=10 "$seconds" "$@" 2>"$OUT/$name.log" || code=$?
    if ((code)); then
        FAILED+=("$name")
        echo "$name ended with $code$( ((code == 124)) && echo ', out of time'); the end of $OUT/$name.log:"
        tail -n 5 "$OUT/$name.log"
    fi
}

NEEDED=(torch transformers numpy pluggy rich safetensors tqdm typer psutil)
FOR_TESTS=(pytest pytest_timeout hypothesis)
OPTIONAL=(faiss hnswlib peft accelerate matplotlib)
if [[ -n $(missing "${NEEDED[@]}" "${FOR_TESTS[@]}" "${OPTIONAL[@]}") ]] && compgen -G "$WHEELS/*.whl" >/dev/null; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps --upgrade --target "$OUT/packages" "$WHEELS"/*.whl
fi
LACKING=$(missing "${NEEDED[@]}")
if [[ -n $LACKING ]]; then
    echo "gpu.sh: these modules are needed, and neither installed nor in $WHEELS: $LACKING" >&2
    exit 2
fi
LACKING=$(missing "${FOR_TESTS[@]}" "${OPTIONAL[@]}")
[[ -z $LACKING ]] || echo "Not installed, and what needs them is left out: $LACKING"
"$PYTHON" - "$DEVICE" <<'PY' || exit 2
import platform
import sys

import torch
import transformers

print(f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}")
if sys.argv[1] != "cpu" and not torch.cuda.is_available():
    sys.exit("gpu.sh: torch sees no CUDA device; check the driver with nvidia-smi, or set DEVICE=cpu SMALL=1")
if sys.argv[1] != "cpu":
    print(f"{torch.cuda.get_device_name()}, {torch.cuda.get_device_properties(0).total_memory / 1e9:.0f} GB")
PY

if ((SMALL)); then
    BANK=(--sizes 1000 --dims 64)
    DECODER=(--model random-tiny --tokens 512 --new-tokens 4 --training-tokens 512)
    LONG=(--model random-tiny --lengths 2048)
    THREE_B=(--model random-tiny --tokens 6144,6144 --limit-gb 0)
else
    BANK=(--sizes 1000,100000)
    DECODER=(--model random-135m --tokens 8192)
    LONG=(--model random-135m --lengths 8192,16384,32768,65536,131072)
    THREE_B=(--seconds 160)
fi
TESTS=(-m gpu "$ROOT/tests")
[[ $DEVICE != cpu ]] || TESTS=(-k cpu "$ROOT/tests/decoder/test_oracles_on_devices.py")
BACKENDS=(--backend torch)
if [[ $DEVICE != cpu && -z $(missing faiss) ]] &&
    "$PYTHON" -c 'import faiss, sys; sys.exit(not hasattr(faiss, "StandardGpuResources"))' 2>/dev/null; then
    BACKENDS+=(--backend faiss)
fi

cd -- "$ROOT"
if [[ -z $(missing "${FOR_TESTS[@]}") ]]; then
    part tests 110 "$PYTHON" -m pytest -q -p no:cacheprovider --continue-on-collection-errors "${TESTS[@]}"
fi
part bank 50 "$PYTHON" bench/bank.py --device "$DEVICE" "${BACKENDS[@]}" "${BANK[@]}" --json "$OUT/bank.json"
part decoder 60 "$PYTHON" bench/decoder.py --device "$DEVICE" --index-device "$DEVICE" "${BACKENDS[@]}" \
    "${DECODER[@]}" --json "$OUT/decoder.json"
part long_context 70 "$PYTHON" bench/long_context.py --device "$DEVICE" "${LONG[@]}" --out "$OUT"
part three_b 180 "$PYTHON" bench/three_b.py --device "$DEVICE" "${THREE_B[@]}" --json "$OUT/three_b.json"

echo
"$PYTHON" bench/results.py "$OUT"/*.json | tee "$OUT/table.txt"
if ((${#FAILED[@]})); then
    echo "Parts that failed: ${FAILED[*]}"
    exit 1
fi
