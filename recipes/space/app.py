"""A Gradio Space: ask Moshi, or let it say a text, with one click per emotion; the adapter and its base side by side.

HF_CSM_MODEL=USER/ADAPTER python recipes/space/app.py

What it speaks with comes from the environment, which a Space sets under Settings, Variables:

HF_CSM_MODEL     adapters of one base, or a merged model, as for `hf-csm say --model`; several with spaces between
HF_CSM_REVISION  branch, tag or commit of the model's repository (default: main)
HF_CSM_DEVICE    such as cpu, for small models (default: a GPU)
HF_CSM_SECONDS   longest answer (default: 15)
"""

from __future__ import annotations

import functools
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_csm.errors import UserError


if TYPE_CHECKING:
    import gradio

    from hf_csm.serving.loaded import Speaker
    from hf_csm.serving.speech import Speech

EXAMPLES = ("Hello, how are you doing today?", "What would you do with a free afternoon?", "I lost my keys again!")
"""Questions that the base asks of itself, so that one can try it without a microphone."""
MAX_QUESTION_S = 30.0
MAX_TEXT = 300
"""Characters of a text to say."""
NO_EMOTION = "no emotion"
TITLE = "Moshi, with emotion"

Sound = tuple[int, np.ndarray]
"""Sample rate and int16 samples `[S]`, as Gradio plays them."""


class Stage:
    """The models, and the one thread that speaks with them."""

    def __init__(self, environment: Mapping[str, str]):
        """Load the models that `environment` names.

        Raises:
            UserError: none is named, it cannot be had, or there is no GPU.
        """
        names = shlex.split(environment.get("HF_CSM_MODEL", ""))
        if not names:
            raise UserError(
                "This Space does not know which model to speak with.",
                "Set the variable HF_CSM_MODEL in its settings to an adapter, such as USER/NAME, and restart it.",
            )
        self.max_s = _seconds(environment.get("HF_CSM_SECONDS") or "15")
        self.names = names
        self._worker = ThreadPoolExecutor(1, "moshi")
        revision, device = environment.get("HF_CSM_REVISION") or None, environment.get("HF_CSM_DEVICE") or None
        self.speaker: Speaker = self._worker.submit(_load, names, revision, device).result()
        # What the base says depends on no emotion: it is asked once.
        self._base = functools.lru_cache(maxsize=8)(self._speak_base)

    @property
    def emotions(self) -> list[str]:
        return self.speaker.emotions

    @property
    def has_base(self) -> bool:
        """Say whether there is a base to compare with: not beside merged weights."""
        return len(self.speaker.voices) > 1

    def ask(self, emotion: str | None, path: str | None, strength: float, seed: float) -> Iterator[Speech]:
        """Yield the adapter's answer to a recording, then the base's."""
        from hf_csm.serving.speech import read_question
        from hf_csm.units import SAMPLE_RATE

        if not path:
            raise UserError("There is no question yet.", "Record or upload one, or take an example.")
        question = read_question(path)
        if len(question) > MAX_QUESTION_S * SAMPLE_RATE:
            raise UserError(
                f"The question is {len(question) / SAMPLE_RATE:.0f} seconds long.",
                f"Ask in at most {MAX_QUESTION_S:.0f} seconds.",
            )
        yield from self._both("reply", question.tobytes(), emotion, strength, seed)

    def say(self, emotion: str | None, text: str, strength: float, seed: float) -> Iterator[Speech]:
        """Yield the text as the adapter says it, then the base."""
        yield from self._both("say", text[:MAX_TEXT], emotion, strength, seed)

    def example(self, text: str) -> Sound:
        """Return `text` as the base says it."""
        return sound(self._speak_base("say", text, 0))

    def _both(
        self, kind: str, content: str | bytes, emotion: str | None, strength: float, seed: float
    ) -> Iterator[Speech]:
        if not (0 <= (seed or 0) < 2**63) or int(seed or 0) != (seed or 0):
            raise UserError(f"The seed is {seed}.", "Give a whole number of at least 0.")
        voice = self.speaker.choose(emotion)
        how = {"strength": strength} if voice.adapter is not None else {}
        yield self._speak(kind, content, emotion=emotion, voice=voice.name, seed=int(seed or 0), **how)
        if self.has_base:
            yield self._base(kind, content, int(seed or 0))

    def _speak_base(self, kind: str, content: str | bytes, seed: int) -> Speech:
        return self._speak(kind, content, voice=self.speaker.voices[-1].name, seed=seed)

    def _speak(self, kind: str, content: str | bytes, **how: Any) -> Speech:
        from hf_csm.serving.speech import reply, say

        if isinstance(content, str):
            return self._worker.submit(say, self.speaker, content, **how).result()
        question = np.frombuffer(content, dtype=np.float32)
        return self._worker.submit(reply, self.speaker, question, max_s=self.max_s, **how).result()


def _seconds(value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds < float("inf"):
        raise UserError(f"HF_CSM_SECONDS is {value!r}.", "Set it to a number of seconds above 0, such as 15.")
    return seconds


def _load(names: list[str], revision: str | None, device: str | None) -> Speaker:
    import torch

    from hf_csm.serving.loaded import load_speaker

    if device is None and not torch.cuda.is_available():
        raise UserError(
            "This Space has no GPU, and Moshi needs one with 24 GB.",
            "Choose other hardware in its settings; for small models set the variable HF_CSM_DEVICE to cpu.",
        )
    return load_speaker(names, revision=revision, device=device)


def sound(speech: Speech) -> Sound:
    """Return what Moshi said after the question, as Gradio plays it."""
    from hf_csm.data.audio import to_int16
    from hf_csm.units import SAMPLE_RATE, seconds_to_samples

    return SAMPLE_RATE, to_int16(speech.audio[seconds_to_samples(speech.question_end_s) :])


def build_app(environment: Mapping[str, str] = os.environ) -> gradio.Blocks:
    """Return the app; where the models cannot be loaded, a page that says why."""
    import gradio as gr

    with gr.Blocks(title=TITLE) as app:
        gr.Markdown(f"# {TITLE}")
        try:
            stage = Stage(environment)
        except UserError as error:
            gr.Markdown(f"**{error.problem}**\n\n{error.remedy}")
            return app
        gr.Markdown(
            f"`{' '.join(stage.names)}`, an adapter of `{stage.speaker.base_name}`. Ask something and choose the "
            "emotion of the answer, or let Moshi say a text. The voice is a machine's."
            if stage.has_base
            else f"`{' '.join(stage.names)}`. Ask something and choose the emotion of the answer."
        )
        with gr.Tab("Ask"):
            question = gr.Audio(sources=["microphone", "upload"], type="filepath", label="Your question")
            with gr.Row():
                examples = [(gr.Button(f"Example: {text}", size="sm"), text) for text in EXAMPLES]
            ask_buttons = _emotion_buttons(gr, stage.emotions)
        with gr.Tab("Say"):
            text = gr.Textbox(label="Text", value=EXAMPLES[1], max_length=MAX_TEXT)
            say_buttons = _emotion_buttons(gr, stage.emotions)
        with gr.Row():
            strength = gr.Slider(0, 2, 1, step=0.1, label="Strength of the adapter", visible=stage.has_base)
            seed = gr.Number(0, precision=0, minimum=0, label="Seed: another one, another answer")
        outputs = []
        with gr.Row():
            for name in ("Adapter", "Base")[: 1 + stage.has_base]:
                with gr.Column():
                    outputs += [
                        gr.Audio(label=name, interactive=False, type="numpy", autoplay=name == "Adapter"),
                        gr.Textbox(label=f"{name}: what it said", interactive=False, lines=3),
                    ]
        # One conversation at a time: the others wait in the queue, and see their place.
        alone: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "moshi"}
        for buttons, act, given, name in (
            (ask_buttons, stage.ask, question, "ask"),
            (say_buttons, stage.say, text, "say"),
        ):
            for button, emotion in buttons:
                button.click(
                    _handler(gr, functools.partial(act, emotion), len(outputs)),
                    [given, strength, seed],
                    outputs,
                    api_name=re.sub(r"\W", "_", f"{name}_{emotion or 'plain'}"),
                    **alone,
                )
        for button, example in examples:
            button.click(functools.partial(stage.example, example), None, question, api_visibility="private", **alone)
    return app.queue(max_size=16)


def _emotion_buttons(gr: Any, emotions: list[str]) -> list[tuple[Any, str | None]]:
    with gr.Row():
        return [
            (gr.Button(emotion or NO_EMOTION, variant="primary" if emotion else "secondary"), emotion)
            for emotion in (*emotions, None)
        ]


def _handler(gr: Any, act: Callable[..., Iterator[Speech]], num_outputs: int) -> Callable[..., Iterator[list[Any]]]:
    """Return what Gradio calls: it fills the adapter's side, then the base's."""

    def handle(given: str | None, strength: float, seed: float) -> Iterator[list[Any]]:
        shown: list[Any] = [None] * num_outputs
        try:
            for side, speech in enumerate(act(given, strength, seed)):
                shown[2 * side : 2 * side + 2] = [sound(speech), speech.text or "(no words)"]
                yield list(shown)
        except UserError as error:
            raise gr.Error(f"{error.problem} {error.remedy}") from error

    return handle


if __name__ == "__main__":
    build_app().launch()
