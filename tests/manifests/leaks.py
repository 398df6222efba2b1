"""Secrets by value, where only their names belong.

Goes in: rendered objects, or any other value of dictionaries, lists and strings. Comes out: findings. It knows what
keys look like, which variables hold one, and canaries that a test put into the environment.
"""

import re
from collections.abc import Iterable
from typing import Any

from manifests.objects import Finding, walk

_LOOKS_LIKE = {
    "an AWS key": r"\b(AKIA|ASIA)[0-9A-Z]{16}\b",
    "a hub token": r"\bhf_[A-Za-z0-9]{20,}\b",
    "a GitHub token": r"\bgh[pousr]_[A-Za-z0-9]{30,}\b",
    "a signed token": r"\beyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in an address": r"\b[a-z][a-z0-9+.-]*://[^/\s:@]+:[^/\s:@]+@",
    "a bearer token": r"\b[Bb]earer +[A-Za-z0-9._~+/-]{16,}",
}
_LOOKS_LIKE_ANY = re.compile("|".join(_LOOKS_LIKE.values()))
_SECRET_NAME = re.compile(r"(?i)(secret|password|passwd|credential|api_?key|access_?key|private_?key|(^|_)token$)")
_ALLOWED_VALUES = re.compile(r"/[^\s]*|true|false|\d{0,6}")
"""A file's path, a switch or a number is no secret."""


def find_leaks(value: Any, *, subject: str, canaries: Iterable[str] = ()) -> list[Finding]:
    """Strings that are a secret, look like one, or are given to a variable whose name says that it holds one."""
    found = []
    for path, part in walk(value):
        if isinstance(part, dict):
            name, text = part.get("name"), part.get("value")
            is_pair = isinstance(name, str) and isinstance(text, str)
            if is_pair and _SECRET_NAME.search(name) and not _ALLOWED_VALUES.fullmatch(text):
                found.append(Finding("secret-by-value", subject, path, f"{name} is given by value"))
            if any(isinstance(key, str) and canary in key for key in part for canary in canaries):
                found.append(Finding("secret-canary", subject, path, "a key holds a secret of the environment"))
        elif isinstance(part, str):
            if any(canary in part for canary in canaries):
                found.append(Finding("secret-canary", subject, path, "holds a secret of the environment"))
            if _LOOKS_LIKE_ANY.search(part):
                what = next(what for what, pattern in _LOOKS_LIKE.items() if re.search(pattern, part))
                found.append(Finding("secret-by-value", subject, path, f"looks like {what}"))
    return found


def find_secret_objects(manifest: dict[str, Any], *, subject: str) -> list[Finding]:
    """A rendered Secret with content, and a whole secret poured into the environment."""
    found = []
    if manifest.get("kind") == "Secret" and (manifest.get("data") or manifest.get("stringData")):
        found.append(Finding("secret-object", subject, "data", "a secret is made by the user, never rendered"))
    for path, part in walk(manifest):
        if isinstance(part, list) and path.endswith("envFrom"):
            for source in part:
                if "secretRef" in source:
                    words = "gives every key of the secret; name the one that is needed"
                    found.append(Finding("secret-whole", subject, path, words))
    return found
