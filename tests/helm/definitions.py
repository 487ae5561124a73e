"""Custom resource definitions as strict JSON schemas: what a definition does not name is refused."""

import functools

import jsonschema
import yaml

from chart import CRDS, Loader


def strict(node):
    """The schema with unknown fields refused, where the definition does not keep them."""
    if isinstance(node, list):
        return [strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    result = {key: strict(value) for key, value in node.items() if key not in ("format", "x-kubernetes-validations")}
    if node.get("x-kubernetes-int-or-string"):
        result.pop("type", None)
        result.pop("anyOf", None)
        result["type"] = ["integer", "string"]
    keeps = node.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(node.get("properties"), dict) and node.get("type") == "object" and not keeps:
        result.setdefault("additionalProperties", False)
    return result


@functools.cache
def schemas():
    """Schema by `group/version/Kind`, of the whole object."""
    found = {}
    for path in CRDS.glob("*.yaml"):
        for document in yaml.load_all(path.read_text(), Loader):
            if path.name == "own-words.yaml":
                for name, spec in document.items():
                    found[name] = {"type": "object", "required": ["spec"], "properties": {"spec": spec}}
                continue
            spec = document["spec"]
            for version in spec["versions"]:
                name = f"{spec['group']}/{version['name']}/{spec['names']['kind']}"
                whole = strict(version["schema"]["openAPIV3Schema"])
                whole["properties"]["metadata"] = {"type": "object"}
                found[name] = whole
    return found


def is_custom(document):
    """Whether the object is of a custom resource; all others are Kubernetes' own."""
    return f"{document['apiVersion']}/{document['kind']}" in schemas()


def validate(document):
    """Raises jsonschema.ValidationError where the object is not as its definition wants it."""
    name = f"{document['apiVersion']}/{document['kind']}"
    whole = schemas()[name]
    unknown = set(document) - {"apiVersion", "kind", "metadata", "spec"}
    assert not unknown, f"{name}: {unknown}"
    jsonschema.Draft7Validator(whole).validate(document)
