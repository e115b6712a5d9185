#!/usr/bin/env bash
# One call on a GPU machine, under 10 minutes: ceilings, build, correctness gates, measurements, a short training.
#
#     benchmarks/gpu_suite.sh OUT_DIR [CIFAR_FOLDER|-] [STAGE...]
#
# Without a CIFAR_FOLDER the throughput is measured on the built-in digits. Without STAGEs all of them run, in the order
# below, until time is up; what they need together is more than one call has, so take them in three:
#
#     build info tests ceilings loss augment batchnorm digits
#     build images compile throughput run cifar
#     build memcheck racecheck
#
# A red gate (tests/gpu) ends a call: nothing is measured. No stage begins after SUITE_SECONDS (default 560) and each has
# its own limit, so the whole ends before 10 minutes whatever happens. After every stage OUT_DIR holds what there is so
# far in at most 8 files: stages.txt, tests.log, throughput_cuda.csv and .png, and suite.tar.gz with everything (but
# checkpoints). Packages that the machine lacks (tyro, typeguard, docstring_parser, ...) come by PYTHONPATH.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "$1" && cd "$1" && pwd)
cifar=${2:--}
stages=" ${*:3} "
total=${SUITE_SECONDS:-560}
python=${PYTHON:-python3}
work=$(mktemp -d)
monitor=
trap 'kill $monitor 2>/dev/null; rm -rf "$work" "$work.tar.gz"' EXIT
# What torch.compile makes stays on a warm machine, in a folder that git ignores.
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD:${PYTHONPATH:-} TORCHINDUCTOR_CACHE_DIR=$PWD/build/inductor

bundle() {  # puts what there is into OUT_DIR
  tar --exclude='*.pt' --exclude='*.npz' -czf "$work.tar.gz" -C "$work" . && mv "$work.tar.gz" "$out/suite.tar.gz"
  for file in stages.txt tests.log throughput_cuda.csv throughput_cuda.png; do
    [ -f "$work/$file" ] && cp "$work/$file" "$out/"
  done
  return 0
}

stage() {  # stage NAME SECONDS COMMAND...: runs it, if it is wanted, under the limit; keeps output and status
  local name=$1 limit=$2
  shift 2
  if [[ $stages != "  " && $stages != *" $name "* ]]; then
    echo "$name: not asked for" >>"$work/stages.txt"
    return 0
  fi
  local left=$((total - SECONDS))
  if [ "$left" -lt 1 ]; then
    echo "$name: no time left" | tee -a "$work/stages.txt"
    return 1
  fi
  local start=$SECONDS
  timeout --kill-after=5 $((limit < left ? limit : left)) "$@" >"$work/$name.log" 2>&1
  local status=$?
  echo "$name: status $status after $((SECONDS - start)) s" | tee -a "$work/stages.txt"
  bundle
  return $status
}

nvidia-smi >"$work/nvidia-smi.txt" 2>&1
nvidia-smi dmon -d 5 -s pucm >"$work/dmon.txt" 2>&1 &  # clocks, use, memory
monitor=$!
# Only the architecture of this machine: the other targets are compiled where there is time.
arch=$($python -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || exit 1
export TORCH_CUDA_ARCH_LIST=$arch MAX_JOBS
MAX_JOBS=$(nproc)

stage build 150 $python setup.py build_ext --inplace || exit 1
stage info 20 $python -m bacon_fast.info
# Kernels are compiled at their first call, some 800 of them: by all cores at once.
stage tests 320 env OMP_NUM_THREADS=1 $python -m pytest -q -n "$((MAX_JOBS > 4 ? MAX_JOBS - 2 : 2))" --dist worksteal tests/gpu || {
  echo "red gate: nothing is measured" | tee -a "$work/stages.txt"
  bundle
  exit 1
}
stage ceilings 25 $python benchmarks/ceilings.py --device cuda --out "$work/ceilings_cuda.csv"

data=()
if [ "$cifar" != - ]; then
  stage images 40 $python -c "
import sys
from pathlib import Path
sys.path.insert(0, 'benchmarks')
from throughput_problem import decode_folder
print(decode_folder(Path(sys.argv[1]), Path(sys.argv[2])))" "$cifar" "$work" &&
    data=(--data-dir "$(tail -n 1 "$work/images.log")")
fi
ladder=($python benchmarks/throughput.py --device cuda "${data[@]}" --out "$work/throughput_cuda.csv")
# max-autotune compiles for minutes: by itself first, so that if it takes too long the other arms are still measured.
arms=(USB A B C D F F-tf32)
stage compile 130 "${ladder[@]}" --arms E --rounds 1 --slice 0.5 --no-memory --out "$work/compile_cuda.csv" &&
  arms+=(E)
stage throughput 230 "${ladder[@]}" --arms "${arms[@]}" --concurrent 3 --rounds 5 --slice 2.5 --seconds 170
stage run 60 "${ladder[@]}" --full-run 3000 --out "$work/throughput_run_cuda.csv"
stage loss 120 $python benchmarks/loss.py --device cuda --quick --out "$work/loss_cuda.csv"
stage augment 25 $python benchmarks/augment.py --device cuda --out "$work/augment_cuda.csv"
stage batchnorm 120 $python benchmarks/batchnorm.py --device cuda --quick --out "$work/batchnorm_cuda.csv"
stage digits 60 $python train.py digits --run-dir "$work/digits"
if [ ${#data[@]} -gt 0 ]; then
  stage cifar 60 $python train.py bacon-cifar10 --dataset arrays "${data[@]}" --steps 3000 --bacon.contrast-start 0.1 \
    --precision bf16 --no-report --run-dir "$work/cifar"
fi
# Every allocation by itself, so that what lies beyond it is seen.
native=(tests/gpu/test_bank_gpu.py tests/gpu/test_augment_gpu.py tests/gpu/test_sgd_ema_gpu.py tests/gpu/test_heads_gpu.py
  tests/gpu/test_bacon_step_gpu.py tests/gpu/test_batchnorm_gpu.py)
for tool in memcheck racecheck; do
  stage $tool 220 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 1 \
    $python -m pytest -q -x "${native[@]}"
done
bundle
cat "$work/stages.txt"
