"""A stand-in for a Kubernetes API server: it stores objects, merges server-side applies and deletes, and refuses what the
schemas refuse, what tests/helm/admission.py knows of names, labels and lists, and changes of fields that can't be changed. It knows who owns the number of
an object's replicas, and of no other field. It has no controllers, no admission and no scheduler. There is no kube-apiserver in the package registries
that the tests may use; what helm itself does (install, upgrade, rollback, test, uninstall) is real.
"""

import base64
import copy
import http.server
import json
import re
import subprocess
import sys
import threading
import time
import urllib.parse
import uuid

import jsonschema
import kubernetes_validate
import yaml

import admission
import definitions

# group/version: (kind, plural) of what the chart and helm use
KINDS = {
    "v1": [("ConfigMap", "configmaps"), ("Secret", "secrets"), ("Service", "services"), ("ServiceAccount", "serviceaccounts"), ("Pod", "pods"),
           ("PersistentVolumeClaim", "persistentvolumeclaims"), ("Namespace", "namespaces"), ("Event", "events")],
    "apps/v1": [("Deployment", "deployments"), ("StatefulSet", "statefulsets"), ("ReplicaSet", "replicasets")],
    "batch/v1": [("CronJob", "cronjobs"), ("Job", "jobs")],
    "policy/v1": [("PodDisruptionBudget", "poddisruptionbudgets")],
    "autoscaling/v2": [("HorizontalPodAutoscaler", "horizontalpodautoscalers")],
    "rbac.authorization.k8s.io/v1": [("Role", "roles"), ("RoleBinding", "rolebindings")],
    "networking.k8s.io/v1": [("NetworkPolicy", "networkpolicies"), ("Ingress", "ingresses")],
    "leaderworkerset.x-k8s.io/v1": [("LeaderWorkerSet", "leaderworkersets")],
    "keda.sh/v1alpha1": [("ScaledObject", "scaledobjects"), ("TriggerAuthentication", "triggerauthentications")],
    "monitoring.coreos.com/v1": [("PodMonitor", "podmonitors"), ("PrometheusRule", "prometheusrules")],
}
# what has a subresource `scale`
SCALED = ("Deployment", "StatefulSet", "LeaderWorkerSet")
PATH = re.compile(r"^(?:/api/(?P<core>v1)|/apis/(?P<group>[^/]+/[^/]+))(?:/namespaces/(?P<namespace>[^/]+))?/(?P<plural>[a-z]+)(?:/(?P<name>[^/]+))?(?:/(?P<sub>\w+))?$")


def merge(old, new):
    """What a server-side apply by the only manager makes of an object: what it says now, and the server's metadata."""
    result = copy.deepcopy(new)
    for key in ("uid", "creationTimestamp"):
        result["metadata"][key] = old["metadata"][key]
    if "status" in old:
        result["status"] = old["status"]
    return result


def patched(old, patch):
    """A JSON merge patch. Helm's strategic ones are the same if no list changes."""
    result = dict(old)
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = patched(result[key], value)
        else:
            result[key] = value
    return result


def fields(data):
    """(number, value) of a protobuf message; values are integers or bytes."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        tag = varint()
        if tag & 7 == 0:
            yield tag >> 3, varint()
        else:
            length = varint()
            yield tag >> 3, data[at : at + length]
            at += length


def secret_of(data):
    """The Secret of a protobuf body: helm keeps its releases so. (Objects of the chart come as JSON.)"""
    raw = dict(fields(data[4:]))[2]
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"labels": {}}, "data": {}}
    for number, value in fields(raw):
        if number == 1:
            for of_metadata, content in fields(value):
                if of_metadata == 1:
                    secret["metadata"]["name"] = content.decode()
                if of_metadata == 11:
                    key, label = (dict(fields(content))[part].decode() for part in (1, 2))
                    secret["metadata"]["labels"][key] = label
        elif number == 2:
            entry = dict(fields(value))
            secret["data"][entry[1].decode()] = base64.b64encode(entry[2]).decode()
        elif number == 3:
            secret["type"] = value.decode()
    return secret


def judge(document):
    """Why the object is refused, or nothing."""
    if "data" in document and document["kind"] == "Secret" and document.get("type", "").startswith("helm.sh/"):
        return None
    document = {key: value for key, value in document.items() if key != "status"}
    try:
        if definitions.is_custom(document):
            definitions.validate(document)
        else:
            kubernetes_validate.validate(document, "1.36", strict=True)
    except (jsonschema.ValidationError, kubernetes_validate.ValidationError, AssertionError) as error:
        return str(error).splitlines()[0]
    return next(admission.complaints(document), None)


class Server:
    """Serves on a loopback port until it is closed."""

    def __init__(self):
        self.objects, self.log, self.version, self.lock, self.output = {}, [], 0, threading.Lock(), {}
        handler = type("Handler", (Handler,), {"state": self})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()

    def run_job(self, key, job):
        """Runs the command of a hook's Job, as a kubelet would, with this server as the cluster's."""
        (container,) = job["spec"]["template"]["spec"]["containers"]
        words = [sys.executable, *container["command"][1:], *container["args"]]
        environment = {"BORA_KUBERNETES_URL": f"http://127.0.0.1:{self.server.server_port}"}
        ended = subprocess.run(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60)
        condition = {"type": "Failed" if ended.returncode else "Complete", "status": "True", "message": "ended"}
        with self.lock:
            self.output[key[2]] = ended.stdout
            if key in self.objects:
                self.version += 1
                metadata = {**self.objects[key]["metadata"], "resourceVersion": str(self.version)}
                status = {"conditions": [condition], "failed" if ended.returncode else "succeeded": 1}
                self.objects[key] = {**self.objects[key], "metadata": metadata, "status": status}

    def kubeconfig(self, path):
        cluster = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{self.server.server_port}"}}
        path.write_text(json.dumps({"apiVersion": "v1", "kind": "Config", "clusters": [cluster], "users": [{"name": "u", "user": {}}],
                                    "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}], "current-context": "x"}))
        return path

    def names(self):
        """kind/name of all objects but helm's own records."""
        return sorted(f"{one['kind']}/{one['metadata']['name']}" for one in self.objects.values() if not one.get("type", "").startswith("helm.sh/"))

    def scale(self, kind, name, replicas, manager="kube-controller-manager"):
        """What an autoscaler does: it sets the number through the subresource `scale`, and owns it from then on."""
        with self.lock:
            one = self.get(kind, name)
            one["spec"]["replicas"] = replicas
            others = [admission.without_replicas(entry) for entry in one["metadata"].get("managedFields", []) if entry.get("subresource") != "scale"]
            others = [entry for entry in others if entry["fieldsV1"]]
            own = {"manager": manager, "operation": "Update", "subresource": "scale", "fieldsV1": {"f:spec": {"f:replicas": {}}}}
            # as a real server does it: a Scale of zero has no field `replicas`, so that nobody owns it
            one["metadata"]["managedFields"] = [*others, own] if replicas else others

    def get(self, kind, name):
        (found,) = [one for one in self.objects.values() if one["kind"] == kind and one["metadata"]["name"] == name]
        return found


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # head and body are two writes: otherwise the second one waits 40 ms for the client's acknowledgement of the first
    disable_nagle_algorithm = True
    state = None

    def log_message(self, *_):
        pass

    def answer(self, body, status=200):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, status, reason, message=""):
        self.answer({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": status, "message": message or reason}, status)

    def body(self):
        raw = self.rfile.read(int(self.headers.get("content-length") or 0))
        if raw.startswith(b"k8s\0"):
            # only helm's own records come so; of the options of a deletion nothing is needed
            return secret_of(raw) if self.command != "DELETE" else {}
        return yaml.safe_load(raw) if raw else {}

    def discovery(self, path):
        if path == "/version":
            return {"major": "1", "minor": "36", "gitVersion": "v1.36.0"}
        if path == "/api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            groups = []
            for version in KINDS:
                if "/" in version:
                    entry = {"groupVersion": version, "version": version.split("/")[1]}
                    groups.append({"name": version.split("/")[0], "versions": [entry], "preferredVersion": entry})
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
        if path == "/openapi/v3":
            return {"paths": {}}
        version = path.removeprefix("/apis/").removeprefix("/api/")
        if version in KINDS:
            verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
            resources = [{"name": plural, "singularName": kind.lower(), "namespaced": kind != "Namespace", "kind": kind, "verbs": verbs} for kind, plural in KINDS[version]]
            return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources}
        return None

    def target(self):
        url = urllib.parse.urlparse(self.path)
        match = PATH.match(url.path)
        if not match:
            return None
        version = match["core"] or match["group"]
        kind = next((kind for kind, plural in KINDS.get(version, []) if plural == match["plural"]), None)
        return kind and (version, kind, match["namespace"], match["name"], match["sub"], dict(urllib.parse.parse_qsl(url.query)))

    def store(self, key, document):
        state = self.state
        state.version += 1
        document["metadata"].setdefault("uid", str(uuid.uuid4()))
        document["metadata"].setdefault("creationTimestamp", "2026-01-01T00:00:00Z")
        document["metadata"]["resourceVersion"] = str(state.version)
        if document["kind"] == "Pod":  # as if a kubelet had run it to its end
            document["status"] = {"phase": "Succeeded"}
        if document["kind"] == "Job" and "helm.sh/hook" in document["metadata"].get("annotations", {}) and "status" not in document:
            document["status"] = {"active": 1}
            threading.Thread(target=state.run_job, args=(key, copy.deepcopy(document)), daemon=True).start()
        state.objects[key] = document
        return document

    def do_GET(self):
        if self.path.startswith("/openapi/v2"):
            # a description that describes nothing: helm then leaves the judgement to the server
            self.send_response(200)
            self.send_header("content-type", "application/com.github.proto-openapi.spec.v2.v1.0+protobuf")
            self.send_header("content-length", "0")
            return self.end_headers()
        found = self.discovery(urllib.parse.urlparse(self.path).path)
        if found:
            return self.answer(found)
        target = self.target()
        if not target:
            return self.refuse(404, "NotFound", self.path)
        version, kind, namespace, name, sub, query = target
        if sub == "log":
            self.send_response(200)
            self.send_header("content-length", "3")
            self.end_headers()
            return self.wfile.write(b"ok\n")
        with self.state.lock:
            if name:
                one = self.state.objects.get((kind, namespace, name))
                return self.answer(one) if one else self.refuse(404, "NotFound", f'{kind} "{name}" not found')
            items = self.matching(kind, namespace, query)
            listing = {"kind": f"{kind}List", "apiVersion": version, "metadata": {"resourceVersion": str(self.state.version)}, "items": items}
        if query.get("watch") in ("true", "1"):
            return self.watch(version, kind, namespace, query)
        return self.answer(listing)

    def matching(self, kind, namespace, query):
        labels = [term.split("=") for term in query.get("labelSelector", "").split(",") if "=" in term]
        field = re.match(r"metadata\.name=(.+)", query.get("fieldSelector", ""))
        return [one for (one_kind, one_namespace, one_name), one in self.state.objects.items()
                if one_kind == kind and namespace in (None, one_namespace) and (not field or field[1] == one_name)
                and all(one["metadata"].get("labels", {}).get(key) == value for key, value in labels)]

    def watch(self, version, kind, namespace, query):
        """Tells what changes until the client leaves."""
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True
        known, first = {}, query.get("sendInitialEvents") == "true"
        end = time.monotonic() + 60
        try:
            while time.monotonic() < end:
                with self.state.lock:
                    now = {one["metadata"]["name"]: one for one in self.matching(kind, namespace, query)}
                    state_version = str(self.state.version)
                events = [("ADDED" if name not in known else "MODIFIED", one) for name, one in now.items()
                          if known.get(name, {}).get("metadata", {}).get("resourceVersion") != one["metadata"]["resourceVersion"]]
                events += [("DELETED", one) for name, one in known.items() if name not in now]
                if first:
                    end_of_list = {"resourceVersion": state_version, "annotations": {"k8s.io/initial-events-end": "true"}}
                    events.append(("BOOKMARK", {"kind": kind, "apiVersion": version, "metadata": end_of_list}))
                    first = False
                for event, one in events:
                    self.wfile.write(json.dumps({"type": event, "object": one}).encode() + b"\n")
                self.wfile.flush()
                known = now
                time.sleep(0.05)
        except OSError:
            pass

    def write(self, create):
        target = self.target()
        if not target:
            return self.refuse(404, "NotFound", self.path)
        version, kind, namespace, name, _, query = target
        document = self.body()
        document.setdefault("apiVersion", version)
        document.setdefault("kind", kind)
        with self.state.lock:
            key = (kind, namespace, name or document["metadata"]["name"])
            old = self.state.objects.get(key)
            if self.command == "POST" and old:
                return self.refuse(409, "AlreadyExists", f"{kind} {key[2]} already exists")
            if self.command == "PATCH" and "apply" not in self.headers.get("content-type", ""):
                if not old:
                    return self.refuse(404, "NotFound")
                document = patched(old, document)
            manager = query.get("fieldManager", "helm")
            if self.command == "PATCH" and manager != "helm":
                # an apply of a few fields by another one than Helm: of the number, in these tests
                document = {**copy.deepcopy(old), "spec": {**old["spec"], **document["spec"]}}
            document["metadata"]["namespace"] = namespace
            self.state.log.append((self.command, kind, key[2], self.headers.get("content-type", ""), query.get("dryRun")))
            if reason := judge({**document, "metadata": {k: v for k, v in document["metadata"].items() if k not in ("uid", "resourceVersion", "creationTimestamp", "managedFields")}}):
                return self.refuse(422, "Invalid", f"{kind} {key[2]}: {reason}")
            if old and (fields := list(admission.change(old, document))):
                return self.refuse(422, "Invalid", f"{kind} {key[2]}: {', '.join(fields)}: field is immutable")
            if kind in SCALED:
                try:
                    operation = "Apply" if "apply" in self.headers.get("content-type", "") else "Update"
                    wanted = document["spec"].get("replicas", None if operation == "Apply" else 1)
                    replicas, managers = admission.replicas(old, wanted, manager, operation, query.get("force") == "true")
                except admission.ConflictError as conflict:
                    return self.refuse(409, "Conflict", str(conflict))
                document["metadata"]["managedFields"] = managers
                if replicas is not None:
                    document["spec"]["replicas"] = replicas
            if old:
                document = merge(old, document)
            if query.get("dryRun"):
                return self.answer(document)
            return self.answer(self.store(key, document), 200 if old else 201)

    def do_POST(self):
        self.write(True)

    def do_PUT(self):
        self.write(False)

    def do_PATCH(self):
        self.write(False)

    def do_DELETE(self):
        target = self.target()
        if not target:
            return self.refuse(404, "NotFound", self.path)
        _, kind, namespace, name, _, _ = target
        self.body()
        with self.state.lock:
            gone = self.state.objects.pop((kind, namespace, name), None)
        if not gone:
            return self.refuse(404, "NotFound", f'{kind} "{name}" not found')
        return self.answer({"kind": "Status", "apiVersion": "v1", "status": "Success"})
