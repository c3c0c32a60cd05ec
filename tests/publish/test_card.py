import json
import re
import shlex

import peft
import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard, hf_api

from hf_csm.cli import build_parser
from hf_csm.corpora import all_builders
from hf_csm.errors import UserError
from hf_csm.mixture.provenance import CorpusTerms
from hf_csm.models.emotion_control import EmotionControl, write_emotion_control
from hf_csm.models.moshi.checkpoint import find_checkpoint
from hf_csm.models.moshi.lora import adapter_parameters, load_adapter
from hf_csm.models.moshi.model import load_moshi
from hf_csm.publish.card import MEASURES, facts_of, model_card, write_card
from hf_csm.publish.push_model import push_model


BASE = "kyutai/moshiko-pytorch-bf16"
RAVDESS, ESD = (
    CorpusTerms(
        builder.NAME,
        builder.TITLE,
        builder.LICENSE,
        builder.NOTICE,
        builder.HOMEPAGE,
        builder.NOT_TO_BE_PUBLISHED,
        table="ann/ravdess-codes" if builder.NAME == "ravdess" else None,
        num_windows=1234,
        duration_s=5400.0,
        emotions={"happy": 1000, "sad": 234},
        languages=["en"] if builder.NAME == "ravdess" else ["en", "zh"],
    )
    for builder in sorted(all_builders(), key=lambda builder: builder.NAME, reverse=True)
    if builder.NAME in ("ravdess", "esd")
)
METRICS = [
    {"step": 100, "loss": 4.0},
    {"step": 100, "eval_loss": 3.5, "eval_base_loss": 4.25, "eval_text_words": 2.0, "eval_base_text_words": 1.5},
    {"step": 200, "eval_loss": 9.0, "eval_base_loss": 4.25},
]
DATA = "Training data and what its licenses mean"


@pytest.fixture
def folder(tmp_path):
    """Return the facts that a push collects for the checkpoint of step 100."""
    write_emotion_control(EmotionControl("prefix", "<{emotion}>", ("neutral", "sad"), BASE, None, 100), tmp_path)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in METRICS))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"lora": {"rank": 64}, "optimizer": {"lr": 4e-6}, "seed": 7}))
    return tmp_path


def card_of(folder, corpora=(RAVDESS,), **more):
    return model_card(
        facts_of(folder, "ann/moshiko-sad", list(corpora), **{"base_model": BASE, "base_license": "cc-by-4.0"} | more)
    )


def section(card, title):
    return card.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_the_metadata_describe_an_adapter(folder):
    data = ModelCard(card_of(folder)).data
    assert (data.base_model, data.base_model_relation) == (BASE, "adapter")
    assert (data.library_name, data.pipeline_tag) == ("peft", "audio-to-audio")
    assert (data.license, data.license_name, data.license_link) == ("cc-by-nc-sa-4.0", None, None)
    assert {"moshi", "lora", "emotion", "sad", "neutral"} <= set(data.tags)
    assert (data.language, data.datasets) == (["en"], ["ann/ravdess-codes"])
    losses = {result.metric_name: result.metric_value for result in data.eval_results}
    assert losses == {
        "Negative log-likelihood in nats, all targets, weighted as in training": 3.5,
        "Negative log-likelihood in nats, text: words": 2.0,
    }
    assert len(data.eval_results) > 1
    for result in data.eval_results:
        assert (result.dataset_type, result.dataset_split) == ("ann/ravdess-codes", "validation")
    assert (data.model_name, result.task_type) == ("moshiko-sad", "audio-to-audio")


def test_the_languages_are_those_of_base_and_corpora(folder):
    assert ModelCard(card_of(folder, [RAVDESS, ESD])).data.language == ["en", "zh"]


def test_merged_weights_are_a_finetune_that_moshi_loads(folder):
    card = card_of(folder, merged=True)
    data = ModelCard(card).data
    assert (data.library_name, data.base_model_relation) == ("moshi", "finetune")
    assert "lora" not in data.tags and "import peft" not in card
    assert "Merged weights" in card


@pytest.mark.parametrize("corpora", [(RAVDESS,), (RAVDESS, ESD), ()])
def test_the_hub_accepts_the_card(folder, hub, corpora):
    names = write_card(facts_of(folder, "user/x", list(corpora), base_model=BASE, base_license="cc-by-4.0"), folder)
    HfApi().create_repo("user/x")
    for name in names:
        HfApi().upload_file(path_or_fileobj=folder / name, path_in_repo=name, repo_id="user/x")
    assert "POST /api/validate-yaml" in hub.requests
    license_, files = HfApi().model_info("user/x").card_data.license, HfApi().list_repo_files("user/x")
    assert license_ == ("cc-by-nc-sa-4.0" if corpora == (RAVDESS,) else "other")
    assert ("LICENSE.md" in files) == (license_ == "other")


def test_terms_without_a_common_license_are_in_license_md(folder):
    facts = facts_of(folder, "ann/x", [RAVDESS], base_model=BASE, base_license="cc-by-4.0")
    assert write_card(facts, folder) == ["README.md"]
    names = write_card(facts_of(folder, "ann/x", [RAVDESS, ESD], base_model=BASE, base_license="cc-by-4.0"), folder)
    assert names == ["README.md", "LICENSE.md"]
    data = ModelCard.load(folder / "README.md").data
    assert (data.license, data.license_link) == ("other", "LICENSE.md")
    assert data.license_name == "cc-by-nc-sa-4.0-and-esd-terms"
    terms = (folder / "LICENSE.md").read_text()
    assert RAVDESS.notice in terms and ESD.notice in terms and f"**{BASE}**, the base model: cc-by-4.0" in terms
    assert not list(folder.glob(".*"))


def test_every_corpus_is_listed_with_its_license_and_conditions(folder):
    replay = CorpusTerms("talk", "Talk", "cc-by-4.0", replay=True)
    text = section(card_of(folder, [RAVDESS, ESD, replay], base_license="cc-by-4.0"), DATA)
    rows = {row.split(" | ")[0].strip("| "): row for row in text.splitlines() if row.startswith("| ")}
    assert "| cc-by-nc-sa-4.0 | 1.50 | 1,234 | happy, sad |" in rows["RAVDESS"]
    assert "no commercial use" in rows["RAVDESS"] and "Not for distribution" in rows["ESD"]
    assert "not recorded" in rows["Talk (replay: ordinary dialogue)"]
    assert "License of the base model: cc-by-4.0." in text and "not for commercial use, because of RAVDESS" in text
    for terms in (RAVDESS, ESD):
        assert f"**{terms.title}** (<{terms.homepage}>): {terms.notice[:40]}" in text


def test_unknown_training_data_are_stated(folder):
    card = card_of(folder, [])
    assert "Not recorded" in section(card, DATA)
    data = ModelCard(card).data
    assert (data.license, data.license_name, data.datasets) == ("other", "unstated", None)


def test_the_losses_are_those_of_the_checkpoint(folder):
    text = section(card_of(folder), "Loss")
    assert "after step 100" in text and "9.0" not in text and "loss.png" not in text
    assert "| all targets, weighted as in training | 3.5000 | 4.2500 | -0.7500 |" in text
    assert "| text: words | 2.0000 | 1.5000 | +0.5000 |" in text
    (folder / "loss.png").touch()
    assert "(loss.png)" in section(card_of(folder), "Loss")


def test_missing_evaluations_and_options_are_stated(folder):
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 4.0}\n{"step": 2, "lo')
    card = card_of(folder)
    assert "Not evaluated" in section(card, "Loss") and ModelCard(card).data.eval_results is None
    for name in ("metrics.jsonl", "config.yaml"):
        (folder / name).unlink()
    card = card_of(folder)
    assert "Not evaluated" in section(card, "Loss") and "not recorded" in section(card, "Training")


def test_measures_without_results_are_listed_as_not_measured(folder):
    text = section(card_of(folder), "Results")
    missing = text.split("Not measured")[1]
    assert all(title in missing for title in MEASURES.values()) and "| measure |" not in text
    (folder / "health.json").write_text(json.dumps({"voiced_share": 0.41, "healthy": True, "note": "long text"}))
    measured, missing = section(card_of(folder), "Results").split("Not measured")
    assert "| voiced_share | 0.41 |" in measured and "| healthy | yes |" in measured and "long text" not in measured
    assert MEASURES["health"] in measured and MEASURES["health"] not in missing
    assert all(title in missing for name, title in MEASURES.items() if name != "health")
    for name in MEASURES:
        (folder / f"{name}.json").write_text('{"x": 1}')
    assert "Not measured" not in section(card_of(folder), "Results")


def test_the_options_of_the_run_are_shown(folder):
    shown = yaml.safe_load(section(card_of(folder), "Training").split("```yaml\n")[1].split("```")[0])
    assert shown == {"lora": {"rank": 64}, "optimizer": {"lr": 4e-6}}


@pytest.mark.parametrize(
    ("control", "parts"),
    [
        (EmotionControl("prefix", "<{emotion}>", ("neutral", "sad")), ["neutral and sad.", "such as `<sad>`"]),
        (EmotionControl("prefix", "<{emotion}>"), ["not recorded"]),
        (EmotionControl("none", emotions=("happy",)), ["always speaks", "`happy`", "no prefix"]),
        (EmotionControl("none"), ["No emotion can be selected"]),
    ],
)
def test_how_to_select_an_emotion_depends_on_the_control(folder, control, parts):
    write_emotion_control(control, folder)
    card = card_of(folder)
    assert all(part in section(card, "Emotions") for part in parts)
    asks = control.control == "prefix" and bool(control.emotions)
    assert ("--emotion sad" in card) == asks


def test_samples_are_linked(folder):
    assert "## Samples" not in card_of(folder)
    (folder / "samples").mkdir()
    (folder / "samples" / "trained_sad.wav").touch()
    assert "(samples/trained_sad.wav)" in section(card_of(folder), "Samples")


def test_the_path_of_a_local_base_is_not_published(folder):
    card = card_of(folder, base_model="/home/ann/secret/base", base_revision="v1")
    assert "secret" not in card and "a model that is not on the Hub" in card
    data = ModelCard(card).data
    assert data.base_model is None and "base_model_relation" not in data.to_dict()


def test_names_with_spaces_and_capitals_are_made_valid(folder):
    mine = CorpusTerms("My own Voices", "My own voices", "unknown")
    data = ModelCard(card_of(folder, [mine])).data
    assert data.license_name == "cc-by-4.0-and-my-own-voices-terms"
    assert {result.dataset_type for result in data.eval_results} == {"my-own-voices"}


def test_a_non_commercial_base_is_stated(folder):
    card = card_of(folder, [CorpusTerms("mine", "Mine", "cc-by-4.0")], base_license="cc-by-nc-4.0")
    assert f"not for commercial use, because of the base model {BASE}." in card


def test_the_revision_of_the_base_is_stated(folder):
    card = card_of(folder, base_revision="v1")
    assert "(revision `v1`)" in card and f'from_hf_repo("{BASE}", revision="v1")' in card


def test_names_from_corpora_cannot_break_the_card(folder):
    evil = CorpusTerms("evil", "a | b\n## Heading <script>x</script>", "mit", notice="line\n- [click](http://x)")
    card = card_of(folder, [evil], base_license="mit")
    text = ModelCard(card).text
    assert "<script>" not in text and "\n## Heading" not in card and "[click](" not in text
    (row,) = (line for line in card.splitlines() if line.startswith("| a "))
    assert len(re.findall(r"(?<!\\)\|", row)) == 7
    assert ModelCard(card).data.license == "mit"


def test_the_commands_of_the_card_parse(folder):
    commands = [line for line in card_of(folder).splitlines() if line.startswith("hf-csm ")]
    assert [command.split()[1] for command in commands] == ["serve", "say", "reply"]
    for command in commands:
        build_parser().parse_args(shlex.split(command)[1:])


def test_the_code_of_the_card_loads_the_pushed_adapter(hub, base_on_hub, run, monkeypatch):
    monkeypatch.setattr(hf_api.api, "endpoint", hub.endpoint)  # of PEFT's own questions
    push_model(run / "best", "user/moshiko-happy")
    card = ModelCard.load("user/moshiko-happy")
    found = {}
    exec(card.text.split("```python\n")[1].split("```")[0], found)
    assert isinstance(found["model"], peft.PeftModel)
    loaded = [weight for name, weight in found["model"].named_parameters() if "lora_" in name]
    trained = adapter_parameters(load_adapter(load_moshi(find_checkpoint(base_on_hub)), run / "best" / "adapter"))
    assert len(loaded) == len(trained) and all(torch.equal(a, b) for a, b in zip(loaded, trained, strict=True))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", "a: ["),
        ("config.yaml", "- a"),
        ("metrics.jsonl", "[1]\n"),
        ("metrics.jsonl", '{"loss": 1}\n'),
        ("health.json", "{"),
        ("health.json", "[]"),
        ("emotions.json", "{}"),
    ],
)
def test_a_damaged_file_is_named(folder, name, content):
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=name) as error:
        card_of(folder)
    assert "\n" not in error.value.problem + error.value.remedy
