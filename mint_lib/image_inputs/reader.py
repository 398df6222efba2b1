"""Reads prompts with images, for image students of every family that has a module here.

Goes in: turns, encoded images, and the student's tokenizer, image processor and config. Comes out: token ids with a
place for each image feature, and tensors. Each prompt tree holds its images once, however many answers hang from it.
It runs no model, and it needs no torchvision: images are always prepared by Pillow, so that a student sees the same
pixels wherever it runs. A row holds one tree: trees behind one another in a row are for students that read text.
"""

import io
import itertools
import json
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mint_lib.errors import InvalidInput
from mint_lib.image_inputs.family import ImageFamily, ImageInputs, PreparedImages
from mint_lib.image_inputs.idefics3 import Idefics3
from mint_lib.image_inputs.llava import Llava
from mint_lib.image_inputs.mllama import Mllama
from mint_lib.image_inputs.qwen_vl import QwenVl
from mint_lib.packing import PackedTrees, Tree
from mint_lib.reading import Reader, ReadPrompt
from mint_lib.records import Turn

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import BaseImageProcessor, PretrainedConfig, PreTrainedTokenizerBase

_FAMILIES: tuple[type[ImageFamily], ...] = (Idefics3, Llava, Mllama, QwenVl)
_FORMATS = ("PNG", "JPEG")
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


class ImageReader(Reader):
    """Reads prompts for one image student. It pickles."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        image_processor: "BaseImageProcessor",
        model_config: "PretrainedConfig",
    ):
        """Read for the student of `model_config`; its chat template is the tokenizer's.

        Raises:
            InvalidInput: nothing here reads for that `model_type`, or the three do not belong together.
        """
        super().__init__(tokenizer)
        by_type = {model_type: family for family in _FAMILIES for model_type in family.model_types}
        if model_config.model_type not in by_type:
            raise InvalidInput(
                f"the student is of type {model_config.model_type!r}. Image students can be of type "
                f"{', '.join(sorted(by_type))}: choose one of these, or set student.reads to text."
            )
        self.unpredicted_ids = frozenset({model_config.image_token_id})
        """Tokens of a prompt that stand for images: no likelihood is asked of them, and a model may have no output
        for them."""
        self.family = by_type[model_config.model_type](tokenizer, image_processor, model_config)

    def read(self, prompt: Sequence[Turn], images: Sequence[bytes] = (), *, case_id: str = "") -> ReadPrompt:
        """`prompt` with its images, as the student's chat template and its image processor have it."""
        self._check_prompt(prompt, len(images), case_id)
        text = self._render(prompt, len(images), case_id)
        if not images:
            return ReadPrompt(self._encode(text))
        prepared = self._prepare(images, case_id)
        pieces = text.split(self.family.image_token)
        if len(pieces) - 1 != len(images):
            raise InvalidInput(
                f"The chat template writes {len(pieces) - 1} image tokens for the {len(images)} images of case "
                f"{_name(case_id)}. Give the student a template that writes one for each part of type image."
            )
        spelled = itertools.chain.from_iterable(itertools.zip_longest(pieces, prepared.texts, fillvalue=""))
        ids = self._encode("".join(spelled))
        num_tokens, num_features = ids.count(self.family.image_token_id), self.family.count_features(prepared.inputs)
        if num_tokens != num_features:
            raise InvalidInput(
                f"The prompt of case {_name(case_id)} has {num_tokens} image tokens, and its images give "
                f"{num_features} features. The student's tokenizer, image processor and config must be of one model."
            )
        return ReadPrompt(ids, prepared.inputs)

    def read_images(self, images: Sequence[bytes], *, case_id: str = "") -> ImageInputs | None:
        """The tensors of `images`."""
        return self._prepare(images, case_id).inputs if images else None

    def collate_images(
        self, image_inputs: Sequence[ImageInputs | None], trees: Sequence[Tree], batch: PackedTrees
    ) -> dict[str, Any]:
        """The images of a batch whose row i is tree i; nothing where no tree has images.

        Raises:
            InvalidInput: a tree's image tokens are not as many as its features, as when an answer holds one.
            ValueError: trees share a row.
        """
        if len(batch["input_ids"]) != len(trees):
            raise ValueError(f"{len(trees)} trees are in {len(batch['input_ids'])} rows; image students need one each")
        for inputs, tree in zip(image_inputs, trees, strict=True):
            num_tokens = tree.input_ids.count(self.family.image_token_id)
            num_features = self.family.count_features(inputs) if inputs is not None else 0
            if num_tokens != num_features:
                raise InvalidInput(
                    f"A prompt with its answers has {num_tokens} image tokens, and its images give {num_features} "
                    f"features. No answer may hold {self.family.image_token!r}."
                )
        if all(inputs is None for inputs in image_inputs):
            return {}
        return self.family.collate(image_inputs, trees, batch)

    def _check_prompt(self, prompt: Sequence[Turn], num_images: int, case_id: str) -> None:
        """Refuse what would put images where there are none, or images nowhere."""
        marks = (self.family.image_token, *self.family.image_tokens)
        if any(mark in turn.content for turn in prompt for mark in marks):
            raise InvalidInput(
                f"The text of case {_name(case_id)} holds a token that marks images. None of {', '.join(marks)} may "
                "stand in a text: remove it."
            )
        if self.family.needs_images and not num_images:
            raise InvalidInput(
                f"Case {_name(case_id)} has no image, and a student of this type needs one in every prompt. Leave such "
                "cases out, or choose another student."
            )
        if num_images and not any(turn.role == "user" for turn in prompt):
            raise InvalidInput(f"Case {_name(case_id)} has images, but its prompt has no user turn to hold them.")

    def _render(self, prompt: Sequence[Turn], num_images: int, case_id: str) -> str:
        """The prompt in the student's chat template, with one image token for each image."""
        import jinja2

        messages = []
        for turn in prompt:
            parts: list[dict[str, str]] = [{"type": "text", "text": turn.content}]
            if turn.role == "user":
                parts, num_images = [{"type": "image"}] * num_images + parts, 0
            messages.append({"role": turn.role, "content": parts})
        try:
            text: str = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except (jinja2.TemplateError, TypeError) as error:
            raise InvalidInput(
                f"The student's chat template does not take the prompt of case {_name(case_id)} "
                f"({type(error).__name__}). It must take contents in parts of type image and text; some templates "
                "take no system turn beside images."
            ) from error
        return text

    def _encode(self, text: str) -> list[int]:
        """Token ids of a rendered prompt, with the tokenizer's first token if the template did not write it."""
        begins = self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=not begins)
        return ids

    def _prepare(self, images: Sequence[bytes], case_id: str) -> PreparedImages:
        return self.family.prepare([_decode(data, case_id) for data in images])


def load_image_reader(folder: pathlib.Path, tokenizer: "PreTrainedTokenizerBase") -> ImageReader:
    """A reader for the image student in `folder`, whose `tokenizer` was read already.

    Raises:
        InvalidInput: the folder has no image processor, or one that cannot be read without code of the model's.
    """
    from transformers import AutoConfig

    import mint_lib.vision.efficientnet_lite  # noqa: F401 - makes its architecture known to transformers

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return ImageReader(tokenizer, load_image_processor(folder), config)


def load_image_processor(folder: pathlib.Path) -> "BaseImageProcessor":
    """The image processor in `folder`, which works by Pillow.

    Raises:
        InvalidInput: there is none, or it needs code of the model's.
    """
    from transformers import AutoImageProcessor

    if not any((folder / name).is_file() for name in _PROCESSOR_FILES):
        raise InvalidInput(
            f"{folder} holds none of {', '.join(_PROCESSOR_FILES)}, so nothing says how its student sees. Give the "
            "folder of an image student, or set student.reads to text."
        )
    try:
        return AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    except (ValueError, ImportError, OSError) as error:
        raise InvalidInput(
            f"the image processor in {folder} cannot be read ({type(error).__name__}). It must be one of the classes "
            "that transformers has for Pillow."
        ) from error


def load_chat_template(folder: pathlib.Path) -> str | None:
    """The chat template that `folder` keeps in `chat_template.json`, where older image students have it."""
    path = folder / "chat_template.json"
    if not path.is_file():
        return None
    template: str | None = json.loads(path.read_text()).get("chat_template")
    return template


def _decode(data: bytes, case_id: str) -> "Image":
    """The RGB image that `data` holds, transparent places on white.

    Raises:
        InvalidInput: it is no PNG or JPEG, or broken.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if not image.has_transparency_data:
                return image.convert("RGB")
            rgba = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    except Exception:  # Pillow's decoders raise many types on broken bytes, and each means the same here
        raise InvalidInput(
            f"An image of case {_name(case_id)} cannot be decoded. Give whole {' or '.join(_FORMATS)} files."
        ) from None


def _name(case_id: str) -> str:
    return case_id or "(unnamed)"
