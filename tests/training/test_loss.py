import pytest
import torch

from hf_csm.config import LossConfig
from hf_csm.models.family import NO_TOKEN, Layout, TokenNLL
from hf_csm.models.moshi.layout import STREAM_NAMES, stream_masks, stream_weights
from hf_csm.training.loss import stream_sums, token_weights, weighted_sum


# text, two codebooks of Moshi's, one of the user's
LAYOUT = Layout((0, 0, 1, 0), 2, 1, text_padding_id=3, end_of_text_padding_id=0, text_card=10, card=8)
CONFIG = LossConfig(text_weight=2.0, text_padding_weight=0.5, first_codebook_weight=10.0, other_codebooks_weight=1.0)
CODES = torch.tensor(
    [[[7, 3, 0, 5, NO_TOKEN], [1, 1, 1, 1, NO_TOKEN], [2, 2, 2, 2, NO_TOKEN], [4, 4, 4, 4, NO_TOKEN]]]
)


def masks_of(num_given=0):
    return stream_masks(CODES, torch.tensor([num_given]), LAYOUT)


def test_weights_tell_words_padding_and_codebooks_apart():
    weights = token_weights(masks_of(), stream_weights(CONFIG))
    assert weights[0].tolist() == [
        [2.0, 1.0, 1.0, 2.0, 0.0],
        [10.0, 10.0, 10.0, 10.0, 0.0],
        [1.0, 1.0, 1.0, 1.0, 0.0],
        [0.0, 0.0, 0.0, 0.0, 0.0],
    ]


def test_the_given_prefix_has_no_loss_but_its_audio_has():
    weights = token_weights(masks_of(num_given=2), stream_weights(CONFIG))
    assert weights[0, 0].tolist() == [0.0, 0.0, 1.0, 2.0, 0.0]
    assert weights[0, 1].tolist() == [10.0, 10.0, 10.0, 10.0, 0.0]


def test_by_default_text_weighs_as_much_as_the_audio_of_a_frame():
    config = LossConfig()
    assert config.text_weight == config.first_codebook_weight + 7 * config.other_codebooks_weight


def test_groups_share_no_target_and_miss_none():
    masks = masks_of()
    assert masks.sum(0).max() == 1
    assert masks.sum() == 12


def test_weighted_sum_and_stream_sums():
    masks = masks_of()
    nll = torch.arange(20.0).view(1, 4, 5)
    output = TokenNLL(nll, masks.any(0))
    assert weighted_sum(output, token_weights(masks, stream_weights(CONFIG))).item() == (
        2 * 0 + 1 + 2 + 2 * 3 + 10 * (5 + 6 + 7 + 8) + (10 + 11 + 12 + 13)
    )
    sums = dict(zip(STREAM_NAMES, stream_sums(output, masks).T.tolist(), strict=True))
    assert sums == {
        "text_words": [0 + 3, 2],
        "text_padding": [1 + 2, 2],
        "codebook_0": [26, 4],
        "codebooks_rest": [46, 4],
    }


def test_a_weight_on_a_stream_that_is_not_predicted_is_an_assertion_error():
    masks = masks_of()
    output = TokenNLL(torch.zeros(CODES.shape), torch.zeros(CODES.shape, dtype=torch.bool))
    with pytest.raises(AssertionError, match="does not predict"):
        weighted_sum(output, token_weights(masks, stream_weights(CONFIG)))
