"""Answers that were paid for once, on disk, so that a run that is repeated asks only what is missing.

Goes in: the digest of a question and its reply. Comes out: that reply, for the same question of the same endpoint. An
entry appears whole or not at all; one that is damaged is as if it were not there. Entries hold what the model answered,
which may repeat a case: only their owner may read them.
"""

import json
import os
import pathlib
import tempfile

from pydantic import ValidationError

from mint_lib.chat.questions import Reply, digest_json


class ReplyCache:
    """Replies under a folder, by digest."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder

    def get(self, key: str) -> Reply | None:
        """The reply kept under `key`, a `sha256:...`; none where there is none, or a damaged one."""
        try:
            entry = json.loads(self._path(key).read_bytes())
            if (
                not isinstance(entry, dict)
                or entry.get("key") != key
                or entry.get("digest") != digest_json(entry["reply"])
            ):
                return None
            return Reply.model_validate(entry["reply"])
        except (OSError, ValueError, KeyError, ValidationError):
            return None

    def put(self, key: str, reply: Reply) -> None:
        """Keep `reply` under `key`."""
        path = self._path(key)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        content = reply.model_dump(mode="json")
        entry = json.dumps({"key": key, "digest": digest_json(content), "reply": content}, indent=1)
        handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=".")  # only the owner may read it
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(entry)
            os.replace(scratch, path)
        except BaseException:
            pathlib.Path(scratch).unlink(missing_ok=True)
            raise

    def _path(self, key: str) -> pathlib.Path:
        digest = key.removeprefix("sha256:")
        return self._folder / digest[:2] / f"{digest}.json"
