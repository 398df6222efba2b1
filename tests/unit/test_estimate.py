import dataclasses
import io
import itertools
import types
import weakref

import pytest
import torch
import transformers
from rich.console import Console
from tiny_image_students import make_student
from torch.utils.flop_counter import FlopCounterMode

from mint_lib.errors import InvalidInput
from mint_lib.packing import collate_trees, pack_tree, predict_edges
from mint_lib.records import Reference
from mint_lib.student import StudentConfig, load_student
from mint_lib.training.accelerators import ACCELERATORS, choose_accelerators
from mint_lib.training.adapter import LoraConfig
from mint_lib.training.architecture import measure_architecture, read_architecture
from mint_lib.training.estimate import estimate_flops, estimate_memory, find_largest_batch
from mint_lib.training.estimate_setting import Setting, count_trained
from mint_lib.training.settings import AlignmentConfig
from mint_lib.training.tuning import prepare_tuning
from pipelines.forecast import forecast_alignment, print_forecasts

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "middle": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8},
}
SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
KEPT = ("activations", "around the layers", "bfloat16 copies")
LORAS = {
    "every layer": LoraConfig(rank=8),
    "last layer": LoraConfig(rank=8, last_layers=1),
    "two matrices": LoraConfig(rank=4, target_modules=("q_proj", "down_proj")),
    "weight-decomposed": LoraConfig(rank=8, update="weight_decomposed"),
    "dropout": LoraConfig(rank=8, dropout=0.1),
}


def _build(shape, *, num_key_value_heads=2, dtype=torch.float32, vocabulary=1000):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **shape, vocab_size=vocabulary, num_key_value_heads=num_key_value_heads, tie_word_embeddings=True
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


def _collate(*, num_trees=2, prompt_tokens=150, answer_tokens=20):
    generator = torch.Generator().manual_seed(1)

    def draw(length):
        return torch.randint(0, 1000, (length,), generator=generator).tolist()

    trees = [
        pack_tree(draw(prompt_tokens), [draw(answer_tokens), draw(answer_tokens)], with_prompt_edges=True)
        for _ in range(num_trees)
    ]
    return collate_trees(trees, pad_token_id=0)


def _setting_of(batch, **options):
    num_rows, num_places = batch["input_ids"].shape
    return Setting(
        batch_tokens=num_rows * num_places,
        row_tokens=num_places,
        mean_row_tokens=num_places,
        edge_share=len(batch["target_N"]) / (num_rows * num_places),
        trees_per_batch=num_rows,
        device="cpu",
        **options,
    )


def _prepare(shape, setting):
    """A student that is trained as `setting` says, and its architecture."""
    # All weights that are trained are float32, whatever they are computed in.
    dtype = torch.bfloat16 if setting.dtype == "bfloat16" and setting.tuning == "adapter" else torch.float32
    model = _build(shape, dtype=dtype)
    student = measure_architecture(model)
    model = prepare_tuning(model, tuning=setting.tuning, lora=setting.lora).model.train()
    if setting.activations == "recompute":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model, student


def _count_saved_bytes(model, batch, *, autocast):
    """Bytes that the backward pass holds when the forward pass is over, each memory once, weights left out."""

    class Held:
        def __init__(self, tensor):
            self.tensor = tensor

    held = weakref.WeakSet()

    def pack(tensor):
        box = Held(tensor)
        held.add(box)
        return box

    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        result = predict_edges(model, batch)
    storages = [box.tensor.untyped_storage() for box in held]
    assert result.requires_grad  # and lives until here, with its graph
    return sum({item.data_ptr(): item.nbytes() for item in storages if item.data_ptr() not in weights}.values())


@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS)
def test_trained_parameters_of_tiny_student_equal_pefts_count(lora):
    model = load_student(StudentConfig(model="tiny"))
    student = measure_architecture(model)
    counted = count_trained(student, Setting(lora=lora, batch_tokens=1, row_tokens=1, mean_row_tokens=1))
    tuned = prepare_tuning(model, tuning="adapter", lora=lora)
    assert counted.num_parameters == tuned.num_trained
    assert student.num_parameters + counted.num_parameters == tuned.num_parameters


@pytest.mark.parametrize("rank", [8, 256])
def test_trained_parameters_of_smollm2_equal_pefts_count(rank):
    with torch.device("meta"):
        model = _build(SMOLLM2, num_key_value_heads=3, vocabulary=49152)
        student = measure_architecture(model)
        tuned = prepare_tuning(model, tuning="adapter", lora=LoraConfig(rank=rank))
    assert student.num_parameters == 134_515_008  # as SmolLM2-135M's weight file
    counted = count_trained(
        student, Setting(lora=LoraConfig(rank=rank), batch_tokens=1, row_tokens=1, mean_row_tokens=1)
    )
    assert counted.num_parameters == tuned.num_trained


@pytest.mark.parametrize("family", ["idefics3", "llava", "mllama", "qwen2_vl"])
@pytest.mark.parametrize(("towers", "projector"), [("language", "trained"), ("language_and_vision", "frozen")])
def test_trained_parameters_of_image_student_equal_pefts_count(family, towers, projector):
    model = make_student(family).model
    lora = LoraConfig(rank=4, towers=towers, projector=projector)
    student = measure_architecture(model)
    counted = count_trained(student, Setting(lora=lora, batch_tokens=1, row_tokens=1, mean_row_tokens=1))
    assert counted.num_parameters == prepare_tuning(model, tuning="adapter", lora=lora).num_trained


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LORAS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kept_activations_of_adapter_equal_saved_tensors(shape, name, dtype):
    batch = _collate()
    setting = _setting_of(batch, lora=LORAS[name], dtype=dtype)
    model, student = _prepare(shape, setting)
    saved = _count_saved_bytes(model, batch, autocast=dtype == "bfloat16")
    estimated = sum(term.num_bytes for term in estimate_memory(student, setting) if term.name in KEPT)
    # What is not counted: the first layer's dropout masks, which autograd leaves out; indices; the smallest weights.
    assert estimated == pytest.approx(saved, rel=0.1 if name == "dropout" else 0.01)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kept_activations_of_full_tuning_equal_saved_tensors(shape, dtype):
    batch = _collate()
    setting = _setting_of(batch, tuning="full", dtype=dtype)
    model, student = _prepare(shape, setting)
    saved = _count_saved_bytes(model, batch, autocast=dtype == "bfloat16")
    estimated = sum(term.num_bytes for term in estimate_memory(student, setting) if term.name in KEPT)
    assert estimated == pytest.approx(saved, rel=0.05)  # not counted: the tied output layer's copy in bfloat16


@pytest.mark.parametrize("lora", [LORAS["every layer"], LORAS["last layer"]], ids=["every layer", "last layer"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_recomputed_activations_equal_saved_tensors(shape, lora):
    batch = _collate()
    setting = _setting_of(batch, lora=lora, activations="recompute")
    model, student = _prepare(shape, setting)
    saved = _count_saved_bytes(model, batch, autocast=False)
    estimated = sum(term.num_bytes for term in estimate_memory(student, setting) if term.name in KEPT)
    # Counted, but not seen by autograd: rotary angles, which a layer that runs again is given as they are.
    assert estimated == pytest.approx(saved, rel=0.15)


@pytest.mark.parametrize(
    "options",
    [
        {"lora": LoraConfig(rank=8)},
        {"lora": LoraConfig(rank=8, last_layers=2)},
        {"lora": LoraConfig(rank=8), "activations": "recompute"},
        {"tuning": "full"},
    ],
    ids=["adapter", "last layers", "recompute", "full"],
)
def test_operations_of_step_equal_pytorchs_count(options):
    batch = _collate()
    setting = _setting_of(batch, **options)
    model, student = _prepare(SHAPES["middle"], setting)
    (model if setting.tuning == "full" else model.get_base_model()).set_attn_implementation("eager")
    predict_edges(model, batch)  # the first pass runs twice, to find out what the model does to its logits
    with FlopCounterMode(display=False) as counter:
        predict_edges(model, batch).sum().backward()
    # The estimate is of FlashAttention, whose backward pass has 5 products to the 4 of the eager one that is counted.
    assert 1.0 < estimate_flops(student, setting) / counter.get_total_flops() < 1.06


def _memory(student, **options):
    setting = Setting(**{"batch_tokens": 2048, "row_tokens": 512, "mean_row_tokens": 400} | options)
    return {term.name: term.num_bytes for term in estimate_memory(student, setting)}


@pytest.fixture(scope="module")
def smollm2():
    with torch.device("meta"):
        return measure_architecture(_build(SMOLLM2, num_key_value_heads=3, vocabulary=49152))


def test_nf4_weights_have_half_a_byte_and_their_constants(smollm2):
    matrices = sum(layer.num_inputs * layer.num_outputs for layer in smollm2.linear_layers)
    rest = smollm2.num_parameters - matrices
    # 4 bits, and 0.127 bits of constants with double quantisation (QLoRA, section 3).
    expected = matrices * (4 + 0.127) / 8 + rest * 2
    found = _memory(smollm2, dtype="bfloat16", quantisation="nf4")["base weights"]
    assert found == pytest.approx(expected, rel=1e-4)


def test_deepspeed_shards_what_its_stage_says(smollm2):
    alone, four = ({"deepspeed_stage": 2, "tuning": "full", "num_workers": number} for number in (1, 4))
    assert _memory(smollm2, **four)["optimiser"] == _memory(smollm2, **alone)["optimiser"] / 4
    assert _memory(smollm2, **four)["trained weights"] == _memory(smollm2, **alone)["trained weights"]
    third = {"deepspeed_stage": 3, "tuning": "full", "num_workers": 4}
    assert _memory(smollm2, **third)["trained weights"] == _memory(smollm2, **alone)["trained weights"] / 4
    assert "optimiser" not in _memory(smollm2, **third, offload="optimizer")
    assert "trained weights" not in _memory(smollm2, **third, offload="optimizer_and_parameters")


def test_flex_attention_keeps_no_mask(smollm2):
    flex, sdpa = (_memory(smollm2, attention=name)["activations"] for name in ("flex", "sdpa"))
    # Each layer's mask in float32, and keys and values repeated from 3 heads to 9.
    assert sdpa - flex == 2048 * 30 * 4 * (512 + 2 * (576 - 192))


def test_largest_batch_fits_and_the_next_does_not(smollm2):
    setting = Setting(batch_tokens=64, row_tokens=500, mean_row_tokens=400.0)
    largest = find_largest_batch(smollm2, setting, memory_bytes=16e9)

    def needed(num_tokens):
        changed = dataclasses.replace(setting, batch_tokens=num_tokens)
        return sum(term.num_bytes for term in estimate_memory(smollm2, changed))

    assert largest % 128 == 0
    assert needed(largest) <= 16e9 < needed(largest + 128)


def test_largest_batch_is_none_where_the_longest_tree_does_not_fit(smollm2):
    setting = Setting(batch_tokens=64, row_tokens=100_000, mean_row_tokens=400.0)
    assert find_largest_batch(smollm2, setting, memory_bytes=16e9) is None


def test_family_of_other_layers_is_refused():
    with torch.device("meta"):
        model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(num_hidden_layers=1))
    with pytest.raises(InvalidInput, match="GPTNeoXForCausalLM"):
        measure_architecture(model)


def test_config_alone_gives_the_models_architecture(tmp_path):
    _build(SHAPES["tiny"]).config.save_pretrained(tmp_path)
    expected = measure_architecture(_build(SHAPES["tiny"] | {"num_hidden_layers": 1}))
    assert read_architecture(tmp_path, reads="text", num_layers=1) == expected


def test_unknown_accelerator_is_refused_with_all_names():
    with pytest.raises(InvalidInput) as caught:
        choose_accelerators(["b1000"])
    assert all(name in str(caught.value) for name in ACCELERATORS)


def _step(**options):
    student = options.pop("student", StudentConfig(model="tiny", window_tokens=200))
    config = AlignmentConfig(name="tiny", seed=1, student=student, **options)
    return types.SimpleNamespace(
        id="alignment", stage="alignment", config=config, inputs={"preferences": "preferences"}
    )


def _planned(step, reference=None):
    preferences = types.SimpleNamespace(id="preferences", stage="preferences")
    return [
        types.SimpleNamespace(step=preferences, reference=reference),
        types.SimpleNamespace(step=step, reference=None),
    ]


def _print(step, names, *, reference=None, store=None):
    file = io.StringIO()
    print_forecasts(_planned(step, reference), names, store=store, console=Console(file=file, width=200))
    return file.getvalue()


def test_forecast_takes_lengths_from_the_pairs_in_the_store():
    sides = {f"{side}_tokens": {"mean": mean, "max": 12} for side, mean in (("chosen", 8), ("rejected", 12))}
    checks = {"num_pairs": 30, "num_paired_cases": 20, "prompt_tokens": {"mean": 60, "max": 90}, **sides}
    store = types.SimpleNamespace(read_json=lambda reference, name: {"train": checks})
    step = _step(trees_per_batch=8, epochs=2)
    reference = Reference.parse(f"preferences/tiny@v000001#sha256:{'0' * 64}")
    forecast = forecast_alignment(step, _planned(step, reference), store=store)
    assert forecast.lengths.mean_row_tokens == 60 + 1.5 * (8 + 12)
    assert forecast.lengths.row_tokens == 90 + 2 * (12 + 12)
    assert forecast.num_steps == 3 * 2


def test_forecast_without_pairs_takes_the_window_and_says_so():
    step = _step()
    assert forecast_alignment(step, _planned(step), store=None).lengths.row_tokens == 200
    text = _print(step, ["l4", "cpu"])
    assert "no pairs yet: each tree taken at student.window_tokens, 200" in text
    rows = [line.split() for line in text.splitlines() if line.strip().startswith(("l4 ", "cpu "))]
    assert "fits" in rows[0]
    assert "not estimated" in " ".join(rows[1])


def test_forecast_of_trl_method_is_not_made_up():
    step = _step(method="dpo")
    assert "TRL" in forecast_alignment(step, _planned(step), store=None)


def test_forecast_of_hub_student_downloads_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    step = _step(student=StudentConfig(model="hub:nobody/nothing", revision="v1"))
    text = forecast_alignment(step, _planned(step), store=None)
    assert "hf download nobody/nothing config.json --revision v1" in text
    assert not list(tmp_path.iterdir())


def test_plan_without_type_hints_at_it_only_for_accelerators():
    assert "--gpu" in _print(_step(use_gpu=True), [])
    assert not _print(_step(), [])


def test_every_verdict_agrees_with_its_own_numbers():
    step = _step(student=StudentConfig(model="tiny", window_tokens=200), batch_tokens=2**23)
    forecast = forecast_alignment(step, _planned(step), store=None)
    verdicts = {
        name: (forecast.fit(accelerator), accelerator.memory_bytes)
        for name, accelerator in ACCELERATORS.items()
        if accelerator.memory_bytes
    }
    for fit, memory in verdicts.values():
        assert (fit.verdict == "does not fit") == (fit.num_bytes > memory)
        assert (fit.verdict == "fits") == (fit.num_bytes <= 0.9 * memory)
    largest = [fit.largest_batch for fit, _ in sorted(verdicts.values(), key=lambda item: item[1])]
    assert all(first <= second for first, second in itertools.pairwise(largest))
