"""Every mode of the alignment stage, from pairs in a store to a student: DeepSpeed, all weights, images, memory."""

import importlib.util
import io
import os
import pathlib
import pickle
import shutil
import signal
import threading
import time

import psutil
import pyarrow.fs
import pytest
import torch
from PIL import Image, ImageDraw
from pydantic import ValidationError
from tiny_alignment import LABELS, TEMPLATE, config_of, make_pairs
from tiny_preferences import add_passed_gate

from mint_lib.alignment import align_student
from mint_lib.records import StageRecord
from mint_lib.rows import pair_schema
from mint_lib.student import StudentConfig, load_reader, load_student
from mint_lib.student_weights import TUNED_FOLDERS
from mint_lib.training import on_ray
from mint_lib.training.adapter import LoraConfig
from mint_lib.training.deepspeed import restrict_checkpoint_loading
from mint_lib.training.watch import Validation

NUM_TRAINED, NUM_CASES = 12, 18
COLOURS = [(220, 30, 30), (30, 30, 220), (30, 160, 30)]
# Weights as small as these would else stay whole on every worker.
SHARDED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
IMAGES = {
    "student": StudentConfig(model="tiny-image", reads="image"),
    "lora": LoraConfig(rank=8, projector="trained"),
    "batch_tokens": 512,
}
# Float32 sums in another order: 1e-7 a step, of which training makes 1e-6 in nine. A gradient that is off by a factor,
# or a rate, decay or norm that is not the recipe's, shows in the second digit.
ROUNDING = {"rel": 1e-4, "abs": 1e-5}
WINDOW = 106  # tokens; a case takes 103 to 111

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None or shutil.which("g++") is None,
    reason="DeepSpeed is not installed, or there is no g++, with which it compiles its exchange between CPU processes",
)


def draw_square(case):
    """A PNG of a square on grey, in the colour of the case's label."""
    image = Image.new("RGB", (48, 48), (96 + case, 100, 100))
    left = case % 5 * 4
    ImageDraw.Draw(image).rectangle((left, left, left + 20, left + 20), fill=COLOURS[case % 3])
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def split_pairs(*, with_images):
    """Training and validation pairs. With images, the text tells nothing."""
    pairs = make_pairs(NUM_CASES)
    if with_images:
        prompt = TEMPLATE.prompt("A face.")
        pairs = [
            pair.model_copy(update={"prompt": prompt, "images": (draw_square(int(pair.case_id.split("-")[1])),)})
            for pair in pairs
        ]
    num_train_pairs = NUM_TRAINED * (len(LABELS) - 1)
    return pairs[:num_train_pairs], pairs[num_train_pairs:]


def write_preferences(store, train, validation):
    with store.write("preferences", "test") as version:
        version.add_rows("train", train, pair_schema())
        version.add_rows("validation", validation, pair_schema())
        version.add_json("labels.json", [label.model_dump(mode="json") for label in LABELS])
        version.add_bytes("template.yaml", TEMPLATE.data)
        add_passed_gate(version)
        return version.commit(StageRecord(stage="preferences", config={}, inputs={}, code_version="test"))


def mode_of(**values):
    defaults = {
        "trees_per_batch": 5,
        "epochs": 6,
        "validate_every_steps": 6,
        "checkpoint_every_steps": 3,
        "early_stop_patience": 99,
        "keep_best": "loss",
        "max_gradient_norm": 0.5,
        "weight_decay": 0.1,
        "cpus_per_worker": 1,
        "max_failures": 0,
    }
    return config_of(**(defaults | values))


class Aligned:
    """What one run of the stage left in the store."""

    def __init__(self, store, config):
        train, self.validation_pairs = split_pairs(with_images=config.student.reads == "image")
        preferences = write_preferences(store, train, self.validation_pairs)
        self.store, self.config = store, config
        self.reference = align_student(config, store=store, preferences=preferences)
        self.record = store.record(self.reference)
        self.history = store.read_json(self.reference, "history.json")
        files = store.files(self.reference).items()
        self.files = {path: entry.sha256 for path, entry in files if path != "record.json"}  # which holds the config

    def figures(self, kind, name):
        return [row[name] for row in self.history if row["kind"] == kind]

    def measure(self, folder):
        """The validation's figures of the student as it is loaded from the store."""
        tuned = TUNED_FOLDERS[self.config.tuning]
        self.store.download(self.reference, folder, tuned)
        validation = Validation(
            pairs=self.validation_pairs,
            labels=LABELS,
            template=TEMPLATE,
            reader=load_reader(self.config.student),
            window_tokens=self.config.student.window_tokens,
            over_long=self.config.student.over_long,
        )
        return validation.measure(load_student(self.config.student, folder / tuned))


def assert_same_training(one, other):
    """The numbers of two runs agree within the tolerance, from the first step to the last."""
    for kind, names in {
        "train": ("loss", "grad_norm", "learning_rate", "reward_margin"),
        "validation": ("loss", "reward_margin", "agreement_mrr"),
    }.items():
        for name in names:
            assert one.figures(kind, name) == pytest.approx(other.figures(kind, name), **ROUNDING), name


@pytest.fixture(scope="module", autouse=True)
def one_ray_session(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        if "TORCH_EXTENSIONS_DIR" not in os.environ:
            # A compilation that was killed leaves a lock that the next one waits for, so none is shared.
            patch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.mktemp("torch_extensions")))
        with on_ray.ray_session(2):
            yield


@pytest.fixture(scope="module")
def align(s3_store):
    """A function that runs the stage undisturbed, once for each mode."""
    done = {}

    def run(**values):
        config = mode_of(**values)
        key = config.model_dump_json()
        if key not in done:
            done[key] = Aligned(s3_store(), config)
        return done[key]

    return run


def align_with_a_kill(store, config):
    """A run of which one worker is killed once there is a checkpoint."""
    killed = []
    folder = store.runs_path("x").rpartition("/")[0]

    def has_checkpoint():
        selector = pyarrow.fs.FileSelector(folder, recursive=True, allow_not_found=True)
        return any(item.path.endswith("/manifest.json") for item in store.arrow_filesystem().get_file_info(selector))

    def kill():
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and not killed:
            if has_checkpoint():
                # Only this session's workers: others on the machine may train too.
                for process in psutil.Process().children(recursive=True):
                    if "RayTrainWorker" in " ".join(process.cmdline()):
                        os.kill(process.pid, signal.SIGKILL)
                        killed.append(process.pid)
                        break
            time.sleep(0.02)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    broken = Aligned(store, config)
    killer.join(timeout=10)
    assert killed, "the run ended before a worker could be killed"
    return broken


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_steps_in_passes_train_as_data_parallelism_does(align, stage):
    plain = align(num_workers=2)
    # 150 places hold one tree, so a step is up to five passes, an odd number of which leaves one worker a pass short.
    sharded = align(num_workers=2, batch_tokens=150, deepspeed={"stage": stage, "settings": SHARDED})
    assert_same_training(sharded, plain)
    assert sharded.record.counts == plain.record.counts


@needs_deepspeed
def test_deepspeed_killed_worker_resumes_to_the_same_files(align, store):
    values = {"num_workers": 2, "batch_tokens": 150, "deepspeed": {"stage": 3, "settings": SHARDED}}
    unbroken = align(**values)
    broken = align_with_a_kill(store, mode_of(**values, max_failures=2))
    assert broken.files == unbroken.files


@needs_deepspeed
def test_deepspeed_checkpoint_that_holds_code_is_not_run(tmp_path, monkeypatch):
    class Code:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "was_run",)

    from deepspeed.runtime.checkpoint_engine import torch_checkpoint_engine

    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")  # so that it is put back
    restrict_checkpoint_loading()
    torch.save({"module": Code()}, tmp_path / "states.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch_checkpoint_engine.TorchCheckpointEngine().load(str(tmp_path / "states.pt"))
    assert not (tmp_path / "was_run").exists()


@needs_deepspeed
def test_deepspeed_all_weights_at_stage_3_are_gathered_into_the_version(align, tmp_path):
    values = {"num_workers": 2, "tuning": "full", "learning_rate": 1e-3}
    plain = align(**values)
    sharded = align(**values, deepspeed={"stage": 3, "settings": SHARDED})
    assert_same_training(sharded, plain)
    assert sharded.record.counts == plain.record.counts
    assert sharded.measure(tmp_path)["loss"] == pytest.approx(sharded.record.metrics["best_loss"], **ROUNDING)


@needs_deepspeed
def test_deepspeed_offloaded_optimizer_changes_no_number(align):
    kept = align(num_workers=2, batch_tokens=150, deepspeed={"stage": 2, "settings": SHARDED})
    offloaded = align(
        num_workers=2, batch_tokens=150, deepspeed={"stage": 2, "offload": "optimizer", "settings": SHARDED}
    )
    assert_same_training(offloaded, kept)


def test_full_tuning_writes_weights_that_give_the_validated_numbers(align, tmp_path):
    aligned = align(num_workers=2, tuning="full", learning_rate=1e-3)
    losses = aligned.figures("validation", "loss")
    assert min(losses[1:]) < losses[0]
    assert {path for path in aligned.files if path.startswith("weights/")} >= {
        "weights/config.json",
        "weights/model.safetensors",
        "weights/tokenizer.json",
    }
    assert not any(path.startswith("adapter/") for path in aligned.files)
    found = aligned.measure(tmp_path)
    best = {name: aligned.record.metrics[f"best_{name}"] for name in found}
    assert found == pytest.approx(best, **ROUNDING)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_quantised_base_is_trained_and_the_record_says_so(align, tmp_path):
    aligned = align(quantisation="nf4")
    losses = aligned.figures("validation", "loss")
    assert min(losses[1:]) < losses[0]
    assert any("nf4" in note for note in aligned.record.notes)
    # The adapter is served on the base's own weights, which 4 bits only approximate.
    assert aligned.measure(tmp_path)["loss"] == pytest.approx(aligned.record.metrics["best_loss"], rel=0.2)


@pytest.mark.parametrize("method", ["orpo", "dpo"])
def test_image_student_learns_by_every_method(align, tmp_path, method):
    aligned = align(method=method, **IMAGES)
    figures = aligned.figures("validation", "loss" if method == "sft" else "reward_margin")
    assert figures[-1] < figures[0] if method == "sft" else figures[-1] > figures[0]
    num_projected = sum(p.numel() for p in load_student(IMAGES["student"]).model.connector.parameters())
    assert aligned.record.counts["num_trainable_parameters"] > num_projected
    found = aligned.measure(tmp_path)
    best = {name: aligned.record.metrics[f"best_{name}"] for name in found}
    assert found == pytest.approx(best, **ROUNDING)


def test_image_student_killed_worker_resumes_to_the_same_files(align, store):
    unbroken = align(**IMAGES)
    broken = align_with_a_kill(store, mode_of(**IMAGES, max_failures=2))
    assert broken.files == unbroken.files


def test_image_student_with_cached_frozen_layers_is_refused():
    with pytest.raises(ValidationError, match="frozen_layers: cache is for text students"):
        mode_of(student=IMAGES["student"], lora=LoraConfig(last_layers=1), frozen_layers="cache")


def test_over_long_prompts_are_cut_and_counted(align):
    aligned = align(student=StudentConfig(model="tiny", window_tokens=WINDOW, over_long="cut_prompt"))
    counts = aligned.record.counts
    assert 0 < counts["num_cut_prompts"] < NUM_TRAINED
    assert counts["num_cut_tokens"] >= counts["num_cut_prompts"]
    assert any(f"{counts['num_cut_prompts']} prompts were too long" in note for note in aligned.record.notes)
