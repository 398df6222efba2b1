"""The chart rendered by a real helm, for tests.

Goes in: values files of the chart and single values. Comes out: Kubernetes objects as dictionaries, or helm's own words
where it refuses. It asks no cluster: what helm renders here is what it would send.
"""

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

CHART = Path(__file__).parents[1] / "helm"
VALUES_FILES = sorted(CHART.glob("values*.yaml"))
"""The defaults and every example of a cluster."""
DIGESTS = {
    "images.train": "registry.example/mint-train@sha256:" + "a" * 64,
    "images.serve": "registry.example/mint-serve@sha256:" + "b" * 64,
}
"""The chart names no image of its own: a digest is known only once an image is built."""
CLUSTER_FACTS = {
    "s3.endpointUrl": "https://s3.example.org",
    "network.s3.cidrs": "{198.51.100.0/24}",
    "network.apiServer.cidrs": "{192.0.2.10/32}",
}
"""What the defaults leave open besides, and the examples of clusters say."""
RELEASE = "mint"
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # dashboards are long, and the one in Python takes seconds
_TOOLS_FOLDERS = (Path(__file__).parents[1] / ".tools" / "bin", Path(os.environ.get("MINT_TOOLS", "/nonexistent")))


def find_tool(name: str) -> str | None:
    """Where the program `name` is: on PATH, in `.tools/bin` of the project, or in the folder $MINT_TOOLS."""
    folders = os.pathsep.join([os.environ.get("PATH", ""), *map(str, _TOOLS_FOLDERS)])
    return shutil.which(name, path=folders)


def require_tool(name: str) -> str:
    """As `find_tool`; skips the test where the program is absent."""
    tool = find_tool(name)
    if tool is None:
        pytest.skip(f"{name} is not installed: run tests/get_helm_kubectl.py .tools/bin")
    return tool


def run_helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Helm with folders of its own, so that nothing of the person who runs the tests is read."""
    helm = require_tool("helm")
    with tempfile.TemporaryDirectory() as home:
        own = {f"HELM_{kind}_HOME": f"{home}/{kind}" for kind in ("CACHE", "CONFIG", "DATA")}
        environment = {"PATH": os.environ.get("PATH", ""), "HOME": home, "KUBECONFIG": f"{home}/none"} | own
        return subprocess.run(
            [helm, *arguments], capture_output=True, text=True, timeout=120, check=False, env=environment
        )


def render_chart(
    values_files: tuple[Path, ...] = (), sets: dict[str, str] | None = None, *, images: bool = True
) -> list[dict[str, Any]]:
    """Objects that `helm install` would send, hooks too; the list is the caller's own.

    Args:
        values_files: Files over the chart's defaults, the last one wins.
        sets: Values as `--set` takes them, by dotted path.
        images: Whether the example digests are given, without which the chart refuses; and, where no file says them,
            facts of an example cluster.

    Raises:
        ValueError: helm refused, in its own words.
    """
    text = render_text(values_files, sets, images=images)
    return [item for item in yaml.load_all(text, Loader=_Loader) if item]


def render_text(values_files: tuple[Path, ...] = (), sets: dict[str, str] | None = None, *, images: bool = True) -> str:
    """As `render_chart`, but the YAML that helm prints."""
    facts = {} if set(values_files) - {CHART / "values.yaml"} else CLUSTER_FACTS
    given = (DIGESTS | facts if images else {}) | (sets or {})
    return _render(tuple((str(file), file.read_text()) for file in values_files), tuple(sorted(given.items())))


@functools.cache
def _render(values_files: tuple[tuple[str, str], ...], sets: tuple[tuple[str, str], ...]) -> str:
    files = [part for file, _ in values_files for part in ("--values", file)]
    values = [part for key, value in sets for part in ("--set", f"{key}={value}")]
    done = run_helm("template", RELEASE, str(CHART), "--namespace", "mint", *files, *values)
    if done.returncode:
        raise ValueError(done.stderr.strip())
    return done.stdout
