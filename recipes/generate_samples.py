"""Generate a clip with an adapter and with its base for each emotion of the adapter, while the user is silent.

python recipes/generate_samples.py checkpoints/expressive/best --out samples --seconds 10
python recipes/generate_samples.py USER/NAME --revision v1 --out samples --device cuda
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_csm.cli import run_command
from hf_csm.errors import UserError


if TYPE_CHECKING:
    from hf_csm.models.family import Frame


@dataclass(frozen=True)
class Sample:
    """One generated clip and its statistics.

    Attributes:
        model: `trained` or `base`.
        emotion: of the prefix; `none` without prefix.
        text: of the text stream, without the prefix.
        padding_share: share of the text tokens that are padding.
        num_semantic_codes: number of different codes of codebook 0.
        level_db: loudness relative to full scale (RMS).
    """

    model: str
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
    """Write `trained_<emotion>.wav` for every emotion, and with an adapter `base_<emotion>.wav`.

    The same arguments give the same clips; the caller's random state is restored.

    Args:
        model: checkpoint, export, or Hub repository of an adapter or merged model.
        revision: of the Hub repository.
        emotions: some of the model's; None for all.
        temperature: of text and audio; None for moshi's own, 0.7 and 0.8.
        seed: the same for every clip, so that only model and emotion differ.

    Raises:
        UserError: the model was not trained on an emotion, or cannot be found.
    """
    import numpy as np
    import soundfile
    import torch

    from hf_csm.data.audio import ROOM_TONE_DB, room_tone
    from hf_csm.hub import find_model
    from hf_csm.models import get_family
    from hf_csm.models.emotion_control import read_emotion_control
    from hf_csm.units import SAMPLE_RATE, SAMPLES_PER_FRAME, seconds_to_frames

    control = read_emotion_control(find_model(model, revision))
    unknown = [emotion for emotion in emotions or () if emotion not in control.emotions]
    if unknown:
        raise UserError(
            f"{model} was not trained on the emotion {unknown[0]!r}.",
            f"Choose from {', '.join(control.emotions)}."
            if control.emotions
            else "Leave --emotions out: it was trained on none.",
        )
    family = get_family(model, revision)
    checkpoint = family.find_checkpoint(str(model), revision)
    tokenizer = family.load_tokenizer(checkpoint)
    base, adapter = family.split_adapter(checkpoint, str(model))
    num_frames = seconds_to_frames(duration_s)
    out.mkdir(parents=True, exist_ok=True)
    samples = []
    with torch.random.fork_rng(devices=[device] if device.startswith("cuda") else []):
        engine = family.open_engine(
            base,
            [adapter] if adapter else [],
            device=device,
            temperature=temperature,
            text_temperature=temperature,
        )
        for name, strength in (("trained", 1.0), ("base", 0.0)) if adapter else (("trained", 1.0),):
            for emotion in emotions or control.emotions or (None,):
                engine.reset(0, seed=seed)
                if adapter:
                    engine.set_strength(0, 0, strength)
                engine.force_text(0, control.tokens(emotion, tokenizer))
                rng = np.random.default_rng(seed)
                frames: list[Frame] = []
                while len(frames) < num_frames:
                    user = room_tone(SAMPLES_PER_FRAME, rng, (ROOM_TONE_DB, ROOM_TONE_DB))
                    frames.extend(engine.step({0: user}).values())
                audio = np.concatenate([frame.audio for frame in frames])
                soundfile.write(out / f"{name}_{emotion or 'none'}.wav", audio, SAMPLE_RATE)
                is_padding = [frame.text_token in engine.padding_ids for frame in frames]
                words = [
                    frame.text_token
                    for frame, padding in zip(frames, is_padding, strict=True)
                    if not (padding or frame.is_forced)
                ]
                samples.append(
                    Sample(
                        model=name,
                        emotion=emotion or "none",
                        text=tokenizer.decode(words),
                        padding_share=sum(is_padding) / num_frames,
                        num_semantic_codes=len({int(frame.codes[0]) for frame in frames}),
                        level_db=float(20 * np.log10(np.sqrt(np.mean(audio**2)) + 1e-9)),
                    )
                )
        engine.close()
    return samples


def main(argv: list[str]) -> None:
    """Parse the options, write the clips, print one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint, folder that `hf-csm export` wrote, or Hub repository USER/NAME")
    parser.add_argument("--revision", help="branch, tag or commit of the Hub repository (default: its main branch)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the clips")
    parser.add_argument(
        "--seconds", dest="duration_s", metavar="S", type=float, default=10.0, help="length of a clip (default: 10)"
    )
    parser.add_argument("--emotions", nargs="+", help="default: all that the model was trained on")
    parser.add_argument("--temperature", type=float, help="of text and audio (default: moshi's own, 0.7 and 0.8)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    for sample in generate_samples(**vars(parser.parse_args(argv))):
        print(json.dumps(vars(sample)))


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
