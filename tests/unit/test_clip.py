"""The CLIP teacher: its loss, what it reads, labels added afterwards, and what of it reaches a text student."""

import hashlib
import io

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from mint_lib.calibration import normalise_scores
from mint_lib.clip.case_views import CaseVectors, Reading
from mint_lib.clip.contrastive import Batch, compute_loss, contrast, draw_batches, measure_retrieval
from mint_lib.clip.pool import Pool, Views, fit_pool
from mint_lib.errors import IntegrityError, InvalidInput
from mint_lib.records import Case, Label
from mint_lib.teachers.clip import ClipTeacher
from mint_lib.vision.fitting import TrainingPlan, fit_best_epoch

LABELS = [
    Label(id=f"T:{number}", name=name)
    for number, name in enumerate(("red upright", "red lying", "blue upright", "blue lying"))
]


def draw_tile(rng, *, blue, upright):
    """Noise with stripes: colour and direction tell the label."""
    pixels = rng.integers(90, 140, size=(64, 64, 3)).astype(np.uint8)
    colour = (40, 60, 220) if blue else (220, 60, 40)
    for start in range(int(rng.integers(4)), 62, 8):
        stripe = (slice(None), slice(start, start + 3))
        pixels[stripe if upright else stripe[::-1]] = colour
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def make_cases(count, *, seed, columns=(0, 1, 2, 3)):
    """The image tells the whole label, the text only its colour, beside words that tell nothing."""
    rng = np.random.default_rng(seed)
    cases = []
    for number in range(count):
        column = columns[number % len(columns)]
        colour, direction = LABELS[column].name.split()
        noise = rng.choice(["thin", "wide", "dull", "bright"])
        cases.append(
            Case(
                case_id=f"case-{seed}-{number}",
                group_id=f"case-{seed}-{number}",
                text=f"{noise} stripes, {colour} {colour}.",
                image=draw_tile(rng, blue=colour == "blue", upright=direction == "upright"),
                label_id=LABELS[column].id,
                source="toy",
                synthetic=True,
            )
        )
    return cases


def make_teacher(*, seed=1, labels=LABELS, **changes):
    config = {
        "pretrained": None,
        "architecture": {"image_size": 64, "hidden_size": 16, "joint_size": 16, "num_heads": 2, "max_text_tokens": 12},
        "prompts": ["{label}", "stripes, {label}"],
        "learning_rate": 1e-2,
        "batch_size": 32,
        "num_epochs": 8,
        **changes,
    }
    return ClipTeacher(ClipTeacher.Config.model_validate(config), labels, seed=seed)


def share_right(teacher, cases):
    columns = {label.id: column for column, label in enumerate(teacher.labels)}
    truth = np.array([columns[case.label_id] for case in cases])
    return float((teacher.score(cases).argmax(axis=1) == truth).mean())


def without(cases, *fields):
    return [case.model_copy(update=dict.fromkeys(fields)) for case in cases]


@pytest.fixture(scope="module")
def fitted():
    train = make_cases(96, seed=1)
    train[3:90:12] = without(train[3:90:12], "text")
    train[7:90:12] = without(train[7:90:12], "image")
    teacher = make_teacher()
    return teacher, teacher.fit(train, make_cases(32, seed=2))


def test_clip_loss_with_one_positive_is_that_of_radford():
    torch.manual_seed(0)
    left, right = (torch.nn.functional.normalize(torch.randn(5, 8), dim=-1) for _ in range(2))
    logits, diagonal = 7 * left @ right.T, torch.arange(5)
    wanted = (
        torch.nn.functional.cross_entropy(logits, diagonal) + torch.nn.functional.cross_entropy(logits.T, diagonal)
    ) / 2
    # float32 sums in another order
    assert contrast(left, right, torch.eye(5, dtype=torch.bool), torch.tensor(7.0)).item() == pytest.approx(
        wanted.item(), rel=1e-5
    )


def test_clip_loss_with_several_positives_is_that_of_yang():
    """UniCL's equations written out: a positive's log-probability, averaged over the positives of each item."""
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(6, 4)), rng.normal(size=(3, 4))
    classes = np.array([0, 0, 1, 1, 1, 0])  # no image of the third label
    logits = 2.0 * left @ right.T
    by_image = [-(row - np.log(np.exp(row).sum()))[label] for row, label in zip(logits, classes, strict=True)]
    by_label = []
    for label in (0, 1):
        row = logits[:, label]
        by_label.append(-(row - np.log(np.exp(row).sum()))[classes == label].mean())
    found = contrast(
        torch.tensor(left), torch.tensor(right), torch.tensor(classes[:, None] == np.arange(3)), torch.tensor(2.0)
    )
    assert found.item() == pytest.approx((np.mean(by_image) + np.mean(by_label)) / 2, rel=1e-12)


def test_clip_cases_of_one_label_do_not_push_each_other_from_its_prompt():
    """Where two images of a label lie alike, the label's prompt draws both; a single positive would repel the other."""
    images = torch.tensor([[0.6, 0.8], [0.6, 0.8], [1.0, 0.0]], requires_grad=True)
    labels = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    several = torch.tensor([[True, False], [True, False], [False, True]])
    contrast(images, labels, several, torch.tensor(5.0)).backward()
    assert torch.allclose(images.grad[0], images.grad[1])
    assert (images.grad[:2] @ labels[0] < 0).all()  # descent raises the similarity


class Vectors:
    """An encoder whose images and windows are their own vectors."""

    device = torch.device("cpu")

    def scale(self):
        return torch.tensor(3.0)

    def embed_images(self, images):
        return torch.tensor(images)

    def embed_windows(self, windows):
        return torch.tensor(windows, dtype=torch.float64)


def test_clip_loss_of_a_batch_asks_only_for_what_its_cases_have():
    rng = np.random.default_rng(0)
    images, texts, prompts = rng.normal(size=(2, 4)), rng.normal(size=(2, 4)), rng.normal(size=(2, 4))
    batch = Batch(
        image_rows=[0, 1], images=list(images), text_rows=[1, 2], windows=texts.tolist(), text_keys=[0, 1],
        targets=[0, 1, 1], prompts=prompts.tolist(),
    )  # fmt: skip
    tensors = [torch.tensor(value) for value in (images, texts, prompts)]
    terms = [
        contrast(tensors[0], tensors[2], torch.tensor([[True, False], [False, True]]), torch.tensor(3.0)),
        contrast(tensors[1], tensors[2], torch.tensor([[False, True], [False, True]]), torch.tensor(3.0)),
        contrast(tensors[0][1:], tensors[1], torch.tensor([[True, False]]), torch.tensor(3.0)),
    ]
    assert compute_loss(Vectors(), batch).item() == pytest.approx((sum(terms) / 3).item(), rel=1e-12)


def test_clip_batches_hold_every_case_once_with_its_own_text_and_image():
    readings = [
        Reading(windows=[[number]] if number % 3 else [], images=np.full((2, 1), number) if number % 2 else None)
        for number in range(10)
    ]
    batches = list(
        draw_batches(
            readings, list(range(10)), list(range(10)), [[[90]], [[91], [92]]], np.random.default_rng(0),
            vary=lambda window, rng: window, batch_size=4,
        )
    )  # fmt: skip
    assert sorted(target for batch in batches for target in batch.targets) == list(range(10))
    for batch in batches:
        assert [batch.targets[row] for row in batch.image_rows] == [int(image[0]) for image in batch.images]
        assert [batch.targets[row] for row in batch.text_rows] == [window[0] for window in batch.windows]
        assert batch.prompts[0] == [90]
        assert batch.prompts[1] in ([91], [92])


def test_clip_learns_from_image_and_text_together_and_uses_what_is_there(fitted):
    teacher, report = fitted
    cases = make_cases(80, seed=3)
    assert share_right(teacher, cases) > 0.9
    assert share_right(teacher, without(cases, "text")) > 0.9
    assert 0.3 < share_right(teacher, without(cases, "image")) < 0.7  # the text tells the colour only
    assert report["num_train_without_image"] == 7
    assert report["num_train_without_text"] == 8
    assert report["retrieval"]["image_to_text_recall_at_5"] > 2 * report["retrieval"]["chance_recall_at_1"]


def test_clip_image_teacher_reads_no_text_and_text_control_no_image():
    cases = make_cases(24, seed=3)
    for inputs, hidden in (("image", "text"), ("text", "image")):
        teacher = make_teacher(inputs=inputs, num_epochs=2)
        teacher.fit(make_cases(32, seed=1), make_cases(16, seed=2))
        scores = teacher.score(cases)
        assert np.ptp(scores, axis=0).max() > 0.1
        assert np.allclose(scores, teacher.score(without(cases, hidden)), atol=1e-6)
        [lacking] = without(cases[:1], "text" if hidden == "image" else "image")
        assert np.ptp(teacher.score([lacking])) == 0


def test_clip_read_back_scores_alike_to_the_bit(fitted, tmp_path):
    teacher, _ = fitted
    teacher.save(tmp_path)
    cases = make_cases(12, seed=4)
    loaded = ClipTeacher.load(tmp_path, LABELS)
    assert np.array_equal(loaded.score(cases), teacher.score(cases))
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    again = tmp_path / "again"
    again.mkdir()
    loaded.save(again)
    assert all((again / path.name).read_bytes() == path.read_bytes() for path in tmp_path.iterdir() if path.is_file())
    with pytest.raises(InvalidInput, match="not the 4 given"):
        ClipTeacher.load(tmp_path, LABELS[::-1])


def test_clip_with_another_tower_than_it_was_fitted_with_is_refused(fitted, tmp_path):
    teacher, _ = fitted
    teacher.save(tmp_path)
    digest = teacher._encoder.facts["tower_digest"]
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace(digest, "sha256:" + "0" * 64))
    with pytest.raises(IntegrityError, match="fitted with sha256:000"):
        ClipTeacher.load(tmp_path, LABELS)


def test_clip_seed_decides_the_weights_and_nothing_global_does(tmp_path):
    digests = []
    for name, seed, noise in (("a", 1, 5), ("b", 1, 6), ("c", 2, 5)):
        torch.manual_seed(noise)
        teacher = make_teacher(seed=seed, num_epochs=2, num_variations=2, drop_phrase_share=0.2)
        teacher.fit(make_cases(24, seed=1), make_cases(8, seed=2))
        folder = tmp_path / name
        folder.mkdir()
        teacher.save(folder)
        digests.append(hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest())
    assert digests[0] == digests[1] != digests[2]


def test_clip_score_of_a_case_does_not_depend_on_its_batch(fitted):
    teacher, _ = fitted
    cases = make_cases(12, seed=5)
    cases[2:4] = without(cases[2:4], "image")
    alone = np.concatenate([teacher.score([case]) for case in cases[:4]])
    assert teacher.score(cases)[:4] == pytest.approx(alone, abs=1e-4)


def test_clip_long_text_is_read_to_its_end(fitted):
    teacher, _ = fitted
    [case] = without(make_cases(1, seed=6), "image")
    padded = case.model_copy(update={"text": "thin stripes, " * 20})
    ending = padded.model_copy(update={"text": padded.text + "blue blue blue."})
    blue = normalise_scores(teacher.score([padded, ending]))[:, 2:].sum(axis=1)
    assert blue[1] > blue[0]


def test_clip_added_label_is_found_by_its_words_without_training():
    """The held-out label joins what others taught: blue of one, lying of another."""
    teacher = make_teacher(labels=LABELS[:3], num_epochs=20, patience_epochs=20)
    described = [
        case.model_copy(update={"text": LABELS[int(case.label_id[-1])].name})
        for case in make_cases(90, seed=1, columns=(0, 1, 2))
    ]
    teacher.fit(described[:72], described[72:])
    larger = teacher.add_labels([LABELS[3].model_copy(update={"name": "azure prone", "synonyms": ("blue lying",)})])
    unseen = without(make_cases(40, seed=3, columns=(3,)), "text")
    scores = larger.score(unseen)
    assert scores.shape == (40, 4)
    assert (scores.argmax(axis=1) == 3).mean() > 0.5  # chance: .25; standard error at most .08
    seen = without(make_cases(30, seed=4, columns=(0, 1, 2)), "text")
    assert share_right(larger, seen) > 0.6
    assert np.allclose(normalise_scores(larger.score(seen)[:, :3]), normalise_scores(teacher.score(seen)))
    assert len(teacher.labels) == 3


def test_clip_teacher_with_an_added_label_is_saved_and_read_back(fitted, tmp_path):
    teacher, _ = fitted
    added = Label(id="T:9", name="dull stripes")
    larger = teacher.add_labels([added])
    larger.save(tmp_path)
    cases = make_cases(4, seed=3)
    assert np.array_equal(ClipTeacher.load(tmp_path, [*LABELS, added]).score(cases), larger.score(cases))


@pytest.mark.parametrize(
    ("label", "message"),
    [(Label(id="T:0", name="wide"), "already"), (Label(id="T:9", name="chartreuse zigzag"), "knows no word of label")],
)
def test_clip_label_that_cannot_be_added_is_refused(fitted, label, message):
    with pytest.raises(InvalidInput, match=message):
        fitted[0].add_labels([label])


def test_clip_pool_trusts_the_view_that_tells_more_and_lets_either_speak_alone():
    rng = np.random.default_rng(0)
    truth = rng.integers(3, size=300)
    telling = np.log(normalise_scores(3.0 * np.eye(3)[truth] + rng.normal(size=(300, 3))))
    silent = np.log(normalise_scores(rng.normal(size=(300, 3))))
    has_image, has_text = np.arange(300) % 10 != 0, np.arange(300) % 10 != 1
    pool = fit_pool(Views(telling, silent, has_image, has_text), truth)
    assert pool.image_weight > 0.8
    assert pool.text_temperature > 3  # of a view that tells nothing, little is left
    scores = pool.apply(Views(telling, silent, has_image, has_text))
    assert np.allclose(scores[0], silent[0] / pool.text_temperature)
    assert np.allclose(scores[1], telling[1] / pool.image_temperature)
    nothing = np.zeros(300, dtype=bool)
    assert not pool.apply(Views(telling, silent, nothing, nothing)).any()
    assert fit_pool(Views(telling, silent, nothing, nothing), truth) == Pool()


def test_clip_retrieval_counts_equal_texts_as_right_and_leaves_out_cases_without_both():
    images = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.0, 0.0]])
    texts = np.array([[0.9, 0.1], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    has_image = np.array([True, True, True, False])
    vectors = CaseVectors(images, texts, has_image, np.ones(4, dtype=bool))
    apart = measure_retrieval(vectors, ["a", "b", "c", "d"], ks=(1, 2))
    # The first two images lie nearest to the second text, the third to the first, which comes first at k = 2 as well.
    assert apart["image_to_text_recall_at_1"] == pytest.approx(1 / 3)
    assert apart["image_to_text_recall_at_2"] == pytest.approx(2 / 3)
    alike = measure_retrieval(vectors, ["a", "a", "c", "d"], ks=(1,))
    assert alike["image_to_text_recall_at_1"] == pytest.approx(2 / 3)
    assert alike["chance_recall_at_1"] == pytest.approx(5 / 9)
    assert alike["num_cases"] == 3
    assert measure_retrieval(vectors._replace(has_image=~has_image), ["a", "b", "c", "d"]) == {}


def test_fitting_keeps_the_best_epoch_and_stops_without_a_better_one():
    network = torch.nn.Linear(1, 1)
    losses, weights = iter([3.0, 1.0, 2.0, 2.0, 0.5]), []

    def evaluate():
        weights.append(network.weight.item())
        return {"validation_nll": next(losses)}

    history = fit_best_epoch(
        network,
        TrainingPlan(learning_rate=0.1, weight_decay=0.0, num_epochs=5, patience_epochs=2, warmup_share=0.0),
        draw_epoch=lambda: [torch.ones(1, 1)] * 3,
        compute_loss=lambda batch: (network(batch) - 5).square().mean(),
        num_batches=3,
        evaluate=evaluate,
        description="toy",
    )
    assert [row["epoch"] for row in history] == [1, 2, 3, 4]
    assert network.weight.item() == weights[1]
    assert history[1]["train_loss"] < history[0]["train_loss"]
    assert not network.training


def test_clip_scale_never_exceeds_100(fitted):
    teacher, _ = fitted
    before = teacher._encoder.logit_scale.item()
    with torch.no_grad():
        teacher._encoder.logit_scale.fill_(9.0)
    assert teacher._encoder.scale().item() == pytest.approx(100, rel=1e-5)
    with torch.no_grad():
        teacher._encoder.logit_scale.fill_(before)


def test_clip_without_labelled_training_cases_is_refused():
    with pytest.raises(InvalidInput, match="train has none"):
        make_teacher().fit([], make_cases(4, seed=1))


def test_clip_whose_training_cases_lack_what_it_reads_is_refused():
    blind = without(make_cases(8, seed=1), "text")
    with pytest.raises(InvalidInput, match="None of the 8 training cases"):
        make_teacher(inputs="text").fit(blind, make_cases(4, seed=2))
    some = [*blind[:-2], *make_cases(2, seed=3)]
    report = make_teacher(inputs="text", num_epochs=1, batch_size=2).fit(some, make_cases(4, seed=2))
    assert report["num_train_without_text"] == 6
    assert report["retrieval"] == {}


@pytest.mark.parametrize(
    "changes",
    [
        {"pretrained": "vinid/plip"},
        {"architecture": None},
        {"training": "none"},
        {"prompts": []},
        {"prompts": ["a tile"]},
        {"inputs": "face"},
        {"architecture": {"image_size": 100}},
        {"architecture": {"hidden_size": 30, "num_heads": 4}},
    ],
)
def test_clip_config_that_fits_no_model_is_refused(changes):
    with pytest.raises(ValidationError):
        make_teacher(**changes)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A folder as `save_pretrained` leaves it, with random weights in CLIP's own format."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    letters = [chr(place) for place in range(33, 127)]
    marks = ["<|startoftext|>", "<|endoftext|>"]
    words = [*letters, *(letter + "</w>" for letter in letters), "re", "red</w>", "bl", "ue</w>", *marks]
    vocabulary = {word: place for place, word in enumerate(words)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[("r", "e"), ("re", "d</w>"), ("b", "l"), ("u", "e</w>")])
    tokenizer.save_pretrained(folder)
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(words), "max_position_embeddings": 24, "eos_token_id": vocabulary["<|endoftext|>"]}
    config = CLIPConfig(
        text_config={**layers, **text, "bos_token_id": vocabulary["<|startoftext|>"]},
        vision_config={**layers, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessorPil(**size).save_pretrained(folder)
    return folder


def test_clip_zero_shot_scores_as_the_pretrained_model_does(pretrained):
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

    labels = [Label(id="T:0", name="red"), Label(id="T:1", name="blue")]
    teacher = make_teacher(
        labels=labels, architecture=None, pretrained=str(pretrained), training="none", inputs="image",
        prompts=["a {label} tile"],
    )  # fmt: skip
    cases = make_cases(8, seed=1, columns=(0, 2))
    cases = [case.model_copy(update={"label_id": f"T:{place % 2}"}) for place, case in enumerate(cases)]
    report = teacher.fit([], cases)
    assert report["history"] == []
    model, tokenizer = CLIPModel.from_pretrained(pretrained), AutoTokenizer.from_pretrained(pretrained)
    images = [Image.open(io.BytesIO(case.image)) for case in cases]
    inputs = CLIPImageProcessorPil.from_pretrained(pretrained)(images=images, return_tensors="pt")
    inputs |= tokenizer(["a red tile", "a blue tile"], padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = model(**inputs).logits_per_image.log_softmax(-1).numpy()
    temperature = report["pool"]["image_temperature"]
    # Resizing 64 pixels to 32 rounds to bytes in both; the model is float32.
    assert np.allclose(teacher.score(cases) * temperature, wanted, atol=2e-3)


def test_clip_fine_tuned_from_pretrained_weights_is_read_back_without_them(pretrained, tmp_path):
    teacher = make_teacher(architecture=None, pretrained=str(pretrained), num_epochs=2, num_variations=2)
    report = teacher.fit(make_cases(16, seed=1), make_cases(8, seed=2))
    assert [row["epoch"] for row in report["history"]] == [1, 2]
    cases = make_cases(6, seed=3)
    cases[0] = cases[0].model_copy(update={"text": "red stripes " * 30})  # more than the 24 tokens of a window
    teacher.save(tmp_path)
    saved = (tmp_path / "config.json").read_text().replace(str(pretrained), "nowhere")
    (tmp_path / "config.json").write_text(saved)
    assert np.array_equal(ClipTeacher.load(tmp_path, LABELS).score(cases), teacher.score(cases))


def test_clip_folder_without_a_clip_model_is_refused(tmp_path):
    teacher = make_teacher(architecture=None, pretrained=str(tmp_path), training="none")
    with pytest.raises(InvalidInput, match="cannot be read as a CLIP model"):
        teacher.fit([], make_cases(4, seed=1))


def test_clip_teacher_of_photo_and_text_gives_a_text_student_pairs_without_any_image(fitted):
    from mint_lib.pairing.checks import PairChecker
    from mint_lib.pairing.facts import SplitFacts
    from mint_lib.pairing.settings import PreferencesConfig
    from mint_lib.pairing.split import pair_split
    from mint_lib.student import StudentConfig, load_reader
    from mint_lib.teacher import rank_scores
    from mint_lib.template import Template

    teacher, _ = fitted
    cases = make_cases(8, seed=3)
    cases[1:3] = [*without(cases[1:2], "image"), *without(cases[2:3], "text")]
    rankings = rank_scores(cases, teacher.score(cases), LABELS, 1.0, "sha256:" + "0" * 64)
    student = StudentConfig(model="tiny", window_tokens=600)
    config = PreferencesConfig(name="toy", seed=1, student=student, top_k=1, bottom_q=1)
    template = Template.load(config.template).with_num_answers(1)
    checker = PairChecker(load_reader(student), template, LABELS, student.window_tokens)
    facts = SplitFacts()
    pairs = list(pair_split(cases, rankings, LABELS, config, checker, "train", facts))
    checks = facts.describe()
    assert [pair.case_id for pair in pairs] == [case.case_id for case in cases if case.text]
    assert all(pair.images == () for pair in pairs)
    assert checks["dropped"] == {"no_text": 1}
