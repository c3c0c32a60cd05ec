"""What a model card tells people: how to talk to the model, whose speech it learned from, what is known of it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import yaml

from hf_csm import __version__
from hf_csm.mixture.provenance import CorpusTerms
from hf_csm.publish.licenses import base_terms, meaning


if TYPE_CHECKING:
    from hf_csm.publish.card import CardFacts

MEASURES = {
    "health": "Health of free-running speech: does it still talk, pause and answer in time",
    "expressivity": "Expressivity: is the emotion that was asked for heard, by recognisers and in pitch and loudness",
    "listening": "A listening test with people",
    "speed": "Real time on a GPU",
}
"""What a model can be measured by: `<name>.json`, an object of numbers, has the results. Otherwise it was not run."""
LOSSES = {
    "loss": "all targets, weighted as in training",
    "text_words": "text: words",
    "text_padding": "text: padding",
    "codebook_0": "codebook 0 (semantic)",
    "codebooks_rest": "the other codebooks",
}
_SETTINGS = (
    ("training", "max_steps", "gradient_accumulation_steps", "max_grad_norm"),
    ("dataset", "duration_sec", "batch_size", "control", "prefix_dropout", "emotions", "languages"),
    ("lora", "rank", "alpha", "dropout", "target_modules"),
    ("optimizer", "name", "lr", "weight_decay", "betas"),
    ("scheduler", "num_warmup_steps", "min_lr_ratio"),
    ("loss", "text_weight", "text_padding_weight", "first_codebook_weight", "other_codebooks_weight"),
)
MOSHI_BIBTEX = """@techreport{kyutai2024moshi,
  title  = {Moshi: a speech-text foundation model for real-time dialogue},
  author = {Alexandre D\\'efossez and Laurent Mazar\\'e and Manu Orsini and Am\\'elie Royer and Patrick P\\'erez and
            Herv\\'e J\\'egou and Edouard Grave and Neil Zeghidour},
  year   = {2024},
  eprint = {2410.00037},
  archivePrefix = {arXiv},
}"""


def body(facts: CardFacts) -> str:
    """Return the card below its metadata."""
    sections = (
        _introduction,
        _serving,
        _emotions,
        _data,
        _training,
        _losses,
        _measures,
        _samples,
        _use,
        _attribution,
    )
    return "\n\n".join(text for text in (section(facts).strip() for section in sections) if text) + "\n"


def _introduction(facts: CardFacts) -> str:
    what = "whole weights: a LoRA adapter merged into" if facts.merged else "a LoRA adapter for"
    step = f" (step {facts.control.step:,})" if facts.control.step is not None else ""
    known = f" It takes {_listing(facts.control.emotions)}." if facts.control.emotions else ""
    return (
        f"# {facts.repo_id.partition('/')[2]}\n\n"
        f"{what[0].upper()}{what[1:]} {_base(facts)}, trained with hf-csm {__version__} so that Moshi speaks with "
        f"emotion{step}.{known} Moshi is a full-duplex spoken dialogue model: it hears and speaks all the time."
    )


def _serving(facts: CardFacts) -> str:
    name, emotion = facts.repo_id, _example(facts)
    ask = f" --emotion {emotion}" if emotion else ""
    text = f"""## How to serve it

With Moshi's own server, on a GPU, one flag:

```
pip install moshi
python -m moshi.server --hf-repo {name}
```

With hf-csm, which takes emotions and has a web page to choose them on:

```
hf-csm serve {name}
hf-csm say "I did not expect to see you here." --model {name}{ask} --out said.wav
hf-csm reply question.wav --model {name}{ask} --out answer.wav
```"""
    if facts.merged or facts.base_model is None:
        return text
    revision = f', revision="{facts.base_revision}"' if facts.base_revision else ""
    return f"""{text}

With PEFT, on Moshi's own `LMModel`:

```python
import peft
from moshi.models import loaders

base = loaders.CheckpointInfo.from_hf_repo("{facts.base_model}"{revision})
model = peft.PeftModel.from_pretrained(base.get_moshi(device="cpu"), "{name}")
```"""


def _emotions(facts: CardFacts) -> str:
    control = facts.control
    if control.control == "prefix":
        example = control.prefix_template.format(emotion=_example(facts) or "sad")
        known = f"It knows {_listing(control.emotions)}." if control.emotions else "Which it knows was not recorded."
        text = (
            f"{known}\n\nOne is asked for by a prefix of Moshi's text stream, such as `{example}`: its tokens are "
            "forced in the first frames, before Moshi says anything. `hf-csm serve`, `say` and `reply` do that. "
            "Moshi's own server cannot force text: there the model speaks without being asked for an emotion."
        )
    elif control.emotions:
        text = f"It always speaks {control.emotions[0]}, without being asked; so it does on Moshi's own server."
    else:
        text = "It cannot be asked for one: it was trained without a prefix that names the emotion."
    return f"## Emotions\n\n{text}\n\n`emotions.json` says the same for programs."


def _data(facts: CardFacts) -> str:
    if not facts.corpora:
        return (
            "## Training data and what its licences mean\n\n"
            "Not recorded: ask whoever trained it on whose speech, and on what terms, before you use it."
        )
    rows = [
        "| corpus | licence | hours | windows | emotions | what it asks |",
        "| --- | --- | ---: | ---: | --- | --- |",
    ]
    for terms in facts.corpora:
        rows.append(
            "| "
            + " | ".join(
                _cell(text)
                for text in (
                    terms.title + (" (replay: ordinary dialogue)" if terms.replay else ""),
                    terms.license,
                    f"{terms.duration_s / 3600:.2f}" if terms.duration_s else "not recorded",
                    f"{terms.num_windows:,}" if terms.num_windows else "not recorded",
                    ", ".join(terms.emotions) or "not recorded",
                    meaning(terms),
                )
            )
            + " |"
        )
    notices = [
        f"- **{_cell(terms.title)}**{_link(terms)}: {_cell(terms.notice)}" for terms in facts.corpora if terms.notice
    ]
    base = facts.base_license or "not known; see its page"
    is_other = facts.licence.id == "other"
    result = "all terms in [LICENSE.md](LICENSE.md) at once" if is_other else f"`{facts.licence.id}`"
    sources = (*facts.corpora, *base_terms(facts.base_model or "", facts.base_license))
    against = ", ".join(dict.fromkeys(terms.title.strip() for terms in sources if "-nc" in terms.license))
    commerce = f" It is not for commercial use, because of {against}." if against else ""
    return "\n".join(
        [
            "## Training data and what its licences mean",
            "",
            *rows,
            "",
            f"Licence of the base model: {base}. This model is under {result}.{commerce}",
            "",
            "Whether weights are a work made from the recordings they were trained on is not settled. hf-csm decides "
            "for caution and passes an adapter on as if it were: what a corpus asks of material made from it is asked "
            "of this model. No recording, code, text or label of a corpus is in this repository.",
            "",
            "### Attribution of the corpora",
            "",
            *(notices or ["Nobody has stated whom to name."]),
        ]
    )


def _training(facts: CardFacts) -> str:
    if not facts.options:
        return "## Training\n\nHow it was trained was not recorded."
    settings: dict[str, Any] = {}
    for group, *names in _SETTINGS:
        found = {name: (facts.options.get(group) or {}).get(name) for name in names}
        settings[group] = {name: value for name, value in found.items() if value is not None}
    text = yaml.safe_dump({group: found for group, found in settings.items() if found}, sort_keys=False)
    return f"## Training\n\nAll options are in `config.yaml`. Those that matter most:\n\n```yaml\n{text}```"


def _losses(facts: CardFacts) -> str:
    line, text = facts.evaluation, ["## Loss", ""]
    if facts.has_plot:
        text += ["![Loss of training and validation over the steps](loss.png)", ""]
    if not line:
        return "\n".join([*text, "Not evaluated on a validation split."])
    text += [
        f"On the validation split after step {int(line['step']):,}, mean negative log likelihood in nats:",
        "",
        "| targets | this model | base model | difference |",
        "| --- | ---: | ---: | ---: |",
    ]
    for key, name in LOSSES.items():
        own, base = line.get(f"eval_{key}"), line.get(f"eval_base_{key}")
        if own is not None:
            more = f"{base:.4f} | {own - base:+.4f}" if base is not None else "not run | "
            text.append(f"| {name} | {own:.4f} | {more} |")
    text += ["", "A lower loss alone does not show that Moshi still talks well, or with more feeling."]
    return "\n".join(text)


def _measures(facts: CardFacts) -> str:
    text = ["## Results", ""]
    for name, title in MEASURES.items():
        if results := facts.measured.get(name):
            text += [f"{title}:", "", "| measure | value |", "| --- | ---: |"]
            text += [f"| {_cell(key)} | {_value(value)} |" for key, value in results.items()] + [""]
    missing = [title for name, title in MEASURES.items() if not facts.measured.get(name)]
    if missing:
        text += ["Not measured, so nothing is known of it:", "", *(f"- {title}." for title in missing)]
    return "\n".join(text)


def _samples(facts: CardFacts) -> str:
    if not facts.samples:
        return ""
    clips = [(path, path.rpartition("/")[2].startswith("base_")) for path in facts.samples]
    lines = [f"- [{path}]({path}){', the base, for comparison' if is_base else ''}" for path, is_base in clips]
    return "\n".join(["## Samples", "", "What was said after training:", "", *lines])


def _use(facts: CardFacts) -> str:
    return """## Intended use and limits

For research on expressive spoken dialogue, and for trying out how a voice that carries emotion changes a conversation.

- The emotion labels of acted corpora are instructions to actors. What people hear often differs, and acted emotion is
  stronger than what people show in conversation.
- Emotions are put on, not felt: what was trained is how Moshi sounds, not what it understands.
- It does not recognise emotions. Nothing it says is a measure of how a person feels; do not judge people by it.
- The voices it learned from are people's. Do not use it to imitate a person, or to deceive anyone about who speaks;
  tell people that they talk to a machine.
- Do not use it to press on people's feelings to make them decide or pay.
- The limits of the base model hold: it makes things up, can be rude or biased, and knows mostly English.
- What was not measured, above, is not known."""


def _attribution(facts: CardFacts) -> str:
    text = "## Citation\n\nName the corpora as above, and the base model"
    if (facts.base_model or "").startswith("kyutai/"):
        return f"{text}:\n\n```bibtex\n{MOSHI_BIBTEX}\n```"
    return f"{text}, {_base(facts)}, as its page asks."


def _base(facts: CardFacts) -> str:
    if facts.base_model is None:
        return "a model that is not on the Hub"
    at = f" (revision `{facts.base_revision}`)" if facts.base_revision else ""
    return f"[{facts.base_model}](https://huggingface.co/{facts.base_model}){at}"


def _example(facts: CardFacts) -> str | None:
    """Return an emotion to show how to ask for it: one that is heard at once, if it is known."""
    known = facts.control.emotions
    return "happy" if "happy" in known else next((name for name in known if name != "neutral"), None)


def _link(terms: CorpusTerms) -> str:
    return f" (<{terms.homepage}>)" if terms.homepage.startswith("https://") else ""


def _listing(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _value(value: float | bool) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else f"{value:g}"


def _cell(text: str) -> str:
    """Return text that stays in its line and cell, whatever the owner of a corpus has called it."""
    return re.sub(r"([|<>`*\[\]])", r"\\\1", " ".join(str(text).split()))
