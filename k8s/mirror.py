"""Third parties for a cluster without the internet: their manifests fetched once, their images listed and renamed.

Goes in: the folders of `k8s/`, each a kustomization with pinned addresses. Comes out: a copy of the folders in which
every address is a file, so that `kubectl kustomize` needs no network; the list of images; and manifests that name a
registry of your own. It needs `kubectl`, and for `fetch` the internet. It copies no image itself: `copies` prints the
commands. Helm charts (the GPU operator) are not among the folders.

    python k8s/mirror.py fetch                                          # writes k8s/vendor and k8s/checksums.txt
    python k8s/mirror.py images                                         # one image a line
    python k8s/mirror.py copies --registry registry.example/mirror | sh
    python k8s/mirror.py render 51-kserve --registry registry.example/mirror | kubectl apply --server-side -f -
"""

import argparse
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import yaml

HERE = Path(__file__).parent
TIMEOUT_SECONDS = 120
_BASE = re.compile(r"(?P<repository>https?://[^/]+/[^/]+/[^/]+)//(?P<path>[^?]+)\?ref=(?P<version>[^&]+)")
"""A folder of a Git repository at a tag, as kustomize writes it."""
_IMAGE = re.compile(
    r"[a-z0-9][a-z0-9.-]*(?::\d+)?(?:/[a-z0-9][a-z0-9._-]*)+(?::(?!\d+$)\w[\w.-]*)?(?:@sha256:[0-9a-f]{64})?"
)
_HAS_VERSION = re.compile(r":\w[\w.-]*$|@sha256:")


class MirrorError(Exception):
    """What is wrong and what to do."""


def list_folders(root: Path) -> list[Path]:
    """The folders of `root` that hold a kustomization, in the order of installation."""
    return sorted(path.parent for path in root.glob("[0-9][0-9]-*/kustomization.yaml"))


def list_addresses(folder: Path) -> list[str]:
    """What a folder takes from elsewhere."""
    resources = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    return [resource for resource in resources if "://" in resource]


def fetch(root: Path, vendor: Path, checksums: Path) -> None:
    """Copy every folder of `root` to `vendor`, with files in place of addresses.

    An address that `checksums` knows must give the same content as when it was first fetched; others are added to it.

    Raises:
        MirrorError: an address does not answer, or its content has changed.
    """
    known = _read_checksums(checksums)
    fetched: dict[str, str] = {}
    shutil.rmtree(vendor, ignore_errors=True)
    for folder in list_folders(root):
        target = vendor / folder.name
        shutil.copytree(folder, target)
        kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
        for number, address in enumerate(kustomization["resources"]):
            if "://" not in address:
                continue
            relative, digest = _fetch_address(address, target)
            if known.get(address, digest) != digest:
                shutil.rmtree(vendor)
                raise MirrorError(
                    f"{address} has changed: its sha256 is {digest}, and {checksums.name} says {known[address]}. A "
                    "release must not change. Find out why; only then remove its line."
                )
            fetched[address] = digest
            kustomization["resources"][number] = relative
        (target / "kustomization.yaml").write_text(yaml.safe_dump(kustomization, sort_keys=False))
    checksums.write_text("".join(f"{digest}  {address}\n" for address, digest in sorted(fetched.items())))


def build(folder: Path) -> str:
    """The manifests of a folder, by `kubectl kustomize`.

    Raises:
        MirrorError: kustomize refuses, in its own words.
    """
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise MirrorError(f"kubectl kustomize {folder}: {done.stderr.strip()}")
    return done.stdout


def list_images(manifests: str) -> list[str]:
    """Every image that manifests name: in containers, and in the arguments, variables and files of a controller."""
    found: set[str] = set()
    for document in yaml.load_all(manifests, Loader=_Loader):
        # A kind's schema names no image that runs.
        if document and document.get("kind") != "CustomResourceDefinition":
            found.update(_find_images(document))
    return sorted(found)


def rename(image: str, registry: str) -> str:
    """Where a copy of an image lies: its path under `registry`, its first host left out."""
    host, _, path = image.partition("/")
    is_host = bool(path) and ("." in host or ":" in host or host == "localhost")
    return f"{registry.rstrip('/')}/{path if is_host else image}"


def write_copy(image: str, registry: str) -> str:
    """The command that copies an image with all its platforms. skopeo takes a tag or a digest, not both."""
    has_both = re.fullmatch(r"(.+):([\w.-]+)(@sha256:[0-9a-f]{64})", image)
    source = f"{has_both[1]}{has_both[3]}" if has_both else image
    target = rename(f"{has_both[1]}:{has_both[2]}" if has_both else image, registry)
    return f"skopeo copy --all --preserve-digests docker://{source} docker://{target}"


def render(manifests: str, registry: str) -> str:
    """The manifests with every image taken from `registry`."""
    for image in sorted(list_images(manifests), key=len, reverse=True):
        manifests = re.sub(rf"(?<![\w./@:-]){re.escape(image)}(?![\w./@:-])", rename(image, registry), manifests)
    return manifests


def _fetch_address(address: str, target: Path) -> tuple[str, str]:
    """Writes what an address gives under `target`; its path there, and its sha256."""
    base = _BASE.fullmatch(address)
    if base is None:
        content = _download(address)
        path = PurePosixPath(urlsplit(address).path).name
        (target / path).write_bytes(content)
        return path, hashlib.sha256(content).hexdigest()
    repository, version = base["repository"], base["version"]
    content = _download(f"{repository}/archive/refs/tags/{version}.tar.gz")
    top = PurePosixPath(base["path"]).parts[0]
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        members = [member for member in archive.getmembers() if PurePosixPath(member.name).parts[1:2] == (top,)]
        if not members:
            raise MirrorError(f"{address}: its archive holds no folder {top}. Look for the folder's name at that tag.")
        archive.extractall(target, members=members, filter="data")
    name = PurePosixPath(members[0].name).parts[0]
    # Of the files, not of the archive, whose compression a server may change.
    digest = hashlib.sha256()
    for file in sorted(path for path in (target / name).rglob("*") if path.is_file()):
        digest.update(f"{file.relative_to(target / name)}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return f"{name}/{base['path']}", digest.hexdigest()


def _download(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:  # noqa: S310 - of a kustomization
            return bytes(response.read())
    except (urllib.error.URLError, TimeoutError) as error:
        raise MirrorError(f"{url} does not answer ({error}). Run fetch on a machine that reaches it.") from error


def _read_checksums(path: Path) -> dict[str, str]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {address: digest for digest, address in (line.split(maxsplit=1) for line in lines)}


def _find_images(value: Any, key: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _find_images(part, str(name))
    elif isinstance(value, list):
        for part in value:
            yield from _find_images(part, key)
    elif isinstance(value, str):
        # KServe keeps images in JSON inside a ConfigMap, operators in --name=image arguments.
        if value.lstrip().startswith("{"):
            try:
                yield from _find_images(json.loads(value))
                return
            except ValueError:
                pass
        if key == "image" and _HAS_VERSION.search(value):
            yield value
            return
        for word in re.split(r"[\s\"',=]+", value):
            if _IMAGE.fullmatch(word) and _HAS_VERSION.search(word):
                yield word


class _Loader(yaml.SafeLoader):
    """YAML as Kubernetes reads it: a lone `=`, which enums of the Prometheus operator hold, is text."""


_Loader.add_constructor("tag:yaml.org,2002:value", lambda loader, node: loader.construct_scalar(node))


def main() -> None:
    """Run one of the commands above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["fetch", "images", "copies", "render"])
    parser.add_argument("folders", nargs="*", help="names as 51-kserve; all of them by default")
    parser.add_argument("--vendor", type=Path, default=HERE / "vendor", help="where the fetched copy lies")
    parser.add_argument("--registry", help="registry and path that images are copied to")
    options = parser.parse_args()
    if options.command in ("copies", "render") and not options.registry:
        parser.error(f"{options.command} needs --registry")
    try:
        if options.command == "fetch":
            fetch(HERE, options.vendor, HERE / "checksums.txt")
            return
        folders = [options.vendor / name for name in options.folders] or list_folders(options.vendor)
        if not folders:
            raise MirrorError(f"{options.vendor} holds no folder. Run fetch first.")
        manifests = "\n---\n".join(map(build, folders))
        if options.command == "render":
            sys.stdout.write(render(manifests, options.registry))
            return
        for image in list_images(manifests):
            sys.stdout.write((write_copy(image, options.registry) if options.command == "copies" else image) + "\n")
    except MirrorError as error:
        sys.exit(f"mirror: {error}")


if __name__ == "__main__":
    main()
