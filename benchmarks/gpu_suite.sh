#!/usr/bin/env bash
# One call on a GPU machine, under 10 minutes: build, correctness gates, then measurements and a short training.
# Packages that the machine lacks (tyro, tensorboard, scikit-learn, ...) come by PYTHONPATH; the limits add up to 600 s.
# Usage: benchmarks/gpu_suite.sh OUT_DIR [CIFAR_FOLDER]. Everything goes to files in OUT_DIR; nothing is measured on a red gate.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "$1" && cd "$1" && pwd)
cifar=${2:-}
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD:${PYTHONPATH:-}

stage() {  # stage NAME SECONDS COMMAND...: runs it under a limit, keeps its output, reports its status
  local name=$1 limit=$2
  shift 2
  local start=$SECONDS
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  local status=$?
  echo "$name: status $status after $((SECONDS - start)) s" | tee -a "$out/stages.txt"
  return $status
}

: >"$out/stages.txt"
nvidia-smi >"$out/nvidia-smi.txt" 2>&1
# Only the architecture of this machine: the other targets are compiled where there is time.
arch=$($python -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || exit 1
TORCH_CUDA_ARCH_LIST=$arch MAX_JOBS=$(nproc) stage build 150 $python setup.py build_ext --inplace || exit 1
stage info 20 $python -m bacon_fast.info
stage tests 150 $python -m pytest -q tests/gpu || { echo "red gate: nothing is measured" | tee -a "$out/stages.txt"; exit 1; }
stage loss 120 $python benchmarks/loss.py --device cuda --quick --out "$out/loss_cuda.csv"
stage augment 40 $python benchmarks/augment.py --device cuda --out "$out/augment_cuda.csv"
stage digits 60 $python train.py digits --run-dir "$out/digits"
if [ -n "$cifar" ]; then
  stage cifar 60 $python train.py bacon-cifar10 --dataset folder --data-dir "$cifar" --steps 1000 --contrast-start 0.1 \
    --precision bf16 --no-report --run-dir "$out/cifar"
fi
cat "$out/stages.txt"
