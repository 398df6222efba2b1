"""What `mint serve` does around the serving stage: a token for this machine, and words on how to ask.

Goes in: references and where to listen. Comes out: a running server, and `.mint/serve/` with what `mint ask` needs: the
address and a token that only this account can read.
"""

import os
import pathlib
import secrets
import sys

import yaml
from rich.console import Console

from mint_lib.cluster import load_cluster
from mint_lib.errors import InvalidInput
from mint_lib.inference_service import render_inference_service, render_vllm
from mint_lib.server.access import AccessConfig, TokensFile, issue_token
from mint_lib.server.stored_student import read_student
from mint_lib.server.students import ServedStudent
from mint_lib.serving import Endpoint, ServingConfig, name_models, serve_models
from mint_lib.store import Store
from pipelines.ask import Connection
from pipelines.stores import LOCAL_FOLDER

SERVE_FOLDER = LOCAL_FOLDER / "serve"
CONNECTION = SERVE_FOLDER / "connection.json"


def serve_here(
    references: list[str],
    *,
    store: Store,
    config: ServingConfig,
    has_page: bool,
    console: Console,
    host: str = "127.0.0.1",
    port: int = 8080,
    tokens: pathlib.Path | None = None,
) -> None:
    """Serve until a signal; prints how to ask as soon as the models answer. Raises as `serve_models` does."""
    models = name_models(references)
    token_file = None
    if tokens is None:
        tokens, token_file = _make_token()
    console.print(f"loading {', '.join(references)} from {store.location}", highlight=False, soft_wrap=True)

    def tell_ready(url: str, students: list[ServedStudent]) -> None:
        write_private(
            CONNECTION, Connection(url=url, token_file=token_file, models=tuple(models)).model_dump_json().encode()
        )
        print_usage(url, students, token_file=token_file, has_page=has_page, console=console)

    try:
        serve_models(
            config,
            store=store,
            models=models,
            endpoint=Endpoint(AccessConfig(tokens_file=tokens), host, port, has_page),
            tell_ready=tell_ready,
        )
    finally:
        CONNECTION.unlink(missing_ok=True)


def print_usage(
    url: str, students: list[ServedStudent], *, token_file: pathlib.Path | None, has_page: bool, console: Console
) -> None:
    """Where the server is, what it serves, and one line for each way to ask."""

    def line(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    for student in students:
        line(f"{student.name}: {student.reference} ({student.precision}, loaded in {student.load_seconds:.1f} s)")
    name = students[0].name
    token = f"$(cat {token_file})" if token_file else "$TOKEN"
    line(f"\nReady at {url}; Ctrl+C stops it.")
    if has_page:
        line(f"  page    {url}/" + (f"#token={token_file.read_text()}" if token_file else ""))
    is_seeing = students[0].modality == "image"
    question = "--image tile.png" if is_seeing else '"A boy of 4 years with short stature and a webbed neck."'
    if token_file:
        line(f"  ask     mint ask {question}  (token in {token_file})")
    line(f"""  curl    curl {url}/v1/models/{name}:predict -H "Authorization: Bearer {token}" \\""")
    case = """{"image": {"b64": "'$(base64 -w0 tile.png)'"}}""" if is_seeing else '{"text": "A boy of 4 years ..."}'
    line(f"""            -H 'Content-Type: application/json' -d '{{"instances": [{case}]}}'""")
    line(f'  openai  OpenAI(base_url="{url}/openai/v1", api_key="{token}")')


def print_service(references: list[str], *, store: Store, cluster: pathlib.Path | None, is_vllm: bool) -> None:
    """Print the object that makes a cluster serve one model: ours, or KServe's vLLM runtime with the adapter.

    Raises:
        InvalidInput: there are several references or no cluster file, or a value of it is not allowed.
    """
    if len(references) != 1 or cluster is None:
        raise InvalidInput(
            "--render makes one object: give one reference, and --cluster with a YAML file of namespace, images (with "
            "their digests) and s3 at least; see README."
        )
    [(name, text)] = name_models(references).items()
    reference = store.resolve(text)
    values = load_cluster(cluster)
    if is_vllm:
        facts = read_student(store, reference).facts
        if facts.student.reads == "image":
            raise InvalidInput(f"{reference} is an image student, which is not served by vLLM here.")
        rank = None
        if facts.tuning == "adapter":
            if facts.lora.get("update", "additive") != "additive":
                raise InvalidInput(
                    f"{reference} has a weight-decomposed adapter (DoRA), which is not served by vLLM here."
                )
            rank = int(str(facts.lora["rank"]))
        document = render_vllm(reference, cluster=values, name=name, student=facts.student, lora_rank=rank)
    else:
        document = render_inference_service(reference, cluster=values, name=name)
    sys.stdout.write(yaml.safe_dump(document, sort_keys=False, width=1000))


def _make_token() -> tuple[pathlib.Path, pathlib.Path]:
    """A tokens file with one token, made once in this folder, and the file that holds the token itself."""
    tokens, token_file = SERVE_FOLDER / "tokens.json", SERVE_FOLDER / "token"
    if tokens.exists() and token_file.exists():
        return tokens, token_file
    token, entry = issue_token("local")
    write_private(tokens, TokensFile(tokens=(entry,)).model_dump_json().encode())
    write_private(token_file, token.encode())
    return tokens, token_file


def write_private(path: pathlib.Path, data: bytes) -> None:
    """Write a file that only this account can read, whole or not at all."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
    part.replace(path)
