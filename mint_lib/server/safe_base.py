"""A base model's files, looked at before they are loaded: a known family in safetensors, with a plain chat template.

Goes in: a folder with config, weights, tokenizer and, for image students, the image processor's config. Comes out: what
the weight files hold, or the reason for refusing them. The weights have the shapes that the config gives; the chat
template uses no attribute that leads out of its sandbox. No code of a model repository is ever run.
"""

import dataclasses
import pathlib
import re
from typing import Any

from mint_lib.server.safe_adapter import ImageParts
from mint_lib.server.safe_config import IMAGE_FAMILIES, check_config
from mint_lib.server.safe_files import MAX_JSON_BYTES, TensorFacts, check_safetensors, read_json_object, refuse
from mint_lib.server.safe_processor import check_processor

_TOKENIZER_KEYS = frozenset(
    [
        "tokenizer_class",
        "model_max_length",
        "bos_token",
        "eos_token",
        "pad_token",
        "unk_token",
        "sep_token",
        "cls_token",
        "mask_token",
        "additional_special_tokens",
        "extra_special_tokens",
        "added_tokens_decoder",
        "chat_template",
        "clean_up_tokenization_spaces",
        "padding_side",
        "truncation_side",
        "add_bos_token",
        "add_eos_token",
        "add_prefix_space",
        "errors",
        "split_special_tokens",
        "legacy",
        "use_default_system_prompt",
        "spaces_between_special_tokens",
        "sp_model_kwargs",
        "model_input_names",
        "backend",
        "is_local",
        "local_files_only",
        "name_or_path",
        "vocab_size",
    ]
)
_TOKENIZER_CLASSES = frozenset(
    [
        "PreTrainedTokenizerFast",
        "TokenizersBackend",
        "LlamaTokenizer",
        "LlamaTokenizerFast",
        "GPT2Tokenizer",
        "GPT2TokenizerFast",
        "Qwen2Tokenizer",
        "Qwen2TokenizerFast",
    ]
)
_GENERATION_REFUSED = ("custom_generate", "auto_map", "trust_remote_code", "assistant", "compile_config")
_MAX_TEMPLATE_BYTES = 65_536
_GENERATION_TAG = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
"""transformers' own tag, which plain Jinja cannot parse; it only marks a span."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseFacts:
    """What the files of a base say, found to be consistent."""

    tensors: dict[str, TensorFacts]
    """By the names that they have in the model."""
    image_parts: ImageParts | None
    """Of an image student; None: it reads text only."""
    num_layers: int
    """Of the decoder."""
    max_window_tokens: int
    """Longest prompt and answer together that its positions reach."""


def check_base(folder: pathlib.Path) -> BaseFacts:
    """The facts of the base in `folder`. Imports transformers and torch.

    Raises:
        InvalidInput: the family is not served, a key is unknown or names code, a weight file is damaged or has other
            shapes than the config says, the tokenizer is of an unknown class, or the chat template reaches outside.
    """
    config = check_config(folder / "config.json")
    if (folder / "generation_config.json").is_file():
        found = read_json_object(folder / "generation_config.json")
        if any(key.startswith(_GENERATION_REFUSED) for key in found):
            refuse(folder / "generation_config.json", "it names code to run in generation")
    _check_tokenizer(folder)
    if config.model_type in IMAGE_FAMILIES:
        check_processor(folder)
    tensors: dict[str, TensorFacts] = {}
    for path in sorted(folder.glob("*.safetensors")):
        held = check_safetensors(path)
        if held.keys() & tensors.keys():
            refuse(path, "it holds a tensor that another weight file holds too")
        tensors |= held
    model = _build_empty(config, folder)
    text_config = config.get_text_config()
    return BaseFacts(
        tensors=_check_shapes(model, tensors, folder),
        image_parts=_find_parts(model),
        num_layers=text_config.num_hidden_layers,
        max_window_tokens=text_config.max_position_embeddings,
    )


def check_chat_template(source: str, path: pathlib.Path) -> None:
    """Refuse a chat template that uses what only an attack needs; what is left runs in transformers' sandbox.

    Raises:
        InvalidInput: it is no Jinja, too long, reads another template, or names an underscored attribute.
    """
    import jinja2
    import jinja2.nodes

    if len(source.encode()) > _MAX_TEMPLATE_BYTES:
        refuse(path, f"its chat template has more than {_MAX_TEMPLATE_BYTES} bytes")
    try:
        # Parsed only, never rendered here.
        environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=True)
        parsed = environment.parse(_GENERATION_TAG.sub("", source))
    except (jinja2.TemplateError, RecursionError):
        refuse(path, "its chat template is not Jinja")
    readers = (jinja2.nodes.Import, jinja2.nodes.FromImport, jinja2.nodes.Include, jinja2.nodes.Extends)
    if any(parsed.find_all(readers)):
        refuse(path, "its chat template reads another template")
    if any(node.attr.startswith("_") for node in parsed.find_all(jinja2.nodes.Getattr)):
        refuse(path, "its chat template names an underscored attribute")
    if any(node.name in ("attr", "pprint") for node in parsed.find_all(jinja2.nodes.Filter)):
        refuse(path, "its chat template looks attributes up by name")
    constants = (node.value for node in parsed.find_all(jinja2.nodes.Const))
    if any(isinstance(value, str) and "__" in value for value in constants):
        refuse(path, "its chat template spells an underscored attribute")


def _check_tokenizer(folder: pathlib.Path) -> None:
    path = folder / "tokenizer_config.json"
    config = read_json_object(path)
    if not config.keys() <= _TOKENIZER_KEYS:
        refuse(path, "it holds a key that is not on the list of known ones")
    if config.get("tokenizer_class") not in _TOKENIZER_CLASSES:
        refuse(path, f"its tokenizer_class is none of {', '.join(sorted(_TOKENIZER_CLASSES))}")
    if not (folder / "tokenizer.json").is_file():
        refuse(folder / "tokenizer.json", "it is missing")
    named = config.get("chat_template") or []
    for entry in [named] if isinstance(named, str) else named:
        template = entry.get("template") if isinstance(entry, dict) else entry
        if not isinstance(template, str):
            refuse(path, "its chat template is not a text")
        check_chat_template(template, path)
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        if jinja.stat().st_size > MAX_JSON_BYTES:
            refuse(jinja, f"it has more than {MAX_JSON_BYTES} bytes")
        check_chat_template(jinja.read_bytes().decode(errors="replace"), jinja)


def _build_empty(config: Any, folder: pathlib.Path) -> Any:
    """The model that the config describes, without memory for its weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    family = AutoModelForImageTextToText if config.model_type in IMAGE_FAMILIES else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            return family.from_config(config, trust_remote_code=False)
    except Exception as error:  # a model's code raises what it likes about a bad value
        refuse(folder / "config.json", f"no model can be built from it ({type(error).__name__})")


def _find_parts(model: Any) -> ImageParts | None:
    """Where the parts of an image student lie."""
    if model.config.model_type not in IMAGE_FAMILIES:
        return None
    decoder = model.get_decoder()
    place = next(name for name, module in model.named_modules() if module is decoder)
    return ImageParts(decoder=f"{place}.", projector=IMAGE_FAMILIES[model.config.model_type].projector)


def _check_shapes(model: Any, tensors: dict[str, TensorFacts], folder: pathlib.Path) -> dict[str, TensorFacts]:
    """`tensors` by the model's own names; refuses weights that are not those of the model that the config describes."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    # Families were renamed since files were made.
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    own, prefix = model.state_dict(), model.base_model_prefix
    renamed = {rename_source_key(name, renamings, [], prefix, own)[0]: facts for name, facts in tensors.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in own.items()}
    # Tied weights are one tensor under two names, and files hold it under one.
    optional = set(model.all_tied_weights_keys)
    if {name for name in expected if name not in optional} - renamed.keys():
        refuse(folder / "config.json", "weight files lack tensors of the model that it describes")
    is_other = any(expected.get(name) != facts.shape for name, facts in renamed.items())
    if is_other or len(renamed) != len(tensors):
        refuse(folder / "config.json", "weight files hold tensors or shapes that the model it describes does not have")
    return renamed
