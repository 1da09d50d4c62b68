#!/usr/bin/env bash
# Everything that a machine with an NVIDIA GPU can tell, in one call: its tests, then rows of attention, linears and
# whole models. Needs torch, Triton and transformers, and no network.
#
#   benchmarks/gpu.sh                          at most 8 minutes; goes on where an earlier call was cut
#   benchmarks/gpu.sh --only PART...           measures what has one of these in its name, anew, without the tests
#   benchmarks/gpu.sh --device cpu             goes the same way with tiny shapes, without a GPU
#
# GPU_SECONDS  for all of it, 470 if nothing is said; a step that would not end in time is not begun
# OUT          where gpu.csv, gpu.log and gpu-tests.log go, benchmarks/results if nothing is said
# PYTHON       the interpreter, .venv/bin/python or python3 if nothing is said
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
started=$SECONDS
total=${GPU_SECONDS:-470}
out=${OUT:-benchmarks/results}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
device=cuda
is_whole=1
for ((i = 1; i <= $#; i++)); do
    case ${!i} in
    --only) is_whole=0 ;;
    --device) next=$((i + 1)) && device=${!next:-} ;;
    esac
done
mkdir -p "$out" || exit 1
exec > >(tee -a "$out/gpu.log") 2>&1

left() { echo $((total - (SECONDS - started))); }

# Octavo itself, from this tree; a machine without a network has what its installation needs, or links serve.
if ! "$python" -c "import octavo" 2>/dev/null; then
    "$python" -m pip install --quiet --no-index --no-build-isolation --no-deps --editable . || {
        mkdir -p .cache/gpu/octavo
        for part in octavo/* common models ops; do ln -sfn "$PWD/$part" ".cache/gpu/octavo/${part##*/}"; done
        export PYTHONPATH="$PWD/.cache/gpu${PYTHONPATH:+:$PYTHONPATH}"
    }
fi
echo "== $(date -u +%FT%TZ) $*"
"$python" -c "
import torch, transformers, octavo.ops
print('torch', torch.__version__, 'transformers', transformers.__version__)
try:
    import triton; print('triton', triton.__version__)
except ImportError as error:
    print(error)
print(octavo.ops.report())" || exit 1
if [ "$device" = cuda ]; then
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.mem,power.limit --format=csv,noheader || exit 1
fi

# The tests that a GPU alone can run: every op against its reference, opcheck, torch.compile, CUDA graphs.
failed=0
if [ $is_whole = 1 ]; then
    tests=(tests/ops/test_cuda_attention_compiled.py tests/ops/test_cuda_codec.py tests/ops/test_cuda_linear.py)
    if ! "$python" -c "import pytest" 2>/dev/null; then
        echo "the tests are left out: pytest is not installed" && failed=1
    else
        if ! "$python" -c "import hypothesis" 2>/dev/null; then
            echo "hypothesis is not installed: of the tests those of attention alone are run" && failed=1
            tests=("${tests[0]}")
        fi
        workers=()
        if "$python" -c "import xdist" 2>/dev/null; then workers=(-n "$(($(nproc) < 12 ? $(nproc) : 12))"); fi
        # One thread each, or as many as there are cores would wait for each other in every worker; names as they end,
        # since a summary comes only at the end.
        OMP_NUM_THREADS=1 timeout $((total / 4)) "$python" -m pytest -v -p no:benchmark -p no:cacheprovider \
            -k "gpu or graph" --durations=5 "${workers[@]}" "${tests[@]}" | tee "$out/gpu-tests.log" || failed=1
    fi
fi

timeout $(($(left) + 10)) "$python" benchmarks/gpu.py --seconds "$(left)" --results "$out" "$@" || failed=1
echo "== ended after $((SECONDS - started)) s, exit code $failed"
exit $failed
