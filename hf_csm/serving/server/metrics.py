"""Prometheus metrics of the server."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest


FRAME_TIME_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.1, 0.15, 0.25, 0.5, 1.0)
"""Seconds; below 0.08 is real time."""


class Metrics:
    """Metrics of one server, in their own registry."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        name = "hf_csm_"
        self.slots = Gauge(name + "slots", "Number of slots", registry=self.registry)
        self.sessions_active = Gauge(name + "sessions_active", "Active sessions", registry=self.registry)
        self.sessions = Counter(name + "sessions", "Sessions started", registry=self.registry)
        self.refused = Counter(
            name + "sessions_refused", "Requests refused, by reason", ["reason"], registry=self.registry
        )
        self.drops = Counter(
            name + "drops",
            "Sessions ended by the server or lost, by reason",
            ["reason"],
            registry=self.registry,
        )
        self.ignored = Counter(
            name + "messages_ignored", "Messages ignored, by reason", ["reason"], registry=self.registry
        )
        self.frames = Counter(name + "frames", "Frames of 80 ms stepped", registry=self.registry)
        self.frame_time = Histogram(
            name + "frame_seconds",
            "Duration of an engine step over all slots with a frame",
            buckets=FRAME_TIME_BUCKETS,
            registry=self.registry,
        )

    def render(self) -> bytes:
        """Return the metrics in Prometheus text format."""
        return generate_latest(self.registry)
