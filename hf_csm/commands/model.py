"""The model commands: export, push, serve, say, reply."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_csm.errors import UserError, require_extra


if TYPE_CHECKING:
    from hf_csm.serving.loaded import LoadedModel
    from hf_csm.serving.speech import Speech

DEFAULT_BASE = "kyutai/moshiko-pytorch-bf16"


def add_model_commands(add_command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the model commands to the parser of `hf-csm`."""
    export = add_command("export", _export, "Export a checkpoint to a folder that PEFT and moshi.server load.")
    export.add_argument(
        "checkpoint", help="a run's checkpoint, such as checkpoints/run/best, or a Hub repository USER/NAME"
    )
    export.add_argument("--revision", help="branch, tag or commit of the Hub repository (default: its main branch)")
    export.add_argument("--out", type=Path, required=True, help="folder to write")
    export.add_argument("--merged", action="store_true", help="write merged weights instead of the adapter")
    _add_device(export)

    push = add_command("push", _push, "Publish a checkpoint on the Hub, for moshi.server and PEFT.")
    push.add_argument(
        "checkpoint", help="a run's checkpoint, a folder that `hf-csm export` wrote, or a Hub repository USER/NAME"
    )
    push.add_argument("--repo-id", required=True, help="USER/NAME; created if it does not exist")
    push.add_argument("--merged", action="store_true", help="push merged weights instead of the adapter")
    push.add_argument("--private", action="store_true", help="create the repository as private")
    _add_device(push)
    push.add_argument("--revision", metavar="BRANCH", help="branch to push to (default: main)")
    push.add_argument("--checkpoint-revision", metavar="REVISION", help="revision of a checkpoint on the Hub")
    push.add_argument("--base-model", metavar="USER/NAME", help="Hub repository of a base model in a local folder")
    push.add_argument(
        "--license-of", nargs="+", default=[], metavar="CORPUS=ID", help="license of a corpus that declares none"
    )
    push.add_argument(
        "--terms-allow", nargs="+", default=[], metavar="CORPUS",
        help="corpora whose signed terms permit publishing models trained on them",
    )  # fmt: skip

    say = add_command("say", _say, "Speak a text with an emotion and write an audio file.")
    say.add_argument("text", help="text to speak")
    _add_speaking(say)

    reply = add_command(
        "reply",
        _reply,
        "Answer a recorded question with an emotion and write Moshi's channel to an audio file. The answer follows a "
        "lead-in of at least one second and the length of the question.",
    )
    reply.add_argument("question", type=Path, help="audio file of any sample rate and number of channels")
    _add_speaking(reply)
    reply.add_argument(
        "--stereo", action="store_true", help="write the user to the left channel and Moshi to the right"
    )
    reply.add_argument("--tail-s", type=float, default=3.0, help="seconds of silence that end the answer (default: 3)")
    reply.add_argument(
        "--seconds",
        type=float,
        default=30.0,
        help="maximum length of the answer, from the end of the question (default: 30)",
    )
    _add_serve(add_command)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", help="where the result is verified, such as cuda or cpu (default: a GPU if there is one)"
    )


def _add_speaking(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="audio file to write: .wav, .flac or .ogg")
    parser.add_argument("--emotion", help="an emotion that the model supports (default: none)")
    parser.add_argument(
        "--model", nargs="+", metavar="[NAME=]REPO_OR_FOLDER",
        help=f"adapters of one base, or one base or merged model (default: $HF_CSM_MODEL, else {DEFAULT_BASE})",
    )  # fmt: skip
    parser.add_argument("--revision", help="branch, tag or commit of the model's repository (default: main)")
    parser.add_argument("--voice", help="name of the adapter, or base (default: the first that supports the emotion)")
    parser.add_argument(
        "--strength",
        type=float,
        default=1.0,
        help="scale of the adapter: 0 is the base model, 1 the trained adapter (default: 1)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="random seed; the same seed gives the same speech (default: 0)"
    )
    parser.add_argument(
        "--temperature", type=float, help="sampling temperature of text and audio (default: set by the model)"
    )
    parser.add_argument("--device", help="such as cuda or cpu (default: a GPU if there is one)")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16 on a GPU, float32 on a CPU"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON with words and times")


def _add_serve(add_command: Callable[..., argparse.ArgumentParser]) -> None:
    serve = add_command(
        "serve",
        _serve,
        "Serve conversations over WebSocket, compatible with moshi.server, with a web page to choose emotions.",
    )
    serve.add_argument(
        "names", nargs="+", metavar="CHECKPOINT_OR_REPO",
        help="adapters of one base, or one base or merged model: folders or Hub repositories, or NAME=FOLDER_OR_REPO",
    )  # fmt: skip
    serve.add_argument("--revision", help="branch, tag or commit, with a single Hub repository")
    serve.add_argument("--emotion", help="default emotion of conversations (default: none)")
    serve.add_argument(
        "--host", default="localhost", help="host name or address to listen on; 0.0.0.0 for all (default: localhost)"
    )
    serve.add_argument("--port", type=int, default=8998, help="default: 8998; 0 picks a free port")
    serve.add_argument("--slots", type=int, default=1, help="number of simultaneous conversations (default: 1)")
    serve.add_argument("--device", help="such as cuda or cpu (default: a GPU if there is one)")
    serve.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16 on a GPU, float32 on a CPU"
    )
    serve.add_argument(
        "--ssl", type=Path, metavar="FOLDER", help="serve HTTPS with cert.pem and key.pem from this folder"
    )
    serve.add_argument(
        "--token-file", type=Path, help="file with the token required from clients (default: $HF_CSM_TOKEN, if set)"
    )
    serve.add_argument(
        "--allow-origin", action="append", default=[], metavar="ORIGIN",
        help="origin whose pages may use this server, such as https://example.org; repeatable; * for any",
    )  # fmt: skip
    serve.add_argument(
        "--max-minutes", type=float, default=60.0, help="maximum length of a conversation (default: 60)"
    )


def _push(options: argparse.Namespace) -> None:
    from hf_csm.models.device import choose_device
    from hf_csm.publish.push_model import push_model

    stated = dict(part.split("=", 1) for part in options.license_of if "=" in part)
    if len(stated) < len(options.license_of):
        raise UserError(f"--license-of is {' '.join(options.license_of)}.", "Give CORPUS=ID, as in mine=cc-by-4.0.")
    url = push_model(
        options.checkpoint,
        options.repo_id,
        merged=options.merged,
        private=options.private,
        revision=options.revision,
        checkpoint_revision=options.checkpoint_revision,
        base_model=options.base_model,
        stated=stated,
        cleared=options.terms_allow,
        device=choose_device(options.device),
    )
    print(f"{url} is complete. Serve it with:")
    if options.revision is None:
        print(f"python -m moshi.server --hf-repo {options.repo_id}")
    else:
        print(f"hf-csm serve {options.repo_id} --revision {shlex.quote(options.revision)}")
        print("(Moshi's own server reads the main branch only.)")


def _export(options: argparse.Namespace) -> None:
    from hf_csm.models.device import choose_device
    from hf_csm.publish.export import export_checkpoint

    folder = export_checkpoint(
        options.checkpoint,
        options.out,
        revision=options.revision,
        merged=options.merged,
        device=choose_device(options.device),
    )
    what = "the merged weights" if options.merged else "the adapter"
    print(f"{folder} holds {what}, verified: moshi loads it, with the checkpoint's logits. Serve it with:")
    weights = "" if options.merged else f" --lora-weight {folder / 'lora.safetensors'}"
    print(f"python -m moshi.server --config-path {folder / 'config.json'}{weights}")
    print(f"or, with emotions: hf-csm serve {folder}")


def _say(options: argparse.Namespace) -> None:
    from hf_csm.serving.speech import check_text, say

    text = check_text(options.text)
    _speak(options, lambda model, how: say(model, text, **how))


def _reply(options: argparse.Namespace) -> None:
    from hf_csm.serving.speech import check_times, read_question, reply

    check_times(options.tail_s, options.seconds)
    question = read_question(options.question)
    _speak(
        options,
        lambda model, how: reply(model, question, tail_s=options.tail_s, max_s=options.seconds, **how),
        stereo=options.stereo,
    )


def _speak(
    options: argparse.Namespace, speak: Callable[[LoadedModel, dict[str, Any]], Speech], stereo: bool = False
) -> None:
    """Check the options, load the models, generate speech, write it and print a summary."""
    from hf_csm.models.device import choose_device
    from hf_csm.serving.loaded import check_strength, load_weights
    from hf_csm.serving.resolve import resolve_models
    from hf_csm.serving.speech import check_out, write_audio

    check_out(options.out)
    check_strength(options.strength)
    if options.temperature is not None and not 0 < options.temperature < float("inf"):
        raise UserError(f"--temperature is {options.temperature:g}.", "Use a number above 0; 0.7 is typical.")
    if not 0 <= options.seed < 2**64:
        raise UserError(f"--seed is {options.seed}.", "Use an integer of at least 0.")
    names = options.model or shlex.split(os.environ.get("HF_CSM_MODEL", ""))
    if not names and (options.emotion or options.voice):
        raise UserError(
            f"No model was given, and {DEFAULT_BASE} has no emotions.",
            "Name an adapter with --model REPO_OR_FOLDER or in HF_CSM_MODEL.",
        )
    device = choose_device(options.device)
    models = resolve_models(names or [DEFAULT_BASE], options.revision)
    models.choose(options.emotion, options.voice)
    model = load_weights(
        models,
        device=device,
        dtype=options.dtype,
        temperature=options.temperature,
        text_temperature=options.temperature,
    )
    how = {name: getattr(options, name) for name in ("emotion", "strength", "seed")} | {"adapter": options.voice}
    try:
        speech = speak(model, how)
    finally:
        model.close()
    write_audio(options.out, speech, stereo=stereo)
    if options.json:
        print(json.dumps({"out": str(options.out), "model": names or [DEFAULT_BASE]} | speech.describe()))
    else:
        emotion = f" ({speech.emotion})" if speech.emotion else ""
        print(f"{options.out}: {speech.duration_s:.1f} s, {speech.adapter}{emotion}: {speech.text or '(no words)'}")
    if options.emotion and not speech.emotion:
        print(f"warning: {speech.adapter} does not support emotions; {options.emotion} was ignored.", file=sys.stderr)
    if speech.is_silent:
        print("warning: the speech is silent. Try another --seed or a lower --strength.", file=sys.stderr)


def _serve(options: argparse.Namespace) -> None:
    require_extra("serve", "hf-csm serve", "aiohttp", "prometheus_client", "sphn")
    from hf_csm.serving.server.run import ServeOptions, serve

    serve(ServeOptions(**{field.name: getattr(options, field.name) for field in fields(ServeOptions)}))
