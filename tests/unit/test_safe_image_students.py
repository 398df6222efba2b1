"""Image students that name code, lie about their parts or reach beyond them are refused before they are loaded."""

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest
from tiny_image_students import FAMILIES, make_student, write_folder

from mint_lib.errors import InvalidInput
from mint_lib.server.safe_adapter import check_adapter
from mint_lib.server.safe_base import check_base
from mint_lib.server.safe_config import IMAGE_FAMILIES
from mint_lib.student_weights import fetch_student_folder
from mint_lib.training.adapter import IMAGE_PARTS, LoraConfig, add_adapter

EVERYTHING = LoraConfig(rank=2, projector="trained", towers="language_and_vision")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """A folder of each family."""
    folders = {}
    for family in FAMILIES:
        folders[family] = tmp_path_factory.mktemp(family)
        write_folder(make_student(family), folders[family])
    return folders


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """The folder of an adapter of each family, with projector and tower."""
    folders = {}
    for family in FAMILIES:
        folder = folders[family] = tmp_path_factory.mktemp(f"{family}-adapter")
        add_adapter(make_student(family).model, EVERYTHING).save_pretrained(str(folder))
        (folder / "README.md").unlink()
        change(folder, "adapter_config.json", base_model_name_or_path="tiny")
    return folders


@pytest.fixture
def folder(bases: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(bases["llava"], tmp_path / "base"))


@pytest.fixture
def adapter(adapters: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(adapters["llava"], tmp_path / "adapter"))


def change(folder: pathlib.Path, file: str, part: str | None = None, **values: Any) -> None:
    path = folder / file
    content = json.loads(path.read_text())
    (content if part is None else content[part]).update(values)
    path.write_text(json.dumps(content))


def check(adapter: pathlib.Path, base: pathlib.Path) -> None:
    facts = check_base(base)
    check_adapter(
        adapter,
        base_model="tiny",
        num_layers=facts.num_layers,
        base_tensors=facts.tensors,
        image_parts=facts.image_parts,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_image_base_and_adapter_of_every_family_are_taken_as_they_are_written(
    bases: dict[str, pathlib.Path], adapters: dict[str, pathlib.Path], family: str
) -> None:
    facts = check_base(bases[family])
    assert facts.num_layers == 2
    assert facts.image_parts is not None
    assert any(name.startswith(facts.image_parts.decoder) for name in facts.tensors)
    assert any(name.startswith(facts.image_parts.projector) for name in facts.tensors)
    check(adapters[family], bases[family])


def test_image_families_have_their_projectors_where_training_has_them() -> None:
    assert {name: family.projector for name, family in IMAGE_FAMILIES.items()} == {
        name: parts.projector for name, parts in IMAGE_PARTS.items()
    }


def test_embedded_image_base_is_taken() -> None:
    facts = check_base(fetch_student_folder("tiny-image"))
    assert facts.image_parts is not None
    assert facts.max_window_tokens == 2048


@pytest.mark.parametrize(
    ("part", "values"),
    [
        (None, {"auto_map": {"AutoModel": "evil.Model"}}),
        ("text_config", {"auto_map": {"AutoModel": "evil.Model"}}),
        ("vision_config", {"auto_map": {"AutoModel": "evil.Model"}}),
        ("text_config", {"_attn_implementation": "evil/kernels"}),
        ("vision_config", {"_attn_implementation_internal": "evil/kernels"}),
        ("text_config", {"quantization_config": {"quant_method": "evil"}}),
        (None, {"trust_remote_code": True}),
        (None, {"text_config": None}),
        (None, {"vision_config": "evil"}),
        (None, {"audio_config": {"model_type": "evil"}}),
        ("text_config", {"model_type": "evil"}),
        ("vision_config", {"model_type": "llama"}),
        ("vision_config", {"model_type": ["clip_vision_model"]}),
        ("vision_config", {"image_size": 10**6}),
        ("vision_config", {"image_size": 0}),
        ("vision_config", {"num_hidden_layers": 10**6}),
        ("text_config", {"num_hidden_layers": 10**6}),
        ("text_config", {"vocab_size": 10**12}),
        ("vision_config", {"hidden_size": 10**12}),
        ("text_config", {"dtype": "int8"}),
        (None, {"architectures": ["LlamaForCausalLM"]}),
        (None, {"model_type": "llama"}),
        ("text_config", {"model_type": "mistral", "sliding_window": 16}),
    ],
    ids=str,
)
def test_image_config_that_names_code_or_cannot_be_is_refused(
    folder: pathlib.Path, part: str | None, values: dict[str, Any]
) -> None:
    change(folder, "config.json", part, **values)
    with pytest.raises(InvalidInput, match=r"config\.json is refused") as caught:
        check_base(folder)
    assert "evil" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("vision_config", {"num_hidden_layers": 3}),
        ("vision_config", {"image_size": 64}),
        ("text_config", {"intermediate_size": 32}),
        (None, {"multimodal_projector_bias": False}),
    ],
    ids=str,
)
def test_image_base_whose_weights_are_not_those_of_its_config_is_refused(
    folder: pathlib.Path, part: str | None, values: dict[str, Any]
) -> None:
    change(folder, "config.json", part, **values)
    with pytest.raises(InvalidInput, match="weight files"):
        check_base(folder)


@pytest.mark.parametrize(
    "values",
    [
        {"image_processor_type": "EvilImageProcessor"},
        {"image_processor_type": "CLIPImageProcessorEvil"},
        {"image_processor_type": ["CLIPImageProcessor"]},
        {"processor_class": "EvilProcessor"},
        {"auto_map": {"AutoImageProcessor": "evil.Processor"}},
        {"trust_remote_code": True},
        {"image_processor": {"auto_map": {}}},
        {"image_processor": "evil"},
        {"feature_extractor_type": "evil"},
        {"size": {"height": 10**6, "width": 10**6}},
        {"size": {"evil": 3}},
        {"crop_size": {"height": -1, "width": 32}},
        {"size": 0},
        {"max_image_tiles": 10**6},
        {"patch_size": "evil"},
        {"resample": True},
        {"rescale_factor": 1e300},
        {"do_resize": "evil"},
        {"image_mean": [0.5]},
        {"image_std": ["evil"] * 3},
        {"image_std": [1e9] * 3},
    ],
    ids=str,
)
def test_image_processor_that_is_not_plain_is_refused(folder: pathlib.Path, values: dict[str, Any]) -> None:
    change(folder, "preprocessor_config.json", **values)
    with pytest.raises(InvalidInput, match=r"preprocessor_config\.json is refused") as caught:
        check_base(folder)
    assert "evil" not in str(caught.value).lower()


def test_image_base_that_does_not_say_how_it_sees_is_refused(folder: pathlib.Path) -> None:
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(InvalidInput, match="how the student sees"):
        check_base(folder)


@pytest.mark.parametrize(
    "modules",
    [
        ["model.vision_tower"],
        ["model.multi_modal_projector", "lm_head"],
        ["lm_head"],
        ["model.multi_modal_projector.linear_1"],
        ["multi_modal_projector"],
        "model.multi_modal_projector",
        [".*"],
    ],
    ids=str,
)
def test_image_adapter_that_trains_another_module_is_refused(
    adapter: pathlib.Path, bases: dict[str, pathlib.Path], modules: Any
) -> None:
    change(adapter, "adapter_config.json", modules_to_save=modules)
    with pytest.raises(InvalidInput, match=r"adapter_config\.json is refused: it trains whole modules other than"):
        check(adapter, bases["llava"])


PROJECTOR = "base_model.model.model.multi_modal_projector.linear_1.weight"
CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "missing": lambda tensors: tensors.pop(PROJECTOR),
    "other shape": lambda tensors: tensors.update({PROJECTOR: tensors[PROJECTOR][:, :3]}),
    "one more": lambda tensors: tensors.update({f"{PROJECTOR}s": tensors[PROJECTOR].clone()}),
    "weights of the tower": lambda tensors: tensors.update(
        {"base_model.model.model.vision_tower.post_layernorm.weight": tensors[PROJECTOR][0].clone()}
    ),
    "adapter on the projector": lambda tensors: tensors.update(
        {PROJECTOR.replace("weight", "lora_A.weight"): tensors[PROJECTOR][:2].clone()}
    ),
}


@pytest.mark.parametrize("edit", CHANGES.values(), ids=CHANGES)
def test_image_adapter_whose_tensors_are_not_those_of_its_parts_is_refused(
    adapter: pathlib.Path, bases: dict[str, pathlib.Path], edit: Callable[[dict[str, Any]], object]
) -> None:
    from safetensors.torch import load_file, save_file

    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    with pytest.raises(InvalidInput, match=r"adapter_model\.safetensors is refused"):
        check(adapter, bases["llava"])


def test_image_adapter_that_says_nothing_of_its_projector_is_refused(
    adapter: pathlib.Path, bases: dict[str, pathlib.Path]
) -> None:
    change(adapter, "adapter_config.json", modules_to_save=None)
    with pytest.raises(InvalidInput, match="not the A or B side"):
        check(adapter, bases["llava"])


def test_image_adapter_of_a_cut_student_keeps_the_towers_layers(
    adapters: dict[str, pathlib.Path], bases: dict[str, pathlib.Path]
) -> None:
    model = make_student("llava").model
    del model.model.language_model.layers[1]
    cut = bases["llava"].parent / "cut-adapter"
    model.config.text_config.num_hidden_layers = 1
    add_adapter(model, EVERYTHING).save_pretrained(str(cut))
    (cut / "README.md").unlink()
    change(cut, "adapter_config.json", base_model_name_or_path="tiny")
    facts = check_base(bases["llava"])
    known = {"base_model": "tiny", "base_tensors": facts.tensors, "image_parts": facts.image_parts}
    check_adapter(cut, num_layers=1, **known)
    with pytest.raises(InvalidInput, match="of its tensors are missing"):
        check_adapter(adapters["llava"], num_layers=1, **known)
