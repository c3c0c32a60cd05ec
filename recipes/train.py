"""Train a LoRA adapter on Moshi.

    accelerate launch --quiet --config_file accelerate_configs/single_gpu.yaml recipes/train.py \
        --config recipes/configs/expressive_finetuning.yaml --lora.rank 64

Every option of the YAML file can be given on the command line; `--help` lists them.
"""

from __future__ import annotations

import os
import sys

from hf_csm.cli import run_command
from hf_csm.config_parser import parse_run_config
from hf_csm.training.interrupt import stop_with_launcher


def main(argv: list[str]) -> None:
    """Parse the options and train."""
    stop_with_launcher()
    config = parse_run_config(argv)

    # `--help` and a misspelt option answer at once: the heavy imports come after.
    from hf_csm.models import get_family
    from hf_csm.publish.push_run import check_push, push_run
    from hf_csm.training.loop import train

    is_main = int(os.environ.get("RANK", 0)) == 0
    if is_main:  # not after days of training
        check_push(config)
    checkpoint = train(config, get_family(config.moshi_paths.hf_repo_id, config.moshi_paths.revision))
    if is_main:
        print(f"{checkpoint} is written. Turn it into a folder that serves: hf-csm export {checkpoint} --out DIR")
        url = push_run(config, checkpoint)
        if url is not None:
            print(f"Pushed to {url}. Serve it with: python -m moshi.server --hf-repo {config.training.push_to_hub}")


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    sys.exit(run_command(lambda: main(arguments), debug="--debug" in sys.argv))
