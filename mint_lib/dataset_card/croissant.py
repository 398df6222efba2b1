"""Croissant 1.0: a data set described for machines, as JSON-LD (docs.mlcommons.org/croissant/docs/croissant-spec.html).

Goes in: a `Description` and the Arrow schema of its rows. Comes out: a dictionary to be written as `croissant.json`
beside the files: every file with its sha256 and size, every split as a record set whose fields are the columns, and the
properties of the responsible-AI vocabulary (Croissant RAI 1.0). It knows no store.
"""

from typing import TYPE_CHECKING, Any

from mint_lib.dataset_card.description import Description
from mint_lib.dataset_card.facts import NOT_STATED
from mint_lib.dataset_card.statements import (
    describe_content,
    describe_deidentification,
    describe_gate,
    describe_imbalance,
    describe_origin,
    describe_privacy,
    describe_split,
    describe_teacher,
    join_facts,
    join_sentences,
    list_limits,
    list_sources,
    list_uses,
    sum_facts,
)
from mint_lib.storage.layout import number_version

if TYPE_CHECKING:
    import pyarrow

CROISSANT = "croissant.json"
CONFORMS_TO = ("http://mlcommons.org/croissant/1.0", "http://mlcommons.org/croissant/RAI/1.0")
_PAIR_FACTS = ("policy", "teacher_digest", "template_digest")
_FORMATS = {".parquet": "application/x-parquet", ".jsonl": "application/jsonlines", ".json": "application/json"}
_CROISSANT_WORDS = (
    *("citeAs", "column", "equivalentProperty", "extract", "field", "fileObject", "fileProperty", "fileSet", "format"),
    *("includes", "isLiveDataset", "jsonPath", "key", "md5", "parentField", "path", "recordSet", "references", "regex"),
    *("repeated", "replace", "samplingRate", "separator", "source", "subField", "transform"),
)
_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "sc": "https://schema.org/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    **{name: f"cr:{name}" for name in _CROISSANT_WORDS},
}
"""The context that the specification prescribes (appendix 1)."""


def render_croissant(description: Description, schema: "pyarrow.Schema", *, shards: str = "{split}/*.parquet") -> Any:
    """The JSON-LD document.

    Args:
        description: What is told; its `files` are those beside which the document will lie.
        schema: Arrow schema of the rows. Binary columns, and structs of `bytes` and `path`, are images.
        shards: Glob pattern of a split's files.
    """
    facts = description.facts
    document: dict[str, Any] = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": list(CONFORMS_TO),
        "name": f"{description.kind}-{description.name}",
        "description": describe_content(description),
        "license": facts.licence,
        "isLiveDataset": False,
        "creator": [{"@type": "sc:Organization", "name": name} for name in facts.creators],
        "citeAs": None if facts.citation == NOT_STATED else facts.citation,
        "version": f"{number_version(description.reference.version)}.0.0" if description.reference else None,
        "datePublished": description.created_at.date().isoformat() if description.created_at else None,
        "keywords": ["medical", description.kind],
        "additionalProperty": _list_properties(description),
        **_describe_responsibly(description),
        "distribution": [*_list_files(description), *_list_file_sets(description, shards)],
        "recordSet": [_make_record_set(split, schema) for split in description.splits],
    }
    return {key: value for key, value in document.items() if value not in (None, [])}


def _describe_responsibly(description: Description) -> dict[str, Any]:
    """The properties of Croissant RAI that the store can answer."""
    sources = "; ".join(list_sources(description))
    imbalance = describe_imbalance(description)
    pairs: dict[str, Any] = {}
    if description.kind == "preferences":
        pairs = {
            "rai:dataAnnotationProtocol": [f"Policy of the pairs: {join_facts(description, 'policy')}."],
            "rai:machineAnnotationTools": list(describe_teacher(description)),
        }
    return pairs | {
        "rai:dataCollection": join_sentences(
            [*([f"Sources: {sources}."] if sources else []), describe_origin(description), *_drop_leaks(description)]
        ),
        "rai:dataPreprocessingProtocol": [describe_split(description), *describe_deidentification(description)],
        "rai:dataBiases": [*([imbalance] if imbalance else []), *description.leaks],
        "rai:personalSensitiveInformation": list(describe_privacy(description)),
        "rai:dataUseCases": list(list_uses(description)),
        "rai:dataLimitations": list(list_limits(description)),
    }


def _drop_leaks(description: Description) -> list[str]:
    return [f"{note.rstrip('.')}." for note in description.notes if note not in description.leaks]


def _list_properties(description: Description) -> list[dict[str, Any]]:
    """Facts that the vocabulary has no word for, as schema.org property values."""
    found = [
        ("reference", str(description.reference) if description.reference else None),
        ("consent", description.facts.consent),
        ("code version", description.record.code_version),
        *((f"input {name}", text) for name, text in sorted(description.record.inputs.items())),
        *(("lineage", text) for text in sorted(description.lineage)),
        *((column, value) for column in _PAIR_FACTS for value in sum_facts(description, column)),
        ("data gate", describe_gate(description)[0]),
    ]
    return [{"@type": "sc:PropertyValue", "name": name, "value": value} for name, value in found if value is not None]


def _list_files(description: Description) -> list[dict[str, Any]]:
    """Every data file with its checksum."""
    return [
        {
            "@type": "cr:FileObject",
            "@id": path,
            "name": path,
            "contentUrl": path,
            "contentSize": f"{entry.size} B",
            "encodingFormat": _FORMATS[path[path.rfind(".") :]],
            "sha256": entry.sha256,
        }
        for path, entry in sorted(description.files.items())
        if path[path.rfind(".") :] in _FORMATS and path != CROISSANT
    ]


def _list_file_sets(description: Description, shards: str) -> list[dict[str, Any]]:
    """The files of each split taken together: what its record set reads."""
    return [
        {
            "@type": "cr:FileSet",
            "@id": f"files-{split}",
            "name": f"files-{split}",
            "encodingFormat": _FORMATS[shards[shards.rfind(".") :]],
            "includes": shards.format(split=split),
        }
        for split in description.splits
    ]


def _make_record_set(split: str, schema: "pyarrow.Schema") -> dict[str, Any]:
    """The columns of a split; Croissant has no word for a map, which is left out."""
    import pyarrow as pa

    columns = [field for field in schema if not pa.types.is_map(field.type)]
    return {
        "@type": "cr:RecordSet",
        "@id": split,
        "name": split,
        "description": f"The rows of the split {split}.",
        "field": [_make_field(f"{split}/{field.name}", field.name, field.type, split) for field in columns],
    }


def _make_field(field_id: str, column: str, kind: "pyarrow.DataType", split: str, path: str = "") -> dict[str, Any]:
    """A column, or with `path` a part of it, as a field; structs become sub-fields."""
    import pyarrow as pa

    field: dict[str, Any] = {"@type": "cr:Field", "@id": field_id, "name": field_id}
    if pa.types.is_list(kind):
        field["repeated"] = True
        kind = kind.value_type
    if _is_image(kind):
        path = "bytes" if pa.types.is_struct(kind) else path
    elif pa.types.is_struct(kind):
        field["subField"] = [
            _make_field(f"{field_id}/{part.name}", column, part.type, split, path=part.name) for part in kind
        ]
        return field
    source: dict[str, Any] = {"fileSet": {"@id": f"files-{split}"}, "extract": {"column": column}}
    if path:
        source["transform"] = {"jsonPath": path}
    return field | {"dataType": _name_type(kind), "source": source}


def _is_image(kind: "pyarrow.DataType") -> bool:
    import pyarrow as pa

    return pa.types.is_binary(kind) or (pa.types.is_struct(kind) and {part.name for part in kind} == {"bytes", "path"})


def _name_type(kind: "pyarrow.DataType") -> str:
    """The schema.org type of a column that is no struct."""
    import pyarrow as pa

    if _is_image(kind):
        return "sc:ImageObject"
    if pa.types.is_boolean(kind):
        return "sc:Boolean"
    if pa.types.is_integer(kind):
        return "sc:Integer"
    return "sc:Float" if pa.types.is_floating(kind) else "sc:Text"
