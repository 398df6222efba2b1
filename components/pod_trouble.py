"""What keeps a pod from running, in words.

Goes in: a pod as the API server gives it. Comes out: troubles, each with whether it may pass by itself. Asks nothing.
"""

from typing import Any, NamedTuple

_LASTING = {
    "ErrImagePull": "its image cannot be pulled. See the image's name and the pull secrets in the cluster file",
    "ImagePullBackOff": "its image cannot be pulled. See the image's name and the pull secrets in the cluster file",
    "InvalidImageName": "the image's name is not valid. See `images` in the cluster file",
    "ErrImageNeverPull": "its image is not on the node, and pulling is forbidden",
    "CreateContainerConfigError": "a secret or config map that it names is missing, or its user is not allowed",
    "CreateContainerError": "the container cannot be made",
    "RunContainerError": "the container cannot be started",
    "CrashLoopBackOff": "its container ends again and again. See its log",
}


class Trouble(NamedTuple):
    """Why a pod does not run."""

    text: str
    passes: bool
    """It may pass by itself, as when a node is added."""


def describe_trouble(pod: dict[str, Any]) -> list[Trouble]:
    """Why `pod` does not run; empty if it does, or is on its way."""
    status = pod.get("status", {})
    role = pod["metadata"].get("labels", {}).get("app.kubernetes.io/component", "pod")
    troubles = [
        Trouble(f"{role}: no node takes it: {_shorten(condition.get('message', ''))}", True)
        for condition in status.get("conditions", [])
        if condition["type"] == "PodScheduled" and condition["status"] == "False"
    ]
    if status.get("reason") == "Evicted":
        troubles.append(Trouble(f"{role}: evicted from its node: {_shorten(status.get('message', ''))}", True))
    for container in [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]:
        waiting = container.get("state", {}).get("waiting", {})
        if waiting.get("reason") in _LASTING:
            said = f" ({_shorten(waiting['message'])})" if waiting.get("message") else ""
            troubles.append(Trouble(f"{role}: {waiting['reason']}: {_LASTING[waiting['reason']]}{said}", False))
        ends = [container.get(key, {}).get("terminated", {}) for key in ("state", "lastState")]
        if any(end.get("reason") == "OOMKilled" for end in ends):
            text = f"{role}: killed for memory. Give it more: memory_gib, and shared_memory_gib counts into it"
            troubles.append(Trouble(text, True))
    return troubles


def _shorten(text: str) -> str:
    return " ".join(text.split())[:200]
