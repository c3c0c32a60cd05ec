"""Let an adapter and its base speak with each emotion that it knows, to room tone, and write what they say.

python recipes/generate_samples.py checkpoints/expressive/best --out samples --seconds 10
python recipes/generate_samples.py USER/NAME --revision v1 --out samples --device cuda
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_csm.cli import run_command
from hf_csm.errors import UserError


@dataclass(frozen=True)
class Sample:
    """One generated clip and what can be counted in it.

    Attributes:
        voice: `trained` or `base`.
        emotion: that it was asked for; `none` where there is nothing to ask.
        padding_share: text tokens that are padding.
        num_semantic_codes: different codes of codebook 0.
        level_db: loudness relative to full scale (RMS).
    """

    voice: str
    emotion: str
    text: str
    padding_share: float
    num_semantic_codes: int
    level_db: float


def generate_samples(
    model: str | Path,
    out: Path,
    *,
    revision: str | None = None,
    emotions: list[str] | None = None,
    duration_s: float,
    temperature: float | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> list[Sample]:
    """Write `<voice>_<emotion>.wav` for both voices and every emotion; merged models have one voice.

    Args:
        model: checkpoint, export, or Hub repository of an adapter or merged model.
        revision: of the Hub repository.
        emotions: some of those that the model knows; None for all.
        temperature: of text and audio; None for moshi's own, 0.7 and 0.8.
        seed: the same for every clip, so that only voice and emotion differ.

    Raises:
        UserError: the model does not know an emotion, or cannot be found.
    """
    import numpy as np
    import soundfile
    import torch

    from hf_csm.evaluation.generate import generate
    from hf_csm.models.emotion_control import read_emotion_control
    from hf_csm.models.moshi.checkpoint import find_checkpoint, load_mimi, load_tokenizer
    from hf_csm.models.moshi.pull import find_folder
    from hf_csm.units import SAMPLE_RATE, seconds_to_frames

    control = read_emotion_control(find_folder(model, revision))
    unknown = [emotion for emotion in emotions or () if emotion not in control.emotions]
    if unknown:
        raise UserError(
            f"{model} does not know {unknown[0]}.",
            f"Choose from {', '.join(control.emotions)}."
            if control.emotions
            else "Leave --emotions out: it knows none.",
        )
    wanted: Sequence[str | None] = emotions or control.emotions or (None,)
    checkpoint = find_checkpoint(str(model), revision)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    mimi = load_mimi(checkpoint, device)
    tokenizer = load_tokenizer(checkpoint)
    out.mkdir(parents=True, exist_ok=True)
    samples = []
    for voice in ("trained", "base") if checkpoint.lora_weights else ("trained",):
        if voice == "base":
            checkpoint.lora_weights = None
            checkpoint.lm_config = {**(checkpoint.lm_config or {}), "lora": False}
        lm = checkpoint.get_moshi(device=device, dtype=dtype, fuse_lora=voice == "trained")
        mimi.set_num_codebooks(lm.dep_q)
        for emotion in wanted:
            made = generate(
                lm,
                mimi,
                user_audio=None,
                num_frames=seconds_to_frames(duration_s),
                prefix_tokens=control.tokens(emotion, tokenizer),
                temperature=0.8 if temperature is None else temperature,
                text_temperature=0.7 if temperature is None else temperature,
                seed=seed,
            )
            audio = made.audio.numpy()
            soundfile.write(out / f"{voice}_{emotion or 'none'}.wav", audio, SAMPLE_RATE)
            words = [token for token in made.text_tokens.tolist() if token not in (0, lm.text_padding_token_id)]
            samples.append(
                Sample(
                    voice=voice,
                    emotion=emotion or "none",
                    text=tokenizer.decode(words),
                    padding_share=1 - len(words) / len(made.text_tokens),
                    num_semantic_codes=len(made.codes[0].unique()),
                    level_db=float(20 * np.log10(np.sqrt(np.mean(audio**2)) + 1e-9)),
                )
            )
    return samples


def main(argv: list[str]) -> None:
    """Parse the options, write the clips, print one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint, folder that `hf-csm export` wrote, or Hub repository USER/NAME")
    parser.add_argument("--revision", help="branch, tag or commit of the Hub repository (default: its main branch)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the clips")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a clip (default: 10)")
    parser.add_argument("--emotions", nargs="+", help="default: all that the model knows")
    parser.add_argument("--temperature", type=float, help="of text and audio (default: moshi's own, 0.7 and 0.8)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    options = parser.parse_args(argv)
    samples = generate_samples(
        options.model,
        options.out,
        revision=options.revision,
        emotions=options.emotions,
        duration_s=options.seconds,
        temperature=options.temperature,
        seed=options.seed,
        device=options.device,
    )
    for sample in samples:
        print(json.dumps(vars(sample)))


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
