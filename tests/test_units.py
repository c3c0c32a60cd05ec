import pytest

from hf_csm import units


def test_a_frame_is_eighty_milliseconds():
    assert units.SAMPLES_PER_FRAME == units.SAMPLE_RATE / units.FRAME_RATE
    assert units.frames_to_seconds(1) == 0.08


@pytest.mark.parametrize(("time_s", "frame"), [(0.0, 0), (0.0799, 0), (0.08, 1), (0.24, 3), (0.56, 7), (79.99, 999)])
def test_frame_at_is_the_frame_that_contains_a_time(time_s, frame):
    assert units.frame_at(time_s) == frame


@pytest.mark.parametrize(("duration_s", "num_frames"), [(0.0, 0), (0.01, 1), (0.08, 1), (0.56, 7), (80.0, 1000)])
def test_frames_hold_the_whole_duration(duration_s, num_frames):
    assert units.seconds_to_frames(duration_s) == num_frames
    assert units.samples_to_frames(units.seconds_to_samples(duration_s)) == num_frames


def test_samples_and_seconds_are_inverse():
    for num_samples in (0, 1, 1919, 1920, 123_457):
        assert units.seconds_to_samples(units.samples_to_seconds(num_samples)) == num_samples
