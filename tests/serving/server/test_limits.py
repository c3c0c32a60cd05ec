from hf_csm.serving.server.limits import MAX_REASON_BYTES, TokenBucket, close_reason


def test_token_bucket_allows_a_burst_then_its_rate():
    now = [0.0]
    bucket = TokenBucket(per_s=10, burst=3, clock=lambda: now[0])
    assert [bucket.take() for _ in range(4)] == [True, True, True, False]
    now[0] = 0.1
    assert [bucket.take(), bucket.take()] == [True, False]
    now[0] = 100.0  # at most the burst accumulates
    assert [bucket.take() for _ in range(4)] == [True, True, True, False]


def test_close_reason_is_truncated_between_characters():
    assert close_reason("client reads too slowly") == b"client reads too slowly"
    for text in ("x" * 200, "ü" * 100, "x" + "ü" * 100, "…" * 60):
        reason = close_reason(text)
        assert MAX_REASON_BYTES - 3 < len(reason) <= MAX_REASON_BYTES
        assert text.startswith(reason.decode())
