"""Asking a student outside any client's request: to warm it, and to compare two loadings of one student.

Goes in: a served student and a case's text or image. Comes out: its ranking, once its numbers were found possible.
"""

import io
import math
import queue
import time
import uuid

from mint_lib.engine.requests import Event, Failed, Ranked, RankRequest
from mint_lib.errors import ComputationFailed, DeadlineExceeded
from mint_lib.server.students import ServedStudent

TENANT = "\0server"
"""Shares no prefix with a client: names of tenants hold no NUL."""
_SYNTHETIC_CASE = "A girl of 7 years with short stature and seizures."
_PICTURE_PIXELS = 64
_TOLERANCE = 1e-3
"""On sums of probabilities: float32 log-probabilities of thousands of labels add up to 1 within a few 1e-5."""


def rank_case(student: ServedStudent, case: str | bytes, *, timeout_seconds: float) -> Ranked:
    """The student's scores for a case's text, or its encoded image.

    Raises:
        PromptTooLong: the case does not fit the student's window.
        DeadlineExceeded: no answer came in time.
        ComputationFailed: the model failed, or its numbers are no probabilities.
    """
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    prompt = student.encode_case(case)
    request = RankRequest(
        request_id=uuid.uuid4().hex,
        tenant=TENANT,
        adapter=student.adapter,
        prompt_ids=prompt.ids,
        images=prompt.images,
        deadline=time.monotonic() + timeout_seconds,
        trie=student.trie,
    )
    ticket = student.engine.submit(request, events.put)
    while True:
        try:
            event = events.get(timeout=max(0.0, request.deadline - time.monotonic()) + 1.0)
        except queue.Empty:
            ticket.cancel()
            raise DeadlineExceeded(
                f"{student.reference} gave no answer within {timeout_seconds:g} s. Give it more time or more cores."
            ) from None
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Ranked):
            return check_ranking(event, student)


def warm_up(student: ServedStudent, *, timeout_seconds: float) -> Ranked:
    """The student's first answer, to a made-up case; a student that cannot give it must not be served."""
    case = _SYNTHETIC_CASE if student.modality == "text" else _draw_picture()
    return rank_case(student, case, timeout_seconds=timeout_seconds)


def _draw_picture() -> bytes:
    """A made-up picture, of two colours."""
    from PIL import Image

    image = Image.new("RGB", (_PICTURE_PIXELS, _PICTURE_PIXELS), (228, 190, 214))
    image.paste((94, 58, 135), (0, 0, _PICTURE_PIXELS // 2, _PICTURE_PIXELS // 2))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def check_ranking(ranked: Ranked, student: ServedStudent) -> Ranked:
    """`ranked` itself, if its numbers are the probabilities of the student's labels. Raises ComputationFailed."""
    values = ranked.log_probabilities
    total = sum(math.exp(value) for value in values if not math.isnan(value) and value < 1)
    is_possible = (
        len(values) == len(student.labels)
        and not any(math.isnan(value) or value > _TOLERANCE for value in values)
        and 1 - ranked.unreached_mass - _TOLERANCE <= total <= 1 + _TOLERANCE
        and (not ranked.is_exact or all(math.isfinite(value) for value in values))
    )
    if not is_possible:
        raise ComputationFailed(
            f"{student.reference} gave numbers that are no probabilities of its {len(student.labels)} labels. Its "
            "weights or its base are unsound: serve another version."
        )
    return ranked
