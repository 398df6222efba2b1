"""What is trained of text and image students, how many weights, that nothing else changes, and what is saved."""

import io
import json
import logging

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tiny_image_students import FAMILIES, make_student, write_folder
from tiny_preferences import TINY, make_pair
from tiny_training import build_tiny_trainer

from mint_lib.errors import InvalidInput
from mint_lib.server.safe_adapter import check_adapter
from mint_lib.server.safe_base import check_base
from mint_lib.server.safe_files import check_safetensors
from mint_lib.student import StudentConfig, load_reader, load_student
from mint_lib.student_weights import fetch_student_folder, list_student_files
from mint_lib.training.adapter import LoraConfig
from mint_lib.training.preference_trees import grow_trees, score_pairs
from mint_lib.training.tuning import hash_frozen, place_tuned, prepare_tuning, save_tuned, start_from

RANK = 3
LORA = LoraConfig(rank=RANK)
PEFOMED = LoraConfig(rank=RANK, projector="trained")
IMAGE_STUDENT = StudentConfig(model=f"folder:{fetch_student_folder('tiny-image')}", reads="image")
PAIRS = [make_pair("c1", "Boy.", "Marfan", "Noonan"), make_pair("c2", "Girl of 3.", "Kabuki", "Noonan")]
# By name, as a reference that does not ask the code under test.
VISION = {"mllama": ".vision_model.", "llava": ".vision_tower.", "qwen2_vl": ".visual.", "qwen2_5_vl": ".visual."}
PROJECTOR = {"idefics3": ".connector.", "smolvlm": ".connector.", "qwen2_vl": ".merger.", "qwen2_5_vl": ".merger."}
# Float32 sums in another order, on logits of the order of 1.
ROUNDING = 1e-5


def make_image(colour):
    file = io.BytesIO()
    Image.new("RGB", (40, 32), colour).save(file, "PNG")
    return file.getvalue()


IMAGE_PAIRS = [
    pair.model_copy(update={"images": (make_image(colour),)})
    for pair, colour in zip(PAIRS, ("red", "blue"), strict=True)
]


def is_projector(family, name):
    return PROJECTOR.get(family, ".multi_modal_projector.") in f"{name}."


def is_vision(family, name):
    return VISION.get(family, ".vision_model.") in name and not is_projector(family, name)


def prepare(config, tuning, lora=LORA):
    torch.manual_seed(1)
    return prepare_tuning(load_student(config), tuning=tuning, lora=lora)


def copy_weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def ask(model, pairs, config):
    """The model's log-probability of a token of every answer."""
    reader = load_reader(config)
    trees = grow_trees(pairs, reader, window_tokens=512)
    return torch.cat(score_pairs(model.eval(), trees, reader=reader, batch_tokens=1000))


@pytest.mark.parametrize("projector", ["frozen", "trained"])
@pytest.mark.parametrize("towers", ["language", "language_and_vision"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tuning_of_an_image_student_trains_the_parts_that_its_config_names(family, towers, projector):
    model = make_student(family).model
    expected = 0
    for name, module in model.named_modules():
        if is_projector(family, name):
            if projector == "trained":
                expected += sum(parameter.numel() for parameter in module.parameters(recurse=False))
        elif (
            isinstance(module, torch.nn.Linear)
            and name != "lm_head"
            and (towers == "language_and_vision" or not is_vision(family, name))
        ):
            expected += RANK * (module.in_features + module.out_features)
    tuned = prepare_tuning(model, tuning="adapter", lora=LoraConfig(rank=RANK, towers=towers, projector=projector))
    trained = {name: p.numel() for name, p in tuned.model.named_parameters() if p.requires_grad}
    assert tuned.num_trained == sum(trained.values()) == expected
    assert any(is_vision(family, name) for name in trained) == (towers == "language_and_vision")
    assert any(is_projector(family, name) for name in trained) == (projector == "trained")
    assert not any("lm_head" in name or "embed_tokens" in name for name in trained)


def test_tuning_of_the_last_layers_counts_those_of_the_language_model():
    model = make_student("idefics3").model
    assert model.config.vision_config.num_hidden_layers == 2
    tuned = prepare_tuning(model, tuning="adapter", lora=LoraConfig(rank=RANK, last_layers=1))
    trained = [name for name, parameter in tuned.model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 7
    assert all("text_model.layers.1." in name for name in trained)


@pytest.mark.parametrize("lora", [PEFOMED, LoraConfig(towers="language_and_vision")], ids=["projector", "tower"])
def test_tuning_of_vision_that_a_text_student_does_not_have_is_refused(lora):
    with pytest.raises(InvalidInput, match=r"the student \(llama\) reads text only"):
        prepare(TINY, "adapter", lora)


def test_tuning_of_vision_of_an_unknown_family_is_refused():
    model = make_student("llava").model
    model.config.model_type = "another"
    with pytest.raises(InvalidInput, match=r"family another .* is not known; it is of idefics3, smolvlm, llava"):
        prepare_tuning(model, tuning="adapter", lora=PEFOMED)


@pytest.mark.parametrize("values", [{"projector": "trained"}, {"towers": "language_and_vision"}], ids=str)
def test_tuning_of_the_last_layers_and_of_what_lies_below_them_is_refused(values):
    with pytest.raises(ValueError, match="last_layers 1 ends the backward pass above the images"):
        LoraConfig(last_layers=1, **values)


@pytest.fixture(scope="module")
def trained_projector(tmp_path_factory):
    """An image student trained for some steps with its projector, and the weights before."""
    folder = tmp_path_factory.mktemp("projector")
    tuned = prepare(IMAGE_STUDENT, "adapter", PEFOMED)
    before, frozen = copy_weights(tuned.model), hash_frozen(tuned.model)
    trainer = build_tiny_trainer(tuned.model, IMAGE_PAIRS, folder, reader=load_reader(IMAGE_STUDENT))
    trainer.train()
    save_tuned(trainer, folder / "best", base_name="tiny-image")
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return tuned.model, before, frozen, losses, folder / "best"


def test_tuning_with_the_projector_changes_it_and_the_adapter_and_nothing_else(trained_projector):
    model, before, frozen, losses, _ = trained_projector
    assert losses[-1] < losses[0]
    assert hash_frozen(model) == frozen
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {name for name, value in model.named_parameters() if value.requires_grad}
    assert any("connector" in name for name in changed)


def test_tuning_with_the_projector_answers_alike_when_loaded_again(trained_projector):
    model, _, _, _, folder = trained_projector
    loaded = load_student(IMAGE_STUDENT, folder)
    expected = ask(model, IMAGE_PAIRS, IMAGE_STUDENT)
    torch.testing.assert_close(ask(loaded, IMAGE_PAIRS, IMAGE_STUDENT), expected, atol=ROUNDING, rtol=ROUNDING)
    with loaded.disable_adapter():
        assert (ask(loaded, IMAGE_PAIRS, IMAGE_STUDENT) - expected).abs().max() > 0.1
    saved = check_safetensors(folder / "adapter_model.safetensors")
    assert any("connector" in name and ".lora_" not in name for name in saved)


def test_tuning_with_the_projector_is_refused_on_a_base_that_reads_text(trained_projector):
    base_tensors = check_safetensors(fetch_student_folder("tiny-image") / "model.safetensors")
    with pytest.raises(InvalidInput, match=r"whole modules too \(lora\.projector: trained\).*reads text only"):
        check_adapter(trained_projector[-1], base_model="tiny-image", num_layers=2, base_tensors=base_tensors)


def test_tuning_adapter_files_are_the_same_in_every_process_and_name_no_folder(trained_projector, tmp_path):
    folder = trained_projector[-1]
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    text = (folder / "adapter_config.json").read_text()
    config = json.loads(text)
    assert config["base_model_name_or_path"] == "tiny-image"
    assert config["target_modules"] == sorted(config["target_modules"])
    assert list(config) == sorted(config)
    assert "/" not in text


def test_tuning_projector_of_a_bfloat16_student_is_kept_in_float32_and_fits_in():
    family = make_student("llava")
    model = family.model.bfloat16()
    tuned = prepare_tuning(model, tuning="adapter", lora=PEFOMED)
    trained = {name: p.dtype for name, p in tuned.model.named_parameters() if p.requires_grad and "projector" in name}
    assert set(trained.values()) == {torch.float32}
    assert len(trained) == 4, "weights and biases of two layers"
    read = family.reader.read(IMAGE_PAIRS[0].prompt, IMAGE_PAIRS[0].images)
    pixels = read.image_inputs["pixel_values"].bfloat16()
    logits = tuned.model(input_ids=torch.tensor([read.ids]), pixel_values=pixels.view(-1, 3, 32, 32)).logits
    assert logits.dtype == torch.bfloat16
    logits.float().square().mean().backward()
    assert all(p.grad.abs().max() > 0 for name, p in tuned.model.named_parameters() if name in trained)


def test_tuning_hash_sees_every_frozen_weight_and_no_trained_one():
    model = prepare(TINY, "adapter").model
    before = hash_frozen(model)
    for name, parameter in model.named_parameters():
        kept = parameter.data.clone()
        parameter.data.view(-1)[-1] += 1e-3
        assert (hash_frozen(model) == before) == (".lora_" in name)
        parameter.data.copy_(kept)
    assert hash_frozen(model) == before


def test_tuning_hash_of_bfloat16_weights_sees_their_last_bit():
    model = load_student(StudentConfig(model="tiny", dtype="bfloat16")).requires_grad_(False)
    before = hash_frozen(model)
    next(iter(model.parameters())).data.view(torch.int16)[0, 0] ^= 1
    assert hash_frozen(model) != before


@pytest.fixture(scope="module")
def trained_whole(tmp_path_factory):
    """A text student of which all weights were trained for some steps."""
    folder = tmp_path_factory.mktemp("whole")
    tuned = prepare(TINY, "full")
    before = copy_weights(tuned.model)
    trainer = build_tiny_trainer(tuned.model, PAIRS, folder, reader=load_reader(TINY), learning_rate=3e-3)
    trainer.train()
    save_tuned(trainer, folder / "best", base_name="tiny")
    place_tuned(folder / "best", folder / "version", student=TINY)
    return tuned, before, trainer, folder


def test_tuning_in_full_changes_every_weight_and_counts_them(trained_whole):
    tuned, before, trainer, _ = trained_whole
    assert tuned.num_trained == tuned.num_parameters == sum(value.numel() for value in before.values())
    assert all(not torch.equal(value, before[name]) for name, value in tuned.model.named_parameters())
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]


def test_tuning_in_full_is_saved_as_a_model_that_needs_no_base(trained_whole):
    tuned, _, _, folder = trained_whole
    weights = folder / "version" / "weights"
    assert not (folder / "version" / "adapter").exists()
    assert set(weights.iterdir()) == set(list_student_files(weights))
    expected = ask(tuned.model, PAIRS, TINY)
    torch.testing.assert_close(ask(load_student(TINY, weights), PAIRS, TINY), expected, atol=0, rtol=0)
    alone = StudentConfig(model=f"folder:{weights}")
    torch.testing.assert_close(ask(load_student(alone), PAIRS, alone), expected, atol=0, rtol=0)
    assert (expected - ask(load_student(TINY), PAIRS, TINY)).abs().max() > 0.1
    assert check_base(weights).num_layers == 2, "the server takes it as it takes a base"


def test_tuning_in_full_writes_the_same_files_in_every_process_and_names_no_folder(trained_whole):
    weights = trained_whole[-1] / "version" / "weights"
    config = json.loads((weights / "config.json").read_text())
    assert list(config) == sorted(config)
    assert config["dtype"] == "float32"
    assert not any(str(path.parent) in path.read_text(errors="replace") for path in weights.glob("*.json"))


def test_tuning_in_full_of_a_bfloat16_student_trains_float32_and_saves_bfloat16(tmp_path):
    config = StudentConfig(model="tiny", dtype="bfloat16")
    tuned = prepare(config, "full")
    assert {parameter.dtype for parameter in tuned.model.parameters()} == {torch.float32}
    # Far below what bfloat16 can add to a weight in one step.
    trainer = build_tiny_trainer(tuned.model, PAIRS, tmp_path, reader=load_reader(config), learning_rate=1e-6)
    before = copy_weights(tuned.model)
    trainer.train()
    assert all(not torch.equal(value, before[name]) for name, value in tuned.model.named_parameters())
    save_whole = tuned.model.save_pretrained
    trainer.save_model = lambda folder: save_whole(folder, max_shard_size="100KB")
    for _ in range(2):  # the second time as the first: saving must not change what is known of the precision
        save_tuned(trainer, tmp_path / "best", base_name="tiny")
    assert json.loads((tmp_path / "best" / "config.json").read_text())["dtype"] == "bfloat16"
    index = json.loads((tmp_path / "best" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * tuned.num_parameters
    shards = sorted((tmp_path / "best").glob("*.safetensors"))
    assert len(shards) > 1
    assert {path.name for path in shards} == set(index["weight_map"].values())
    for path in shards:
        with safe_open(path, "pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118 - no dict
    loaded = load_student(config, tmp_path / "best")
    for name, value in tuned.model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), value.bfloat16())


def test_tuning_of_an_image_student_in_full_is_saved_with_what_reads_its_images(tmp_path):
    tuned = prepare(IMAGE_STUDENT, "full")
    trainer = build_tiny_trainer(
        tuned.model, IMAGE_PAIRS, tmp_path, reader=load_reader(IMAGE_STUDENT), max_steps=1, learning_rate=3e-3
    )
    trainer.train()
    save_tuned(trainer, tmp_path / "best", base_name="tiny-image")
    place_tuned(tmp_path / "best", tmp_path / "version", student=IMAGE_STUDENT)
    alone = StudentConfig(model=f"folder:{tmp_path / 'version' / 'weights'}", reads="image")
    expected = ask(tuned.model, IMAGE_PAIRS, IMAGE_STUDENT)
    torch.testing.assert_close(ask(load_student(alone), IMAGE_PAIRS, alone), expected, atol=ROUNDING, rtol=ROUNDING)


def test_tuning_tells_how_many_parameters_are_trained(caplog):
    with caplog.at_level(logging.INFO, logger="mint_lib.training.adapter"):
        tuned = prepare(TINY, "adapter")
    assert caplog.records[0].args == (tuned.num_trained, tuned.num_parameters)


def test_tuning_of_a_saved_image_student_reads_names_as_they_are_saved(tmp_path):
    """Families rename weights between memory and files; an adapter with a projector must find its way back."""
    family = make_student("llava")
    write_folder(family, tmp_path / "base")
    config = StudentConfig(model=f"folder:{tmp_path / 'base'}", reads="image")
    tuned = prepare(config, "adapter", PEFOMED)
    trainer = build_tiny_trainer(tuned.model, IMAGE_PAIRS, tmp_path, reader=family.reader)
    trainer.train()
    save_tuned(trainer, tmp_path / "best", base_name="tiny-image")
    loaded = load_student(config, tmp_path / "best")
    expected = {name: value for name, value in tuned.model.named_parameters() if value.requires_grad}
    found = dict(loaded.named_parameters())
    assert len(expected) == 2 * 14 + 4
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_training_starts_from_what_an_earlier_one_trained(tmp_path):
    first = prepare(IMAGE_STUDENT, "adapter", PEFOMED).model
    with torch.no_grad():
        for parameter in first.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    first.save_pretrained(tmp_path)
    second = prepare(IMAGE_STUDENT, "adapter", PEFOMED).model
    fresh = {name: value.clone() for name, value in second.named_parameters()}
    start_from(second, tmp_path)
    trained = {name for name, value in first.named_parameters() if value.requires_grad}
    for (name, found), (_, wanted) in zip(second.named_parameters(), first.named_parameters(), strict=True):
        assert torch.equal(found, wanted), name
        assert torch.equal(found, fresh[name]) == (name not in trained), name
        assert found.requires_grad == (name in trained), name


def test_training_that_has_no_place_for_what_was_trained_is_refused(tmp_path):
    prepare(IMAGE_STUDENT, "adapter", PEFOMED).model.save_pretrained(tmp_path)
    with pytest.raises(InvalidInput, match="without a place here"):
        start_from(prepare(IMAGE_STUDENT, "adapter", LORA).model, tmp_path)
