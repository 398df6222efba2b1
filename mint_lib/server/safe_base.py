"""A base model's files, looked at before they are loaded: plain decoders in safetensors, with a plain chat template.

Goes in: a folder with config, weights and tokenizer. Comes out: what the weight files hold, or the reason for refusing
them. The config's keys are those of its own class in transformers; the weights have the shapes that the config gives;
the chat template uses no attribute that leads out of its sandbox. No code of a model repository is ever run.
"""

import dataclasses
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from mint_lib.server.safe_files import MAX_JSON_BYTES, TensorFacts, check_safetensors, read_json_object, refuse

FAMILIES = ("llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")
"""Decoders with plain attention that transformers itself implements; the engine serves no others."""
_CONFIG_KEYS = frozenset(
    [
        "model_type",
        "transformers_version",
        "architectures",
        "dtype",
        "torch_dtype",
        "_name_or_path",
        "_model_name_or_path",
        "unk_token_id",
        "rope_theta",
        "rope_scaling",
        "is_llama_config",
        "rope_interleaved",
        "transformers.js_config",
    ]
)
"""Keys beside those of the config class that saved configs carry and that load nothing."""
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
_DTYPES = ("float32", "float16", "bfloat16")
_MAX_NUMBER = 2**31
"""No size of a config is larger; it keeps a lying config from asking for absurd amounts of memory."""
_MAX_LAYERS = 512
_MAX_TEMPLATE_BYTES = 65_536
_GENERATION_TAG = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
"""transformers' own tag, which plain Jinja cannot parse; it only marks a span."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseFacts:
    """What the files of a base say, found to be consistent."""

    tensors: dict[str, TensorFacts]
    num_layers: int
    max_window_tokens: int
    """Longest prompt and answer together that its positions reach."""


def check_base(folder: pathlib.Path) -> BaseFacts:
    """The facts of the base in `folder`. Imports transformers and torch.

    Raises:
        InvalidInput: the family is not served, a key is unknown or names code, a weight file is damaged or has other
            shapes than the config says, the tokenizer is of an unknown class, or the chat template reaches outside.
    """
    config = _check_config(folder / "config.json")
    if (folder / "generation_config.json").is_file():
        found = read_json_object(folder / "generation_config.json")
        if any(key.startswith(_GENERATION_REFUSED) for key in found):
            refuse(folder / "generation_config.json", "it names code to run in generation")
    _check_tokenizer(folder)
    tensors: dict[str, TensorFacts] = {}
    for path in sorted(folder.glob("*.safetensors")):
        held = check_safetensors(path)
        if held.keys() & tensors.keys():
            refuse(path, "it holds a tensor that another weight file holds too")
        tensors |= held
    _check_shapes(config, tensors, folder)
    return BaseFacts(
        tensors=tensors, num_layers=config.num_hidden_layers, max_window_tokens=config.max_position_embeddings
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


def _check_config(path: pathlib.Path) -> Any:
    """The validated config object."""
    found = read_json_object(path)
    family = found.get("model_type")
    if "vision_config" in found:
        refuse(path, "its model reads images, and what is served here reads text only")
    if family not in FAMILIES:
        refuse(path, f"its model_type is none of {', '.join(FAMILIES)}")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config_class = CONFIG_MAPPING[family]
    known = {field.name for field in dataclasses.fields(config_class)} | _CONFIG_KEYS
    if not found.keys() <= known:
        refuse(path, f"it holds keys that {config_class.__name__} does not have, and could name code to run")
    if found.get("architectures") not in (None, [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]]):
        refuse(path, f"its architecture is not {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]}")
    if any(found.get(key, "float32") not in _DTYPES for key in ("dtype", "torch_dtype")):
        refuse(path, f"its element type is none of {', '.join(_DTYPES)}")
    if not all(abs(number) <= _MAX_NUMBER for number in _numbers(found)):
        refuse(path, "it holds a number beyond all sizes of models")
    layers = found.get("num_hidden_layers")
    if layers is not None and not (type(layers) is int and 1 <= layers <= _MAX_LAYERS):
        refuse(path, f"its number of layers is not 1 to {_MAX_LAYERS}")
    try:
        config = config_class.from_dict({key: value for key, value in found.items() if key != "model_type"})
    except (
        Exception
    ) as error:  # transformers raises what it likes about a bad value; the value stays out of the message
        refuse(path, f"{config_class.__name__} does not accept it ({type(error).__name__})")
    is_windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if is_windowed or set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        refuse(path, "it attends within a sliding window, which the engine does not serve")
    return config


def _numbers(value: object) -> Iterator[float]:
    """All numbers in a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float):
        yield value


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


def _check_shapes(config: Any, tensors: dict[str, TensorFacts], folder: pathlib.Path) -> None:
    """Refuse weights that are not those of the model that the config describes. The model is built without memory."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # a model's code raises what it likes about a bad value
        refuse(folder / "config.json", f"no model can be built from it ({type(error).__name__})")
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    # Tied weights are one tensor under two names, and files hold it under one.
    optional = set(model.all_tied_weights_keys)
    found = {name: facts.shape for name, facts in tensors.items()}
    if {name for name in expected if name not in optional} - found.keys():
        refuse(folder / "config.json", "weight files lack tensors of the model that it describes")
    if any(expected.get(name) != shape for name, shape in found.items()):
        refuse(folder / "config.json", "weight files hold tensors or shapes that the model it describes does not have")
