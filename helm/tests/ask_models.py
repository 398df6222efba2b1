"""Asks every model of a release whether it answers: the program of the chart's `helm test` pod.

Goes in: MINT_TEST_MODELS, a JSON object of model name to server address, MINT_TEST_SECONDS, and MINT_TEST_TOKEN where
there is one. Comes out: exit code 0 if each server says that it is ready and, asked with the token, ranks labels for a
made-up case. Standard library only: it runs in the server's image.
"""

import json
import logging
import os
import sys
import time
import urllib.error
import urllib.request

CASE = "A boy of 4 years with short stature, pulmonary stenosis and a webbed neck."
logger = logging.getLogger("ask_models")


def wait_until_ready(url: str, *, deadline: float) -> None:
    """Return as soon as the server at `url` says that it is ready.

    Raises:
        RuntimeError: it did not until `deadline`, a time of the monotonic clock.
    """
    answer = "nothing"
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=5):  # noqa: S310 - an address that the chart made
                return
        except urllib.error.HTTPError as error:
            answer = f"status {error.code}"
        except OSError as error:
            answer = str(error)
        time.sleep(2)
    raise RuntimeError(
        f"{url}/readyz did not say that it is ready in time; it said last: {answer}. "
        "See `kubectl describe inferenceservice` and the logs of its pods."
    )


def rank_labels(url: str, name: str, *, token: str, seconds: float) -> int:
    """How many labels the model `name` ranked for a made-up case.

    Raises:
        RuntimeError: the server refused, or its answer holds no labels.
    """
    body = json.dumps({"instances": [{"text": CASE}], "parameters": {"top_k": 3}}).encode()
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/models/{name}:predict", data=body, headers=headers)  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=seconds) as response:  # noqa: S310
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{name} answered with status {error.code}: {error.read(300)!r}") from None
    labels = answer["predictions"][0]["labels"]
    if not labels:
        raise RuntimeError(f"{name} ranked no labels")
    return len(labels)


def main() -> int:
    """Ask all models; the number of those that did not answer."""
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
    models: dict[str, str] = json.loads(os.environ["MINT_TEST_MODELS"])
    seconds = float(os.environ["MINT_TEST_SECONDS"])
    token = os.environ.get("MINT_TEST_TOKEN", "").strip()
    if not token:
        logger.info("There is no token, so only readiness is asked.")
    num_failed = 0
    deadline = time.monotonic() + seconds
    for name, url in models.items():
        try:
            wait_until_ready(url, deadline=deadline)
            num_labels = rank_labels(url, name, token=token, seconds=seconds) if token else 0
        except (RuntimeError, OSError, ValueError, KeyError, IndexError, TypeError) as error:
            num_failed += 1
            logger.error("%s: %s", name, error)
        else:
            logger.info("%s: ready%s", name, f", ranked {num_labels} labels" if token else "")
    return num_failed


if __name__ == "__main__":
    sys.exit(min(main(), 1))
