#!/usr/bin/env bash
# Long runs on a GPU machine that is lent for minutes: trains until time is up, and brings back what the next call needs.
#
#     benchmarks/gpu_train.sh OUT_DIR SECONDS IMAGES|- STATE_DIR TABLE [OPTION...]
#
# Runs `python -m bacon_fast.reproduce TABLE OPTION...` (`--jobs 3` trains three runs at once on one GPU) on an image folder
# or on an archive that holds one (IMAGES; -: the table needs none). STATE_DIR holds the files state.* that the last call
# left in its OUT_DIR; before the first call it need not exist. SIGTERM stops the runs a minute before SECONDS are over:
# they save, and OUT_DIR gets state.00, state.01, ... (every run with its newest checkpoint, in parts of 15 MB) and the
# table as it stands. For example, BaCon's first column at full length, one call after the other:
#
#     benchmarks/gpu_train.sh $OUT 570 .carry/cifar10_jpeg.tar.xz .carry/state bacon-table1 --columns bacon-cifar10 \
#       --methods fixmatch,fixmatch+abc,fixmatch+abc+bacon --seeds 0 --jobs 3 --set precision=bf16
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "$1" && cd "$1" && pwd)
seconds=$2 images=$3 state=$4 table=$5
shift 5
python=${PYTHON:-python3}
work=$PWD/build/gpu_train  # always the same: a run knows its images by this path
rm -rf "$work"
mkdir -p "$work/runs"
trap 'rm -rf "$work"' EXIT
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD:${PYTHONPATH:-}

options=("$@")
if [ "$images" != - ]; then
  if [ -f "$images" ]; then
    mkdir "$work/archive"
    tar -xf "$images" -C "$work/archive"
    images=$(dirname "$(find "$work/archive" -type d -name train | head -n 1)")
  fi
  options+=(--dataset folder --data-dir "$images")
fi
if compgen -G "$state/state.*" >/dev/null; then
  cat "$state"/state.* | tar -x -C "$work/runs"
fi
reserve=${TRAIN_RESERVE:-60}
status=0
timeout --signal=TERM --kill-after="$reserve" $((seconds - reserve - SECONDS)) \
  "$python" -m bacon_fast.reproduce "$table" "${options[@]}" --no-calibrate --out "$work/runs" 2>&1 |
  tee "$work/log.txt" || status=$?

# Of each run all but the newest checkpoint stay behind.
find "$work/runs" -name 'step-*.pt' | sort | awk -F/ '{
  folder = $0; sub("/[^/]*$", "", folder)
  if (folder in newest) print newest[folder]
  newest[folder] = $0
}' | xargs -r -d '\n' rm --
rm -f "$out"/state.*
tar -c -C "$work/runs" . | split --bytes=15M --numeric-suffixes --suffix-length=2 - "$out/state."
tail -n 40 "$work/log.txt" >"$out/log.txt"
for file in table.md table.csv runs.csv; do
  if [ -f "$work/runs/$file" ]; then cp "$work/runs/$file" "$out/"; fi
done
# 124: time was up, and there is something to go on from.
if [ $status = 124 ]; then echo "stopped after $SECONDS s: call again with the files $out/state.* as STATE_DIR"; fi
[ $status = 124 ] || exit $status
