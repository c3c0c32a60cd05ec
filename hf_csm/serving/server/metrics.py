"""What the server counts, as Prometheus reads it."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest


FRAME_TIME_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.1, 0.15, 0.25, 0.5, 1.0)
"""Seconds; what stays below 0.08 holds real time."""


class Metrics:
    """One server's, in a registry of its own."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        name = "hf_csm_"
        self.slots = Gauge(name + "slots", "Conversations that fit", registry=self.registry)
        self.sessions_active = Gauge(name + "sessions_active", "Conversations going on", registry=self.registry)
        self.sessions = Counter(name + "sessions", "Conversations begun", registry=self.registry)
        self.refused = Counter(
            name + "sessions_refused", "Requests turned away, by reason", ["reason"], registry=self.registry
        )
        self.drops = Counter(
            name + "drops",
            "Conversations ended by the server or lost, by reason",
            ["reason"],
            registry=self.registry,
        )
        self.ignored = Counter(
            name + "messages_ignored", "Messages without effect, by reason", ["reason"], registry=self.registry
        )
        self.frames = Counter(name + "frames", "Frames of 80 ms that were stepped", registry=self.registry)
        self.frame_time = Histogram(
            name + "frame_seconds",
            "Time of a step, which takes a frame in every slot that has one",
            buckets=FRAME_TIME_BUCKETS,
            registry=self.registry,
        )

    def render(self) -> bytes:
        """Return all of it in Prometheus's text format."""
        return generate_latest(self.registry)
