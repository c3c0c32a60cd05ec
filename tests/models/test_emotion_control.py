import json

import pytest
import yaml

from hf_csm.errors import UserError
from hf_csm.mixture.provenance import CorpusTerms, write_corpora
from hf_csm.models.emotion_control import EmotionControl, read_emotion_control, write_emotion_control


PREFIX = EmotionControl("prefix", "<{emotion}> ", ("happy", "sad"), "kyutai/moshiko-pytorch-bf16", "v1", 500)


class Letters:
    def encode(self, text):
        return [ord(letter) for letter in text]


@pytest.fixture
def checkpoint(tmp_path):
    """A training checkpoint of step 500, and a function that writes what its run was configured to."""
    folder = tmp_path / "run" / "checkpoint_000500"
    for name in ("adapter", "consolidated"):
        (folder / name).mkdir(parents=True)

    def configure(trained=None, **dataset):
        dataset = {"control": "prefix", "prefix_template": "({emotion})", "emotions": None} | dataset
        config = {"dataset": dataset, "moshi_paths": {"hf_repo_id": "kyutai/moshiko", "revision": "v2"}}
        (folder.parent / "config.yaml").write_text(yaml.safe_dump(config))
        if trained:
            write_corpora([CorpusTerms("a", "A", "mit", emotions=emotions) for emotions in trained], folder.parent)

    configure.folder = folder
    return configure


def test_the_prefix_is_tokens_of_its_text():
    assert PREFIX.tokens("sad", Letters()) == [ord(letter) for letter in "<sad> "]
    assert PREFIX.tokens(None, Letters()) == []
    assert EmotionControl("none", emotions=("sad",)).tokens("sad", Letters()) == []


def test_a_written_file_is_read_back(tmp_path):
    write_emotion_control(PREFIX, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["emotions.json"]
    assert read_emotion_control(tmp_path) == PREFIX
    assert json.loads((tmp_path / "emotions.json").read_text()) == {
        "control": "prefix",
        "prefix_template": "<{emotion}> ",
        "emotions": ["happy", "sad"],
        "base_model": "kyutai/moshiko-pytorch-bf16",
        "base_revision": "v1",
        "step": 500,
    }


def test_a_model_without_emotion_control_takes_no_emotion(tmp_path):
    (tmp_path / "config.yaml").write_text("of: something else")
    assert read_emotion_control(tmp_path) == EmotionControl("none", emotions=())


@pytest.mark.parametrize("part", ["", "adapter", "consolidated", "../best"])
def test_a_checkpoint_takes_the_emotions_of_its_run(checkpoint, part):
    checkpoint(trained=[{"sad": 3, "happy": 1, "other": 4, "unlabelled": 9}, {"calm": 1}])
    (checkpoint.folder.parent / "best").symlink_to(checkpoint.folder.name)
    assert read_emotion_control(checkpoint.folder / part) == EmotionControl(
        "prefix", "({emotion})", ("calm", "happy", "sad"), "kyutai/moshiko", "v2", 500
    )


def test_without_counts_the_filter_gives_the_emotions(checkpoint):
    checkpoint(emotions=["sad", "angry"])
    assert read_emotion_control(checkpoint.folder).emotions == ("sad", "angry")
    checkpoint()
    assert read_emotion_control(checkpoint.folder).emotions == ()


@pytest.mark.parametrize(
    ("trained", "expected"), [([{"happy": 3}], ("happy",)), ([{"happy": 3}, {"sad": 1}], ()), ([{"other": 3}], ())]
)
def test_without_prefix_only_a_single_emotion_is_listed(checkpoint, trained, expected):
    checkpoint(control="none", trained=trained)
    assert read_emotion_control(checkpoint.folder).emotions == expected


def test_an_export_takes_precedence_over_the_run(checkpoint):
    checkpoint()
    write_emotion_control(PREFIX, checkpoint.folder)
    assert read_emotion_control(checkpoint.folder) == PREFIX


def test_a_damaged_configuration_is_named(checkpoint):
    for text in ("dataset: [", "- a", "dataset: {}"):
        (checkpoint.folder.parent / "config.yaml").write_text(text)
        with pytest.raises(UserError, match="config.yaml is damaged") as error:
            read_emotion_control(checkpoint.folder)
        assert "\n" not in error.value.problem + error.value.remedy


GOOD = {"control": "prefix", "prefix_template": "({emotion})", "emotions": ["sad"]}


def test_a_file_of_another_version_is_read_as_far_as_it_is_known(tmp_path):
    (tmp_path / "emotions.json").write_text(json.dumps({"emotions": ["sad"], "control": "none", "intensity": 3}))
    assert read_emotion_control(tmp_path) == EmotionControl("none", "({emotion})", ("sad",))
    twice = GOOD | {"prefix_template": "{emotion}, {emotion} {{!}}"}
    (tmp_path / "emotions.json").write_text(json.dumps(twice))
    assert bytes(read_emotion_control(tmp_path).tokens("sad", Letters())) == b"sad, sad {!}"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[]", "not a JSON object"),
        ({}, "control is None"),
        (GOOD | {"control": "voice"}, "control is 'voice', not one of prefix, none"),
        (GOOD | {"emotions": "sad"}, "emotions is not a list"),
        (GOOD | {"emotions": [1]}, "emotions is not a list"),
        (GOOD | {"emotions": ["<script>"]}, "emotions is not a list"),
        (GOOD | {"emotions": ["x" * 41]}, "emotions is not a list"),
        (GOOD | {"emotions": ["sad\n"]}, "emotions is not a list"),
        (GOOD | {"prefix_template": "(sad)"}, "prefix_template is '(sad)'"),
        (GOOD | {"prefix_template": "{emotion} {x}"}, "prefix_template is"),
        (GOOD | {"prefix_template": "{emotion:>99999999}"}, "prefix_template is"),
        (GOOD | {"prefix_template": "{emotion.__class__}"}, "prefix_template is"),
        (GOOD | {"prefix_template": "{emotion!r}"}, "prefix_template is"),
        (GOOD | {"prefix_template": "{emotion"}, "prefix_template is"),
        (GOOD | {"prefix_template": None}, "prefix_template is None"),
        (GOOD | {"base_model": 1}, "base_model is 1"),
        (GOOD | {"step": "500"}, "step is '500'"),
    ],
)
def test_a_damaged_file_is_refused_with_a_reason(tmp_path, content, complaint):
    (tmp_path / "emotions.json").write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(UserError) as error:
        read_emotion_control(tmp_path)
    assert complaint in error.value.problem and "emotions.json is damaged" in error.value.problem
    assert "\n" not in error.value.problem + error.value.remedy
