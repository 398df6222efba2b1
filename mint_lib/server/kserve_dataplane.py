"""KServe's registry and data plane over the lineup of students, and KServe's errors in our words.

Goes in: names, bodies and tensors from KServe's V1 and V2 handlers. Comes out: the models that the caller may ask.
Importing this module imports KServe, which reads the process's arguments: `app.import_kserve` must be around it.
"""

import json
from typing import Any

from kserve import InferRequest, InferResponse, ModelRepository
from kserve.errors import InvalidInput as KServeInvalidInput
from kserve.errors import ModelNotReady, ServerNotReady
from kserve.protocol.dataplane import DataPlane

from mint_lib.errors import Draining, InvalidInput, MintError, NotFound
from mint_lib.server.answers import Answerer
from mint_lib.server.http_errors import Refusal
from mint_lib.server.kserve_model import StudentModel
from mint_lib.server.lifecycle import Readiness


class StudentRepository(ModelRepository):
    """KServe's registry as a view of the lineup, showing each caller the models that it may ask."""

    def __init__(self, *, answerer: Answerer, readiness: Readiness):
        super().__init__()
        self._answerer = answerer
        self._readiness = readiness

    def get_models(self) -> dict[str, StudentModel]:
        """Models by name."""
        return {name: self._make(name) for name in self._answerer.names()}

    def get_model(self, name: str) -> StudentModel:
        """The model called `name`; refuses a name that the caller may not ask or nobody has."""
        self._answerer.check_name(name)
        return self._make(name)

    def _make(self, name: str) -> StudentModel:
        return StudentModel(name, answerer=self._answerer, readiness=self._readiness)

    def unload(self, name: str) -> None:
        """KServe unloads at its end; students are freed by whoever loaded them."""


class StudentDataPlane(DataPlane):
    """KServe's data plane without cloud events, binary tensors and a predictor elsewhere."""

    def __init__(self, registry: StudentRepository, *, readiness: Readiness):
        super().__init__(registry)
        self._readiness = readiness

    def metadata(self) -> dict[str, Any]:
        """Name and version. No extension: models cannot be loaded or unloaded by request."""
        return {**super().metadata(), "extensions": []}

    async def ready(self) -> bool:
        """Whether load balancers should send requests."""
        self._readiness.check()
        return True

    async def model_ready(self, model_name: str, disable_predictor_health_check: bool = False) -> bool:
        """Whether a model is ready. KServe sets the flag for requests, which are answered while draining too."""
        self.model_registry.get_model(model_name)
        if not disable_predictor_health_check:
            self._readiness.check()
        return True

    async def get_model(self, name: str) -> StudentModel:
        """The model called `name`."""
        return self.model_registry.get_model(name)

    def decode(
        self, body: Any, headers: Any, protocol_version: str = "v1", model_name: str | None = None
    ) -> tuple[dict[str, Any] | InferRequest, dict[str, Any]]:
        """A V1 body, which is JSON by now, or the tensors of a V2 body."""
        if isinstance(body, bytes):
            return json.loads(body), {}
        return InferRequest.from_inference_request(body, model_name), {}

    def encode(
        self, model_name: str, response: Any, headers: Any, req_attributes: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """An answer as JSON."""
        if isinstance(response, InferResponse):
            response, _ = response.to_rest()
        return response, {}


def translate_kserve_error(error: Exception) -> MintError:
    """An error of KServe's own code, whose words may quote a request, in ours."""
    if isinstance(error, KServeInvalidInput):
        return InvalidInput("The tensors are not acceptable. /openapi.json says which are.")
    if isinstance(error, ModelNotReady | ServerNotReady):
        return Draining("The model is not ready. Ask again later.")
    if isinstance(error, NotImplementedError):
        return NotFound("There is no such route.")
    return Refusal(500, "internal_error", "The server made a mistake. Report the request's id.")


KSERVE_ERRORS = (KServeInvalidInput, ModelNotReady, ServerNotReady, NotImplementedError)
