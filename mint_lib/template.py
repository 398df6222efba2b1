"""The prompt a student is trained and served with, and the answer it is asked for, from one file.

Goes in: a template file of `mint_lib/templates` (or its bytes, as a version holds them) and a case. Comes out: what the
student is asked, the answer for a ranked list of names, and the names of an answer. A template asks about a text or
about an image, never both: of a case, a student is shown the one that it reads. The elements are MINT's: a role and a
task, a header, numbered lines, names in single quotes, the exact count. It knows no tokens.
"""

import hashlib
import pathlib
import re
import unicodedata
from collections.abc import Sequence
from typing import Literal, NamedTuple, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mint_lib.errors import InvalidInput, RecipeError
from mint_lib.plugins import describe_validation_error
from mint_lib.records import Case, Label, Turn

_FOLDER = pathlib.Path(__file__).parent / "templates"
_QUOTES = {"'": "'", '"': '"', "`": "`", "\u2018": "\u2019", "\u201c": "\u201d"}
_NUMBER = re.compile(r"[*_\s]*\d{1,3}\s*[.):][*_\s]*")
_BULLET = re.compile(r"\s*[-*\u2022]\s+")
_COUNT_LINE = re.compile(r"^num_answers:[^\n]*$", re.MULTILINE)


class Question(NamedTuple):
    """What a student is asked about a case."""

    turns: tuple[Turn, ...]
    images: tuple[bytes, ...]
    """Encoded images, which stand before the text of the first user turn."""


class _Content(BaseModel):
    """What a template file holds."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    reads: Literal["text", "image"] = "text"
    """What a case shows of itself."""
    num_answers: int = Field(ge=1, le=99)
    """How many names the prompt asks for, and so how many a chosen answer holds."""
    header: str = Field(pattern=r"^\S(?:.*\S)?$")
    """First line of every answer."""
    system: str
    """Role and task. Empty: no system turn."""
    user: str
    """User turn with `{num_answers}`, `{case_text}` where it asks about a text, and `{label_names}` where it is to list
    the answers to choose from."""
    caption: str = ""
    """User turn that asks for a description of an image; empty: the template has no such task."""

    @model_validator(mode="after")
    def _has_its_places(self) -> Self:
        wanted = {"{case_text}": int(self.reads == "text"), "{num_answers}": 1}
        for place, count in wanted.items():
            if self.user.count(place) != count:
                raise ValueError(
                    f"the user turn of a template that reads {self.reads} must hold {place} {count} times, not "
                    f"{self.user.count(place)}"
                )
        if self.header not in self.user:
            raise ValueError(f"the user turn must show the header {self.header!r} that answers begin with")
        return self


class Template:
    """One prompt template. Equal bytes give an equal `digest`."""

    def __init__(self, data: bytes, *, where: str):
        try:
            content = yaml.safe_load(data.decode())
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise InvalidInput(f"{where} is not a YAML file in UTF-8: {error}") from None
        if not isinstance(content, dict):
            raise InvalidInput(f"{where} must be a mapping with the keys {', '.join(_Content.model_fields)}.")
        try:
            self._content = _Content.model_validate(content)
        except ValidationError as error:
            raise InvalidInput(describe_validation_error(error, _Content, where=where)) from None
        self.data = data
        self.digest = f"sha256:{hashlib.sha256(data).hexdigest()}"

    @classmethod
    def load(cls, name: str) -> Self:
        """The template file `mint_lib/templates/<name>.yaml`.

        Raises:
            RecipeError: there is no such file.
        """
        names = sorted(path.stem for path in _FOLDER.glob("*.yaml"))
        if name not in names:
            raise RecipeError(f"There is no template {name!r}. Choose one of: {', '.join(names)}.")
        return cls((_FOLDER / f"{name}.yaml").read_bytes(), where=f"template {name}")

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The template that `data`, a `template.yaml` of a stored version, holds.

        Raises:
            InvalidInput: `data` is not a template file.
        """
        return cls(data, where="template.yaml")

    def with_num_answers(self, num_answers: int) -> Self:
        """The same template asking for `num_answers` names, so that the prompt's count is the count trained.

        Raises:
            InvalidInput: the count is not 1 to 99, or the file has no line of its own for it.
        """
        if num_answers == self.num_answers:
            return self
        changed = type(self).from_bytes(_COUNT_LINE.sub(f"num_answers: {num_answers}", self.data.decode()).encode())
        if changed.num_answers != num_answers:
            raise InvalidInput("The template file needs a line `num_answers: <count>` of its own. Add it.")
        return changed

    def with_label_names(self, labels: Sequence[Label]) -> Self:
        """The same template with the names of `labels` where it is to list them."""
        if "{label_names}" not in self._content.user:
            return self
        names = ", ".join(label.name for label in labels)
        content = self._content.model_dump() | {"user": self._content.user.replace("{label_names}", names)}
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1_000_000)
        return type(self).from_bytes(text.encode())

    @property
    def reads(self) -> Literal["text", "image"]:
        """What a case shows of itself."""
        return self._content.reads

    @property
    def num_answers(self) -> int:
        """How many names the prompt asks for."""
        return self._content.num_answers

    def can_ask(self, case: Case) -> bool:
        """Whether `case` has what the template asks about."""
        return case.image is not None if self.reads == "image" else bool(case.text and case.text.strip())

    def question(self, case: Case) -> Question:
        """What a student is asked about `case`: its text, or its image, and nothing else of it."""
        if self.reads == "text":
            return Question(self.prompt(case.text or ""), ())
        return Question(self.prompt(), (case.image,) if case.image is not None else ())

    def prompt(self, case_text: str = "") -> tuple[Turn, ...]:
        """The turns before the answer. `case_text` is inserted verbatim: places within it are not filled."""
        before, place, after = self._content.user.partition("{case_text}")
        count = str(self.num_answers)
        filled = (part.replace("{num_answers}", count) for part in (before, after))
        return self._begin((case_text if place else "").join(filled))

    def caption_question(self, case: Case) -> Question:
        """What asks for a description of `case`'s image.

        Raises:
            InvalidInput: the template has no such task.
        """
        if not self._content.caption:
            raise InvalidInput("The template has no `caption`, so it cannot ask for descriptions. Choose another one.")
        return Question(self._begin(self._content.caption), (case.image,) if case.image is not None else ())

    def _begin(self, user: str) -> tuple[Turn, ...]:
        """The turns before the answer, with `user` as the user's."""
        system = (Turn(role="system", content=self._content.system),) if self._content.system else ()
        return (*system, Turn(role="user", content=user))

    def answer(self, names: Sequence[str]) -> str:
        """The assistant text that lists `names` in their order; `parse` gives them back.

        Raises:
            InvalidInput: there is no name, or one is blank, has outer white space, or breaks the line.
        """
        if not names:
            raise InvalidInput("An answer needs at least one name.")
        for name in names:
            if not name or name != name.strip() or "\n" in name or "\r" in name:
                raise InvalidInput(
                    f"The name {name!r} cannot stand on one line of an answer: it must not be blank, break the "
                    "line, or begin or end with white space. Mend the label set."
                )
        return "\n".join([self._content.header, *(f"{rank}. '{name}'" for rank, name in enumerate(names, start=1))])

    def parse(self, text: str) -> list[str]:
        """The names that an answer lists, in its order, repeated ones too; an empty list where it lists none.

        Tolerant: the header in any case, spacing or emphasis, or missing; any numbering, bullets and quotes; blank
        lines between items. Where lines are numbered only these count, so a closing remark is not taken for a name.
        """
        lines = [line.strip() for line in text.replace("\r\n", "\n").split("\n")]
        headers = [place for place, line in enumerate(lines) if self._is_header(line)]
        if headers:
            end = headers[1] if len(headers) > 1 else len(lines)
            lines = lines[headers[0] + 1 : end]
        items = [line[match.end() :] for line in lines if (match := _NUMBER.match(line))]
        if not items:
            bullets = [line[match.end() :] for line in lines if (match := _BULLET.match(line))]
            quoted = [line for line in lines if line[:1] in _QUOTES]
            items = bullets or quoted or (lines if headers else [])
        return [name for name in map(_unquote, items) if name]

    def _is_header(self, line: str) -> bool:
        """Whether `line` is the header, whatever its case, spaces, underscores and emphasis."""
        return not _NUMBER.match(line) and _letters(line) == _letters(self._content.header)


def normalise_name(name: str) -> str:
    """`name` as names are compared: compatibility form, no case, letters and digits only, one space between words."""
    folded = unicodedata.normalize("NFKC", name).casefold()
    return " ".join(re.findall(r"[^\W_]+", folded))


def _letters(text: str) -> str:
    """Letters of `text` without case."""
    return "".join(letter for letter in text.casefold() if letter.isalpha())


def _unquote(item: str) -> str:
    """`item` without one pair of quotes; text after the closing quote is dropped."""
    item = item.strip()
    closing = _QUOTES.get(item[:1])
    if closing is None:
        return item.strip("*_").strip()
    body = item[1:]
    if body.endswith(closing):
        return body[: -len(closing)].strip()
    ends = re.search(rf"{re.escape(closing)}(?=[^\w{re.escape(closing)}][^{re.escape(closing)}]*$)", body)
    return (body[: ends.start()] if ends else body.rstrip(".,; ")).strip()
