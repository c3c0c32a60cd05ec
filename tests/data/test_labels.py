import pytest

from hf_csm.data.labels import EMOTIONS, emotion_id, emotion_name, map_label
from hf_csm.errors import UserError


def test_a_known_label_maps_to_the_shared_space():
    assert map_label("HAP", {"HAP": "happy"}, "clip") == "happy"


def test_no_agreement_maps_to_no_label():
    assert map_label("X", {"X": None}, "clip") is None


def test_an_unknown_label_is_an_error_that_names_label_and_clip():
    with pytest.raises(UserError, match=r"clip\.wav.*'ZZZ'"):
        map_label("ZZZ", {"HAP": "happy"}, "clip.wav")


def test_ids_and_names_are_inverse():
    assert [emotion_name(emotion_id(emotion)) for emotion in EMOTIONS] == list(EMOTIONS)
    assert (emotion_id(None), emotion_name(None)) == (None, "unlabelled")
