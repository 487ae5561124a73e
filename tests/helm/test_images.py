"""What can be said of images, compose file and systemd units without a container engine."""

import fnmatch
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml

from chart import BORA, CHART, FIXTURES, ROOT, Loader, run, values

DEPLOY = ROOT / "deploy"
DOCKERFILE = DEPLOY / "docker" / "Dockerfile"


def instructions():
    text = re.sub(r"\\\n", " ", DOCKERFILE.read_text())
    return [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def stages():
    found, name = {}, None
    for line in instructions():
        if match := re.match(r"FROM (\S+) AS (\S+)", line):
            name = match[2]
            found[name] = {"from": match[1], "lines": []}
        elif name:
            found[name]["lines"].append(line)
    return found


def test_hadolint_finds_nothing():
    outcome = run("hadolint", DOCKERFILE)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def test_checkov_finds_nothing():
    # CKV_DOCKER_2: health checks are Kubernetes' and compose's. CKV_DOCKER_7: it does not see the tags of bases that are arguments.
    outcome = run("checkov", "--file", DOCKERFILE, "--framework", "dockerfile", "--skip-download", "--quiet", "--compact", "--skip-check", "CKV_DOCKER_2,CKV_DOCKER_7",
                  "--output", "json", env={**os.environ, "LOG_LEVEL": "ERROR"})
    report = json.loads(outcome.stdout)
    assert report["summary"]["failed"] == 0 and report["summary"]["passed"] > 10, [check["check_id"] for check in report["results"]["failed_checks"]]


def test_images_are_small_and_without_root():
    images = stages()
    for name in ("router", "worker"):
        assert images[name]["from"] == "runtime"
        assert "USER 10001:10001" in images[name]["lines"] and 'ENTRYPOINT ["/usr/local/bin/bora"]' in images[name]["lines"]
        # no shell, no package manager: nothing but copies
        assert not [line for line in images[name]["lines"] if line.startswith("RUN")]
    # bases have a tag each, and can be given a digest
    assert all(re.fullmatch(r"ARG \w+_IMAGE=\S+:[\w.-]+", line) and not line.endswith(":latest") for line in instructions() if line.startswith("ARG"))
    assert images["runtime"] == {"from": "scratch", "lines": ["COPY --from=libraries /out/ /"]}


def context():
    """The files that reach the build, by the rules of Dockerfile.dockerignore (later rules win)."""
    rules = [line for line in (DEPLOY / "docker" / "Dockerfile.dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    tracked = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout.splitlines()
    for path in tracked:
        kept = True
        for rule in rules:
            keep, pattern = rule.startswith("!"), rule.removeprefix("!")
            parts = path.split("/")
            prefixes = ["/".join(parts[: number + 1]) for number in range(len(parts))]
            if pattern.startswith("**/"):
                matches = any(fnmatch.fnmatchcase(part, pattern[3:]) for part in parts)
            else:
                matches = any(fnmatch.fnmatchcase(prefix, pattern) for prefix in prefixes)
            if matches:
                kept = keep
        if kept:
            yield path


def test_the_build_context_holds_what_cargo_asks_for(tmp_path):
    files = list(context())
    assert not [path for path in files if path.startswith(("docs/", "helm/", ".git/", "tests/e2e"))]
    copied = " ".join(line for line in stages()["source"]["lines"] if line.startswith("COPY")).split()
    for path in files:
        if any(fnmatch.fnmatchcase(path, source) or path.startswith(f"{source}/") for source in copied):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, tmp_path / path)
    outcome = run("cargo", "metadata", "--locked", "--offline", "--filter-platform", "x86_64-unknown-linux-gnu", "--format-version", "1", cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    metadata = json.loads(outcome.stdout)
    members = {package["name"]: package for package in metadata["packages"] if package["id"] in metadata["workspace_members"]}
    for package in members.values():
        for target in package["targets"]:
            if target["kind"][0] in ("lib", "bin", "custom-build"):
                assert os.path.isfile(target["src_path"]), target["src_path"]
    # etcd-client's build script asks for protoc, which is a script of the repository for exactly the locked version
    version = next(package["version"] for package in metadata["packages"] if package["name"] == "etcd-client")
    assert (tmp_path / "scripts" / "protoc").is_file() and (tmp_path / f"scripts/protoc.etcd-client-{version}.bin").is_file()
    assert "scripts/protoc" in (tmp_path / ".cargo" / "config.toml").read_text()


def test_the_demo_image_holds_the_whole_model(tmp_path):
    """What the COPY lines put where the preset looks, without links (they would lead nowhere), is a checkpoint that the binary takes."""
    preset = yaml.load((CHART / "presets" / "values-cpu-demo.yaml").read_text(), Loader)
    files, place = set(context()), preset["models"]["demo"]["path"]
    for line in stages()["demo"]["lines"]:
        if line.startswith("COPY"):
            *sources, target = line.split()[1:]
            for source in sources:
                assert source in files and not (ROOT / source).is_symlink(), source
                name = source.rsplit("/", 1)[1] if target.endswith("/") else target.rsplit("/", 1)[1]
                assert target.startswith(place)
                shutil.copy(ROOT / source, tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (ROOT / "tests/fixtures/bora-demo/fp8").iterdir()}
    secret = tmp_path / "cluster-secret"
    secret.touch(mode=0o600)
    secret.write_text("0123456789abcdef0123456789abcdef")
    config = {"models": [{"name": "demo", "path": str(tmp_path)}], "registry": {"kind": "static", "endpoints": ["127.0.0.1:9000"]},
              "cluster_secret_file": str(secret)}
    (tmp_path / "bora.yaml").write_text(json.dumps(config))
    outcome = run(BORA, "check", "--config", tmp_path / "bora.yaml")
    assert outcome.returncode == 0, outcome.stderr


def test_the_binary_needs_the_c_library_alone_and_fits_the_image(tmp_path):
    needed = {line.split()[0].rsplit("/", 1)[-1] for line in run("ldd", BORA).stdout.splitlines()}
    # what deploy/docker/libraries copies, and the kernel's own
    assert needed <= {"linux-vdso.so.1", "libc.so.6", "libm.so.6", "libgcc_s.so.1", "libstdc++.so.6", "ld-linux-x86-64.so.2", "libdl.so.2", "libpthread.so.0", "librt.so.1"}, needed
    assert run("strip", "-o", tmp_path / "bora", BORA).returncode == 0
    # the libraries, certificates and time zones of deploy/docker/libraries are 10 MB; the router's image is to stay below 60
    assert (tmp_path / "bora").stat().st_size < 48e6


def test_the_libraries_that_are_copied_are_enough(tmp_path):
    """The image's root, made by the image's own script on a Debian: its loader and its libraries, and no others, run the binary."""
    needed = [Path("/etc/debian_version"), Path("/etc/ssl/certs/ca-certificates.crt"), Path("/usr/share/zoneinfo"),
              *(Path(f"/usr/share/doc/{package}/copyright") for package in ("libc6", "libgcc-s1", "libstdc++6", "ca-certificates", "tzdata"))]
    if not all(path.exists() for path in needed):
        pytest.skip("not a Debian with the packages that the Dockerfile installs")
    made = run("sh", DEPLOY / "docker" / "libraries", tmp_path)
    assert made.returncode == 0, made.stderr
    started = run(tmp_path / "lib64/ld-linux-x86-64.so.2", "--inhibit-cache", "--library-path", tmp_path / "lib/x86_64-linux-gnu", BORA, "--version")
    assert started.returncode == 0 and started.stdout.startswith("bora "), started.stderr
    listed = run(tmp_path / "lib64/ld-linux-x86-64.so.2", "--inhibit-cache", "--library-path", tmp_path / "lib/x86_64-linux-gnu", "--list", BORA).stdout
    assert not [line for line in listed.splitlines() if "=>" in line and str(tmp_path) not in line and "ld-linux" not in line], listed
    # NVIDIA's container runtime puts the driver's libraries into /usr/lib/x86_64-linux-gnu where it finds this file
    assert (tmp_path / "etc/debian_version").is_file() and "bora:x:10001" in (tmp_path / "etc/passwd").read_text()


def test_nvidias_libraries_are_those_that_the_worker_opens():
    copied = {word.rsplit("/", 1)[-1] for line in stages()["cuda"]["lines"] for word in line.split() if ".so." in word}
    source = "\n".join(path.read_text() for path in (ROOT / "worker" / "src").rglob("*.rs"))
    opened = set(re.findall(r'"(lib\w+\.so\.\d+)"', source)) - {"libcuda.so.1"}
    assert opened <= copied, f"the worker opens {opened - copied}, which the image lacks"
    assert copied - opened <= {"libnccl.so.2"}


def test_compose_runs_what_the_binary_knows(tmp_path):
    services = yaml.load((DEPLOY / "compose.yaml").read_text(), Loader)["services"]
    for name in ("router", "worker"):
        service = services[name]
        assert service["read_only"] and service["cap_drop"] == ["ALL"]
        subcommand, *flags = service["command"]
        usage = run(BORA, subcommand, "--help").stdout
        for flag in flags:
            if flag.startswith("--"):
                assert re.search(rf"{re.escape(flag.split('=')[0])}\b", usage), flag
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source.startswith("${") or (DEPLOY / source).is_file(), source
    repository = values()["image"]["router"]["repository"]
    version = yaml.load((CHART / "Chart.yaml").read_text(), Loader)["appVersion"]
    assert services["router"]["image"] == f"{repository}:{version}"
    assert services["etcd"]["image"] == values()["etcd"]["builtin"]["image"]
    text = (DEPLOY / "bora.yaml").read_text()
    model = tmp_path / "model"
    shutil.copytree(FIXTURES / "tiny_text", model)
    shutil.copy(FIXTURES / "tokenizers" / "tekken-v13-8k.json", model / "tekken.json")
    secret = tmp_path / "cluster-secret"
    secret.touch(mode=0o600)
    secret.write_text("0123456789abcdef0123456789abcdef")
    assert "cluster-secret" in services["router"]["secrets"] and "cluster-secret" in services["worker"]["secrets"]
    text = text.replace("/run/secrets/cluster-secret", str(secret))
    (tmp_path / "bora.yaml").write_text(text.replace("path: /model", f"path: {model}"))
    (advertise,) = [word for word in services["worker"]["command"] if word.startswith("--advertise")]
    outcome = run(BORA, "check", "--config", tmp_path / "bora.yaml", advertise)
    assert outcome.returncode == 0, outcome.stderr
    drain = yaml.load(text, Loader)["worker"]["drain_seconds"]
    assert int(services["worker"]["stop_grace_period"].removesuffix("s")) > drain
    (tmp_path / "prometheus.yaml").write_text((DEPLOY / "prometheus.yaml").read_text().replace("/etc/prometheus/rules", str(CHART / "files" / "rules")))
    checked = run("promtool", "check", "config", tmp_path / "prometheus.yaml")
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("unit", ["bora-router.service", "bora-worker@.service"])
def test_systemd_units(unit, tmp_path):
    if not shutil.which("systemd-analyze"):
        pytest.skip("no systemd-analyze")
    text = (DEPLOY / "systemd" / unit).read_text()
    for word in re.findall(r"/usr/local/bin/bora (\w+) (--\w+)", text):
        assert word[1] in run(BORA, word[0], "--help").stdout
    # the binary must exist for the check
    copy = tmp_path / unit
    copy.write_text(text.replace("/usr/local/bin/bora", str(BORA)))
    verified = run("systemd-analyze", "verify", "--man=no", copy, env={**os.environ, "SYSTEMD_LOG_LEVEL": "warning"})
    complaints = [line for line in verified.stderr.splitlines() if str(tmp_path) in line or unit.split(".")[0] in line]
    assert verified.returncode == 0 and not complaints, verified.stderr
    exposure = run("systemd-analyze", "security", "--offline=true", "--threshold=35" if "worker" in unit else "--threshold=15", copy)
    assert exposure.returncode == 0, exposure.stdout[-300:] + exposure.stderr


def test_the_bill_of_materials_names_every_crate_that_is_compiled_in(tmp_path):
    """cargo tree says what is linked; licences are those that deny.toml allows, checksums those of Cargo.lock."""
    written = [tmp_path / name for name in ("one.json", "two.json")]
    for path in written:
        made = run(ROOT / "deploy" / "sbom", path)
        assert made.returncode == 0, made.stderr
    assert written[0].read_bytes() == written[1].read_bytes(), "the same lock gives the same bytes"
    bill = json.loads(written[0].read_text())
    assert (bill["bomFormat"], bill["specVersion"], bill["metadata"]["component"]["name"]) == ("CycloneDX", "1.5", "bora")
    tree = run("cargo", "tree", "--locked", "--manifest-path", ROOT / "Cargo.toml", "--edges", "normal,no-proc-macro", "--prefix", "none", "--format", "{p}",
               "--target", "x86_64-unknown-linux-gnu")
    linked = set(re.findall(r"^(\S+) v(\S+)", tree.stdout, re.M))
    listed = {(one["name"], one["version"]) for one in bill["components"]} | {("bora", bill["metadata"]["component"]["version"])}
    assert tree.returncode == 0 and len(linked) > 100 and not linked - listed, linked - listed
    for one in bill["components"]:
        own = one["name"].startswith("bora-")
        assert one["licenses"][0]["expression"] and (own or re.fullmatch("[0-9a-f]{64}", one["hashes"][0]["content"])), one
    references = {one["bom-ref"] for one in bill["components"]} | {bill["metadata"]["component"]["bom-ref"]}
    assert all({node["ref"], *node["dependsOn"]} <= references for node in bill["dependencies"])
