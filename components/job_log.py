"""The log of a Ray job, read from the pod that copies it: every line once, whatever is lost on the way.

Goes in: an `ApiServer` and, time after time, the pods that there are. Comes out: new lines, and the last error of ours
among them. A log is asked for from its last line's time on, so no connection stays open that could hang.
"""

import re
from collections.abc import Iterator
from typing import Any

from components.api_server import ApiServer, NoSuchObject, NotNow
from mint_lib import errors
from mint_lib.errors import MintError, StoreError

_CONTAINER = "ray-job-submitter"
_MAX_BYTES = 4 * 2**20
"""Of one answer; the rest comes with the next."""
_OWN_ERROR = re.compile(r"([A-Z][A-Za-z]+): (.+)")


class JobLog:
    """What the submitters of one job have said so far."""

    def __init__(self, api: ApiServer, namespace: str):
        self._api = api
        self._namespace = namespace
        self._pod = ""
        self._time = ""
        self._num_at_time = 0
        self._told: set[int] = set()
        self._is_repeating = False
        self.error: MintError | None = None
        """The last error of ours that the stage ended with."""

    @property
    def has_final_error(self) -> bool:
        """Whether the stage met an error that a new attempt would meet again."""
        return self.error is not None and not isinstance(self.error, StoreError)

    def forget(self) -> None:
        """Begin anew: the job is submitted once more."""
        self._told.clear()
        self.error = None

    def read_new_lines(self, pods: list[dict[str, Any]]) -> Iterator[str]:
        """Lines that were not read before, of the newest submitter among `pods`."""
        if not pods:
            return
        pod = max(pods, key=lambda item: item["metadata"].get("creationTimestamp", ""))["metadata"]["name"]
        if pod != self._pod:
            # A second submitter copies the same log from its beginning.
            self._pod, self._time, self._num_at_time, self._is_repeating = pod, "", 0, bool(self._told)
        for stamp, line in self._fetch():
            if stamp != self._time:
                self._time, self._num_at_time = stamp, 0
            self._num_at_time += 1
            self._is_repeating = self._is_repeating and hash(line) in self._told
            if not self._is_repeating:
                self._told.add(hash(line))
                self._note_error(line)
                yield line

    def _fetch(self) -> Iterator[tuple[str, str]]:
        query = {"container": _CONTAINER, "timestamps": "true", "limitBytes": str(_MAX_BYTES)}
        if self._time:
            query["sinceTime"] = self._time  # the server counts whole seconds, so older lines come again
        path = f"/api/v1/namespaces/{self._namespace}/pods/{self._pod}/log"
        try:
            data = self._api.request("GET", path, query=query)
        except (NoSuchObject, NotNow):  # gone, or not started yet
            return
        num_known, seen_time = self._num_at_time, self._time
        for row in data.decode(errors="replace").split("\n")[:-1]:  # what follows the last one is not a whole line
            stamp, _, line = row.partition(" ")
            if stamp < seen_time:  # the kubelet writes all of them with nine digits
                continue
            if stamp == seen_time and num_known:
                num_known -= 1
                continue
            yield stamp, line.rstrip("\r")

    def _note_error(self, line: str) -> None:
        match = _OWN_ERROR.fullmatch(line)
        kind = getattr(errors, match[1], None) if match else None
        if match and isinstance(kind, type) and issubclass(kind, MintError):
            self.error = kind(match[2])
