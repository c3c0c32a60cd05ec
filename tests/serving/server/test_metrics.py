from hf_csm.serving.server.metrics import Metrics


def test_metrics_are_rendered_in_prometheus_format():
    metrics = Metrics()
    metrics.slots.set(8)
    metrics.sessions_active.inc()
    metrics.sessions.inc()
    metrics.refused.labels("busy").inc(2)
    metrics.drops.labels("slow_reader").inc()
    metrics.ignored.labels("unknown_kind").inc()
    metrics.frames.inc(3)
    metrics.frame_time.observe(0.07)
    lines = metrics.render().decode().splitlines()
    for line in (
        "hf_csm_slots 8.0",
        "hf_csm_sessions_active 1.0",
        "hf_csm_sessions_total 1.0",
        'hf_csm_sessions_refused_total{reason="busy"} 2.0',
        'hf_csm_drops_total{reason="slow_reader"} 1.0',
        'hf_csm_messages_ignored_total{reason="unknown_kind"} 1.0',
        "hf_csm_frames_total 3.0",
        'hf_csm_frame_seconds_bucket{le="0.06"} 0.0',
        'hf_csm_frame_seconds_bucket{le="0.08"} 1.0',
    ):
        assert line in lines, line


def test_two_servers_have_separate_metrics():
    one, other = Metrics(), Metrics()
    one.frames.inc()
    assert b"hf_csm_frames_total 0.0" in other.render()
