"""Fetches a model's files from Hugging Face (or a mirror) into a directory, with Python's standard library alone.

The files of a revision change as a set: each one is written beside its place, and all are moved there once every size and
digest is right. A manifest beside the files lists the set. If the hub is away, the pod starts with the set that the manifest
lists. A broken transfer resumes where it ended. Several pods may share the directory: one fetches, the others wait. Nothing
takes longer than --timeout seconds.
"""

import argparse
import email.utils
import errno
import fcntl
import fnmatch
import hashlib
import http.client
import json
import os
import pathlib
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

CHUNK = 8 << 20
MAX_ATTEMPTS = 8
MAX_PAUSE = 60
# how long the hub is asked again if the files are here already
AWAY_TIMEOUT = 20
SOCKET_TIMEOUT = 60
MAX_LISTING_BYTES = 64 << 20
MAX_LISTING_PAGES = 100
FINAL_STATUS = (401, 403, 404, 410)
# of the directory, not of the hub: another attempt does not help
FINAL_ERRNO = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


class FetchError(Exception):
    """Why the files could not be fetched."""


class Deadline:
    """The end of the time that a download may take."""

    def __init__(self, seconds):
        self.seconds, self.end = seconds, time.monotonic() + seconds

    def left(self):
        return self.end - time.monotonic()

    def check(self, what):
        if self.left() <= 0:
            raise FetchError(f"{what}: not done within {self.seconds:.0f} s")


class Hub:
    """The repository at its endpoint."""

    def __init__(self, endpoint, repository, revision, token, deadline):
        self.endpoint, self.repository, self.token, self.deadline = endpoint.rstrip("/"), repository, token, deadline
        self.revision = urllib.parse.quote(revision, safe="")

    def open(self, path, headers=None):
        request = urllib.request.Request(self.endpoint + path, headers={"user-agent": "bora", **(headers or {})})
        if self.token:
            # not sent on to the target of a redirect
            request.add_unredirected_header("Authorization", f"Bearer {self.token}")
        return urllib.request.urlopen(request, timeout=max(0.1, min(SOCKET_TIMEOUT, self.deadline.left())))

    def read(self, response, what):
        """The body by pieces. A server that sends a byte a minute is stopped by the deadline, too."""
        while piece := response.read1(CHUNK):
            yield piece
            self.deadline.check(what)

    def files(self):
        """(path, size, digest) of every file. A digest is `sha256:...`, of small files git's `blob:...`."""
        path = f"/api/models/{self.repository}/tree/{self.revision}?recursive=true"
        for _ in range(MAX_LISTING_PAGES):
            with self.open(path) as response:
                body = b""
                for piece in self.read(response, "list of files"):
                    body += piece
                    if len(body) > MAX_LISTING_BYTES:
                        raise FetchError("list of files: more than 64 MiB")
                following = re.search(r'<([^>]+)>; *rel="next"', response.headers.get("Link", ""))
            for entry in json.loads(body):
                if entry["type"] == "file":
                    sha256 = (entry.get("lfs") or {}).get("oid")
                    blob = entry.get("oid")
                    yield entry["path"], entry["size"], f"sha256:{sha256}" if sha256 else f"blob:{blob}" if blob else None
            if not following:
                return
            url = urllib.parse.urlsplit(following[1])
            path = f"{url.path}?{url.query}"
        raise FetchError(f"list of files: more than {MAX_LISTING_PAGES} pages")

    def open_file(self, path, begin):
        headers = {"Range": f"bytes={begin}-"} if begin else {}
        return self.open(f"/{self.repository}/resolve/{self.revision}/{urllib.parse.quote(path)}", headers)


def digest_of(path, kind):
    """Digest of a file: `sha256`, or `blob` as git computes it."""
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return f"{kind}:{digest.hexdigest()}"


def is_right(path, size, digest):
    return path.is_file() and path.stat().st_size == size and (not digest or digest_of(path, digest.split(":")[0]) == digest)


class Directory:
    """Where the files are, with the manifest of what was fetched: one for each repository, revision and choice of files."""

    def __init__(self, path, repository, revision, include):
        self.path = path
        choice = json.dumps([repository, revision, sorted(include)])
        self.manifest = path / f".bora-manifest-{hashlib.sha256(choice.encode()).hexdigest()[:16]}.json"

    def known(self):
        """The manifest's files: {path: (size, digest)}. Empty if there is none, or it is not whole."""
        try:
            return {one["path"]: (one["size"], one["digest"]) for one in json.loads(self.manifest.read_text())["files"]}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def is_whole(self):
        """Whether every file of the manifest is there with its size."""
        try:
            known = self.known().items()
            return bool(known) and all((self.path / name).stat().st_size == size for name, (size, _) in known)
        except OSError:
            return False

    def write_manifest(self, wanted):
        files = [{"path": name, "size": size, "digest": digest} for name, size, digest in wanted]
        partial = self.manifest.with_suffix(".partial")
        partial.write_text(json.dumps({"files": files}, indent=1) + "\n")
        partial.replace(self.manifest)

    def partial(self, name):
        target = self.path / name
        return target.with_name(target.name + ".partial")

    def lock(self, deadline):
        """Held until the process ends: one pod fetches, others wait."""
        self.path.mkdir(parents=True, exist_ok=True)
        file = open(self.path / ".bora-fetch.lock", "a")  # noqa: SIM115
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return file
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
            deadline.check("waiting for the pod that fetches to the same directory")
            time.sleep(0.5)


def fetch(hub, directory, name, size, digest):
    """Brings one file beside its place."""
    partial = directory.partial(name)
    partial.parent.mkdir(parents=True, exist_ok=True)
    begin = partial.stat().st_size if partial.is_file() else 0
    if begin > size:
        partial.unlink()
        begin = 0
    began = time.monotonic()
    if begin < size or size == 0:
        with hub.open_file(name, begin) as response:
            # a server that knows no ranges sends the whole file
            with open(partial, "ab" if response.status == 206 else "wb") as file:
                for piece in hub.read(response, name):
                    file.write(piece)
                    if file.tell() > size:
                        break
    came = partial.stat().st_size
    if came > size:
        partial.unlink()
    if came != size:
        raise OSError(f"{name}: {came} of {size} bytes came")
    if not is_right(partial, size, digest):
        partial.unlink()
        raise OSError(f"{name}: its digest is not {digest}")
    print(f"{name}: {size} bytes in {time.monotonic() - began:.1f} s", flush=True)


def retry_after(headers):
    """Seconds that the server asks for: a number or a date."""
    value = (headers.get("Retry-After") or "").strip()
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


def with_retries(what, deadline, action, progress=lambda: None):
    """Tries again after failures that may pass: MAX_ATTEMPTS times without progress, and never beyond the deadline."""
    attempt, state = 0, progress()
    while True:
        deadline.check(what)
        asked = 0.0
        try:
            return action()
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code} {error.reason} from {error.url}"
            if error.code in FINAL_STATUS:
                raise FetchError(f"{what}: {reason}") from None
            asked = retry_after(error.headers)
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            if isinstance(error, OSError) and error.errno in FINAL_ERRNO:
                raise FetchError(f"{what}: {reason}") from None
        attempt = attempt + 1 if progress() == state else 1
        state = progress()
        pause = max(asked, min(MAX_PAUSE, float(os.environ.get("FETCH_FIRST_PAUSE", "2")) * 2 ** (attempt - 1)))
        if attempt == MAX_ATTEMPTS:
            raise FetchError(f"{what}: {reason}, {attempt} attempts without progress")
        if pause > deadline.left():
            raise FetchError(f"{what}: {reason}; the next attempt in {pause:.0f} s would be beyond the {deadline.seconds:.0f} s that all may take")
        print(f"{what}: {reason}; again in {pause:.0f} s", file=sys.stderr, flush=True)
        time.sleep(pause)


def update(hub, directory, include, deadline):
    """Brings the directory to what the hub has now."""
    whole = directory.is_whole()
    asking = Deadline(min(AWAY_TIMEOUT, deadline.left())) if whole else deadline
    hub.deadline = asking
    files = with_retries("list of files", asking, lambda: list(hub.files()))
    hub.deadline = deadline
    wanted = [file for file in files if any(fnmatch.fnmatch(file[0], pattern) for pattern in include)]
    if not wanted:
        raise FetchError(f"{hub.repository}: none of its {len(files)} files matches {include}")
    known, missing = directory.known(), []
    for name, size, digest in wanted:
        if pathlib.PurePosixPath(name).is_absolute() or ".." in pathlib.PurePosixPath(name).parts:
            raise FetchError(f"{name}: leads out of the directory")
        target = directory.path / name
        same = known.get(name) == (size, digest) and target.is_file() and target.stat().st_size == size
        if same or is_right(target, size, digest):
            print(f"{name}: there already", flush=True)
            continue
        partial = directory.partial(name)
        arrived = lambda partial=partial: partial.stat().st_size if partial.is_file() else 0
        with_retries(name, deadline, lambda name=name, size=size, digest=digest: fetch(hub, directory, name, size, digest), arrived)
        missing.append(name)
    if missing:
        # from here until the new one is written no set is whole
        directory.manifest.unlink(missing_ok=True)
    for name in missing:
        directory.partial(name).replace(directory.path / name)
    if missing or known != {name: (size, digest) for name, size, digest in wanted}:
        directory.write_manifest(wanted)
    print(f"{len(wanted)} files are in {directory.path}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--repository", required=True)
    parser.add_argument("--revision", default="main")
    parser.add_argument("--to", required=True, type=pathlib.Path)
    parser.add_argument("--include", action="append", default=[])
    parser.add_argument("--timeout", type=float, default=7200, help="seconds that all may take (default: %(default)s)")
    arguments = parser.parse_args()
    # whoever shares the directory as a member of its group may go on with what another user began
    os.umask(0o002)
    deadline = Deadline(arguments.timeout)
    hub = Hub(arguments.endpoint, arguments.repository, arguments.revision, os.environ.get("HF_TOKEN"), deadline)
    directory = Directory(arguments.to, arguments.repository, arguments.revision, arguments.include)
    is_commit = re.fullmatch(r"[0-9a-f]{40}", arguments.revision)
    if is_commit and directory.is_whole():
        print(f"all files of commit {arguments.revision} are in {arguments.to}", flush=True)
        return
    try:
        lock = directory.lock(deadline)
        update(hub, directory, arguments.include, deadline)
        lock.close()
    except (FetchError, OSError) as error:
        if not directory.is_whole():
            raise SystemExit(str(error)) from None
        print(f"{error}\nthe hub or the directory can't be used: starting with the files that were fetched before", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
