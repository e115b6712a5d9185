#!/usr/bin/env bash
# Everything that only a GPU can show, in calls of at most 8 minutes.
#
#     benchmarks/gpu_suite.sh OUT_DIR [first|second|all|STAGE...]
#
# On a GPU of your own, after `make setup`:  SUITE_SECONDS=7200 benchmarks/gpu_suite.sh results all
# On one that is lent for minutes, `make gpu-bundle` makes here what takes long there; the folder gpu-bundle/ then travels with
# the checkout, and the two calls are:       benchmarks/gpu_suite.sh OUT_DIR  and  benchmarks/gpu_suite.sh OUT_DIR second
#
# Stages run in order of value. None stops the next, none begins after SUITE_SECONDS (470), each has a limit of its own, and
# after each of them OUT_DIR holds what there is so far, in at most 8 files: stages.txt (status and seconds), gate.xml, the
# rows loss.csv, throughput.csv and run.csv, throughput.png, logs.tar.gz with everything, and triton.tar.xz, the kernels'
# machine code for the gpu-bundle/ of the next call. The exit status is 1 if a stage failed.
#
# Environment: PYTHON; IMAGES, a folder with CIFAR-10 (without it, the built-in digits are the images); LINES, shown of a log.
set -uo pipefail
first=(info gate loss queue steps run norm arms)
second=(rest ceilings losses batchnorm augment compiled several digits memcheck racecheck)

cd "$(dirname "$0")/.."
out=$(mkdir -p "$1" && cd "$1" && pwd) || exit 2
shift
case "${*:-first}" in
  first) stages=("${first[@]}") ;;
  second) stages=("${second[@]}") ;;
  all) stages=("${first[@]}" "${second[@]}") ;;
  *) stages=("$@") ;;
esac
for name in "${stages[@]}"; do
  [[ " ${first[*]} ${second[*]} " == *" $name "* ]] || { echo "no stage is called $name; there are ${first[*]} ${second[*]}"; exit 2; }
done
total=${SUITE_SECONDS:-470}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
work=$(mktemp -d)
monitor=
trap 'kill $monitor 2>/dev/null; rm -rf "$work"' EXIT
# Triton's index of its cache has absolute paths: this is where gpu_bundle wrote it.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/bacon_fast_triton} TORCHINDUCTOR_CACHE_DIR=$PWD/build/inductor
export PYTHONUNBUFFERED=1 PYTHONPATH=$work/site:$PWD:${PYTHONPATH:-} MAX_JOBS
MAX_JOBS=$(nproc)
data=()
[ -n "${IMAGES:-}" ] && data=(--data-dir "$IMAGES")

bring_back() {  # copies what there is into OUT_DIR
  for file in stages.txt gate.xml loss.csv throughput.csv throughput.png run.csv; do
    [ -f "$work/$file" ] && cp "$work/$file" "$out/"
  done
  tar --exclude=./site --exclude='*.pt' --exclude='*.npz' -czf "$work/logs.tar.gz.tmp" -C "$work" . 2>/dev/null
  mv "$work/logs.tar.gz.tmp" "$out/logs.tar.gz"
}

stage() {  # stage NAME SECONDS COMMAND...: runs it under the limit; keeps output, status and results
  local name=$1 limit=$2 start=$SECONDS left=$((total - SECONDS)) status
  shift 2
  if [ "$left" -lt 10 ]; then
    echo "$name: no time left" | tee -a "$work/stages.txt"
    status=124
  else
    timeout --kill-after=5 $((limit < left ? limit : left)) "$@" >"$work/$name.log" 2>&1
    status=$?
    echo "$name: status $status after $((SECONDS - start)) s" | tee -a "$work/stages.txt"
    tail -n "${LINES:-25}" "$work/$name.log"
  fi
  failed=$((failed | (status != 0)))
  bring_back
  return $status
}
failed=0

prepare() {  # puts what gpu-bundle holds into its place
  [ -d gpu-bundle ] || return 0
  if compgen -G 'gpu-bundle/wheels/*.whl' >/dev/null; then
    $python -m pip install --quiet --no-index --no-deps --no-compile --target "$work/site" gpu-bundle/wheels/*.whl
  fi
  if [ "$($python -m benchmarks.gpu_bundle --digest)" = "$(cat gpu-bundle/_C.digest 2>/dev/null)" ]; then
    cp gpu-bundle/_C.*.so bacon_fast/
  fi
  if [ -f gpu-bundle/triton.tar.xz ] && [ ! -d "$TRITON_CACHE_DIR" ]; then
    tar -xJf gpu-bundle/triton.tar.xz -C "$(dirname "$TRITON_CACHE_DIR")"
  fi
}

# Without a device every test would be skipped, and so pass.
$python -c 'import torch; torch.cuda.init()' || { echo "error: $python finds no usable CUDA device"; exit 1; }
nvidia-smi 2>&1 | tee "$work/nvidia-smi.txt" | sed -n 3,14p
nvidia-smi dmon -d 5 -s pucm >"$work/dmon.txt" 2>&1 &  # clocks, use, memory
monitor=$!
prepare >"$work/prepare.log" 2>&1
cat "$work/prepare.log"
$python -c 'import torch, bacon_fast._C as native, sys; sys.exit(not native.built_with_cuda)' 2>>"$work/prepare.log" ||
  stage build 150 $python setup.py build_ext --inplace

gate=$(tr '\n' ' ' <benchmarks/gpu_gate.txt)
# Kernels that the bundle lacks are compiled at their first call: by all cores at once.
tests=(env OMP_NUM_THREADS=1 $python -m pytest -q -n "$((MAX_JOBS > 12 ? 10 : (MAX_JOBS + 1) / 2))" --dist worksteal -o addopts= tests/gpu)
sanitize=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1)
# No graphs: what is allocated inside a capture the sanitizer does not see.
plain=($python -m pytest -q -x -o addopts= tests/gpu -k "($gate) and not graph and not replay and not captured")
loss=($python -m benchmarks.loss --device cuda --quick --out "$work/loss.csv" --times "$work/contrastive_times.csv")
ladder=($python -m benchmarks.throughput --device cuda "${data[@]}" --out "$work/throughput.csv")
for name in "${stages[@]}"; do
  case $name in
    info) stage info 30 $python -m bacon_fast.info ;;
    gate) stage gate 110 "${tests[@]}" -k "$gate" --junitxml "$work/gate.xml" ;;
    loss) stage loss 70 "${loss[@]}" --only "K=10 D" ;;
    queue) stage queue 55 "${loss[@]}" --only "B=4096" ;;
    steps) stage steps 120 "${ladder[@]}" --arms D F --rounds 5 --slice 2 --seconds 100 ;;
    run) stage run 60 $python -m benchmarks.throughput --device cuda "${data[@]}" --full-run 3000 --out "$work/run.csv" ;;
    norm) stage norm 80 "${ladder[@]}" --arms F F-norm --rounds 3 --slice 1.5 --no-memory ;;
    arms) stage arms 300 "${ladder[@]}" --arms A B C F --rounds 3 --slice 1.5 --seconds 150 --no-memory ;;
    rest) stage rest 150 "${tests[@]}" -k "not ($gate)" ;;
    ceilings) stage ceilings 25 $python -m benchmarks.ceilings --device cuda --out "$work/ceilings.csv" ;;
    losses) stage losses 160 "${loss[@]}" ;;
    batchnorm) stage batchnorm 60 $python -m benchmarks.batchnorm --device cuda --quick --out "$work/batchnorm.csv" ;;
    augment) stage augment 25 $python -m benchmarks.augment --device cuda --out "$work/augment.csv" ;;
    compiled) stage compiled 240 "${ladder[@]}" --arms E F F-compile --rounds 3 --slice 1.5 --no-memory ;;
    several) stage several 60 "${ladder[@]}" --arms F F-tf32 --concurrent 3 --rounds 3 --slice 2 --no-memory ;;
    digits) stage digits 60 $python train.py digits --run-dir "$work/digits" ;;
    memcheck | racecheck) stage $name 200 "${sanitize[@]}" --tool $name "${plain[@]}" ;;
  esac
done
if [ -d "$TRITON_CACHE_DIR" ]; then
  XZ_OPT='-2 -T0' timeout 30 tar -cJf "$work/triton.tar.xz" -C "$(dirname "$TRITON_CACHE_DIR")" "$(basename "$TRITON_CACHE_DIR")" &&
    [ "$(stat -c %s "$work/triton.tar.xz")" -lt 16000000 ] && mv "$work/triton.tar.xz" "$out/"
fi
cat "$work/stages.txt"
exit $failed
