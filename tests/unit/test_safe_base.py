"""Base models that name code, lie about their shapes or carry hostile chat templates are refused before loading."""

import json
import pathlib
import shutil
import struct
from typing import Any

import pytest

from mint_lib.errors import InvalidInput
from mint_lib.server.safe_base import check_base, check_chat_template
from mint_lib.student_weights import fetch_student_folder

TEMPLATES = pathlib.Path("chat_template.jinja")


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(fetch_student_folder("tiny"), tmp_path / "base"))


def change(folder: pathlib.Path, file: str, **values: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_base_in_order_gives_its_facts(folder: pathlib.Path) -> None:
    facts = check_base(folder)
    assert facts.num_layers == 2
    assert facts.max_window_tokens == 2048
    assert facts.tensors["model.embed_tokens.weight"].shape == (512, 64)


@pytest.mark.parametrize("family", ["mistral", "phi3", "qwen2", "qwen3", "smollm3"])
def test_base_of_every_served_family_is_taken_as_transformers_writes_it(
    folder: pathlib.Path, tmp_path: pathlib.Path, family: str
) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values: dict[str, Any] = {"sliding_window": None} if family in ("mistral", "phi3") else {}
    config = AutoConfig.for_model(
        family,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        **values,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / family)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(folder / name, tmp_path / family)
    assert check_base(tmp_path / family).num_layers == 2


@pytest.mark.parametrize(
    "values",
    [
        {"auto_map": {"AutoModelForCausalLM": "evil.Model"}},
        {"trust_remote_code": True},
        {"_attn_implementation": "evil/kernels"},
        {"_attn_implementation_internal": "evil/kernels"},
        {"attn_implementation": "evil/kernels"},
        {"custom_pipelines": {"a": {"impl": "evil.Pipeline"}}},
        {"quantization_config": {"quant_method": "evil"}},
        {"text_config": {"model_type": "llama", "auto_map": {}}},
        {"use_kernels": True},
        {"model_type": "gpt2"},
        {"model_type": "../evil"},
        {"model_type": ["llama"]},
        {"model_type": None},
        {"architectures": ["EvilForCausalLM"]},
        {"dtype": "int8"},
        {"torch_dtype": "float8_e4m3fn"},
        {"num_hidden_layers": 10**6},
        {"num_hidden_layers": "2"},
        {"vocab_size": 10**12},
        {"vocab_size": -1},
        {"hidden_size": "64"},
        {"rope_parameters": {"rope_type": "evil", "rope_theta": 1.0}},
        {"hidden_act": "evil"},
    ],
    ids=str,
)
def test_base_config_that_names_code_or_cannot_be_is_refused(folder: pathlib.Path, values: dict[str, Any]) -> None:
    change(folder, "config.json", **values)
    with pytest.raises(InvalidInput, match=r"config\.json is refused") as caught:
        check_base(folder)
    assert "evil" not in str(caught.value).lower()


def test_base_that_attends_within_a_sliding_window_is_refused(folder: pathlib.Path) -> None:
    change(folder, "config.json", model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=128)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key in ("attention_bias", "mlp_bias", "pretraining_tp"):
        del config[key]
    path.write_text(json.dumps(config))
    with pytest.raises(InvalidInput, match="sliding window"):
        check_base(folder)


@pytest.mark.parametrize(
    "values",
    [
        {"num_hidden_layers": 3},
        {"num_hidden_layers": 1},
        {"hidden_size": 128, "head_dim": 32},
        {"vocab_size": 1024},
        {"intermediate_size": 64},
        {"num_key_value_heads": 4},
        {"attention_bias": True},
        {"tie_word_embeddings": False},
    ],
    ids=str,
)
def test_base_whose_weights_are_not_those_of_its_config_is_refused(
    folder: pathlib.Path, values: dict[str, Any]
) -> None:
    change(folder, "config.json", **values)
    with pytest.raises(InvalidInput, match="weight files"):
        check_base(folder)


def test_base_with_a_lying_weight_header_is_refused(folder: pathlib.Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[:8] = struct.pack("<Q", 2**63)
    path.write_bytes(data)
    with pytest.raises(InvalidInput, match=r"model\.safetensors is refused"):
        check_base(folder)


def test_base_with_pickles_only_is_refused_and_they_are_not_opened(folder: pathlib.Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InvalidInput, match="lack tensors"):
        check_base(folder)


@pytest.mark.parametrize(
    "values",
    [
        {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}},
        {"tokenizer_class": "EvilTokenizer"},
        {"tokenizer_class": None},
        {"tokenizer_file": "/etc/passwd"},
        {"trust_remote_code": True},
        {"chat_template": "{{ ''.__class__ }}"},
        {"chat_template": [{"name": "default", "template": "{{ ''.__class__ }}"}]},
        {"chat_template": [{"name": "default"}]},
    ],
    ids=str,
)
def test_tokenizer_config_that_names_code_or_files_is_refused(folder: pathlib.Path, values: dict[str, Any]) -> None:
    change(folder, "tokenizer_config.json", **values)
    with pytest.raises(InvalidInput, match=r"tokenizer_config\.json is refused"):
        check_base(folder)


def test_generation_config_that_names_code_is_refused(folder: pathlib.Path) -> None:
    change(folder, "generation_config.json", custom_generate="evil/generate")
    with pytest.raises(InvalidInput, match=r"generation_config\.json is refused"):
        check_base(folder)


ATTACKS = {
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "subscript": "{{ ''['__class__'] }}",
    "attr filter": "{{ ''|attr('__class__') }}",
    "attr filter, joined": "{{ ''|attr(['_','_class_','_']|join) }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('touch CANARY').read() }}",
    "namespace": "{% set ns = namespace() %}{{ ns.__init__.__globals__['os'].system('touch CANARY') }}",
    "macro": "{% macro m() %}{% endmacro %}{{ m.__globals__ }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'x' as y %}",
    "from import": "{% from 'x' import y %}",
    "extends": "{% extends 'x' %}",
    "underscore in a branch": "{% if messages|length > 99 %}{{ messages._x }}{% endif %}",
    "no Jinja": "{% if %}",
    "unclosed": "{{ messages",
    "long": "a" * 70_000,
}


@pytest.mark.parametrize("source", ATTACKS.values(), ids=ATTACKS)
def test_chat_template_that_reaches_outside_is_refused_and_runs_nothing(
    folder: pathlib.Path, tmp_path: pathlib.Path, source: str
) -> None:
    canary = tmp_path / "canary"
    (folder / "chat_template.jinja").write_text(source.replace("CANARY", str(canary)))
    with pytest.raises(InvalidInput, match=r"chat_template\.jinja is refused"):
        check_base(folder)
    assert not canary.exists()


def test_chat_template_with_what_real_ones_use_is_taken() -> None:
    check_chat_template(
        "{%- set ns = namespace(found=false) -%}{% for m in messages if m.role != 'tool' %}"
        "{% if loop.first and m['role'] != 'system' %}{{ bos_token + '<|im_start|>system' }}{% endif %}"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | trim }}{% endgeneration %}{% else %}"
        "{{ m.content.split('</think>')[-1] | tojson }}{% set ns.found = true %}{% endif %}"
        "{% if ns.found %}{% continue %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
        "{{ raise_exception('x') if messages is not defined }}{{ strftime_now('%d %b %Y') }}",
        TEMPLATES,
    )
