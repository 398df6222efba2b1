"""A student as KServe sees it: a model that is asked by KServe's own V1 and V2 handlers.

Goes in: V1 bodies and V2 tensors. Comes out: ranked labels in the same two protocols. Importing this module imports
KServe, which reads the process's arguments: `app.import_kserve` must have run before.
"""

from typing import Annotated, Any, Self

from kserve import InferOutput, InferRequest, InferResponse, Model
from kserve.protocol.infer_type import InferInput
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mint_lib.errors import InvalidInput
from mint_lib.server.answers import Answerer, Case, Ranking
from mint_lib.server.calls import current_call
from mint_lib.server.http_errors import BadField, Refusal, describe_error, describe_validation
from mint_lib.server.images import read_base64
from mint_lib.server.lifecycle import Readiness
from mint_lib.server.students import ServedStudent

_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)
_TOP_K = 5
_MAX_TOP_K = 1000


class EncodedImage(BaseModel):
    """An image of an instance."""

    model_config = _STRICT

    b64: str
    """PNG, JPEG or WebP in base64."""


class Instance(BaseModel):
    """One case: a text for a student that reads text, an image for one that reads images."""

    model_config = ConfigDict(**_STRICT, json_schema_extra={"anyOf": [{"required": ["text"]}, {"required": ["image"]}]})

    text: str = ""
    """The case's text, as it stands in a note."""
    image: EncodedImage | None = None
    """The case's image. The student asks about it in words of its own, so that no text may stand beside it."""

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if not self.model_fields_set & {"text", "image"}:
            raise ValueError("a case needs a text or an image")
        return self


class PredictParameters(BaseModel):
    """What a client may choose."""

    model_config = _STRICT

    top_k: Annotated[int, Field(ge=1, le=_MAX_TOP_K)] = _TOP_K
    """How many labels to give."""


class PredictRequest(BaseModel):
    """Body of POST /v1/models/{model_name}:predict."""

    model_config = _STRICT

    instances: Annotated[list[Instance], Field(min_length=1)]
    parameters: PredictParameters = PredictParameters()


class StudentModel(Model):
    """One served name. Which version answers is asked for each request, so that versions can be swapped."""

    def __init__(self, name: str, *, answerer: Answerer, readiness: Readiness):
        super().__init__(name)
        self._answerer = answerer
        self._readiness = readiness
        self.ready = True

    async def healthy(self) -> bool:
        """Whether load balancers should send requests for it."""
        return self._readiness.is_ready

    async def predict(
        self, payload: dict[str, Any] | InferRequest, headers: dict[str, str] | None = None
    ) -> dict[str, Any] | InferResponse:
        """The rankings for the cases of a request: all of them, or an error that names the first bad one."""
        student = await self._answerer.take(self.name)
        if isinstance(payload, InferRequest):
            cases, top_k = self._read_tensors(payload)
            rankings = await self._rank(student, cases, top_k)
            return write_tensors(student, rankings, payload)
        try:
            request = PredictRequest.model_validate(payload)
        except ValidationError as error:
            raise describe_validation(error.errors()) from None
        cases = [
            self._read_case(index, instance.text, instance.image.b64 if instance.image else None)
            for index, instance in enumerate(self._check_count(request.instances))
        ]
        rankings = await self._rank(student, cases, request.parameters.top_k)
        return {"predictions": [describe_ranking(ranking) for ranking in rankings], "model": describe_student(student)}

    async def _rank(self, student: ServedStudent, cases: list[Case], top_k: int) -> list[Ranking]:
        prompts = []
        for index, case in enumerate(cases):
            try:
                prompts.append(await self._answerer.encode_case(student, case))
            except InvalidInput as error:
                raise _at(index, error) from None
        return await self._answerer.rank(student, prompts, top_k=top_k)

    def _read_case(self, index: int, text: str | None, image: str | None) -> Case:
        try:
            return Case(text, read_base64(image, self._answerer.limits) if image is not None else None)
        except InvalidInput as error:
            raise _at(index, error) from None

    def _read_tensors(self, request: InferRequest) -> tuple[list[Case], int]:
        """Cases and top_k of a V2 request: a BYTES tensor `text` [n], or `image` [n] in base64."""
        try:
            parameters = PredictParameters.model_validate(request.parameters or {})
        except ValidationError as error:
            found = describe_validation(error.errors())
            raise BadField(str(found), f"parameters.{found.field}") from None
        tensors: dict[str, list[str]] = {}
        for tensor in request.inputs:
            if tensor.name not in ("text", "image") or tensor.name in tensors:
                raise BadField("The inputs are a tensor `text` or a tensor `image`, each at most once.", "inputs")
            tensors[tensor.name] = self._check_count(_read_strings(tensor))
        if not tensors:
            raise BadField("There is no tensor. Send `text` or `image` as BYTES with shape [n].", "inputs")
        if len({len(data) for data in tensors.values()}) > 1:
            raise BadField("The tensors `text` and `image` differ in length. Send one of each for each case.", "inputs")
        names = {output.name for output in request.request_outputs or ()}
        if not names <= set(_OUTPUTS):
            raise BadField(f"The outputs are {', '.join(_OUTPUTS)}. Leave `outputs` out for all of them.", "outputs")
        num_cases = len(next(iter(tensors.values())))
        texts: list[str] | list[None] = tensors.get("text") or [None] * num_cases
        images: list[str] | list[None] = tensors.get("image") or [None] * num_cases
        cases = [
            self._read_case(index, text, image) for index, (text, image) in enumerate(zip(texts, images, strict=True))
        ]
        return cases, parameters.top_k

    def _check_count(self, items: list[Any]) -> list[Any]:
        most = self._answerer.limits.max_instances
        if not 1 <= len(items) <= most:
            raise InvalidInput(f"The request holds {len(items)} cases; 1 to {most} are answered at once. Send fewer.")
        return items

    def get_input_types(self) -> list[dict[str, Any]]:
        """Metadata of the V2 inputs."""
        with self._answerer.lineup.lease(self.name) as student:
            return [{"name": student.modality, "datatype": "BYTES", "shape": [-1]}]

    def get_output_types(self) -> list[dict[str, Any]]:
        """Metadata of the V2 outputs."""
        return [
            {"name": name, "datatype": datatype, "shape": [-1] if name == "abstained" else [-1, -1]}
            for name, datatype in _OUTPUTS.items()
        ]


_OUTPUTS = {"label_id": "BYTES", "label_name": "BYTES", "probability": "FP64", "abstained": "BOOL"}


def _at(index: int, error: InvalidInput) -> Refusal:
    """`error` with the place of the case that has it."""
    return Refusal(400, describe_error(error).code, f"Case {index}: {error}", param=f"instances.{index}")


def _read_strings(tensor: InferInput) -> list[str]:
    """The strings of a BYTES tensor [n]."""
    data = tensor.data
    if tensor.datatype != "BYTES" or list(tensor.shape) != [len(data)] or not all(isinstance(x, str) for x in data):
        raise BadField(f"The tensor `{tensor.name}` must be BYTES with shape [n] and n strings as data.", "inputs")
    return list(data)


def describe_ranking(ranking: Ranking) -> dict[str, Any]:
    """One prediction of a V1 answer."""
    return {
        "labels": [{"id": label.id, "name": label.name, "probability": label.probability} for label in ranking.labels],
        "abstained": ranking.abstained,
        "exact": ranking.is_exact,
        "proven": ranking.num_proven,
        "calibrated": ranking.is_calibrated,
        "prompt_tokens": ranking.num_prompt_tokens,
        "cached_tokens": ranking.num_cached_tokens,
    }


def describe_student(student: ServedStudent) -> dict[str, Any]:
    """What every answer says of the student that gave it."""
    return {
        "name": student.name,
        "reference": str(student.reference),
        "intended_use": student.intended_use,
        "limits": list(student.limits),
        "precision": student.precision,
    }


def write_tensors(student: ServedStudent, rankings: list[Ranking], request: InferRequest) -> InferResponse:
    """A V2 answer: row-major tensors [n, k], k being the shortest of the rankings."""
    num_labels = min(len(ranking.labels) for ranking in rankings)
    shape = [len(rankings), num_labels]
    rows = [label for ranking in rankings for label in ranking.labels[:num_labels]]
    return InferResponse(
        response_id=request.id or current_call().request_id,
        model_name=student.name,
        infer_outputs=[
            InferOutput("label_id", shape, "BYTES", data=[label.id for label in rows]),
            InferOutput("label_name", shape, "BYTES", data=[label.name for label in rows]),
            InferOutput("probability", shape, "FP64", data=[label.probability for label in rows]),
            InferOutput("abstained", shape[:1], "BOOL", data=[ranking.abstained for ranking in rankings]),
        ],
        parameters={
            "reference": str(student.reference),
            "intended_use": student.intended_use,
            "precision": student.precision,
            "exact": all(ranking.is_exact for ranking in rankings),
            "calibrated": all(ranking.is_calibrated for ranking in rankings),
        },
        requested_outputs=request.request_outputs,
    )
