"""Cases of one run on local disk, so that memory holds none of them: written one after another, read in any order.

Goes in: cases. Comes out: the same cases by their numbers. Parquet would do for the first half only: a split deals rows
by chance, and every single row would cost the decoding of a whole row group. The file has no name, so that whatever
ends the process, nothing of a patient is left behind. Knows nothing of splits.
"""

import array
import contextlib
import json
import os
import struct
import tempfile
from types import TracebackType
from typing import Self

from mint_lib.errors import StoreError
from mint_lib.records import Case

_HEAD = struct.Struct("<I?")
"""Bytes of the JSON text, and whether an image follows it."""


class CaseSpool:
    """A file of cases. Use it as a context manager: what it holds is gone afterwards."""

    def __init__(self) -> None:
        self._ends = array.array("Q", [0])

    def __enter__(self) -> Self:
        """Opens the file.

        Raises:
            StoreError: the temporary folder cannot be written.
        """
        try:
            self._file = tempfile.TemporaryFile(prefix="mint-cases-")
        except OSError as error:
            raise _explain(error) from error
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # a full disk: nobody wants what was not written yet
            self._file.close()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def append(self, case: Case) -> int:
        """Write a case; returns its number, from 0.

        Raises:
            StoreError: the disk is full.
        """
        text = case.model_dump_json(exclude={"image"}).encode()
        image = case.image
        try:
            self._file.write(_HEAD.pack(len(text), image is not None) + text)
            if image is not None:
                self._file.write(image)
        except OSError as error:
            raise _explain(error) from error
        self._ends.append(self._ends[-1] + _HEAD.size + len(text) + len(image or b""))
        return len(self) - 1

    def read(self, number: int) -> Case:
        """The case of this number.

        Raises:
            StoreError: the disk is full: what was appended could not be written.
        """
        begin, end = self._ends[number], self._ends[number + 1]
        try:
            self._file.flush()
        except OSError as error:
            raise _explain(error) from error
        data = os.pread(self._file.fileno(), end - begin, begin)
        length, has_image = _HEAD.unpack_from(data)
        text_end = _HEAD.size + length
        values = json.loads(data[_HEAD.size : text_end])
        return Case.model_validate(values | {"image": data[text_end:] if has_image else None})


def _explain(error: OSError) -> StoreError:
    return StoreError(
        f"Cases cannot be written to the temporary folder {tempfile.gettempdir()} ({error.strerror}). It must hold all "
        "cases of the run once: free some space there, or name another folder in TMPDIR."
    )
