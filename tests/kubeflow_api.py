"""A double of Kubeflow Pipelines' API (v2beta1) over real HTTP: keeps what it takes, and takes only what is well typed.

A pipeline must parse as Kubeflow's own PipelineSpec, its Kubernetes part as KubernetesExecutorConfig; the fields of
every other object must be those of the generated client's models. With a token, requests without it are refused.
"""

import email
import email.policy
import http.server
import json
import threading
import urllib.parse
import uuid
from typing import Any

import kfp_server_api
import yaml
from google.protobuf import json_format
from kfp.kubernetes import kubernetes_executor_config_pb2
from kfp.pipeline_spec import pipeline_spec_pb2

_PREFIX = "/apis/v2beta1"
_SIMPLE = {"str": str, "bool": bool, "int": int, "datetime": str, "object": dict, "dict(str, object)": dict}


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status, self.message = status, message


class KubeflowDouble:
    """A running double. What it holds can be read, and what it answers next can be changed, by tests."""

    def __init__(self, *, token: str | None = None, multi_user: bool = False, path: str = "", tls: Any = None):
        self.token, self.multi_user, self.path = token, multi_user, path
        self.experiments: list[dict[str, Any]] = []
        self.pipelines: list[dict[str, Any]] = []
        self.versions: list[dict[str, Any]] = []
        self.runs: list[dict[str, Any]] = []
        self.recurring_runs: list[dict[str, Any]] = []
        self.refusals: dict[str, Refusal] = {}
        """Method and resource, for instance `POST runs`, to what is answered instead."""
        self.script: list[Any] = []
        """Answers to `GET runs/ID` in turn: a state with its tasks, or a Refusal; the last one stays."""
        self.page: bytes | None = None
        """A page that answers everything, as a login does."""
        double = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def _serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                try:
                    status, kind, answer = 200, "application/json", double._answer(self, body)
                except Refusal as refusal:
                    status, kind, answer = refusal.status, "application/json", {"message": refusal.message}
                if double.page is not None:
                    status, kind = 200, "text/html"
                data = double.page or json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_DELETE = _serve  # noqa: N815 - names of http.server

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        scheme = "https" if tls is not None else "http"
        self.url = f"{scheme}://127.0.0.1:{self._server.server_address[1]}{path}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def num_objects(self) -> int:
        return sum(map(len, (self.experiments, self.pipelines, self.versions, self.runs, self.recurring_runs)))

    def _answer(self, request: Any, body: bytes) -> Any:
        url = urllib.parse.urlsplit(request.path)
        if not url.path.startswith(self.path + _PREFIX):
            raise Refusal(404, "Not Found")
        parts = url.path.removeprefix(self.path + _PREFIX).strip("/").split("/")
        query = dict(urllib.parse.parse_qsl(url.query))
        if parts == ["healthz"]:
            return {"multi_user": self.multi_user}
        if self.token is not None and request.headers.get("Authorization") != f"Bearer {self.token}":
            raise Refusal(401, "Unauthorized: no valid bearer token")
        refusal = self.refusals.get(f"{request.command} {parts[0]}")
        if refusal is not None:
            raise refusal
        if parts[0] == "pipelines" and parts[1:] and parts[1] == "upload_version":
            return self._upload(request, body, query)
        method = getattr(self, f"_{request.command.lower()}_{parts[0]}")
        if request.command == "POST":
            return method(json.loads(body))
        return method(parts[1:], query)

    # Experiments
    def _get_experiments(self, parts: list[str], query: dict[str, str]) -> Any:
        self._check_namespace(query.get("namespace"))
        return self._page("experiments", [e for e in self.experiments if _matches(e, query)], query)

    def _post_experiments(self, body: dict[str, Any]) -> Any:
        self._check_namespace(body.get("namespace"))
        return self._keep(self.experiments, "V2beta1Experiment", "experiment_id", body)

    # Pipelines and their versions
    def _get_pipelines(self, parts: list[str], query: dict[str, str]) -> Any:
        if parts[1:] == ["versions"]:
            own = [v for v in self.versions if v["pipeline_id"] == parts[0]]
            return self._page("pipeline_versions", own, query)
        return self._page("pipelines", [p for p in self.pipelines if _matches(p, query)], query)

    def _post_pipelines(self, body: dict[str, Any]) -> Any:
        if any(p["display_name"] == body["display_name"] for p in self.pipelines):
            raise Refusal(409, "Already exist error")
        return self._keep(self.pipelines, "V2beta1Pipeline", "pipeline_id", body)

    def _upload(self, request: Any, body: bytes, query: dict[str, str]) -> Any:
        header = f"Content-Type: {request.headers['Content-Type']}\r\n\r\n".encode()
        message = email.message_from_bytes(header + body, policy=email.policy.HTTP)
        [part] = list(message.iter_parts())
        documents = list(yaml.safe_load_all(part.get_payload(decode=True)))
        check_pipeline(documents[0], documents[1] if documents[1:] else None)
        if not any(p["pipeline_id"] == query["pipelineid"] for p in self.pipelines):
            raise Refusal(404, "no such pipeline")
        if any(v["display_name"] == query["name"] for v in self.versions):
            raise Refusal(409, "Already exist error")
        values = {"pipeline_id": query["pipelineid"], "display_name": query["name"]}
        return self._keep(self.versions, "V2beta1PipelineVersion", "pipeline_version_id", values)

    # Runs
    def _post_runs(self, body: dict[str, Any]) -> Any:
        self._check_job(body)
        return self._keep(self.runs, "V2beta1Run", "run_id", body) | {"state": "PENDING"}

    def _get_runs(self, parts: list[str], query: dict[str, str]) -> Any:
        run = next(r for r in self.runs if r["run_id"] == parts[0])
        answer = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(answer, Refusal):
            raise answer
        state, tasks = answer
        details = [
            {"display_name": name, "state": task, "create_time": f"2026-01-01T00:00:{number:02d}Z"}
            for number, (name, task) in enumerate(tasks)
        ]
        return run | {"state": state, "run_details": {"task_details": details}}

    # Schedules
    def _get_recurringruns(self, parts: list[str], query: dict[str, str]) -> Any:
        self._check_namespace(query.get("namespace"))
        return self._page("recurringRuns", self.recurring_runs, query)

    def _post_recurringruns(self, body: dict[str, Any]) -> Any:
        self._check_job(body)
        if len(body["trigger"]["cron_schedule"]["cron"].split()) != 6:
            raise Refusal(400, "The cron expression has not 6 fields")
        # The server's field is a number; the client's model calls it text.
        checked = body | {"max_concurrency": str(body["max_concurrency"])}
        self._keep(self.recurring_runs, "V2beta1RecurringRun", "recurring_run_id", checked)
        return self.recurring_runs[-1]

    def _delete_recurringruns(self, parts: list[str], query: dict[str, str]) -> Any:
        self.recurring_runs[:] = [r for r in self.recurring_runs if r["recurring_run_id"] != parts[0]]
        return {}

    def _check_job(self, body: dict[str, Any]) -> None:
        if not any(e["experiment_id"] == body["experiment_id"] for e in self.experiments):
            raise Refusal(404, "no such experiment")
        reference, spec = body.get("pipeline_version_reference"), body.get("pipeline_spec")
        if (reference is None) == (spec is None):
            raise Refusal(400, "either a pipeline or a reference to a version")
        if spec is not None:
            check_pipeline(spec.get("pipeline_spec", spec), spec.get("platform_spec"))
        elif not any(
            (v["pipeline_id"], v["pipeline_version_id"]) == (reference["pipeline_id"], reference["pipeline_version_id"])
            for v in self.versions
        ):
            raise Refusal(404, "no such version")

    def _check_namespace(self, namespace: str | None) -> None:
        if self.multi_user and not namespace:
            raise Refusal(400, "Invalid input error: a namespace is needed in multi-user mode")
        if not self.multi_user and namespace:
            raise Refusal(400, "Invalid input error: in single-user mode there is no namespace")

    def _keep(self, items: list[dict[str, Any]], model: str, id_key: str, values: dict[str, Any]) -> dict[str, Any]:
        _check_fields(values, model)
        items.append(values | {id_key: str(uuid.uuid4())})
        return items[-1]

    def _page(self, key: str, items: list[Any], query: dict[str, str]) -> dict[str, Any]:
        """Two items a page, whatever was asked for: who reads one page only misses things."""
        start = int(query.get("page_token") or 0)
        page: dict[str, Any] = {key: items[start : start + 2]}
        return page | ({"next_page_token": str(start + 2)} if items[start + 2 :] else {})


def check_pipeline(pipeline: dict[str, Any], platform: dict[str, Any] | None) -> None:
    """Prove that a compiled pipeline is what Kubeflow's own messages describe. Raises Refusal with status 400."""
    try:
        json_format.ParseDict(pipeline, pipeline_spec_pb2.PipelineSpec())
        json_format.ParseDict(platform or {}, pipeline_spec_pb2.PlatformSpec())
        for settings in (platform or {}).get("platforms", {}).values():
            for executor in settings["deploymentSpec"]["executors"].values():
                json_format.ParseDict(executor, kubernetes_executor_config_pb2.KubernetesExecutorConfig())
    except (json_format.ParseError, KeyError) as error:
        raise Refusal(400, f"Invalid input error: {error}") from None


def _check_fields(values: dict[str, Any], model: str) -> None:
    types = getattr(kfp_server_api, model).openapi_types
    for key, value in values.items():
        if key not in types:
            raise Refusal(400, f"unknown field {key} of {model}")
        expected = types[key]
        if expected in _SIMPLE:
            if not isinstance(value, _SIMPLE[expected]):
                raise Refusal(400, f"{model}.{key} is {type(value).__name__}, want {expected}")
        elif isinstance(value, dict):
            _check_fields(value, expected)


def _matches(item: dict[str, Any], query: dict[str, str]) -> bool:
    if query.get("namespace") and item.get("namespace") != query["namespace"]:
        return False
    predicates = json.loads(query["filter"])["predicates"] if query.get("filter") else []
    return all(item[p["key"]] == p.get("stringValue", p.get("string_value")) for p in predicates)
