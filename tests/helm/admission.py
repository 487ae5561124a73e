"""What an API server, its controllers and a server-side apply refuse beyond schemas: lengths and shapes of names and labels, entries of a list
under one key, references that lead nowhere, and changes of fields that can't be changed."""

import copy
import re

LABEL = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?")
SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
# longest name of what the kind's controller makes longer ones of: a pod's label bears the name of a StatefulSet and a hash of ten, the StatefulSets of a
# LeaderWorkerSet bear the group's number besides, a CronJob's Jobs a time, and KEDA's autoscaler, whose name is a label's value, says so in front
LONGEST = {"Service": 63, "StatefulSet": 52, "LeaderWorkerSet": 49, "CronJob": 52, "Job": 63, "ScaledObject": 63 - len("keda-hpa-")}
# lists that are maps for a server-side apply, by the field's name, and what their keys are
KEYED = {
    "containers": ("name",), "initContainers": ("name",), "volumes": ("name",), "env": ("name",), "volumeMounts": ("mountPath",),
    "imagePullSecrets": ("name",), "topologySpreadConstraints": ("topologyKey", "whenUnsatisfiable"),
}
# the fields of a spec that may change; of other kinds all may
CHANGEABLE = {
    "StatefulSet": {"replicas", "template", "updateStrategy", "persistentVolumeClaimRetentionPolicy", "minReadySeconds", "revisionHistoryLimit", "ordinals"},
    "PersistentVolumeClaim": {"resources"},
    "Job": {"suspend", "parallelism", "activeDeadlineSeconds", "ttlSecondsAfterFinished"},
}


def templates(document):
    """(metadata, spec) of the pods that an object makes."""
    spec = document.get("spec", {})
    match document["kind"]:
        case "Pod":
            yield document["metadata"], spec
        case "Deployment" | "StatefulSet" | "Job":
            yield spec["template"].get("metadata", {}), spec["template"]["spec"]
        case "CronJob":
            template = spec["jobTemplate"]["spec"]["template"]
            yield template.get("metadata", {}), template["spec"]
        case "LeaderWorkerSet":
            for part in ("leaderTemplate", "workerTemplate"):
                template = spec["leaderWorkerTemplate"][part]
                yield template.get("metadata", {}), template["spec"]


def containers(spec):
    return spec.get("initContainers", []) + spec["containers"]


def labels_of(node):
    """Every map of labels, and every selector, below a node."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("labels", "matchLabels") and isinstance(value, dict):
                yield value
            elif key not in ("data", "annotations", "groups"):
                yield from labels_of(value)
    elif isinstance(node, list):
        for item in node:
            yield from labels_of(item)


def duplicates(node, at=""):
    """Entries that a server-side apply takes for the same one."""
    if isinstance(node, dict):
        for key, value in node.items():
            here = f"{at}.{key}"
            keys = ("containerPort", "protocol") if key == "ports" and value and isinstance(value, list) and "containerPort" in value[0] else \
                   ("port", "protocol") if key == "ports" and at == ".spec" else KEYED.get(key)
            if keys and isinstance(value, list):
                seen = [tuple(item.get(name, "TCP" if name == "protocol" else None) for name in keys) for item in value]
                for one in {one for one in seen if seen.count(one) > 1}:
                    yield f"{here}: two entries of {one}"
            yield from duplicates(value, here)
    elif isinstance(node, list):
        for number, item in enumerate(node):
            yield from duplicates(item, f"{at}[{number}]")


def complaints(document):
    """What is wrong with an object by itself."""
    kind, name = document["kind"], document["metadata"]["name"]
    shape = DNS_1035 if kind in ("Service", "LeaderWorkerSet") else SUBDOMAIN
    longest = LONGEST.get(kind, 253)
    if not shape.fullmatch(name):
        yield "its name is not one"
    if len(name) > longest:
        yield f"its name has {len(name)} characters, {longest} are allowed"
    for labels in labels_of({"metadata": document["metadata"], "spec": document.get("spec", {})}):
        for key, value in labels.items():
            prefix, _, rest = key.rpartition("/")
            if not rest or len(rest) > 63 or not LABEL.fullmatch(rest) or (prefix and not SUBDOMAIN.fullmatch(prefix)):
                yield f"label {key}: its key is not one"
            if len(value) > 63 or not LABEL.fullmatch(value):
                yield f"label {key}: `{value}` is no label's value"
    yield from duplicates(document)
    for _, spec in templates(document):
        for container in containers(spec):
            sleep = container.get("lifecycle", {}).get("preStop", {}).get("sleep")
            if sleep and sleep["seconds"] < 1:
                yield "a pause of no seconds is refused before Kubernetes 1.33"
            mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
            claims = {claim["metadata"]["name"] for claim in document["spec"].get("volumeClaimTemplates", [])}
            for missing in mounted - {volume["name"] for volume in spec.get("volumes", [])} - claims:
                yield f"{container['name']} mounts {missing}, which is no volume"
            ports = {port.get("name") for port in container.get("ports", [])}
            numbers = {port["containerPort"] for port in container.get("ports", [])}
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                for way in container.get(probe, {}).values():
                    if isinstance(way, dict) and way["port"] not in ports | numbers:
                        yield f"{probe} asks port {way['port']}, which the container does not name"
    if kind in ("Deployment", "StatefulSet"):
        for metadata, _ in templates(document):
            if not document["spec"]["selector"]["matchLabels"].items() <= metadata["labels"].items():
                yield "its selector does not select its pods"


def change(old, new):
    """Fields that were changed and can't be."""
    kind = new["kind"]
    if kind == "Deployment" and old["spec"]["selector"] != new["spec"]["selector"]:
        yield "spec.selector"
    if kind == "Secret" and old.get("type") != new.get("type"):
        yield "type"
    if kind in CHANGEABLE:
        for field in sorted((old["spec"].keys() | new["spec"].keys()) - CHANGEABLE[kind]):
            if old["spec"].get(field) != new["spec"].get(field):
                yield f"spec.{field}"


def owns_replicas(entry):
    return "f:replicas" in entry["fieldsV1"].get("f:spec", {})


def without_replicas(entry):
    return {**entry, "fieldsV1": {key: value for key, value in entry["fieldsV1"].items() if key != "f:spec"}}


def replicas(old, wanted, manager="helm", operation="Apply", force=False):
    """What a write of `manager` leaves of `spec.replicas`, and the managedFields after it; a ConflictError if another manager's field is to have another value.
    `wanted` is None if the writer's object has no such field. Of all other fields only that Helm owns its label is kept."""
    entries = copy.deepcopy(old["metadata"].get("managedFields", [])) if old else []
    is_own = lambda entry: (entry["manager"], entry["operation"], entry.get("subresource")) == (manager, operation, None)
    own = next((entry for entry in entries if is_own(entry)), {"manager": manager, "operation": operation, "fieldsType": "FieldsV1", "fieldsV1": {}})
    if manager == "helm":
        own["fieldsV1"]["f:metadata"] = {"f:labels": {"f:helm.sh/chart": {}}}
    others = [entry for entry in entries if not is_own(entry)]
    holders = [entry for entry in others if owns_replicas(entry)]
    now = old["spec"].get("replicas", 1) if old else None
    had, own = owns_replicas(own), without_replicas(own)
    if wanted is None:
        # what nobody owns any more becomes its default
        return (1 if had and not holders else old and old["spec"].get("replicas")), [own, *others]
    if operation == "Apply" and holders and wanted != now and not force:
        raise ConflictError(f'Apply failed with 1 conflict: conflict with "{holders[0]["manager"]}" with subresource "scale": .spec.replicas')
    if operation == "Apply" or wanted != now or had:
        own["fieldsV1"]["f:spec"] = {"f:replicas": {}}
    if wanted != now:
        others = [without_replicas(entry) for entry in others]
    return wanted, [own, *(entry for entry in others if entry["fieldsV1"])]


class ConflictError(Exception):
    """Another manager owns a field that is to have another value."""


def selected(documents, labels):
    """(metadata, spec) of the pods that labels select."""
    for document in documents:
        for metadata, spec in templates(document):
            if labels.items() <= metadata.get("labels", {}).items():
                yield metadata, spec


def dangling(documents, given=()):
    """References within a release that lead nowhere; `given` are names of Secrets, ConfigMaps and claims that the installer brings."""
    there = {(document["kind"], document["metadata"]["name"]) for document in documents}
    # cert-manager makes the Secret
    there |= {("Secret", document["spec"]["secretName"]) for document in documents if document["kind"] == "Certificate"}

    def known(kind, name):
        return (kind, name) in there or name in given

    for document in documents:
        where = f"{document['kind']} {document['metadata']['name']}"
        spec = document.get("spec", {})
        for _, pod in templates(document):
            if pod["serviceAccountName"] != "default" and not known("ServiceAccount", pod["serviceAccountName"]):
                yield f"{where}: ServiceAccount {pod['serviceAccountName']}"
            for volume in pod.get("volumes", []):
                for field, kind, key in (("configMap", "ConfigMap", "name"), ("secret", "Secret", "secretName"), ("persistentVolumeClaim", "PersistentVolumeClaim", "claimName")):
                    if field in volume and not known(kind, volume[field][key]):
                        yield f"{where}: {kind} {volume[field][key]}"
        match document["kind"]:
            case "StatefulSet":
                if not known("Service", spec["serviceName"]):
                    yield f"{where}: Service {spec['serviceName']}"
            case "Service":
                pods = list(selected(documents, spec["selector"]))
                ports = {port.get("name") for _, pod in pods for container in pod["containers"] for port in container.get("ports", [])}
                yield from (f"{where}: no pod has port {port['targetPort']}" for port in spec["ports"] if port["targetPort"] not in ports)
            case "PodMonitor":
                pods = list(selected(documents, spec["selector"]["matchLabels"]))
                for endpoint in spec["podMetricsEndpoints"]:
                    for metadata, pod in pods:
                        if endpoint["port"] not in {port.get("name") for container in pod["containers"] for port in container.get("ports", [])}:
                            yield f"{where}: pods of {metadata['labels']} have no port {endpoint['port']}"
                if not pods:
                    yield f"{where}: selects no pod"
            case "ServiceMonitor":
                services = [one for one in documents if one["kind"] == "Service" and spec["selector"]["matchLabels"].items() <= one["metadata"]["labels"].items()]
                ports = {port["name"] for service in services for port in service["spec"]["ports"]}
                yield from (f"{where}: no Service has port {endpoint['port']}" for endpoint in spec["endpoints"] if endpoint["port"] not in ports)
            case "NetworkPolicy" | "PodDisruptionBudget":
                labels = (spec.get("podSelector") or spec.get("selector"))["matchLabels"]
                pods = list(selected(documents, labels))
                if not pods:
                    yield f"{where}: selects no pod"
                names = {port.get("name") for _, pod in pods for container in pod["containers"] for port in container.get("ports", [])}
                for rule in spec.get("ingress", []):
                    yield from (f"{where}: no pod has port {port['port']}" for port in rule.get("ports", []) if isinstance(port["port"], str) and port["port"] not in names)
            case "HorizontalPodAutoscaler" | "ScaledObject":
                target = spec["scaleTargetRef"]
                found = [one for one in documents if (one["apiVersion"], one["kind"], one["metadata"]["name"]) == (target["apiVersion"], target["kind"], target["name"])]
                if not found:
                    yield f"{where}: {target}"
                yield from (f"{where}: the target has replicas of its own" for one in found if "replicas" in one["spec"])
            case "Ingress" | "HTTPRoute":
                for name in re.findall(r"'name': '([^']+)', 'port'|'service': \{'name': '([^']+)'", str(spec)):
                    if not known("Service", name[0] or name[1]):
                        yield f"{where}: Service {name[0] or name[1]}"


def collisions(documents):
    """Names that two objects, or an object and one that a controller makes, would share."""
    names = [(document["kind"], document["metadata"]["name"]) for document in documents]
    yield from sorted({f"two of {kind} {name}" for kind, name in names if names.count((kind, name)) > 1})
    for document in documents:
        if document["kind"] == "LeaderWorkerSet":
            for kind, name in names:
                if kind in ("StatefulSet", "LeaderWorkerSet", "Service") and re.fullmatch(rf"{re.escape(document['metadata']['name'])}-\d+", name):
                    yield f"{kind} {name} is also a group of {document['metadata']['name']}"


def unbound(documents):
    """Claims that no pod mounts from the beginning: where the storage class waits for the first consumer, `helm --wait` waits for them."""
    mounted = set()
    for document in documents:
        if document["kind"] != "CronJob" and document.get("spec", {}).get("replicas") != 0:
            for _, spec in templates(document):
                mounted |= {volume["persistentVolumeClaim"]["claimName"] for volume in spec.get("volumes", []) if "persistentVolumeClaim" in volume}
    for document in documents:
        if document["kind"] == "PersistentVolumeClaim" and document["metadata"]["name"] not in mounted:
            yield f"PersistentVolumeClaim {document['metadata']['name']}: no pod mounts it from the beginning"
