#!/usr/bin/env bash
# From raw corpora to an adapter that serves: prepare, encode, mix, train, evaluate, export.
#
#   recipes/run_expressive_finetuning.sh --gpus 1
#   recipes/run_expressive_finetuning.sh --gpus 8 --skip-datasets --resume-from-checkpoint checkpoints/expressive/checkpoint_001000
#
#   --gpus N                       GPUs of this machine, 0 for the CPU (default: all there are)
#   --config YAML                  options of the run (default: recipes/configs/expressive_finetuning.yaml)
#   --raw DIR                      raw corpora, each in a folder of its name: DIR/crema_d, ... (default: raw)
#   --skip-datasets                train on the tables that are there; prepare and encode nothing
#   --sample-seconds S             length of the clips in which the result speaks (default: 10)
#   --resume-from-checkpoint PATH  go on from this checkpoint (default: from the newest of the run, if there is one)
#   -- ...                         everything after this goes to the training, such as --lora.rank 64
#
# Paths in the configuration start from the folder of the repository. Its dataset.sources says which corpora: the source
# codes/esd is made of prepared/esd beside it, and that of raw/esd. RAVDESS is downloaded if it is not there; a corpus
# that is nowhere is left out of the mixture. A stage that fails stops the script with its name; run again, it skips what
# is done.
set -euo pipefail

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; }
fail() { printf 'error: %s\n       %s\n' "$1" "$2" >&2; exit 1; }
value() { [ $# -ge 2 ] && [ -n "$2" ] || fail "$1 has no value." "See --help."; }

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
gpus="" config=$root/recipes/configs/expressive_finetuning.yaml raw=$root/raw skip_datasets=false resume="" sample_seconds=10
while [ $# -gt 0 ]; do
    case "$1" in
        --gpus) value "$@"; gpus=$2; shift 2 ;;
        --config) value "$@"; config=$(realpath -m -- "$2"); shift 2 ;;
        --raw) value "$@"; raw=$(realpath -m -- "$2"); shift 2 ;;
        --skip-datasets) skip_datasets=true; shift ;;
        --sample-seconds) value "$@"; sample_seconds=$2; shift 2 ;;
        --resume-from-checkpoint)
            value "$@"
            [ "$2" = latest ] && resume=latest || resume=$(realpath -m -- "$2")
            shift 2
            ;;
        --) shift; break ;;
        -h | --help) usage; exit 0 ;;
        *) fail "$1 is not an option." "See --help; options of the training follow after --." ;;
    esac
done
cd "$root"
[ -x .venv/bin/python ] && PATH="$PWD/.venv/bin:$PATH"
[ -n "$gpus" ] || gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c . || true)
[[ $gpus =~ ^[0-9]+$ ]] || fail "--gpus is $gpus." "Give a number, 0 for the CPU."
[[ $sample_seconds =~ ^[0-9]+([.][0-9]+)?$ ]] || fail "--sample-seconds is $sample_seconds." "Give a number of seconds."
[ -z "$resume" ] || [ "$resume" = latest ] || [ -d "$resume" ] || fail "$resume: no such checkpoint." "Name a folder checkpoint_NNNNNN of a run."

stage=options
trap 'status=$?; [ $status -eq 0 ] || [ "$stage" = options ] || printf "error: the stage \"%s\" failed.\n       Its own message is above. Run the same command again to go on from there.\n" "$stage" >&2' EXIT
begin() { stage=$1; printf '\n--- %s\n' "$stage"; }

# What the configuration says, a line each: run folder, base model, revision, longest window, last step; then the sources.
mapfile -t options < <(python - --config "$config" "$@" <<'PYTHON'
import sys

from hf_csm.cli import run_command
from hf_csm.config_parser import parse_run_config


def show() -> None:
    run = parse_run_config(sys.argv[1:])
    paths = run.moshi_paths
    print(run.run_dir, paths.hf_repo_id, paths.revision or "", run.dataset.duration_sec, run.training.max_steps, sep="\n")
    print(*(source.path for source in run.dataset.training_sources()), sep="\n")


sys.exit(run_command(show))
PYTHON
)
[ ${#options[@]} -ge 6 ] || exit 1
run_dir=${options[0]} base=${options[1]} revision=${options[2]} duration=${options[3]} max_steps=${options[4]}
sources=("${options[@]:5}")

launch=()
case "$gpus" in
    0) launch=(accelerate launch --quiet --config_file accelerate_configs/cpu.yaml --num_cpu_threads_per_process "$(nproc)") ;;
    1) launch=(accelerate launch --quiet --config_file accelerate_configs/single_gpu.yaml) ;;
    *) launch=(accelerate launch --quiet --config_file accelerate_configs/multi_gpu.yaml --num_processes "$gpus") ;;
esac
encoder=(hf-csm)
[ "$gpus" -le 1 ] || encoder=("${launch[@]}" --module hf_csm.cli)

if [ $skip_datasets = false ]; then
    for codes in "${sources[@]}"; do
        corpus=$(basename "$codes") place=$(dirname "$codes")
        prepared=$(dirname "$place")/prepared/$corpus
        if [ -e "$codes" ] || [ "$(basename "$place")" != codes ]; then
            continue # there already, or not ours to make: a Hub id, a folder of another kind
        fi
        if [ -e "$raw/$corpus" ]; then
            begin "prepare $corpus"
            hf-csm prepare "$corpus" --raw "$raw/$corpus" --out "$prepared"
        elif [ "$corpus" = ravdess ]; then
            begin "prepare $corpus"
            hf-csm prepare "$corpus" --out "$prepared"
        elif [ ! -d "$prepared" ]; then
            continue
        fi
        begin "encode $corpus"
        "${encoder[@]}" encode "$prepared" --out "$codes" --base-model "$base" ${revision:+--revision "$revision"} \
            --duration-sec "$duration"
    done
fi

begin mix
mixture=$(python - ${resume:+--resume} --config "$config" "$@" <<'PYTHON'
import dataclasses
import json
import sys
from pathlib import Path

import yaml

from hf_csm.cli import run_command
from hf_csm.config_parser import parse_run_config
from hf_csm.errors import UserError


def show() -> None:
    run = parse_run_config([argument for argument in sys.argv[1:] if argument != "--resume"])
    sources = run.dataset.training_sources()
    there = [source for source in sources if Path(source.path).exists() or Path(source.path).parent.name != "codes"]
    for source in sources:
        if source not in there:
            print(f"{source.path} is not there and is left out of the mixture.", file=sys.stderr)
    if not there:
        raise UserError("None of the corpora is there.", "Put one in its folder under --raw; see --help.")
    trained = Path(run.run_dir, "config.yaml")
    mixture = [dataclasses.asdict(source) for source in there]
    if trained.exists() and "--resume" not in sys.argv:
        earlier = yaml.safe_load(trained.read_text())["dataset"]["sources"]
        if earlier and earlier != mixture:
            raise UserError(
                f"{run.run_dir} was trained on another mixture: {json.dumps(earlier)}, not {json.dumps(mixture)}.",
                "Give another folder with `-- --run_dir DIR`, or go on with --resume-from-checkpoint PATH.",
            )
    print(json.dumps(mixture))


sys.exit(run_command(show))
PYTHON
)
mkdir -p "$run_dir"
mix=(--dataset.manifest_path null --dataset.sources "$mixture")
if [[ $mixture == *.jsonl\"* ]]; then
    echo "A manifest is encoded when training begins, so the mixture cannot be shown before."
else
    hf-csm describe "$config" --out "$run_dir/mixture.png" "$@" "${mix[@]}"
fi

begin train
last=$(printf '%s/checkpoint_%06d' "$run_dir" "$max_steps")
if [ -d "$last" ] && [ -z "$resume" ]; then
    echo "$last is there already."
else
    "${launch[@]}" recipes/train.py --config "$config" "$@" "${mix[@]}" --resume-from-checkpoint "${resume:-latest}"
fi
best=$run_dir/best
[ -d "$best" ] || best=$last

begin evaluate
device=cuda
[ "$gpus" -gt 0 ] || device=cpu
if [ -f "$run_dir/samples/samples.jsonl" ] && [ "$run_dir/samples/samples.jsonl" -nt "$last" ]; then
    echo "$run_dir/samples is there already."
else
    mkdir -p "$run_dir/samples"
    python recipes/generate_samples.py "$best/consolidated" --out "$run_dir/samples" --seconds "$sample_seconds" \
        --device $device >"$run_dir/samples/.samples.jsonl"
    mv "$run_dir/samples/.samples.jsonl" "$run_dir/samples/samples.jsonl"
fi
tail -n 1 "$run_dir/metrics.jsonl"

begin export
if [ -d "$run_dir/export" ] && [ "$run_dir/export" -nt "$last" ]; then
    echo "$run_dir/export is there already."
else
    hf-csm export "$best" --out "$run_dir/export"
fi
stage=done
echo
echo "Done: $run_dir/export serves, $run_dir/samples can be listened to."
