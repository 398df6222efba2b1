"""Files of tiles: a folder on this machine or a prefix in S3, and images without anything but their pixels.

Goes in: `folder`, or `s3://bucket/prefix` at the endpoint of `MINT_S3_*`, and names below it. Comes out: their bytes,
never those of a file outside; and PNG images whose metadata are gone. Knows no table and no label.
"""

import hashlib
import io
import pathlib
import warnings
from typing import IO, TYPE_CHECKING

from mint_lib.errors import NotFound
from mint_lib.storage.client import S3
from mint_lib.storage.settings import S3Settings

if TYPE_CHECKING:
    from PIL import Image


class TileFiles:
    """The files below a path."""

    def __init__(self, path: str):
        self.path = path
        self._root = pathlib.Path(path)
        self._s3: S3 | None = None
        if path.startswith("s3://"):
            bucket, _, self._prefix = path.removeprefix("s3://").partition("/")
            self._s3 = S3(S3Settings.from_environment().model_copy(update={"bucket": bucket, "prefix": ""}))

    def read(self, name: str) -> bytes | None:
        """A file given relative to the path; None if there is none, or if it lies outside."""
        if not name or "\0" in name or ".." in pathlib.PurePosixPath(name).parts or name.startswith("/"):
            return None
        if self._s3 is not None:
            try:
                return self._s3.get(f"{self._prefix.rstrip('/')}/{name}".lstrip("/"))[0]
            except NotFound:
                return None
        file = self._find(name)
        return None if file is None else file.read_bytes()

    def digest(self, names: list[str]) -> str:
        """`sha256:...` of the names and the contents of these files, missing ones included as such."""
        hasher = hashlib.sha256()
        for name in sorted(set(names)):
            content = self.read(name)
            hasher.update(name.encode("utf-8", "surrogatepass") + b"\0")
            hasher.update(b"-" if content is None else hashlib.sha256(content).digest())
        return f"sha256:{hasher.hexdigest()}"

    def open(self, name: str) -> IO[bytes] | None:
        """A file, opened, of which only what is read need be in memory; one in S3 is read whole."""
        if self._s3 is None:
            file = self._find(name)
            return None if file is None else file.open("rb")
        content = self.read(name)
        if content is None:
            return None
        return io.BytesIO(content)

    def _find(self, name: str) -> pathlib.Path | None:
        """The local file of this name, links followed, if it lies below the path."""
        try:
            file = (self._root / name).resolve()
            return file if file.is_file() and file.is_relative_to(self._root.resolve()) else None
        except (OSError, RuntimeError, ValueError):  # a name too long, a circle of links, a NUL
            return None


def read_header(data: bytes) -> tuple[tuple[int, int], bool]:
    """Width and height of an encoded image that the stage's checks accept, and whether a channel has 8 bits."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # pixels were counted by a limit of our own
        image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
    return image.size, not image.mode.startswith(("I", "F"))


def clean_image(data: bytes, *, size_pixels: int | None) -> bytes:
    """A PNG or JPEG as a PNG that holds its pixels and nothing else: no EXIF, no text, no profile.

    Args:
        data: an image that the stage's checks accept.
        size_pixels: side of the square that it is brought to, by averaging areas where it shrinks. None: as it is.
    """
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as opened:
        return encode_image(ImageOps.exif_transpose(opened).convert("RGB"), size_pixels=size_pixels)


def encode_image(image: "Image.Image", *, size_pixels: int | None) -> bytes:
    """The pixels of an RGB image as PNG, at `size_pixels` squared or as they are."""
    from PIL import Image

    if size_pixels is not None and image.size != (size_pixels, size_pixels):
        shrinks = min(image.size) >= size_pixels
        image = image.resize((size_pixels, size_pixels), Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC)
    plain = Image.frombytes("RGB", image.size, image.tobytes())  # a new image carries no metadata over
    buffer = io.BytesIO()
    plain.save(buffer, "PNG")
    return buffer.getvalue()
