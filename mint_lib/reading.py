"""How a conversation becomes what a student reads: token ids, and tensors of its images where it sees any.

Goes in: turns, encoded images and the student's tokenizer. Comes out: token ids of prompts and answers. Training,
evaluation and serving all read through here, so that a student is asked as it was trained. This module knows no model.
"""

import abc
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from mint_lib.errors import InvalidInput, PromptTooLong
from mint_lib.packing import PackedTrees, Tree
from mint_lib.records import Turn

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


OverLong = Literal["refuse", "cut_prompt"]
"""What becomes of a prompt that does not fit the student's window beside its longest answer."""


class ReadPrompt(NamedTuple):
    """A prompt as the student reads it."""

    ids: list[int]
    """Token ids, the places of its images among them."""
    image_inputs: "Mapping[str, torch.Tensor] | None" = None
    """What its images became, by the name of the model's argument, before they are put into a batch."""


class FittedPrompt(NamedTuple):
    """A prompt that fits."""

    read: ReadPrompt
    turns: tuple[Turn, ...]
    """What is left of its turns."""
    num_cut_tokens: int


class Reader(abc.ABC):
    """Reads prompts for one student."""

    unpredicted_ids: frozenset[int] = frozenset()
    """Tokens of a prompt that no likelihood is asked of, as those that stand for images."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self.tokenizer = tokenizer

    @abc.abstractmethod
    def read(self, prompt: Sequence[Turn], images: Sequence[bytes] = (), *, case_id: str = "") -> ReadPrompt:
        """`prompt` in the student's chat template, ending where the answer begins; `images` open its first user turn.

        Raises:
            InvalidInput: the student reads no images, or needs one, or its image tokens are not as many as its image
                features; names the case.
        """

    @abc.abstractmethod
    def read_images(self, images: Sequence[bytes], *, case_id: str = "") -> "Mapping[str, torch.Tensor] | None":
        """The `image_inputs` that `read` gives for `images`, without reading the prompt again; None for no images."""

    @abc.abstractmethod
    def collate_images(
        self, image_inputs: "Sequence[Mapping[str, torch.Tensor] | None]", trees: Sequence[Tree], batch: PackedTrees
    ) -> dict[str, Any]:
        """What the model takes beside ids, positions and mask for a batch whose rows are `trees`, in their order.

        An entry named as one of the model's other inputs (such as `position_ids`) takes its place.
        """


class TextReader(Reader):
    """Reads prompts for a student that sees text only."""

    def read(self, prompt: Sequence[Turn], images: Sequence[bytes] = (), *, case_id: str = "") -> ReadPrompt:
        """`prompt` as token ids."""
        if images:
            raise InvalidInput(
                f"Case {case_id or '(unnamed)'} has {len(images)} images, and the student reads text only. Choose an "
                "image student (student.reads: image), or pairs without images."
            )
        return ReadPrompt(encode_prompt(self.tokenizer, prompt))

    def read_images(self, images: Sequence[bytes], *, case_id: str = "") -> "Mapping[str, torch.Tensor] | None":
        """None."""
        return None

    def collate_images(
        self, image_inputs: "Sequence[Mapping[str, torch.Tensor] | None]", trees: Sequence[Tree], batch: PackedTrees
    ) -> dict[str, Any]:
        """Nothing."""
        return {}


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: Sequence[Turn]) -> list[int]:
    """Token ids of `prompt` in the student's chat template, ending where the assistant's answer begins."""
    turns = [turn.model_dump() for turn in prompt]
    ids: list[int] = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
    return ids


def fit_prompt(
    reader: Reader,
    prompt: Sequence[Turn],
    images: Sequence[bytes] = (),
    *,
    room_tokens: int,
    over_long: OverLong,
    case_id: str,
) -> FittedPrompt:
    """`prompt` as the student reads it in at most `room_tokens` tokens.

    `cut_prompt` drops the beginning of the last user turn's text, at a token's border, and reads what is left as a
    prompt of its own: the chat template and the other turns stay whole. A prompt with images is never cut.

    Raises:
        PromptTooLong: the prompt does not fit and may not be cut, or nothing of that text would be left.
        InvalidInput: the reader refuses the prompt or its images.
    """
    read = reader.read(prompt, images, case_id=case_id)
    num_tokens = len(read.ids)
    if num_tokens <= room_tokens:
        return FittedPrompt(read, tuple(prompt), 0)
    wrong = f"The prompt of case {case_id} has {num_tokens} tokens; its longest answer leaves it "
    wrong += f"{max(0, room_tokens)} of the student's window."
    raise_window = "Raise student.window_tokens, or shorten the case text or the lists"
    if over_long == "refuse":
        raise PromptTooLong(f"{wrong} {raise_window}; student.over_long: cut_prompt cuts the text's beginning.")
    if images:
        raise PromptTooLong(f"{wrong} A prompt with images is never cut. {raise_window}.")
    turns = list(prompt)
    last_user = max((index for index, turn in enumerate(turns) if turn.role == "user"), default=None)
    if last_user is not None:
        text = turns[last_user].content
        encoded = reader.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        starts = [start for start, _ in encoded["offset_mapping"]]
        num_dropped = num_tokens - room_tokens
        while num_dropped < len(starts) and (rest := text[starts[num_dropped] :]).strip():
            turns[last_user] = Turn(role="user", content=rest)
            read = reader.read(turns, case_id=case_id)
            if len(read.ids) <= room_tokens:
                return FittedPrompt(read, tuple(turns), num_tokens - len(read.ids))
            # What is left may be split into other tokens than before, so that there are still a few too many.
            num_dropped += len(read.ids) - room_tokens
    raise PromptTooLong(f"{wrong} Nothing of the last user turn would be left if it were cut to that. {raise_window}.")


def encode_answer(tokenizer: "PreTrainedTokenizerBase", answer: str) -> list[int]:
    """Token ids of an assistant's answer, closed by the end-of-turn token."""
    return [*tokenizer.encode(answer, add_special_tokens=False), end_of_turn_id(tokenizer)]


def end_of_turn_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The token that closes an assistant's turn in the chat template; the end-of-text token if it closes with none."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    opened = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, tokenize=False)
    rendered = tokenizer.apply_chat_template(turns, tokenize=False)
    closing = rendered.removeprefix(opened).removeprefix("b")
    special = set(tokenizer.all_special_ids)
    for token_id in tokenizer.encode(closing, add_special_tokens=False):
        if token_id in special:
            return token_id
    return int(tokenizer.eos_token_id)
