"""Files of cases: GA4GH Phenopackets (schema 2), or JSON lines with the same facts in a flat shape.

Goes in: a folder or file on this machine, or `s3://bucket/prefix` at the endpoint of `MINT_S3_*`. Comes out: documents
and the facts in each. Flat rows have the keys `case_id`, `disease_id` and `observed` (a list of [term id, label]), and
may have `excluded`, `disease`, `sex`, `age` (ISO 8601 duration) and `pmid`. Knows no ontology.
Schema: https://phenopacket-schema.readthedocs.io, version 2.
"""

import gzip
import pathlib
import re
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from mint_lib.clinical.clinical_text import Sex
from mint_lib.errors import InvalidInput, NotFound
from mint_lib.records import Finding, Split
from mint_lib.storage.client import S3
from mint_lib.storage.settings import S3Settings

_SUFFIXES = (".json", ".jsonl", ".jsonl.gz")
_DURATION = re.compile(r"P(?:(\d+(?:\.\d+)?)Y)?(?:(\d+(?:\.\d+)?)M)?(?:(\d+(?:\.\d+)?)W)?(?:(\d+(?:\.\d+)?)D)?(?:T.*)?")
_SEXES: dict[str, Sex] = {"MALE": "male", "FEMALE": "female"}


class Packet(NamedTuple):
    """The facts of one case."""

    case_id: str
    subject: str
    paper: str | None
    sex: Sex
    age_years: float | None
    disease_id: str
    disease_name: str
    findings: tuple[Finding, ...]
    photo: str | None = None
    split: Split | None = None


class PhenopacketFiles:
    """The files below a path on this machine or in S3."""

    def __init__(self, path: str):
        self._path = path
        self._is_remote = path.startswith("s3://")
        self._root = pathlib.Path(path)
        if self._root.is_file():
            self._root = self._root.parent
        bucket, _, self._prefix = path.removeprefix("s3://").partition("/")
        if self._is_remote:
            self._s3 = S3(S3Settings.from_environment().model_copy(update={"bucket": bucket, "prefix": ""}))

    def read_all(self) -> Iterator[tuple[str, bytes]]:
        """Name and content of each file of cases, sorted by name. Raises InvalidInput if there is none."""
        names = self._list_remote() if self._is_remote else self._list_local()
        if not names:
            raise InvalidInput(
                f"data.config.path: {self._path!r} holds no {', '.join(_SUFFIXES)} file. Give a folder or file of "
                "Phenopackets, or s3://bucket/prefix."
            )
        for name in names:
            yield name, self._s3.get(name)[0] if self._is_remote else (self._root / name).read_bytes()

    def read_beside(self, relative: str) -> bytes | None:
        """A file given relative to the path; None if there is none, or if it lies outside."""
        if ".." in pathlib.PurePosixPath(relative).parts or relative.startswith("/"):
            return None
        if self._is_remote:
            folder = self._prefix if not self._prefix.endswith(_SUFFIXES) else self._prefix.rpartition("/")[0]
            try:
                return self._s3.get(f"{folder.rstrip('/')}/{relative}".lstrip("/"))[0]
            except NotFound:
                return None
        file = (self._root / relative).resolve()
        return file.read_bytes() if file.is_file() and file.is_relative_to(self._root.resolve()) else None

    def _list_remote(self) -> list[str]:
        return sorted(item.key for item in self._s3.list_objects(self._prefix) if item.key.endswith(_SUFFIXES))

    def _list_local(self) -> list[str]:
        path = pathlib.Path(self._path)
        if path.is_file():
            return [path.name] if path.name.endswith(_SUFFIXES) else []
        found = (file for file in path.rglob("*") if file.name.endswith(_SUFFIXES) and file.is_file())
        return sorted(file.relative_to(path).as_posix() for file in found)


def split_documents(name: str, content: bytes) -> Iterator[tuple[str, str]]:
    """Place and text of each JSON document of a file; a file that cannot be decoded gives one empty text."""
    try:
        text = (gzip.decompress(content) if name.endswith(".gz") else content).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        yield name, ""
        return
    if name.endswith(".json"):
        yield name, text
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield f"{name}:{number}", line


def read_flat(values: dict[str, Any], case_id: str) -> Packet:
    """The facts of a flat row. Raises KeyError, TypeError or the like if it is none."""
    findings = [Finding(id=str(item[0]), label=str(item[1])) for item in values["observed"]]
    findings += [Finding(id=str(item[0]), label=str(item[1]), excluded=True) for item in values.get("excluded") or ()]
    return Packet(
        case_id=case_id,
        subject=case_id,
        paper=str(values["pmid"]) if values.get("pmid") else None,
        sex=_SEXES.get(str(values.get("sex")), "unknown"),
        age_years=parse_age(values.get("age")),
        disease_id=str(values.get("disease_id") or ""),
        disease_name=str(values.get("disease") or ""),
        findings=tuple(findings),
    )


def read_phenopacket(values: dict[str, Any], case_id: str) -> Packet:
    """The facts of a Phenopacket; without one certain diagnosis `disease_id` is empty. Raises as `read_flat`."""
    subject = values.get("subject") or {}
    references = (values.get("metaData") or {}).get("externalReferences") or ()
    paper = next((item["id"] for item in references if str(item.get("id")).startswith("PMID:")), None)
    findings = tuple(
        Finding(
            id=str(item["type"]["id"]), label=str(item["type"].get("label") or ""), excluded=bool(item.get("excluded"))
        )
        for item in values["phenotypicFeatures"]
    )
    diseases = {
        str(item["diagnosis"]["disease"]["id"]): str(item["diagnosis"]["disease"].get("label") or "")
        for item in values.get("interpretations") or ()
        if (item.get("diagnosis") or {}).get("disease")
    }
    if not diseases:
        terms = [item["term"] for item in values.get("diseases") or () if not item.get("excluded")]
        diseases = {str(term["id"]): str(term.get("label") or "") for term in terms}
    disease_id, disease_name = next(iter(diseases.items())) if len(diseases) == 1 else ("", "")
    # Subjects are numbered anew in each publication.
    subject_id = " ".join(str(part) for part in (paper, subject.get("id") or case_id) if part)
    return Packet(
        case_id=case_id,
        subject=subject_id,
        paper=paper,
        sex=_SEXES.get(str(subject.get("sex")), "unknown"),
        age_years=parse_age(((subject.get("timeAtLastEncounter") or {}).get("age") or {}).get("iso8601duration")),
        disease_id=disease_id,
        disease_name=disease_name,
        findings=findings,
    )


def parse_age(duration: object) -> float | None:
    """Years in an ISO 8601 duration such as P4Y3M; None if it is none, or negative."""
    match = _DURATION.fullmatch(duration) if isinstance(duration, str) else None
    if match is None or not any(match.groups()):
        return None
    years, months, weeks, days = (float(part or 0) for part in match.groups())
    return years + months / 12 + weeks * 7 / 365.25 + days / 365.25
