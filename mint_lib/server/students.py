"""The students that are served: what belongs to one, and which one answers to a name at this moment.

Goes in: loaded students. Comes out: token ids of prompts in the very template a student was trained on, and leases, so
that a request is answered by one version from beginning to end while another is put in its place. It computes nothing.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from mint_lib.engine.prompt_images import PromptImages
from mint_lib.errors import NotFound, PromptTooLong
from mint_lib.reading import TextReader
from mint_lib.records import Label, Reference, Turn
from mint_lib.template import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mint_lib.engine.answer_format import AnswerFormat
    from mint_lib.engine.label_trie import LabelTrie
    from mint_lib.engine.scheduler import Engine
    from mint_lib.image_inputs.reader import ImageReader

Precision = Literal["float32", "bfloat16", "int8"]


class EncodedPrompt(NamedTuple):
    """A prompt as the engine takes it."""

    ids: tuple[int, ...]
    images: PromptImages | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServedStudent:
    """One version of a model, ready to answer."""

    name: str
    """What requests call it."""
    reference: Reference
    engine: "Engine"
    """Holds its base; several students may share one."""
    adapter: str
    """Its adapter's key in the engine."""
    tokenizer: "PreTrainedTokenizerBase"
    template: Template
    labels: tuple[Label, ...]
    trie: "LabelTrie"
    answer_format: "AnswerFormat"
    stop_ids: frozenset[int]
    """Tokens that end its answers."""
    window_tokens: int
    """Longest prompt and answer together."""
    image_reader: "ImageReader | None" = None
    """How it reads images. An image student needs one in every prompt; None: it reads text and must not get any."""
    temperature: float = 1.0
    """Divides its log-probabilities; fitted on validation cases when the model was evaluated."""
    num_calibration_cases: int = 0
    """Validation cases behind `temperature`; 0: its probabilities are not calibrated."""
    abstain_below: float = 0.0
    """It abstains where its first label is less probable than this."""
    precision: Precision = "float32"
    intended_use: str
    limits: tuple[str, ...]
    """What a user must know, from its card."""
    load_seconds: float
    """From the first byte asked of the store to the first warm answer."""

    @property
    def modality(self) -> Literal["text", "image"]:
        """What it reads."""
        return "text" if self.image_reader is None else "image"

    def encode_case(self, case: str | bytes) -> EncodedPrompt:
        """The prompt for a case's text, or its encoded image, in the template that the student was trained on.

        Raises:
            PromptTooLong: prompt and longest label exceed the window; names the counts, nothing is cut.
            InvalidInput: the image cannot be decoded.
        """
        if isinstance(case, str):
            prompt = self.encode_turns(self.template.prompt(case))
        else:
            prompt = self.encode_turns(self.template.prompt(), images=(case,))
        self._check(prompt.ids, self.trie.depth)
        return prompt

    def encode_turns(self, turns: Sequence[Turn], images: Sequence[bytes] = ()) -> EncodedPrompt:
        """A conversation in the student's chat template, ending where the answer begins. Not checked for length.

        The images stand before the text of the first user turn, as in training.

        Raises:
            InvalidInput: an image cannot be decoded, a text spells an image token, or the student reads text only.
        """
        if self.image_reader is None:
            return EncodedPrompt(tuple(TextReader(self.tokenizer).read(turns, images).ids))
        read = self.image_reader.read(turns, images)
        if read.image_inputs is None:
            return EncodedPrompt(tuple(read.ids))
        token_id = self.image_reader.family.image_token_id
        return EncodedPrompt(tuple(read.ids), PromptImages.build(read.ids, read.image_inputs, image_token_id=token_id))

    def room_for(self, prompt_ids: Sequence[int], max_new_tokens: int | None) -> int:
        """How many tokens the answer may have: `max_new_tokens`, or all that the window leaves.

        Raises:
            PromptTooLong: the window has no room for them.
        """
        self._check(prompt_ids, max_new_tokens or 1)
        return max_new_tokens or self.window_tokens - len(prompt_ids)

    def _check(self, prompt_ids: Sequence[int], num_answer_tokens: int) -> None:
        if len(prompt_ids) + num_answer_tokens > self.window_tokens:
            raise PromptTooLong(
                f"The prompt has {len(prompt_ids)} tokens and its answer needs {num_answer_tokens}; the window of "
                f"{self.name} is {self.window_tokens} tokens. Nothing is cut: shorten the text or ask for fewer tokens."
            )


class Lineup:
    """Which student answers to which name. All methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._students: dict[str, ServedStudent] = {}
        self._leases: dict[int, int] = {}
        self._retired: dict[int, tuple[ServedStudent, Callable[[], None]]] = {}

    def names(self) -> list[str]:
        """The names that are answered, sorted."""
        with self._lock:
            return sorted(self._students)

    def students(self) -> list[ServedStudent]:
        """The students that answer at this moment, by name."""
        with self._lock:
            return [self._students[name] for name in sorted(self._students)]

    @contextlib.contextmanager
    def lease(self, name: str) -> Iterator[ServedStudent]:
        """The student called `name`, kept loaded for as long as the context lasts.

        Raises:
            NotFound: no student has this name.
        """
        with self._lock:
            student = self._students.get(name)
            if student is None:
                # The name is the client's own text and may be anything: it is not repeated.
                known = ", ".join(sorted(self._students)) or "none yet"
                raise NotFound(f"No model has this name. Served here: {known}.")
            self._leases[id(student)] = self._leases.get(id(student), 0) + 1
        try:
            yield student
        finally:
            self._release(student)

    def put(self, student: ServedStudent, *, retire: Callable[[ServedStudent], None]) -> ServedStudent | None:
        """Let `student` answer to its name from the next request on; returns the one it replaces.

        `retire(replaced)` is called once no request uses the replaced one any more, by whoever ends the last one.
        """
        with self._lock:
            replaced = self._students.get(student.name)
            self._students[student.name] = student
            if replaced is None:
                return None
            if self._leases.get(id(replaced)):
                self._retired[id(replaced)] = (replaced, lambda: retire(replaced))
                return replaced
        retire(replaced)
        return replaced

    def _release(self, student: ServedStudent) -> None:
        with self._lock:
            left = self._leases[id(student)] - 1
            if left:
                self._leases[id(student)] = left
                return
            del self._leases[id(student)]
            _, retire = self._retired.pop(id(student), (None, None))
        if retire is not None:
            retire()
