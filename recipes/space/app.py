"""Gradio Space: ask Moshi a question or let it speak a text, with one button per emotion, next to the base model.

HF_CSM_MODEL=USER/ADAPTER python recipes/space/app.py

Environment variables, set in a Space under Settings > Variables:

HF_CSM_MODEL     adapters of one base, or a merged model, as for `hf-csm say --model`, separated by spaces
HF_CSM_REVISION  branch, tag or commit of the model's repository (default: main)
HF_CSM_DEVICE    such as cpu, for small models (default: the GPU)
HF_CSM_SECONDS   maximum length of an answer in seconds (default: 15)
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

    from hf_csm.serving.loaded import LoadedModel
    from hf_csm.serving.speech import Speech

EXAMPLES = ("Hello, how are you doing today?", "What would you do with a free afternoon?", "I lost my keys again!")
"""Example questions, spoken by the base model, to try the app without a microphone."""
MAX_QUESTION_S = 30.0
MAX_TEXT = 300
"""Maximum length of a text in characters."""
NO_EMOTION = "no emotion"
TITLE = "Moshi, with emotion"

Sound = tuple[int, np.ndarray]
"""Sample rate and int16 samples `[S]`, Gradio's audio format."""


class Demo:
    """The model, and the single thread that runs it."""

    def __init__(self, environment: Mapping[str, str]):
        """Load the models from `environment`.

        Raises:
            UserError: no model is set, it cannot be loaded, or there is no GPU.
        """
        names = shlex.split(environment.get("HF_CSM_MODEL", ""))
        if not names:
            raise UserError(
                "No model is set for this Space.",
                "Set the variable HF_CSM_MODEL in the settings to an adapter, such as USER/NAME, and restart it.",
            )
        self.max_s = _seconds(environment.get("HF_CSM_SECONDS") or "15")
        self.names = names
        self._worker = ThreadPoolExecutor(1, "moshi")
        revision, device = environment.get("HF_CSM_REVISION") or None, environment.get("HF_CSM_DEVICE") or None
        self.model: LoadedModel = self._worker.submit(_load, names, revision, device).result()
        # The speech of the base model does not depend on the emotion, so it is cached.
        self._base = functools.lru_cache(maxsize=8)(self._speak_base)

    @property
    def emotions(self) -> list[str]:
        return self.model.emotions

    @property
    def has_base(self) -> bool:
        """Whether there is a base model for comparison; not with merged weights."""
        return len(self.model.choices) > 1

    def ask(self, emotion: str | None, path: str | None, strength: float, seed: float) -> Iterator[Speech]:
        """Yield the answer of the adapter to a recording, then that of the base model."""
        from hf_csm.serving.speech import read_question
        from hf_csm.units import SAMPLE_RATE

        if not path:
            raise UserError("No question.", "Record or upload one, or choose an example.")
        question = read_question(path)
        if len(question) > MAX_QUESTION_S * SAMPLE_RATE:
            raise UserError(
                f"The question is {len(question) / SAMPLE_RATE:.0f} seconds long.",
                f"The limit is {MAX_QUESTION_S:.0f} seconds.",
            )
        yield from self._both("reply", question.tobytes(), emotion, strength, seed)

    def say(self, emotion: str | None, text: str, strength: float, seed: float) -> Iterator[Speech]:
        """Yield the text spoken by the adapter, then by the base model."""
        yield from self._both("say", text[:MAX_TEXT], emotion, strength, seed)

    def example(self, text: str) -> Sound:
        """Return `text` spoken by the base model."""
        return sound(self._speak_base("say", text, 0))

    def _both(
        self, kind: str, content: str | bytes, emotion: str | None, strength: float, seed: float
    ) -> Iterator[Speech]:
        if not (0 <= (seed or 0) < 2**63) or int(seed or 0) != (seed or 0):
            raise UserError(f"The seed is {seed}.", "Use an integer of at least 0.")
        choice = self.model.choose(emotion)
        options = {"strength": strength} if choice.index is not None else {}
        yield self._speak(kind, content, emotion=emotion, adapter=choice.name, seed=int(seed or 0), **options)
        if self.has_base:
            yield self._base(kind, content, int(seed or 0))

    def _speak_base(self, kind: str, content: str | bytes, seed: int) -> Speech:
        return self._speak(kind, content, adapter=self.model.choices[-1].name, seed=seed)

    def _speak(self, kind: str, content: str | bytes, **options: Any) -> Speech:
        from hf_csm.serving.speech import reply, say

        if isinstance(content, str):
            return self._worker.submit(say, self.model, content, **options).result()
        question = np.frombuffer(content, dtype=np.float32)
        return self._worker.submit(reply, self.model, question, max_s=self.max_s, **options).result()


def _seconds(value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds < float("inf"):
        raise UserError(f"HF_CSM_SECONDS is {value!r}.", "Use a number of seconds above 0, such as 15.")
    return seconds


def _load(names: list[str], revision: str | None, device: str | None) -> LoadedModel:
    import torch

    from hf_csm.serving.loaded import load_model

    if device is None and not torch.cuda.is_available():
        raise UserError(
            "This Space has no GPU; Moshi requires one with 24 GB.",
            "Choose other hardware in the settings, or for small models set the variable HF_CSM_DEVICE to cpu.",
        )
    return load_model(names, revision=revision, device=device)


def sound(speech: Speech) -> Sound:
    """Return the speech after the question in Gradio's format."""
    from hf_csm.data.audio import to_int16
    from hf_csm.units import SAMPLE_RATE, seconds_to_samples

    return SAMPLE_RATE, to_int16(speech.audio[seconds_to_samples(speech.question_end_s) :])


def build_app(environment: Mapping[str, str] = os.environ) -> gradio.Blocks:
    """Return the app, or a page with the error if the model cannot be loaded."""
    import gradio as gr

    with gr.Blocks(title=TITLE) as app:
        gr.Markdown(f"# {TITLE}")
        try:
            demo = Demo(environment)
        except UserError as error:
            gr.Markdown(f"**{error.problem}**\n\n{error.remedy}")
            return app
        gr.Markdown(
            f"`{' '.join(demo.names)}`"
            + (f", base model `{demo.model.base_name}`" if demo.has_base else "")
            + ". Ask a question and choose the emotion of the answer, or enter a text to be spoken. "
            "The speech is synthetic."
        )
        with gr.Tab("Ask"):
            question = gr.Audio(sources=["microphone", "upload"], type="filepath", label="Your question")
            with gr.Row():
                examples = [(gr.Button(f"Example: {text}", size="sm"), text) for text in EXAMPLES]
            ask_buttons = _emotion_buttons(gr, demo.emotions)
        with gr.Tab("Speak"):
            text = gr.Textbox(label="Text", value=EXAMPLES[1], max_length=MAX_TEXT)
            say_buttons = _emotion_buttons(gr, demo.emotions)
        with gr.Row():
            strength = gr.Slider(0, 2, 1, step=0.1, label="Adapter strength", visible=demo.has_base)
            seed = gr.Number(0, precision=0, minimum=0, label="Seed (change it for a different answer)")
        outputs = []
        with gr.Row():
            for name in ("Adapter", "Base")[: 1 + demo.has_base]:
                with gr.Column():
                    outputs += [
                        gr.Audio(label=name, interactive=False, type="numpy", autoplay=name == "Adapter"),
                        gr.Textbox(label=f"{name}: transcript", interactive=False, lines=3),
                    ]
        # One request at a time; others wait in the queue and see their position.
        exclusive: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "moshi"}
        for buttons, act, value, name in (
            (ask_buttons, demo.ask, question, "ask"),
            (say_buttons, demo.say, text, "say"),
        ):
            for button, emotion in buttons:
                button.click(
                    _handler(gr, functools.partial(act, emotion), len(outputs)),
                    [value, strength, seed],
                    outputs,
                    api_name=re.sub(r"\W", "_", f"{name}_{emotion or 'plain'}"),
                    **exclusive,
                )
        for button, example in examples:
            button.click(
                functools.partial(demo.example, example), None, question, api_visibility="private", **exclusive
            )
    return app.queue(max_size=16)


def _emotion_buttons(gr: Any, emotions: list[str]) -> list[tuple[Any, str | None]]:
    with gr.Row():
        return [
            (gr.Button(emotion or NO_EMOTION, variant="primary" if emotion else "secondary"), emotion)
            for emotion in (*emotions, None)
        ]


def _handler(gr: Any, act: Callable[..., Iterator[Speech]], num_outputs: int) -> Callable[..., Iterator[list[Any]]]:
    """Return a Gradio handler that fills the outputs of the adapter, then those of the base model."""

    def handle(value: str | None, strength: float, seed: float) -> Iterator[list[Any]]:
        outputs: list[Any] = [None] * num_outputs
        try:
            for side, speech in enumerate(act(value, strength, seed)):
                outputs[2 * side : 2 * side + 2] = [sound(speech), speech.text or "(no words)"]
                yield list(outputs)
        except UserError as error:
            raise gr.Error(f"{error.problem} {error.remedy}") from error

    return handle


if __name__ == "__main__":
    build_app().launch()
