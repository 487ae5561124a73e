"""Runs before a rollback to a revision whose autoscalers set the number of groups and routers: keep_replicas.py NAMESPACE OBJECT...

An OBJECT is API/PLURAL/NAME=STORED: STORED is `replicas` in the revision's manifest, or nothing. Helm gives up a number that it set and that
the manifest does not have, and the API server makes 1 of it. Here another field manager claims the number first, so that it stays until the
autoscaler changes it. A smaller number in the manifest becomes a conflict, which Helm reports. If Helm merges on the client's side (Helm 3), no
claim helps, and the rollback is refused.
"""

import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request

MANAGER = "bora-rollback"
ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
MAX_ATTEMPTS = 5


def ask(method, path, body=None):
    """The API server's response; None if there is no such object."""
    base = os.environ.get("BORA_KUBERNETES_URL")
    headers, context = {"accept": "application/json"}, None
    if not base:
        host = os.environ["KUBERNETES_SERVICE_HOST"]
        base = f"https://{f'[{host}]' if ':' in host else host}:{os.environ['KUBERNETES_SERVICE_PORT']}"
        context = ssl.create_default_context(cafile=f"{ACCOUNT}/ca.crt")
        with open(f"{ACCOUNT}/token") as token:
            headers["authorization"] = f"Bearer {token.read().strip()}"
    if body is not None:
        headers["content-type"] = "application/apply-patch+yaml"
        body = json.dumps(body).encode()
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            with urllib.request.urlopen(urllib.request.Request(base + path, body, headers, method=method), timeout=10, context=context) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            reason = f"{method} {path}: HTTP {error.code}: {error.read(500).decode('utf-8', 'replace')}"
            if error.code < 500 and error.code != 429:
                raise SystemExit(reason) from None
        except OSError as error:
            reason = f"{method} {path}: {error}"
        if attempt < MAX_ATTEMPTS:
            time.sleep(attempt)
    raise SystemExit(reason)


def owners(live):
    """The managedFields entries that own `spec.replicas`."""
    return [entry for entry in live["metadata"].get("managedFields", []) if "f:replicas" in entry.get("fieldsV1", {}).get("f:spec", {})]


def is_merged_by_the_client(live):
    """Whether Helm's fields were set by updates, not by applies on the server's side."""
    return any(entry.get("operation") == "Update" and not entry.get("subresource")
               and "f:helm.sh/chart" in entry.get("fieldsV1", {}).get("f:metadata", {}).get("f:labels", {})
               for entry in live["metadata"].get("managedFields", []))


def keep(namespace, version, plural, name, stored):
    """Keeps an object's number, or says why it can't be kept."""
    path = f"/apis/{version}/namespaces/{namespace}/{plural}/{name}"
    live = ask("GET", path)
    if live is None:
        return None
    replicas = live["spec"].get("replicas", 1)
    if stored is not None and stored >= replicas:
        return None
    if is_merged_by_the_client(live):
        in_manifest = live["metadata"].get("annotations", {}).get("bora/replicas") != "autoscaler"
        after = stored if stored is not None else 1 if in_manifest else replicas
        return f"{plural}/{name} has {replicas} replicas, and the rollback would set {after}" if after < replicas else None
    holders = owners(live)
    if holders and not any(entry.get("subresource") == "scale" or entry["manager"] == MANAGER for entry in holders):
        claim = {"apiVersion": version, "kind": live["kind"], "metadata": {"name": name}, "spec": {"replicas": replicas}}
        ask("PATCH", f"{path}?fieldManager={MANAGER}&force=true", claim)
        print(f"{plural}/{name}: {replicas} replicas are kept until its autoscaler changes them", flush=True)
    if stored is not None:
        # not refused here: Helm would leave the release pending. It reports a conflict with the number's owner instead, and changes nothing
        print(f"{plural}/{name}: the revision's manifest has {stored} replicas, fewer than the {replicas} that there are: Helm will report a conflict", flush=True)
    return None


def main():
    namespace, refused = sys.argv[1], []
    for one in sys.argv[2:]:
        place, _, stored = one.partition("=")
        version, plural, name = place.rsplit("/", 2)
        reason = keep(namespace, version, plural, name, int(stored) if stored else None)
        if reason:
            refused.append(reason)
    if refused:
        raise SystemExit("the rollback is refused, it would take away groups or routers: " + "; ".join(refused) + ". Upgrade with that revision's chart and "
                         "values instead, which keeps the numbers (docs/upgrade.md)")


if __name__ == "__main__":
    main()
