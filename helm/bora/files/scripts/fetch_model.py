"""Fetches a model's files from Hugging Face (or a mirror) into a directory, with Python's standard library alone.

A file is written beside its place and moved there once its size (and, for large files, its SHA-256) is right, so what
stands in the directory is whole. Files that are there already are kept. A broken transfer goes on where it ended.
Several pods may share the directory: one fetches, the others wait.
"""

import argparse
import fcntl
import fnmatch
import hashlib
import json
import os
import pathlib
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

CHUNK = 8 << 20
ATTEMPTS = 8
LONGEST_PAUSE = 60


class Hub:
    """The repository at its endpoint."""

    def __init__(self, endpoint, repository, revision, token):
        self.endpoint, self.repository, self.revision, self.token = endpoint.rstrip("/"), repository, revision, token

    def open(self, path, headers=None):
        request = urllib.request.Request(self.endpoint + path, headers={"user-agent": "bora", **(headers or {})})
        if self.token:
            # not sent on to where a redirect leads
            request.add_unredirected_header("Authorization", f"Bearer {self.token}")
        return urllib.request.urlopen(request, timeout=60)

    def files(self):
        """(path, size, SHA-256 or None) of every file."""
        path = f"/api/models/{self.repository}/tree/{urllib.parse.quote(self.revision, safe='')}?recursive=true"
        with self.open(path) as response:
            entries = json.load(response)
        for entry in entries:
            if entry["type"] == "file":
                yield entry["path"], entry["size"], (entry.get("lfs") or {}).get("oid")

    def open_file(self, path, begin):
        quoted = urllib.parse.quote(path)
        headers = {"Range": f"bytes={begin}-"} if begin else {}
        return self.open(f"/{self.repository}/resolve/{urllib.parse.quote(self.revision, safe='')}/{quoted}", headers)


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def fetch(hub, name, size, digest, to):
    target = to / name
    if target.is_file() and target.stat().st_size == size:
        print(f"{name}: there already", flush=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    begin = partial.stat().st_size if partial.is_file() else 0
    if begin > size:
        partial.unlink()
        begin = 0
    began = time.monotonic()
    if begin < size or size == 0:
        with hub.open_file(name, begin) as response:
            # a server that knows no ranges sends the whole file
            with open(partial, "ab" if response.status == 206 else "wb") as file:
                while chunk := response.read(CHUNK):
                    file.write(chunk)
    if partial.stat().st_size != size:
        raise OSError(f"{name}: {partial.stat().st_size} of {size} bytes came")
    if digest and sha256(partial) != digest:
        partial.unlink()
        raise OSError(f"{name}: its SHA-256 is not {digest}")
    partial.replace(target)
    print(f"{name}: {size} bytes in {time.monotonic() - began:.1f} s", flush=True)


def patiently(what, action):
    """Tries again after failures that may pass."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except urllib.error.HTTPError as error:
            if error.code in (401, 403, 404) or attempt == ATTEMPTS:
                raise SystemExit(f"{what}: HTTP {error.code} {error.reason} from {error.url}") from None
            reason = f"HTTP {error.code}"
        except OSError as error:
            if attempt == ATTEMPTS:
                raise SystemExit(f"{what}: {error}") from None
            reason = str(error)
        pause = min(LONGEST_PAUSE, float(os.environ.get("FETCH_FIRST_PAUSE", "2")) * 2 ** (attempt - 1))
        print(f"{what}: {reason}; again in {pause:.0f} s", file=sys.stderr, flush=True)
        time.sleep(pause)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--repository", required=True)
    parser.add_argument("--revision", default="main")
    parser.add_argument("--to", required=True, type=pathlib.Path)
    parser.add_argument("--include", action="append", default=[])
    arguments = parser.parse_args()
    hub = Hub(arguments.endpoint, arguments.repository, arguments.revision, os.environ.get("HF_TOKEN"))
    arguments.to.mkdir(parents=True, exist_ok=True)
    with open(arguments.to / ".bora-fetch.lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        files = patiently("list of files", lambda: list(hub.files()))
        wanted = [file for file in files if any(fnmatch.fnmatch(file[0], pattern) for pattern in arguments.include)]
        if not wanted:
            raise SystemExit(f"{arguments.repository}: none of its {len(files)} files matches {arguments.include}")
        for name, size, digest in wanted:
            if pathlib.PurePosixPath(name).is_absolute() or ".." in pathlib.PurePosixPath(name).parts:
                raise SystemExit(f"{name}: leads out of the directory")
            patiently(name, lambda name=name, size=size, digest=digest: fetch(hub, name, size, digest, arguments.to))
    print(f"{len(wanted)} files are in {arguments.to}", flush=True)


if __name__ == "__main__":
    main()
