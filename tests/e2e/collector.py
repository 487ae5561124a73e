"""An OTLP collector for tests: takes spans and metrics over gRPC, as real ones do, and keeps them."""

import threading
from concurrent import futures

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


def plain(value):
    """An attribute's value as Python has it."""
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [plain(one) for one in value.array_value.values]
    return getattr(value, kind) if kind else None


def attributes(pairs):
    return {pair.key: plain(pair.value) for pair in pairs}


class Span:
    def __init__(self, resource, span):
        self.service, self.pid = resource["service.name"], resource["process.pid"]
        self.resource, self.name, self.kind = resource, span.name, span.kind
        self.trace, self.id, self.parent = span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex()
        self.begin, self.end = span.start_time_unix_nano, span.end_time_unix_nano
        self.attributes = attributes(span.attributes)
        self.events = [event.name for event in span.events]
        self.status = span.status

    def __repr__(self):
        return f"<{self.service}/{self.pid} {self.name} {self.attributes}>"


class Collector(trace_service_pb2_grpc.TraceServiceServicer, metrics_service_pb2_grpc.MetricsServiceServicer):
    def __init__(self, certificate=None):
        """`certificate`: (certificate file, key file) of one that speaks TLS."""
        self.lock, self.kept, self.metrics = threading.Lock(), [], {}
        self.certificate = certificate

    def __enter__(self):
        self.server = grpc.server(futures.ThreadPoolExecutor(4))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self.server)
        service = type("Metrics", (metrics_service_pb2_grpc.MetricsServiceServicer,), {"Export": lambda _, *a: self.take_metrics(*a)})()
        metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(service, self.server)
        if self.certificate:
            chain, key = (path.read_bytes() for path in self.certificate)
            self.port = self.server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, chain)]))
        else:
            self.port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()
        self.url = f"http{'s' if self.certificate else ''}://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *_):
        self.server.stop(0).wait()

    def Export(self, request, _):
        with self.lock:
            for one in request.resource_spans:
                resource = attributes(one.resource.attributes)
                self.kept += [Span(resource, span) for scope in one.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def take_metrics(self, request, _):
        with self.lock:
            for one in request.resource_metrics:
                service = attributes(one.resource.attributes)["service.name"]
                for scope in one.scope_metrics:
                    self.metrics.setdefault(service, {}).update({metric.name: metric for metric in scope.metrics})
        return metrics_service_pb2.ExportMetricsServiceResponse()

    def spans(self, trace=None):
        with self.lock:
            return [span for span in self.kept if trace in (None, span.trace)]
