"""Makes preference pairs and checks what the student makes of them: its tokenizer, and its image processor.

Goes in: the student's reader, the template, the label set, a case and the labels of both sides. Comes out: a
`PreferencePair` with its lengths in tokens, or the cause why it is refused. It does not know how the labels of a side
were drawn.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from mint_lib.errors import InvalidInput
from mint_lib.pairing.policy import Preference
from mint_lib.reading import encode_answer
from mint_lib.records import Case, Label, PreferencePair
from mint_lib.template import Question, Template

if TYPE_CHECKING:
    from mint_lib.reading import Reader


class PairLengths(NamedTuple):
    """Tokens of a pair, the end of turn included."""

    prompt: int
    chosen: int
    rejected: int


class PairChecker:
    """Makes pairs for one student, template and label set.

    Raises:
        InvalidInput: the tokenizer does not give a label's name back, or gives two labels the same tokens.
    """

    def __init__(
        self,
        reader: "Reader",
        template: Template,
        labels: Sequence[Label],
        window_tokens: int | None,
    ):
        """Check for a student that reads `window_tokens`; None where prompts that are longer will be cut."""
        self._reader = reader
        self._tokenizer = tokenizer = reader.tokenizer
        self.template = template
        self._window_tokens = window_tokens
        self._names = {label.id: label.name for label in labels}
        self._answers: dict[tuple[str, ...], tuple[str, int]] = {}
        added = tokenizer.added_tokens_decoder
        self._control_ids = {*tokenizer.all_special_ids, *(index for index in added if added[index].special)}
        self._num_control_tokens: int | None = None
        if template.reads == "text":
            # The words of the template alone, so that what a case's text adds can be told.
            self._num_control_tokens = self._count_control_tokens(reader.read(template.prompt("text")).ids)
        seen: dict[tuple[int, ...], str] = {}
        for label in labels:
            other = seen.setdefault(self._encode((label.id,))[1], label.id)
            if other != label.id:
                raise InvalidInput(
                    f"The student's tokenizer gives the labels {other} and {label.id} the same tokens, so it cannot "
                    "tell them apart. Rename one, or choose another student."
                )

    def make_pair(
        self, case: Case, preference: Preference, *, teacher_digest: str, policy: str
    ) -> tuple[PreferencePair, PairLengths] | str:
        """The pair and its lengths, or why it is refused: `control_tokens_in_text` or `longer_than_window`.

        The prompt holds what the template asks about, the case's text or its image, and nothing else of the case.
        """
        sides = self._answer(preference.chosen), self._answer(preference.rejected)
        return self._pair(
            case, self.template.question(case), sides, preference, teacher_digest=teacher_digest, policy=policy
        )

    def make_caption_pair(self, case: Case, other: str, *, policy: str) -> tuple[PreferencePair, PairLengths] | str:
        """A pair that prefers the text of `case` to `other`, another case's, as what its image shows."""
        texts = case.text or "", other
        encoded = [encode_answer(self._tokenizer, text) for text in texts]
        if any(self._count_control_tokens(ids[:-1]) for ids in encoded):
            return "control_tokens_in_text"
        sides = (texts[0], len(encoded[0])), (texts[1], len(encoded[1]))
        question = self.template.caption_question(case)
        return self._pair(case, question, sides, Preference((), ()), teacher_digest="", policy=policy)

    def _pair(
        self,
        case: Case,
        question: Question,
        sides: tuple[tuple[str, int], tuple[str, int]],
        preference: Preference,
        *,
        teacher_digest: str,
        policy: str,
    ) -> tuple[PreferencePair, PairLengths] | str:
        """The pair of both `sides`, each an answer and its number of tokens, or why its prompt is refused."""
        (chosen, num_chosen), (rejected, num_rejected) = sides
        prompt_ids = self._reader.read(question.turns, question.images, case_id=case.case_id).ids
        if self._num_control_tokens not in (None, self._count_control_tokens(prompt_ids)):
            return "control_tokens_in_text"
        num_tokens = len(prompt_ids) + max(num_chosen, num_rejected)
        if self._window_tokens is not None and num_tokens > self._window_tokens:
            return "longer_than_window"
        pair = PreferencePair(
            case_id=case.case_id,
            prompt=question.turns,
            images=question.images,
            chosen=chosen,
            rejected=rejected,
            chosen_label_ids=preference.chosen,
            rejected_label_ids=preference.rejected,
            teacher_digest=teacher_digest,
            template_digest=self.template.digest,
            policy=policy,
        )
        return pair, PairLengths(len(prompt_ids), num_chosen, num_rejected)

    def _answer(self, label_ids: tuple[str, ...]) -> tuple[str, int]:
        """A checked answer and its number of tokens."""
        if label_ids not in self._answers:
            answer, ids = self._encode(label_ids)
            self._answers[label_ids] = (answer, len(ids))
        return self._answers[label_ids]

    def _encode(self, label_ids: tuple[str, ...]) -> tuple[str, tuple[int, ...]]:
        """An answer and its tokens, after these gave back the answer to the byte and its names in their order."""
        names = [self._names[label_id] for label_id in label_ids]
        answer = self.template.answer(names)
        *span, end_of_turn = encode_answer(self._tokenizer, answer)
        decoded = self._tokenizer.decode(span, clean_up_tokenization_spaces=False)
        whole = decoded == answer and self.template.parse(decoded) == names
        if not whole or self._count_control_tokens(span):
            raise InvalidInput(
                f"The student's tokenizer does not give the labels {', '.join(label_ids)} back from an answer's "
                f"tokens: it reads {decoded!r}. Rename these labels, or choose another student."
            )
        return answer, (*span, end_of_turn)

    def _count_control_tokens(self, ids: Sequence[int]) -> int:
        """How many of `ids` steer the conversation, such as the end of a turn."""
        return sum(index in self._control_ids for index in ids)
