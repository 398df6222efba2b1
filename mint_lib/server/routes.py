"""The routes: KServe's V1 and V2 handlers, OpenAI's, health, metrics and the page, and no others.

Goes in: the data plane, the answerer and what is shown. Comes out: a FastAPI application that holds nothing global. It
relies on the layers around it: every request here is authorised and its body strictly read. Importing this module
imports KServe, which reads the process's arguments: `app.import_kserve` must be around it.
"""

import secrets
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.rest.v1_endpoints import V1Endpoints
from kserve.protocol.rest.v2_endpoints import V2Endpoints
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from mint_lib import __version__
from mint_lib.errors import InvalidInput, MintError
from mint_lib.server.answers import Answerer
from mint_lib.server.calls import current_call
from mint_lib.server.http_errors import describe_error, describe_validation, render_problem
from mint_lib.server.kserve_dataplane import KSERVE_ERRORS, translate_kserve_error
from mint_lib.server.kserve_model import PredictRequest
from mint_lib.server.lifecycle import Readiness
from mint_lib.server.metrics import ServingMetrics
from mint_lib.server.openai_routes import make_openai_router
from mint_lib.server.openapi import build_document

_PAGE_POLICY = (
    "default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src 'self'; "
    "img-src 'self' data: blob:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)


def make_routes(
    dataplane: DataPlane,
    answerer: Answerer,
    *,
    metrics: ServingMetrics,
    readiness: Readiness,
    page: str | None,
) -> FastAPI:
    """The routes of `calls.ROUTES` and no others: KServe's handlers, OpenAI's, health, metrics, the page."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    document = build_document(
        version=__version__, request_bodies={"PredictRequest": PredictRequest}, has_page=page is not None
    )

    async def show_page() -> Response:
        if page is None:
            return JSONResponse({"status": "alive"})
        nonce = secrets.token_urlsafe(16)
        headers = {
            "content-security-policy": _PAGE_POLICY.format(nonce=nonce),
            "referrer-policy": "no-referrer",
            "cross-origin-opener-policy": "same-origin",
        }
        return Response(page.replace("{{nonce}}", nonce), media_type="text/html", headers=headers)

    async def show_health() -> Response:
        return JSONResponse({"status": "alive"})

    async def show_readiness() -> Response:
        readiness.check()
        return JSONResponse({"status": "ready"})

    async def show_metrics(request: Request) -> Response:
        body, content_type = metrics.render(request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    async def show_document() -> Response:
        return JSONResponse(document)

    v1, v2 = V1Endpoints(dataplane), V2Endpoints(dataplane)
    handlers: dict[str, Callable[..., Awaitable[Any]]] = {
        "/": show_page,
        "/healthz": show_health,
        "/readyz": show_readiness,
        "/metrics": show_metrics,
        "/openapi.json": show_document,
        "/v1/models": v1.models,
        "/v1/models/{model_name}": v1.model_ready,
        "/v2": v2.metadata,
        "/v2/health/live": v2.live,
        "/v2/health/ready": v2.ready,
        "/v2/models": v2.models,
        "/v2/models/{model_name}": v2.model_metadata,
        "/v2/models/{model_name}/ready": v2.model_ready,
    }
    app.add_api_route("/v1/models/{model_name}:predict", v1.predict, methods=["POST"], response_model=None)
    app.add_api_route("/v2/models/{model_name}/infer", v2.infer, methods=["POST"], response_model=None)
    for path, handler in handlers.items():
        app.add_api_route(path, handler, methods=["GET"], response_model=None)
    app.include_router(make_openai_router(answerer))
    _add_error_handlers(app)
    return app


def _add_error_handlers(app: FastAPI) -> None:
    """Every error of a handler becomes an answer of the one table."""

    async def answer(request: Request, error: Exception) -> Response:
        problem = describe_error(error)
        call = current_call()
        call.problem = problem.code
        headers, body = render_problem(problem, path=request.scope["path"], request_id=call.request_id)
        response = Response(body, status_code=problem.status)
        response.raw_headers = headers
        return response

    async def answer_kserve(request: Request, error: Exception) -> Response:
        return await answer(request, translate_kserve_error(error))

    async def answer_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return await answer(request, describe_validation(list(error.errors())))

    async def answer_routing(request: Request, error: Exception) -> Response:
        # Only FastAPI's own reading of a body gets here: unknown routes and methods were refused by a layer outside.
        return await answer(request, InvalidInput("The body cannot be read. Send JSON as /openapi.json says."))

    app.add_exception_handler(MintError, answer)
    app.add_exception_handler(RequestValidationError, answer_validation)
    app.add_exception_handler(HTTPException, answer_routing)
    for kind in KSERVE_ERRORS:
        app.add_exception_handler(kind, answer_kserve)
    app.add_exception_handler(Exception, answer)
