import json
import shutil

import pytest

from hf_csm.errors import UserError
from hf_csm.models.emotion_control import EmotionControl
from hf_csm.models.moshi.checkpoint import find_checkpoint
from hf_csm.models.moshi.export import serving_config
from hf_csm.models.moshi.tiny import write_tiny_moshi
from hf_csm.serving.resolve import BASE, Models, Voice, find_models


@pytest.fixture(scope="module")
def other_base(tmp_path_factory):
    return write_tiny_moshi(tmp_path_factory.mktemp("other") / "other_moshi", seed=1)


@pytest.fixture(scope="module")
def strange(other_base, tmp_path_factory, write_adapter):
    return write_adapter(other_base, tmp_path_factory.mktemp("adapters") / "strange", EmotionControl())


def merged_of(base, folder, emotions):
    """Stands for a merged model: only its files count here."""
    shutil.copytree(base, folder)
    control = {"control": "prefix", "prefix_template": "({emotion})", "emotions": emotions}
    (folder / "emotions.json").write_text(json.dumps(control))
    return folder


def names_of(models):
    return [(voice.name, voice.adapter, voice.emotions) for voice in models.voices]


def test_adapters_are_called_as_their_folders_and_the_base_is_there_too(expressive, calm, tiny_moshi):
    models = find_models([str(expressive), f"quiet={calm}"])
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
def test_a_checkpoint_of_a_run_is_called_as_the_run(as_checkpoint, part):
    models = find_models([str(as_checkpoint / part)])
    assert names_of(models)[0] == ("moody", 0, ("happy", "sad"))


def test_a_base_or_merged_model_alone_is_the_only_voice(tiny_moshi, tmp_path):
    assert names_of(find_models([str(tiny_moshi)])) == [(BASE, None, ())]
    merged = merged_of(tiny_moshi, tmp_path / "moody-moshi", ["sad"])
    assert names_of(find_models([str(merged)])) == [("merged", None, ("sad",))]
    assert names_of(find_models([f"mine={merged}"])) == [("mine", None, ("sad",))]


def test_the_base_may_be_named_beside_its_adapters(expressive, tiny_moshi, tmp_path):
    elsewhere = tmp_path / "copied"
    shutil.copytree(tiny_moshi, elsewhere)
    for base in (tiny_moshi, elsewhere):
        assert [voice.name for voice in find_models([str(base), str(expressive)]).voices] == ["expressive", BASE]


def test_a_folder_may_have_an_equals_sign_in_its_name(tiny_moshi, tmp_path, monkeypatch):
    shutil.copytree(tiny_moshi, tmp_path / "lr=1")
    monkeypatch.chdir(tmp_path)
    assert find_models(["lr=1"]).base_name == "lr=1"


def refused(names, **kwargs):
    with pytest.raises(UserError) as error:
        find_models([str(name) for name in names], **kwargs)
    return error.value


def test_adapters_of_two_bases_are_refused_and_both_are_named(expressive, strange, tiny_moshi, other_base):
    error = refused([expressive, strange])
    assert f"{expressive} is an adapter of {tiny_moshi}" in error.problem
    assert f"{strange} is an adapter of {other_base}" in error.problem
    error = refused([other_base, expressive])
    assert f"{other_base} is a whole model" in error.problem
    assert str(tiny_moshi) in error.problem


def test_one_base_under_another_config_is_another_base(expressive, calm, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(calm, changed)
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"context": 7}))
    assert "not of one base" in refused([expressive, changed]).problem


def test_names_must_differ_and_base_is_taken(expressive, calm):
    assert "'expressive'" in refused([expressive, expressive]).problem
    assert "'base'" in refused([f"base={calm}"]).problem
    assert "NAME=" in refused([f"a={calm}", f"a={expressive}"]).remedy


def test_what_cannot_be_combined_is_refused(tiny_moshi, other_base, expressive, tmp_path):
    merged = merged_of(tiny_moshi, tmp_path / "merged", ["sad"])
    assert "merged model" in refused([merged, expressive]).problem
    assert "whole models" in refused([tiny_moshi, merged]).problem
    assert refused([]).problem == "No model is named."
    assert "2 models" in refused([tiny_moshi, expressive], revision="v1").problem
    assert "there is no folder" in refused([tmp_path / "nothing"]).problem.lower()


def test_a_config_without_rank_is_refused(expressive, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(expressive, broken)
    config = json.loads((broken / "config.json").read_text())
    del config["lora_rank"]
    (broken / "config.json").write_text(json.dumps(config))
    assert "lora_rank" in refused([broken]).problem


def test_the_base_of_an_adapter_is_called_as_its_repository(expressive, tiny_moshi, tmp_path, monkeypatch):
    """As it is when the base is on the Hub; here only the names in config.json are."""
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
    assert find_models([str(adapter)]).base_name == "kyutai/tiny"


MODELS = Models(
    None,
    "tiny",
    (),
    (
        Voice("moody", 0, EmotionControl("prefix", emotions=("happy", "sad"))),
        Voice("glad", 1, EmotionControl("none", emotions=("happy",))),
        Voice("mixed", 2, EmotionControl("none", emotions=("angry", "fearful"))),
        Voice(BASE, None, EmotionControl()),
    ),
)


@pytest.mark.parametrize(
    ("emotion", "voice", "chosen"),
    [
        (None, None, "moody"),
        ("happy", None, "moody"),
        ("happy", "glad", "glad"),
        (None, "glad", "glad"),
        (None, BASE, BASE),
        ("sad", BASE, BASE),  # what the adapters are compared with
    ],
)
def test_the_voice_is_the_one_named_or_the_first_that_knows_the_emotion(emotion, voice, chosen):
    assert MODELS.choose(emotion, voice).name == chosen


@pytest.mark.parametrize(
    ("emotion", "voice", "problem", "remedy"),
    [
        ("hapy", None, "nearest is 'happy'", "The emotions are happy, sad."),
        (
            "sad",
            "glad",
            "The voice 'glad' does not know the emotion 'sad'.",
            "The emotions are happy.",
        ),
        # Trained on both without being told which: nobody can ask it for one.
        ("angry", None, "does not know the emotion 'angry'", "happy, sad"),
        ("angry", "mixed", "The voice 'mixed' was not trained", "leave the emotion out"),
        (None, "mody", "There is no voice 'mody'; nearest is 'moody'.", "moody, glad, mixed, base"),
    ],
)
def test_what_no_voice_can_do_is_refused_with_what_there_is(emotion, voice, problem, remedy):
    with pytest.raises(UserError) as error:
        MODELS.choose(emotion, voice)
    assert problem in error.value.problem
    assert remedy in error.value.remedy


def test_a_base_alone_takes_no_emotion(tiny_moshi):
    models = find_models([str(tiny_moshi)])
    for voice in (None, BASE):
        with pytest.raises(UserError, match="not trained to speak with emotions"):
            models.choose("happy", voice)
