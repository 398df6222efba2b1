"""Custom resources checked against their CRDs as an API server checks them, without a server.

Goes in: an object as a dictionary, and a folder with one structural schema a file, `<group>_<version>_<kind>.json`.
Comes out: what a server with strict field validation would refuse. CEL rules and webhooks are not run.
"""

import functools
import json
import re
from pathlib import Path
from typing import Any

import jsonschema

CRD_FOLDER = Path(__file__).parents[2] / "shared" / "crds"
_OF_EVERY_OBJECT = {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {"type": "object"}}
_NO_VALIDATION = {"description", "nullable", "default", "example"}
# jsonschema knows them as no formats; the type beside them says all that matters here.
_NUMBER_FORMATS = {"int32", "int64", "double", "float", "byte", "password"}


def find_schema_errors(manifest: dict[str, Any], *, folder: Path = CRD_FOLDER) -> list[str]:
    """What the CRD of `manifest` refuses, as `path: message`; empty if it is accepted.

    Raises:
        FileNotFoundError: the folder holds no schema of this kind and version.
    """
    validator = _load_validator(folder, manifest["apiVersion"], manifest["kind"])
    errors = sorted(validator.iter_errors(_drop_nulls(manifest)), key=lambda error: list(map(str, error.absolute_path)))
    return [f"{'/'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in errors]


@functools.cache
def _load_validator(folder: Path, api_version: str, kind: str) -> jsonschema.Draft202012Validator:
    group, version = api_version.split("/")
    schema = _tighten(json.loads((folder / f"{group}_{version}_{kind}.json").read_text()))
    if "properties" in schema:
        schema["properties"] |= _OF_EVERY_OBJECT
    return jsonschema.Draft202012Validator(schema)


def _tighten(schema: Any) -> Any:
    """A structural schema as a JSON schema that refuses unknown fields."""
    if not isinstance(schema, dict):
        return schema
    tight: dict[str, Any] = {}
    properties = schema.get("properties", {})
    for key, value in schema.items():
        if key.startswith("x-kubernetes") or key in _NO_VALIDATION or (key == "format" and value in _NUMBER_FORMATS):
            continue
        if key == "properties":
            tight[key] = {name: _tighten(part) for name, part in value.items()}
        elif key in ("items", "additionalProperties", "not"):
            tight[key] = _tighten(value)
        elif key == "required":  # the server fills in defaults before it validates
            tight[key] = [name for name in value if "default" not in properties.get(name, {})]
        elif key == "pattern":
            tight[key] = _spell_pattern(value)
        else:
            tight[key] = value
    if schema.get("x-kubernetes-int-or-string"):
        tight.pop("type", None)
        tight["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if schema.get("x-kubernetes-embedded-resource"):
        tight.setdefault("properties", {}).update(_OF_EVERY_OBJECT)
    keeps_unknown = schema.get("x-kubernetes-preserve-unknown-fields")
    if "properties" in tight and "additionalProperties" not in tight and not keeps_unknown:
        tight["additionalProperties"] = False
    if schema.get("nullable") and "type" in tight:
        tight["type"] = [tight["type"], "null"]
    return tight


def _spell_pattern(pattern: str) -> str:
    """An RE2 pattern as Python spells it: inline flags stand first, the end of the text is an upper-case Z."""
    flags = "".join(re.findall(r"\(\?([ims]+)\)", pattern))
    return (f"(?{flags})" if flags else "") + re.sub(r"\(\?[ims]+\)", "", pattern).replace(r"\z", r"\Z")


def _drop_nulls(value: Any) -> Any:
    """The server drops fields that are null before it validates."""
    if isinstance(value, dict):
        return {key: _drop_nulls(part) for key, part in value.items() if part is not None}
    return [_drop_nulls(part) for part in value] if isinstance(value, list) else value
