#!/usr/bin/env bash
# From raw corpora to an exported adapter: prepare, encode, mix, train, evaluate, export.
#
#   recipes/run_expressive_finetuning.sh --gpus 1
#   recipes/run_expressive_finetuning.sh --gpus 8 --skip-datasets --resume-from-checkpoint checkpoints/expressive/checkpoint_001000
#
#   --gpus N                       number of GPUs, 0 for the CPU (default: all of this machine)
#   --config YAML                  options of the run (default: recipes/configs/expressive_finetuning.yaml)
#   --raw DIR                      raw corpora, one folder each: DIR/crema_d, ... (default: raw)
#   --skip-datasets                train on existing tables; prepare and encode nothing
#   --sample-seconds S             length of the generated samples (default: 10)
#   --resume-from-checkpoint PATH  resume from this checkpoint (default: the newest of the run, if there is one)
#   -- ...                         options of the training, such as --lora.rank 64
#
# Relative paths in the configuration start at the root of the repository. dataset.sources lists the corpora: codes/esd
# is encoded from prepared/esd, which is prepared from raw/esd. RAVDESS (speech) is downloaded if it is missing; any
# other missing corpus is left out of the mixture. The script stops at a stage that fails; run again, it skips the
# finished stages.
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

plan=$(hf-csm plan "$config" "$@")
eval "$plan"

launch=()
case "$gpus" in
    0) launch=(accelerate launch --quiet --config_file accelerate_configs/cpu.yaml --num_cpu_threads_per_process "$(nproc)") ;;
    1) launch=(accelerate launch --quiet --config_file accelerate_configs/single_gpu.yaml) ;;
    *) launch=(accelerate launch --quiet --config_file accelerate_configs/multi_gpu.yaml --num_processes "$gpus") ;;
esac
encoder=(hf-csm)
[ "$gpus" -le 1 ] || encoder=("${launch[@]}" --module hf_csm.cli)

[ $skip_datasets = false ] || missing=()
for codes in "${missing[@]}"; do
    corpus=$(basename "$codes")
    prepared=$(dirname "$(dirname "$codes")")/prepared/$corpus
    from=()
    [ ! -e "$raw/$corpus" ] || from=(--raw "$raw/$corpus")
    if [ ! -d "$prepared" ]; then
        [ ${#from[@]} -gt 0 ] || [ "$corpus" = ravdess ] || continue
        begin "prepare $corpus"
        hf-csm prepare "$corpus" "${from[@]}" --out "$prepared"
    fi
    begin "encode $corpus"
    "${encoder[@]}" encode "$prepared" --out "$codes" --base-model "$base_model" ${revision:+--revision "$revision"} \
        --duration-sec "$duration_sec"
done

begin mix
plan=$(hf-csm plan "$config" "$@")
eval "$plan"
for codes in "${missing[@]}"; do echo "$codes does not exist and is left out of the mixture." >&2; done
[ "$mixture" != "[]" ] || fail "None of the corpora is there." "Put one in its folder under --raw; see --help."
[ -n "$resume" ] || [ -z "$trained_mixture" ] || [ "$trained_mixture" = "$mixture" ] ||
    fail "$run_dir was trained on another mixture: $trained_mixture, not $mixture." \
        "Give another folder with \`-- --run_dir DIR\`, or resume with --resume-from-checkpoint PATH."
mkdir -p "$run_dir"
mix=(--dataset.manifest_path null --dataset.sources "$mixture")
if [[ $mixture == *.jsonl\"* ]]; then
    echo "The mixture has a manifest, which is encoded when training starts: it cannot be described yet."
else
    hf-csm describe "$config" --out "$run_dir/mixture.png" "$@" "${mix[@]}"
fi

begin train
if [ -d "$last_checkpoint" ] && [ -z "$resume" ]; then
    echo "$last_checkpoint is there already."
else
    "${launch[@]}" recipes/train.py --config "$config" "$@" "${mix[@]}" --resume-from-checkpoint "${resume:-latest}"
fi
best=$run_dir/best
[ -d "$best" ] || best=$last_checkpoint

begin evaluate
device=cuda
[ "$gpus" -gt 0 ] || device=cpu
if [ -f "$run_dir/samples/samples.jsonl" ] && [ "$run_dir/samples/samples.jsonl" -nt "$last_checkpoint" ]; then
    echo "$run_dir/samples is there already."
else
    mkdir -p "$run_dir/samples"
    python recipes/generate_samples.py "$best/consolidated" --out "$run_dir/samples" --seconds "$sample_seconds" \
        --device $device >"$run_dir/samples/.samples.jsonl"
    mv "$run_dir/samples/.samples.jsonl" "$run_dir/samples/samples.jsonl"
fi
tail -n 1 "$run_dir/metrics.jsonl"

begin export
if [ -d "$run_dir/export" ] && [ "$run_dir/export" -nt "$last_checkpoint" ]; then
    echo "$run_dir/export is there already."
else
    hf-csm export "$best" --out "$run_dir/export"
fi
stage=done
echo
echo "Done: the adapter is in $run_dir/export, samples are in $run_dir/samples."
