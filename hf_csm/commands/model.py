"""The verbs that take a trained model: export, push, serve, say, reply."""

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
    from hf_csm.serving.loaded import Speaker
    from hf_csm.serving.speech import Speech

DEFAULT_BASE = "kyutai/moshiko-pytorch-bf16"


def add_model_verbs(add_verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Add them to the parser of `hf-csm`."""
    export = add_verb("export", _export, "Turn a checkpoint into a folder that PEFT and moshi's own server load.")
    export.add_argument(
        "checkpoint", help="a run's checkpoint, such as checkpoints/run/best, or a Hub repository USER/NAME"
    )
    export.add_argument("--revision", help="branch, tag or commit of the Hub repository (default: its main branch)")
    export.add_argument("--out", type=Path, required=True, help="folder to write")
    export.add_argument("--merged", action="store_true", help="write whole merged weights instead of the adapter")
    _add_device(export)

    push = add_verb("push", _push, "Publish a checkpoint on the Hub: moshi serves it with one flag, PEFT loads it.")
    push.add_argument(
        "checkpoint", help="a run's checkpoint, a folder that `hf-csm export` wrote, or a Hub repository USER/NAME"
    )
    push.add_argument("--repo-id", required=True, help="USER/NAME; made if it does not exist")
    push.add_argument("--merged", action="store_true", help="whole merged weights instead of the adapter")
    push.add_argument("--private", action="store_true", help="only you see the repository")
    _add_device(push)
    push.add_argument("--revision", metavar="BRANCH", help="branch to push to (default: the main one)")
    push.add_argument("--checkpoint-revision", metavar="REVISION", help="of a checkpoint that is on the Hub")
    push.add_argument("--base-model", metavar="USER/NAME", help="repository of a base that was trained on as a folder")
    push.add_argument(
        "--license-of", nargs="+", default=[], metavar="CORPUS=ID", help="licence of a corpus that states none"
    )
    push.add_argument(
        "--terms-allow", nargs="+", default=[], metavar="CORPUS",
        help="corpora whose terms, which you signed, let models trained on them be published",
    )  # fmt: skip

    say = add_verb("say", _say, "Let Moshi say a text, with an emotion, into a sound file.")
    say.add_argument("text", help="what to say")
    _add_speaking(say)

    reply = add_verb(
        "reply",
        _reply,
        "Let Moshi answer a recorded question, with an emotion, into a sound file "
        "that begins with a second of quiet and the time of the question.",
    )
    reply.add_argument("question", type=Path, help="sound file, of any rate and number of channels")
    _add_speaking(reply)
    reply.add_argument("--stereo", action="store_true", help="write the user on the left and Moshi on the right")
    reply.add_argument(
        "--tail-s", type=float, default=3.0, help="end when Moshi has been quiet for so many seconds (default: 3)"
    )
    reply.add_argument(
        "--seconds", type=float, default=30.0, help="longest answer, from the question's end (default: 30)"
    )
    _add_serve(add_verb)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", help="where the result is verified, such as cuda or cpu (default: a GPU if there is one)"
    )


def _add_speaking(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="sound file to write: .wav, .flac or .ogg")
    parser.add_argument("--emotion", help="one that a model knows (default: none)")
    parser.add_argument(
        "--model", nargs="+", metavar="[NAME=]REPO_OR_FOLDER",
        help=f"adapters of one base, or a whole model (default: $HF_CSM_MODEL, or else {DEFAULT_BASE})",
    )  # fmt: skip
    parser.add_argument("--revision", help="branch, tag or commit of the model's repository (default: main)")
    parser.add_argument("--voice", help="adapter to speak with, or base (default: the first that knows the emotion)")
    parser.add_argument(
        "--strength", type=float, default=1.0, help="of the adapter: 0 is the base, 1 as trained (default: 1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="the same gives the same speech (default: 0)")
    parser.add_argument("--temperature", type=float, help="of text and audio (default: the model's own)")
    parser.add_argument("--device", help="such as cuda or cpu (default: a GPU if there is one)")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16 on a GPU, float32 on a CPU"
    )
    parser.add_argument("--json", action="store_true", help="print a line of JSON with the words and their times")


def _add_serve(add_verb: Callable[..., argparse.ArgumentParser]) -> None:
    serve = add_verb(
        "serve",
        _serve,
        "Hold conversations over the network, as moshi.server does, with emotions to choose; a page at /.",
    )
    serve.add_argument(
        "names", nargs="+", metavar="CHECKPOINT_OR_REPO",
        help="adapters of one base, or a base or merged model: folders or Hub repositories, or NAME=FOLDER_OR_REPO",
    )  # fmt: skip
    serve.add_argument("--revision", help="branch, tag or commit of the only Hub repository")
    serve.add_argument("--emotion", help="emotion of conversations that name none (default: none)")
    serve.add_argument("--host", default="localhost", help="name or address to listen at; 0.0.0.0 for all")
    serve.add_argument("--port", type=int, default=8998, help="default: 8998; 0 for any that is free")
    serve.add_argument("--slots", type=int, default=1, help="conversations at once (default: 1)")
    serve.add_argument("--device", help="such as cuda or cpu (default: a GPU if there is one)")
    serve.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16 on a GPU, float32 on a CPU"
    )
    serve.add_argument("--ssl", type=Path, metavar="FOLDER", help="serve https with its cert.pem and key.pem")
    serve.add_argument(
        "--token-file", type=Path, help="file with the token that clients must give (default: $HF_CSM_TOKEN, if set)"
    )
    serve.add_argument(
        "--allow-origin", action="append", default=[], metavar="ORIGIN",
        help="site whose pages may use this server, such as https://example.org; may be given again; * is any",
    )  # fmt: skip
    serve.add_argument("--max-minutes", type=float, default=60.0, help="longest conversation (default: 60)")


def _push(options: argparse.Namespace) -> None:
    from hf_csm.models.moshi.checkpoint import choose_device
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
        print(f"hf-csm serve {options.repo_id} --revision {options.revision}")
        print("(Moshi's own server reads the main branch only.)")


def _export(options: argparse.Namespace) -> None:
    from hf_csm.models.moshi.checkpoint import choose_device
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
    _speak(options, lambda speaker, how: say(speaker, text, **how))


def _reply(options: argparse.Namespace) -> None:
    from hf_csm.serving.speech import check_times, read_question, reply

    check_times(options.tail_s, options.seconds)
    question = read_question(options.question)
    _speak(
        options,
        lambda speaker, how: reply(speaker, question, tail_s=options.tail_s, max_s=options.seconds, **how),
        stereo=options.stereo,
    )


def _speak(
    options: argparse.Namespace, speak: Callable[[Speaker, dict[str, Any]], Speech], stereo: bool = False
) -> None:
    """Load the models, speak, write and report; what can be refused is, before the weights are loaded."""
    from hf_csm.serving.loaded import check_strength, choose_device, find_models, load_models
    from hf_csm.serving.speech import check_out, write_audio

    check_out(options.out)
    check_strength(options.strength)
    if options.temperature is not None and not 0 < options.temperature < float("inf"):
        raise UserError(f"--temperature is {options.temperature:g}.", "Give more than 0; 0.7 is usual.")
    if not 0 <= options.seed < 2**64:
        raise UserError(f"--seed is {options.seed}.", "Give a whole number of at least 0.")
    names = options.model or shlex.split(os.environ.get("HF_CSM_MODEL", ""))
    if not names and (options.emotion or options.voice):
        raise UserError(
            f"No model is named, and {DEFAULT_BASE} knows no emotions.",
            "Name an adapter with --model REPO_OR_FOLDER, or in HF_CSM_MODEL.",
        )
    device = choose_device(options.device)
    models = find_models(names or [DEFAULT_BASE], options.revision)
    models.choose(options.emotion, options.voice)
    speaker = load_models(
        models,
        device=device,
        dtype=options.dtype,
        temperature=options.temperature,
        text_temperature=options.temperature,
    )
    how = {name: getattr(options, name) for name in ("emotion", "voice", "strength", "seed")}
    try:
        speech = speak(speaker, how)
    finally:
        speaker.close()
    write_audio(options.out, speech, stereo=stereo)
    if options.json:
        print(json.dumps({"out": str(options.out), "model": names or [DEFAULT_BASE]} | speech.describe()))
    else:
        as_what = f" ({speech.emotion})" if speech.emotion else ""
        print(f"{options.out}: {speech.duration_s:.1f} s, {speech.voice}{as_what}: {speech.text or '(no words)'}")
    if options.emotion and not speech.emotion:
        print(f"warning: {speech.voice} speaks without emotion; {options.emotion} was ignored.", file=sys.stderr)
    if speech.is_silent:
        print("warning: nothing can be heard in it. Try another --seed, or a lower --strength.", file=sys.stderr)


def _serve(options: argparse.Namespace) -> None:
    require_extra("serve", "hf-csm serve", "aiohttp", "prometheus_client", "sphn")
    from hf_csm.serving.server.run import ServeOptions, serve

    serve(ServeOptions(**{field.name: getattr(options, field.name) for field in fields(ServeOptions)}))
