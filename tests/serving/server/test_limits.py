from hf_csm.serving.server.limits import LONGEST_REASON, TokenBucket, close_reason


def test_a_bucket_lets_a_burst_through_and_then_its_rate():
    now = [0.0]
    bucket = TokenBucket(per_s=10, burst=3, clock=lambda: now[0])
    assert [bucket.take() for _ in range(4)] == [True, True, True, False]
    now[0] = 0.1
    assert [bucket.take(), bucket.take()] == [True, False]
    now[0] = 100.0  # no more than the burst is saved up
    assert [bucket.take() for _ in range(4)] == [True, True, True, False]


def test_a_reason_fits_a_close_frame_and_ends_between_characters():
    assert close_reason("too slow a reader") == b"too slow a reader"
    for text in ("x" * 200, "ü" * 100, "x" + "ü" * 100, "…" * 60):
        reason = close_reason(text)
        assert LONGEST_REASON - 3 < len(reason) <= LONGEST_REASON
        assert text.startswith(reason.decode())
