"""Metrics: what the server does -> Prometheus's text."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_TENTHS = tuple(tenth / 10 for tenth in range(1, 11))


class Metrics:
    """Of one server; a registry of its own, so that a process may hold several."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self.requests = Counter("coop_requests", "Requests for answers, by HTTP status.", ["status"], registry=own)
        self.refused = Counter("coop_refused", "Requests that were turned away unread, by why.", ["why"], registry=own)
        self.latency = Histogram(
            "coop_request_seconds", "From the head of a request to its answer.", buckets=_SECONDS, registry=own
        )
        self.in_flight = Gauge("coop_requests_in_flight", "Requests that wait for their answer.", registry=own)
        self.images = Counter("coop_images", "Images, answered or not.", ["outcome"], registry=own)
        self.batch = Histogram(
            "coop_batch_images", "Images through the tower together.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=own
        )
        self.probability = Histogram(
            "coop_answer_probability", "Probability of the label that was answered.", buckets=_TENTHS, registry=own
        )
        self.version = Gauge("coop_version", "1 for the version that answers.", ["version"], registry=own)
        self.reloads = Counter("coop_reloads", "Versions that were loaded, or failed to.", ["outcome"], registry=own)
        self.unreachable = Counter("coop_registry_faults", "Looks at the registry without an answer.", registry=own)
        self.records = Counter("coop_records", "Answers that were to be recorded.", ["outcome"], registry=own)
        self.recording = Gauge("coop_recording", "1 while answers are recorded, 0 while they are not.", registry=own)
        for outcome in ("done", "failed"):
            self.reloads.labels(outcome)                                          # so that 0 is shown
        for why in ("no version", "queue full", "body too large", "body too slow", "no token", "another page"):
            self.refused.labels(why)

    def text(self) -> bytes:
        return generate_latest(self.registry)
