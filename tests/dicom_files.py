"""DICOM files for tests, whose headers name somebody in many places.

Goes in: pixels and tags. Comes out: the bytes of a file with `CANARY` in standard, private and nested tags.
"""

import io
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, RLELossless, generate_uid

CANARY = "Ysolde Quarrington"
GREY = (np.arange(20 * 30).reshape(20, 30) % 251).astype(np.uint8)


def write_dicom(
    pixels: np.ndarray = GREY, syntax: str = ExplicitVRLittleEndian, data: bytes | None = None, **tags: Any
) -> bytes:
    """A DICOM file whose header names somebody in many places."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = UID(syntax)
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset = Dataset()
    dataset.file_meta = meta
    dataset.SOPClassUID = CTImageStorage
    dataset.Modality = "CT"
    dataset.PatientName = CANARY
    dataset.PatientID = CANARY
    dataset.InstitutionName = CANARY
    dataset.ImageComments = CANARY
    dataset.add_new(0x00091001, "LO", CANARY)
    nested = Dataset()
    nested.ReferringPhysicianName = CANARY
    dataset.RequestAttributesSequence = Sequence([nested])
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.SamplesPerPixel = 1 if pixels.ndim == 2 else 3
    dataset.PhotometricInterpretation = "MONOCHROME2" if pixels.ndim == 2 else "RGB"
    if pixels.ndim == 3:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = dataset.BitsStored = pixels.dtype.itemsize * 8
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes() if data is None else data
    for name, value in tags.items():
        setattr(dataset, name, value)
    if syntax == RLELossless and data is None:
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.compress(RLELossless)
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()
