"""What code makes an output: its version, and a hash of the sources that stages read.

Goes in: this package's own files. Comes out: one line, which stands in every record and in the key of every output. It
knows no stage.
"""

import functools
import hashlib
import pathlib

import mint_lib

_NO_STAGE_READS = frozenset(
    (
        *("engine", "server", "serving.py", "inference_service.py"),
        *("cluster.py", "placement.py", "pods.py", "ray_job.py"),
        *("data_difference", "export.py", "exported_rows.py"),
    )
)


@functools.cache
def code_version() -> str:
    """The package's version and a hash of the stages' sources and templates: a cached output never outlives its code.

    What only serves models or places work on a cluster is left out: no output of a stage depends on it.
    """
    folder = pathlib.Path(__file__).parent
    sources = sorted(
        path
        for suffix in ("*.py", "*.yaml", "*.html", "*.css")
        for path in folder.rglob(suffix)
        if path.relative_to(folder).parts[0] not in _NO_STAGE_READS
    )
    hasher = hashlib.sha256()
    for path in sources:
        hasher.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{mint_lib.__version__}+{hasher.hexdigest()[:16]}"
