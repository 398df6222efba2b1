"""Asks a running model server about one case, as `mint ask` does.

Goes in: a text, an image or both, and where the server is. Comes out: the server's answer, or its refusal in words. The
case goes into the request's body and nowhere else.
"""

import base64
import json
import pathlib
import urllib.error
import urllib.parse
import urllib.request
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table

from mint_lib.errors import InvalidInput, MintError

_TIMEOUT_SECONDS = 120.0
_BAR_CELLS = 24


class ServerRefused(MintError):
    """The model server did not answer the question."""


class Connection(BaseModel):
    """Where a server is and how to enter: what `mint serve` leaves for `mint ask` on the same machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    token_file: pathlib.Path | None
    models: tuple[str, ...]


class Question(NamedTuple):
    """One case."""

    text: str | None
    image: pathlib.Path | None
    top_k: int


def read_connection(path: pathlib.Path) -> Connection:
    """What the last `mint serve` in this folder wrote.

    Raises:
        InvalidInput: there is none.
    """
    try:
        return Connection.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        raise InvalidInput(
            f"{path} names no running server. Start one with `mint serve model/<name>`, or give --url and --token-file."
        ) from None


def ask_server(connection: Connection, model: str | None, question: Question) -> dict[str, Any]:
    """The answer of `model` (None: the only one served) as V1 `:predict` gives it.

    Raises:
        InvalidInput: the question is empty, a file cannot be read, or several models are served and none was named.
        ServerRefused: no server answers there, or it refused; the message is its own.
    """
    instance: dict[str, Any] = {}
    if question.text and question.text.strip():
        instance["text"] = question.text
    if question.image is not None:
        instance["image"] = {"b64": base64.b64encode(_read_file(question.image)).decode()}
    if not instance:
        raise InvalidInput("There is nothing to ask about. Give the case's text, - to read it from stdin, or --image.")
    name = model or _choose_model(connection)
    body = {"instances": [instance], "parameters": {"top_k": question.top_k}}
    return _send(connection, f"/v1/models/{name}:predict", body)


def print_answer(answer: dict[str, Any], console: Console) -> None:
    """The ranked labels with their probabilities, and what a reader must know about the model."""
    prediction, model = answer["predictions"][0], answer["model"]
    table = Table("", "label", "id", "probability", "", box=None)
    for rank, label in enumerate(prediction["labels"], start=1):
        share = float(label["probability"])
        bar = "█" * round(share * _BAR_CELLS)
        table.add_row(str(rank), str(label["name"]), str(label["id"]), f"{100 * share:.1f} %", bar)
    console.print(table)
    if prediction["abstained"]:
        console.print("It abstains: its first label is less probable than the server's threshold.")
    if not prediction["calibrated"]:
        console.print("The probabilities are not calibrated: this model has no calibration.")
    if not prediction["exact"]:
        console.print("Too many labels to score whole: the first places are proven, the rest is bounded.")
    console.print(f"[dim]{model['reference']}", highlight=False, soft_wrap=True)
    for sentence in (model["intended_use"], *model["limits"]):
        console.print(f"[dim]{sentence}", highlight=False, soft_wrap=True)


def _choose_model(connection: Connection) -> str:
    models = connection.models or tuple(_send(connection, "/v1/models", None)["models"])
    if len(models) != 1:
        raise InvalidInput(f"{len(models)} models are served: {', '.join(models)}. Choose one with --model.")
    return str(models[0])


def _send(connection: Connection, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
    if not connection.url.startswith(("http://", "https://")):
        raise InvalidInput(f"{connection.url!r} is not the address of a server. Write http://host:port.")
    headers = {"Content-Type": "application/json"}
    if connection.token_file is not None:
        headers["Authorization"] = f"Bearer {_read_file(connection.token_file).decode().strip()}"
    request = urllib.request.Request(  # noqa: S310 - the scheme was checked above
        connection.url.rstrip("/") + urllib.parse.quote(path, safe="/:"),
        data=json.dumps(body).encode() if body is not None else None,
        headers=headers,
    )
    # A proxy of the environment would see the case.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_TIMEOUT_SECONDS) as reply:
            answer: dict[str, Any] = json.load(reply)
            return answer
    except urllib.error.HTTPError as error:
        raise ServerRefused(_explain_refusal(error)) from None
    except (OSError, ValueError) as error:
        raise ServerRefused(
            f"No server answers at {connection.url} ({type(error).__name__}). Start one with `mint serve`."
        ) from None


def _explain_refusal(error: urllib.error.HTTPError) -> str:
    try:
        words = str(json.load(error)["error"])
    except (ValueError, KeyError, TypeError):
        words = str(error.reason)
    wait = error.headers.get("Retry-After")
    again = f" Try again in {wait} s." if wait else ""
    return f"{error.code}: {words}{again} (request {error.headers.get('x-request-id', 'without an id')})"


def _read_file(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read ({error.strerror}).") from None
