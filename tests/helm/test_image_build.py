"""The images, built by deploy/docker/build and run: everything but what needs a base image from a registry. Two stages of the Dockerfile are given as
folders: the binary that is under test, and the root that deploy/docker/libraries makes of this machine's Debian."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from chart import BORA, CHART, ROOT, run
from cluster import free_port, http, wait_until

# what the libraries are copied of
PACKAGES = ("ca-certificates", "libc6", "libgcc-s1", "libstdc++6", "tzdata")
UNSEEN = (
    "no buildah here (Debian's package buildah), so that no image is built" if not shutil.which("buildah")
    else "building and mounting images wants root" if os.geteuid()
    else "not a Debian with the packages that the Dockerfile installs" if not all(Path(f"/usr/share/doc/{package}/copyright").is_file() for package in PACKAGES)
    else "no mount namespaces here" if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode
    else ""
)
pytestmark = pytest.mark.skipif(bool(UNSEEN), reason=UNSEEN)


class Images:
    """Images in a storage of their own."""

    def __init__(self, directory):
        self.directory = directory
        storage = directory / "storage.conf"
        storage.write_text(f'[storage]\ndriver = "vfs"\ngraphroot = "{directory}/images"\nrunroot = "{directory}/run"\n')
        self.environment = {**os.environ, "CONTAINERS_STORAGE_CONF": str(storage), "BUILDAH_ISOLATION": "chroot"}
        self.environment.pop("STORAGE_DRIVER", None)
        # a release build is stripped by the Dockerfile's settings
        assert run("strip", "-o", directory / "bora", BORA).returncode == 0

    def buildah(self, *arguments):
        outcome = run("buildah", *arguments, env=self.environment)
        assert outcome.returncode == 0, outcome.stderr
        return outcome.stdout.strip()

    def build(self, target, libraries):
        made = run("sh", ROOT / "deploy" / "docker" / "libraries", libraries / "out")
        assert made.returncode == 0, made.stderr
        built = run(ROOT / "deploy" / "docker" / "build", "--builder", "buildah", "--prefix", "test.example/", "--binary", self.directory / "bora",
                    "--build-context", f"libraries={libraries}", target, env=self.environment, timeout=300)
        assert built.returncode == 0, built.stdout[-1000:] + built.stderr[-2000:]
        return json.loads(self.buildah("inspect", "--type", "image", f"test.example/bora/{target}:{self.version()}"))

    @staticmethod
    def version():
        return run(BORA, "--version").stdout.split()[1]

    def root(self, target):
        """The image's files, as a container has them."""
        container = self.buildah("from", "--pull-never", f"test.example/bora/{target}:{self.version()}")
        return Path(self.buildah("mount", container))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    made = Images(tmp_path_factory.mktemp("images"))
    yield made
    # each layer is a whole copy
    shutil.rmtree(made.directory)


@pytest.fixture(scope="module")
def demo(images, tmp_path_factory):
    return images.build("demo", tmp_path_factory.mktemp("libraries")), images.root("demo")


def test_the_image_is_small_and_not_root(demo):
    image, root = demo
    config = image["OCIv1"]["config"]
    assert config["User"] == "10001:10001" and config["Entrypoint"] == ["/usr/local/bin/bora"] and config["Cmd"][0] == "router"
    assert config["Labels"]["org.opencontainers.image.version"] == Images.version() and "io.buildah.version" not in config["Labels"]
    files = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
    model = root / "usr/share/bora/demo-model"
    # the demo is the router's image and its model
    assert sum(path.stat().st_size for path in files if model not in path.parents) < 60e6
    assert not [path for path in files if path.stat().st_mode & 0o6000], "set-user-id files"
    assert not {"sh", "bash", "apt-get", "dpkg"} & {path.name for path in files}
    assert [path.relative_to(root) for path in root.rglob("*") if path.is_dir() and path.stat().st_mode & 0o002] == [Path("tmp")]


def test_scanners_learn_which_packages_are_in_it(demo):
    _, root = demo
    assert "VERSION_ID=" in (root / "etc/os-release").read_text()
    for package in PACKAGES:
        status = (root / "var/lib/dpkg/status.d" / package).read_text()
        assert f"Package: {package}\n" in status and "\nVersion: " in status and (root / "usr/share/doc" / package / "copyright").is_file()


def test_the_same_commit_gives_the_same_image(images, demo, tmp_path):
    again = images.build("demo", tmp_path)
    assert again["OCIv1"]["rootfs"]["diff_ids"] == demo[0]["OCIv1"]["rootfs"]["diff_ids"]
    assert again["FromImageDigest"] == demo[0]["FromImageDigest"], "the layers are the same, but what is said of them is not"


# read-only but for /tmp, as the chart has it
CONTAINED = """
set -e
mount --bind "$1" "$1"
mount -o remount,bind,ro "$1"
mount -t tmpfs tmpfs "$1/tmp"
cp "$2" "$1/tmp/bora.yaml"
install -m 0400 -o 10001 "$(dirname "$2")/cluster-secret" "$1/tmp/cluster-secret"
root=$1
shift 2
exec chroot --userspec=10001:10001 --groups= "$root" /usr/local/bin/bora "$@" --config /tmp/bora.yaml
"""


def test_the_image_serves_without_write_access(demo, tmp_path):
    _, root = demo
    api, admin, worker = free_port(), free_port(), free_port()
    (tmp_path / "bora.yaml").write_text(json.dumps({
        "cluster": "image", "cluster_secret_file": "/tmp/cluster-secret", "registry": {"kind": "static", "endpoints": [f"127.0.0.1:{worker}"]},
        "models": [{"name": "bora-demo", "path": "/usr/share/bora/demo-model"}],
        "http": {"host": "127.0.0.1", "port": api, "admin": f"127.0.0.1:{admin}"},
        "worker": {"group": "only", "device": "cpu", "listen": f"127.0.0.1:{worker}", "kv_cache": {"blocks": 512}},
    }))
    (tmp_path / "cluster-secret").write_text("0123456789abcdef0123456789abcdef")
    running = []
    try:
        for part in ("worker", "router"):
            with open(tmp_path / f"{part}.log", "w") as log:
                running.append(subprocess.Popen(["unshare", "--mount", "sh", "-c", CONTAINED, "sh", root, tmp_path / "bora.yaml", part], stdout=log, stderr=log))
        alive = lambda: all(child.poll() is None for child in running)
        wait_until("the health probe", lambda: not alive() or http("GET", f"http://127.0.0.1:{admin}/health")[0] == 200, 60)
        wait_until("the group", lambda: not alive() or http("GET", f"http://127.0.0.1:{admin}/ready")[2].get("ready_groups") == 1, 120)
        assert alive()
        for child in running:
            status = Path(f"/proc/{child.pid}/status").read_text()
            assert "\nUid:\t10001\t10001" in status and "\nCapEff:\t0000000000000000\n" in status and "\nGroups:\t \n" in status
            # of the lines of its own root's mounts: where it is, and how
            assert [line.split()[5].split(",")[0] for line in Path(f"/proc/{child.pid}/mountinfo").read_text().splitlines() if line.split()[4] == "/"] == ["ro"]
        answer = run(sys.executable, CHART / "files" / "scripts" / "ask.py", f"http://127.0.0.1:{api}", "bora-demo", "120", timeout=180)
        assert answer.returncode == 0 and "tokens from bora-demo, group only" in answer.stdout, answer.stdout + answer.stderr
        for child in running:
            child.terminate()
        assert [child.wait(120) for child in running] == [0, 0]
    except AssertionError as error:
        raise AssertionError(f"{error}\n" + "\n".join((tmp_path / f"{part}.log").read_text()[-1500:] for part in ("worker", "router"))) from error
    finally:
        for child in running:
            if child.poll() is None:
                child.kill()
            child.wait()
