"""Questions about a case in steps, each of which sees what it declares and nothing else.

Goes in: steps as a recipe declares them, and a case. Comes out: the messages of each step. The last step ranks the
label set; those before it answer freely, and a later one sees their answers where it says so. WangLab's chain in
MEDIQA-M3G 2024 is two steps: a differential diagnosis from the images, then the ranking from that answer alone. It
knows no endpoint.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from mint_lib.chat.questions import Message

Inputs = Literal["image", "text", "image_and_text"]
_PLACE = re.compile(r"\{([a-z][a-z0-9_]*)\}")
_OF_A_CASE = ("image", "text")
_LABELS = "label_names"
_TEXT = "case_text"


class Step(BaseModel):
    """One question."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str = Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")
    """What later steps and the trace call it."""
    shows: tuple[str, ...] = Field(min_length=1)
    """What the step sees: `image` and `text` of the case, and names of earlier steps, whose answers it sees."""
    system: str = ""
    """Role and task. Empty: no system turn."""
    prompt: str
    """User turn, with `{case_text}` where it shows the text, `{<step>}` for each earlier step that it shows, and
    `{label_names}` where it is to list the label set. What form a ranking must have is added to it."""
    max_tokens: int = Field(ge=1, le=100_000)
    """Longest answer in tokens."""

    @property
    def shows_image(self) -> bool:
        """Whether it sees the case's image."""
        return "image" in self.shows


def check_steps(steps: Sequence[Step], *, inputs: Inputs) -> None:
    """Raise ValueError where a step shows what it cannot, or its prompt and what it shows do not agree."""
    allowed = set(_OF_A_CASE) if inputs == "image_and_text" else {inputs}
    names = [step.name for step in steps]
    taken = {*_OF_A_CASE, _LABELS, _TEXT}
    if len(set(names)) != len(names) or set(names) & taken:
        raise ValueError(f"steps need different names, none of {', '.join(sorted(taken))}")
    for place, step in enumerate(steps):
        earlier = set(names[:place])
        unknown = sorted(set(step.shows) - allowed - earlier)
        if unknown:
            raise ValueError(
                f"step {step.name} shows {', '.join(unknown)}; it may show {', '.join(sorted(allowed | earlier))}"
            )
        found = set(_PLACE.findall(step.prompt))
        wanted = (set(step.shows) & earlier) | ({_TEXT} if "text" in step.shows else set())
        if found - {_LABELS} != wanted:
            places = ", ".join(f"{{{name}}}" for name in sorted(wanted)) or "no place but {label_names}"
            raise ValueError(f"the prompt of step {step.name} must hold {places}, which is what it shows")
    if f"{{{_LABELS}}}" not in steps[-1].prompt:
        raise ValueError(f"the last step, {names[-1]}, ranks the label set: its prompt must hold {{{_LABELS}}}")
    shown = {name for step in steps for name in step.shows}
    useless = sorted((allowed | set(names[:-1])) - shown)
    if useless:
        raise ValueError(f"no step shows {', '.join(useless)}: show it, or leave it out of inputs and steps")


def write_messages(
    step: Step,
    *,
    text: str | None,
    image: bytes | None,
    answers: Mapping[str, str],
    label_names: Sequence[str],
    ending: str = "",
) -> tuple[Message, ...]:
    """The turns of `step`. Values are inserted verbatim: places within them are not filled.

    Args:
        step: which of `answers`, `text` and `image` it sees.
        text: the case's text, if it has one.
        image: the case's image, if it has one.
        answers: of the earlier steps, by name.
        label_names: one is written on each line.
        ending: added to the user turn, after a blank line.
    """
    values = {name: answers[name] for name in step.shows if name not in _OF_A_CASE}
    values[_LABELS] = "\n".join(f"- {name}" for name in label_names)
    if "text" in step.shows:
        values[_TEXT] = text or "(no text)"
    filled = _PLACE.sub(lambda match: values[match[1]], step.prompt)
    images = (image,) if step.shows_image and image is not None else ()
    user = Message("user", f"{filled}\n\n{ending}" if ending else filled, images)
    return (Message("system", step.system), user) if step.system else (user,)
