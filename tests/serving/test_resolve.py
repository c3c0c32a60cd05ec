import json
import shutil

import pytest

from hf_csm.errors import UserError
from hf_csm.models.emotion_control import EmotionControl
from hf_csm.models.moshi.checkpoint import find_checkpoint
from hf_csm.models.moshi.export import serving_config
from hf_csm.models.moshi.tiny import write_tiny_moshi
from hf_csm.serving.resolve import BASE, AdapterChoice, ResolvedModels, resolve_models


@pytest.fixture(scope="module")
def other_base(tmp_path_factory):
    return write_tiny_moshi(tmp_path_factory.mktemp("other") / "other_moshi", seed=1)


@pytest.fixture(scope="module")
def strange(other_base, tmp_path_factory, write_adapter):
    return write_adapter(other_base, tmp_path_factory.mktemp("adapters") / "strange", EmotionControl())


def merged_of(base, folder, emotions):
    """A copy of the base with the metadata of a merged model."""
    shutil.copytree(base, folder)
    control = {"control": "prefix", "prefix_template": "({emotion})", "emotions": emotions}
    (folder / "emotions.json").write_text(json.dumps(control))
    return folder


def names_of(models):
    return [(choice.name, choice.index, choice.emotions) for choice in models.choices]


def test_adapters_are_named_after_their_folders_and_base_is_added(expressive, calm, tiny_moshi):
    models = resolve_models([str(expressive), f"quiet={calm}"])
    assert names_of(models) == [
        ("expressive", 0, ("happy", "sad", "angry")),
        ("quiet", 1, ("calm",)),
        (BASE, None, ()),
    ]
    assert models.base_name == str(tiny_moshi)
    assert models.emotions == ["happy", "sad", "angry", "calm"]
    assert [(adapter.rank, adapter.scaling) for adapter in models.adapters] == [(4, 2.0), (2, 2.0)]
    assert models.base.lora_weights is None
    assert not {"lora", "lora_rank"} & models.base.lm_config.keys()


@pytest.mark.parametrize("part", ["", "consolidated"])
def test_checkpoint_is_named_after_its_run(as_checkpoint, part):
    models = resolve_models([str(as_checkpoint / part)])
    assert names_of(models)[0] == ("moody", 0, ("happy", "sad"))


def test_base_or_merged_model_is_the_only_choice(tiny_moshi, tmp_path):
    assert names_of(resolve_models([str(tiny_moshi)])) == [(BASE, None, ())]
    merged = merged_of(tiny_moshi, tmp_path / "moody-moshi", ["sad"])
    assert names_of(resolve_models([str(merged)])) == [("merged", None, ("sad",))]
    assert names_of(resolve_models([f"mine={merged}"])) == [("mine", None, ("sad",))]


def test_base_may_be_given_with_its_adapters(expressive, tiny_moshi, tmp_path):
    elsewhere = tmp_path / "copied"
    shutil.copytree(tiny_moshi, elsewhere)
    for base in (tiny_moshi, elsewhere):
        assert [choice.name for choice in resolve_models([str(base), str(expressive)]).choices] == ["expressive", BASE]


def test_folder_name_may_have_an_equals_sign(tiny_moshi, tmp_path, monkeypatch):
    shutil.copytree(tiny_moshi, tmp_path / "lr=1")
    monkeypatch.chdir(tmp_path)
    assert resolve_models(["lr=1"]).base_name == "lr=1"


def refused(names, **kwargs):
    with pytest.raises(UserError) as error:
        resolve_models([str(name) for name in names], **kwargs)
    return error.value


def test_adapters_of_different_bases_are_refused(expressive, strange, tiny_moshi, other_base):
    error = refused([expressive, strange])
    assert f"{expressive} is an adapter of {tiny_moshi}" in error.problem
    assert f"{strange} is an adapter of {other_base}" in error.problem
    error = refused([other_base, expressive])
    assert f"{other_base} is a whole model" in error.problem
    assert str(tiny_moshi) in error.problem


def test_another_config_is_another_base(expressive, calm, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(calm, changed)
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"context": 7}))
    assert "base models differ" in refused([expressive, changed]).problem


def test_names_are_unique_and_base_is_reserved(expressive, calm):
    assert "'expressive'" in refused([expressive, expressive]).problem
    assert "'base'" in refused([f"base={calm}"]).problem
    assert "NAME=" in refused([f"a={calm}", f"a={expressive}"]).remedy


def test_invalid_combinations_are_refused(tiny_moshi, other_base, expressive, tmp_path):
    merged = merged_of(tiny_moshi, tmp_path / "merged", ["sad"])
    assert "merged model" in refused([merged, expressive]).problem
    assert "whole models" in refused([tiny_moshi, merged]).problem
    assert refused([]).problem == "No model was given."
    assert "2 models" in refused([tiny_moshi, expressive], revision="v1").problem
    assert "no such folder" in refused([tmp_path / "nothing"]).problem.lower()


def test_config_without_rank_is_refused(expressive, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(expressive, broken)
    config = json.loads((broken / "config.json").read_text())
    del config["lora_rank"]
    (broken / "config.json").write_text(json.dumps(config))
    assert "lora_rank" in refused([broken]).problem


def test_base_is_named_after_its_repository(expressive, tiny_moshi, tmp_path, monkeypatch):
    """Only the names in config.json refer to the Hub here."""
    adapter = tmp_path / "adapter"
    shutil.copytree(expressive, adapter)
    config = json.loads((adapter / "config.json").read_text())
    hub = {
        key: f"hf://kyutai/tiny/{value.rpartition('/')[2]}" for key, value in config.items() if "file://" in str(value)
    }
    assert set(hub) == {key for key in serving_config(find_checkpoint(str(tiny_moshi))) if key.endswith("_name")}
    (adapter / "config.json").write_text(json.dumps(config | hub))
    monkeypatch.setattr(
        "hf_csm.models.moshi.checkpoint.fetch_file", lambda repo, name, revision=None: tiny_moshi / name
    )
    assert resolve_models([str(adapter)]).base_name == "kyutai/tiny"


MODELS = ResolvedModels(
    None,
    None,
    "tiny",
    (),
    (
        AdapterChoice("moody", 0, EmotionControl("prefix", emotions=("happy", "sad"))),
        AdapterChoice("glad", 1, EmotionControl("none", emotions=("happy",))),
        AdapterChoice("mixed", 2, EmotionControl("none", emotions=("angry", "fearful"))),
        AdapterChoice(BASE, None, EmotionControl()),
    ),
)


@pytest.mark.parametrize(
    ("emotion", "adapter", "chosen"),
    [
        (None, None, "moody"),
        ("happy", None, "moody"),
        ("happy", "glad", "glad"),
        (None, "glad", "glad"),
        (None, BASE, BASE),
        ("sad", BASE, BASE),  # for comparison
    ],
)
def test_choice_by_name_or_first_that_supports_the_emotion(emotion, adapter, chosen):
    assert MODELS.choose(emotion, adapter).name == chosen


@pytest.mark.parametrize(
    ("emotion", "adapter", "problem", "remedy"),
    [
        ("hapy", None, "nearest is 'happy'", "happy, sad"),
        (
            "sad",
            "glad",
            "The adapter 'glad' does not support the emotion 'sad'",
            "happy",
        ),
        # Trained on several emotions without a prefix: none can be selected.
        ("angry", None, "does not support the emotion 'angry'", "happy, sad"),
        ("angry", "mixed", "The adapter 'mixed' does not support emotions", "omit the emotion"),
        (None, "mody", "There is no adapter 'mody'; nearest is 'moody'.", "moody, glad, mixed, base"),
    ],
)
def test_unknown_adapter_or_emotion_is_refused_with_the_alternatives(emotion, adapter, problem, remedy):
    with pytest.raises(UserError) as error:
        MODELS.choose(emotion, adapter)
    assert problem in error.value.problem
    assert remedy in error.value.remedy


def test_base_alone_supports_no_emotion(tiny_moshi):
    models = resolve_models([str(tiny_moshi)])
    for adapter in (None, BASE):
        with pytest.raises(UserError, match="does not support emotions"):
            models.choose("happy", adapter)
