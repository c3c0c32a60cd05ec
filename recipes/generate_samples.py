"""Let an exported adapter and its base speak with each emotion, to room tone, and write what they say.

python recipes/generate_samples.py DIR_OF_HF_CSM_EXPORT --out samples --seconds 10
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from hf_csm.cli import run_command
from hf_csm.data.labels import EMOTIONS


@dataclass(frozen=True)
class Sample:
    """One generated clip and what can be counted in it.

    Attributes:
        voice: `trained` or `base`.
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
    export: Path,
    out: Path,
    *,
    emotions: list[str],
    duration_s: float,
    prefix_template: str = "({emotion})",
    temperature: float | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> list[Sample]:
    """Write `<voice>_<emotion>.wav` for both voices and every emotion.

    Args:
        export: folder of an exported adapter.
        temperature: of text and audio; None for moshi's own, 0.7 and 0.8.
        seed: the same for every clip, so that only voice and emotion differ.
    """
    import numpy as np
    import soundfile
    import torch

    from hf_csm.evaluation.generate import generate
    from hf_csm.models.moshi import find_checkpoint, load_mimi, load_tokenizer
    from hf_csm.units import SAMPLE_RATE, seconds_to_frames

    checkpoint = find_checkpoint(str(export))
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    mimi = load_mimi(checkpoint, device)
    tokenizer = load_tokenizer(checkpoint)
    out.mkdir(parents=True, exist_ok=True)
    samples = []
    for voice in ("trained", "base"):
        if voice == "base":
            checkpoint.lora_weights = None
            checkpoint.lm_config = {**(checkpoint.lm_config or {}), "lora": False}
        lm = checkpoint.get_moshi(device=device, dtype=dtype, fuse_lora=voice == "trained")
        mimi.set_num_codebooks(lm.dep_q)
        for emotion in emotions:
            made = generate(
                lm,
                mimi,
                user_audio=None,
                num_frames=seconds_to_frames(duration_s),
                prefix_tokens=tokenizer.encode(prefix_template.format(emotion=emotion)),
                temperature=0.8 if temperature is None else temperature,
                text_temperature=0.7 if temperature is None else temperature,
                seed=seed,
            )
            audio = made.audio.numpy()
            soundfile.write(out / f"{voice}_{emotion}.wav", audio, SAMPLE_RATE)
            words = [token for token in made.text_tokens.tolist() if token not in (0, lm.text_padding_token_id)]
            samples.append(
                Sample(
                    voice=voice,
                    emotion=emotion,
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
    parser.add_argument("export", type=Path, help="folder that `hf-csm export` wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the clips")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a clip (default: 10)")
    parser.add_argument("--emotions", nargs="+", default=list(EMOTIONS[:8]), help="default: the eight of RAVDESS")
    parser.add_argument("--temperature", type=float, help="of text and audio (default: moshi's own, 0.7 and 0.8)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    options = parser.parse_args(argv)
    samples = generate_samples(
        options.export,
        options.out,
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
