"""The prompt a student is trained and served with, and the answer it is asked for, from one file.

Goes in: a template file of `mint_lib/templates` (or its bytes, as a version holds them) and a case's text. Comes out:
the prompt's turns, the answer for a ranked list of names, and the names of an answer. The elements are MINT's: a role
and a task, a header, numbered lines, names in single quotes, the exact count. It knows neither tokens nor labels.
"""

import hashlib
import pathlib
import re
import unicodedata
from collections.abc import Sequence
from typing import Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mint_lib.errors import InvalidInput, RecipeError
from mint_lib.plugins import describe_validation_error
from mint_lib.records import Turn

_FOLDER = pathlib.Path(__file__).parent / "templates"
_QUOTES = {"'": "'", '"': '"', "`": "`", "\u2018": "\u2019", "\u201c": "\u201d"}
_NUMBER = re.compile(r"[*_\s]*\d{1,3}\s*[.):][*_\s]*")
_BULLET = re.compile(r"\s*[-*\u2022]\s+")
_COUNT_LINE = re.compile(r"^num_answers:[^\n]*$", re.MULTILINE)


class _Content(BaseModel):
    """What a template file holds."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    num_answers: int = Field(ge=1, le=99)
    """How many names the prompt asks for, and so how many a chosen answer holds."""
    header: str = Field(pattern=r"^\S(?:.*\S)?$")
    """First line of every answer."""
    system: str
    """Role and task. Empty: no system turn."""
    user: str
    """User turn with `{case_text}` and `{num_answers}`."""

    @model_validator(mode="after")
    def _has_its_places(self) -> Self:
        for place in ("{case_text}", "{num_answers}"):
            if self.user.count(place) != 1:
                raise ValueError(f"the user turn must hold {place} exactly once, not {self.user.count(place)} times")
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

    @property
    def num_answers(self) -> int:
        """How many names the prompt asks for."""
        return self._content.num_answers

    def prompt(self, case_text: str) -> tuple[Turn, ...]:
        """The turns before the answer. `case_text` is inserted verbatim: places within it are not filled."""
        before, after = self._content.user.split("{case_text}")
        count = str(self.num_answers)
        user = before.replace("{num_answers}", count) + case_text + after.replace("{num_answers}", count)
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
