"""Tiny random image students of every family, with what transformers itself makes of a prompt, for tests to compare."""

import io
import pathlib
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from mint_lib.image_inputs.reader import ImageReader
from mint_lib.student_weights import fetch_student_folder

_SPREAD = 0.1  # of random weights, so that logits are far enough apart to tell
_TEXT = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
_TEXT |= {"num_hidden_layers": 2, "initializer_range": _SPREAD}
_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_TOWER |= {"initializer_range": _SPREAD}
_PLAIN = "{{ part['text'] if part['type'] == 'text' else IMAGE }}"
_TEMPLATE = (
    "<|begin|>{% for turn in messages %}<|{{ turn['role'] }}|>{% if turn['content'] is string %}{{ turn['content'] }}"
    "{% else %}{% for part in turn['content'] %}PART{% endfor %}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

Read = Callable[[str, list[Image.Image]], dict[str, torch.Tensor]]
"""From a rendered prompt and its images to what transformers gives its own model for them."""


class ImageStudent(NamedTuple):
    """A tiny student of one family."""

    model: Any
    reader: ImageReader
    read_as_processor: Read


def make_student(family: str) -> ImageStudent:
    """The student of `family`, a key of `FAMILIES`."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return FAMILIES[family]()


def make_image(seed: int, width: int, height: int, *, format: str = "PNG") -> bytes:
    """An encoded image of random coloured blocks."""
    blocks = torch.randint(0, 256, (4, 4, 3), generator=torch.Generator().manual_seed(seed)).to(torch.uint8).numpy()
    file = io.BytesIO()
    Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST).save(file, format)
    return file.getvalue()


def write_folder(student: ImageStudent, folder: pathlib.Path) -> None:
    """Save the student as a checkpoint's folder."""
    student.model.save_pretrained(folder)
    student.reader.tokenizer.save_pretrained(folder)
    student.reader.family.image_processor.save_pretrained(folder)


def _make_tokenizer(*image_tokens: str, image: str) -> Any:
    """The tiny image student's tokenizer with more tokens; `image` is what the template writes for an image."""
    tokenizer = AutoTokenizer.from_pretrained(fetch_student_folder("tiny-image"))
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    tokenizer.add_tokens(list(image_tokens), special_tokens=True)
    first = ("<|begin|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|begin|> $A", special_tokens=[first])
    tokenizer.chat_template = _TEMPLATE.replace("PART", _PLAIN.replace("IMAGE", repr(image)))
    return tokenizer


def _describe_text(tokenizer: Any) -> dict[str, Any]:
    end = tokenizer.eos_token_id
    return _TEXT | {
        "vocab_size": len(tokenizer),
        "pad_token_id": end,
        "eos_token_id": end,
        "bos_token_id": tokenizer.bos_token_id,
    }


def _make_idefics3(kind: str = "Idefics3") -> ImageStudent:
    tiles = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    tokenizer = _make_tokenizer("<end_of_utterance>", *tiles, image="<image>")
    processor_class = Idefics3ImageProcessorPil if kind == "Idefics3" else SmolVLMImageProcessorPil
    image_processor = processor_class(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    config = getattr(transformers, f"{kind}Config")(
        text_config={"model_type": "llama", **_describe_text(tokenizer)},
        vision_config=_TOWER | {"image_size": 32, "patch_size": 8},
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=False,
    )
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    # SmolVLM's own processor needs torchvision; its inputs are those of Idefics3's.
    processor = transformers.Idefics3Processor(image_processor, tokenizer, image_seq_len=4)

    def read(text: str, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        return dict(processor(text=[text], images=[images], return_tensors="pt", add_special_tokens=False))

    return ImageStudent(model, ImageReader(tokenizer, image_processor, config), read)


def _make_llava() -> ImageStudent:
    tokenizer = _make_tokenizer(image="<image>")
    image_processor = LlavaImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **_describe_text(tokenizer)},
        vision_config=_TOWER | {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    processor = transformers.LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )

    def read(text: str, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        return dict(processor(text=[text], images=images, return_tensors="pt", add_special_tokens=False))

    return ImageStudent(model, ImageReader(tokenizer, image_processor, config), read)


def _make_mllama() -> ImageStudent:
    tokenizer = _make_tokenizer("<|image|>", image="<|image|>")
    image_processor = MllamaImageProcessorPil(size={"height": 32, "width": 32}, max_image_tiles=4)
    image_id = tokenizer.convert_tokens_to_ids("<|image|>")
    vision = {key: value for key, value in _TOWER.items() if key != "num_attention_heads"}
    vision |= {"attention_heads": 2, "image_size": 32, "patch_size": 8, "num_global_layers": 1}
    config = transformers.MllamaConfig(
        # As in the published models, the image token comes behind all that the output layer knows.
        text_config=_describe_text(tokenizer) | {"vocab_size": image_id, "cross_attention_layers": [0]},
        vision_config=vision | {"intermediate_layers_indices": [0], "vision_output_dim": 64},
        image_token_index=image_id,
    )
    model = transformers.MllamaForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if "gate" in name and parameter.numel() == 1:
            torch.nn.init.constant_(parameter, 1.0)  # they are 0 at first, and images have no say
    processor = transformers.MllamaProcessor(image_processor, tokenizer)

    def read(text: str, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        return dict(processor(text=[text], images=[images], return_tensors="pt", add_special_tokens=False))

    return ImageStudent(model, ImageReader(tokenizer, image_processor, config), read)


def _make_qwen(kind: str = "Qwen2VL") -> ImageStudent:
    marks = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
    tokenizer = _make_tokenizer(*marks, image="".join(marks[:3]))
    ids = dict(zip(marks, tokenizer.convert_tokens_to_ids(list(marks)), strict=True))
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 48 * 48}
    )
    vision: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 8, "initializer_range": _SPREAD}
    if kind == "Qwen2VL":
        vision |= {"embed_dim": 32, "hidden_size": 64}
    else:
        vision |= {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "window_size": 32}
        vision |= {"fullatt_block_indexes": [1]}
    config = getattr(transformers, "Qwen2VLConfig" if kind == "Qwen2VL" else "Qwen2_5_VLConfig")(
        text_config=_describe_text(tokenizer)
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    name = "Qwen2VLForConditionalGeneration" if kind == "Qwen2VL" else "Qwen2_5_VLForConditionalGeneration"
    model = getattr(transformers, name)(config).eval()
    # The processor needs torchvision, but the method that spells images needs no whole processor.
    parts = types.SimpleNamespace(image_processor=image_processor, image_token="<|image_pad|>")

    def read(text: str, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        found = dict(image_processor(images, return_tensors="pt"))
        pieces = text.split("<|image_pad|>")
        spelled = [
            transformers.Qwen2VLProcessor.replace_image_token(parts, found, index) for index in range(len(images))
        ]
        whole = "".join(piece + more for piece, more in zip(pieces, [*spelled, ""], strict=True))
        input_ids = tokenizer(whole, return_tensors="pt", add_special_tokens=False)["input_ids"]
        types_BT = (input_ids == ids["<|image_pad|>"]).int()
        return {"input_ids": input_ids, "mm_token_type_ids": types_BT, **found}

    return ImageStudent(model, ImageReader(tokenizer, image_processor, config), read)


FAMILIES: dict[str, Callable[[], ImageStudent]] = {
    "idefics3": _make_idefics3,
    "smolvlm": lambda: _make_idefics3("SmolVLM"),
    "llava": _make_llava,
    "mllama": _make_mllama,
    "qwen2_vl": _make_qwen,
    "qwen2_5_vl": lambda: _make_qwen("Qwen2_5_VL"),
}
