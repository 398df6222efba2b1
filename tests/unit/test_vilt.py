"""The ViLT teacher: what it reads, that it learns from both inputs, and that a seed decides everything."""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from mint_lib.errors import InvalidInput
from mint_lib.records import Case, Label
from mint_lib.teachers.vilt import ViltTeacher
from mint_lib.vilt.inputs import find_edges, make_word_tokenizer, read_photo, split_windows, vary_findings, vary_photo

LABELS = [Label(id=f"OMIM:{number}", name=f"Disease {number}") for number in range(4)]


def draw_face(rng, *, upright):
    """A grey noisy square with stripes that stand or lie: only the photo tells."""
    pixels = rng.integers(90, 130, size=(32, 32, 3)).astype(np.uint8)
    stripes = slice(4, 28, 4)
    if upright:
        pixels[4:28, stripes] = 250
    else:
        pixels[stripes, 4:28] = 250
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def make_cases(count, *, seed):
    """Text tells the label's half, the photo its parity; some cases lack one of them."""
    rng = np.random.default_rng(seed)
    cases = []
    for number in range(count):
        column = number % 4
        words = [("heart", "septum", "aorta"), ("brain", "seizure", "speech")][column // 2]
        noise = rng.choice(["boy", "girl", "fever", "short", "tall"], size=3)
        cases.append(
            Case(
                case_id=f"case-{seed}-{number}",
                group_id=f"case-{seed}-{number}",
                text=None if number % 15 == 14 else " ".join([*rng.choice(words, size=2), *noise]),
                image=None if number % 15 == 7 else draw_face(rng, upright=column % 2 == 0),
                label_id=LABELS[column].id,
                source="toy",
                synthetic=True,
            )
        )
    return cases


def make_teacher(*, seed=1, **changes):
    config = {
        "pretrained": None,
        "architecture": {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "image_size": 32, "patch_size": 16},
        "max_text_tokens": 16,
        "learning_rate": 3e-3,
        "batch_size": 16,
        "num_epochs": 8,
        **changes,
    }
    return ViltTeacher(ViltTeacher.Config.model_validate(config), LABELS, seed=seed)


def share_right(teacher, cases):
    truth = np.array([int(case.label_id.removeprefix("OMIM:")) for case in cases])
    return float((teacher.score(cases).argmax(axis=1) == truth).mean())


@pytest.fixture(scope="module")
def fitted():
    teacher = make_teacher()
    report = teacher.fit(make_cases(160, seed=1), make_cases(40, seed=2))
    return teacher, report


def test_vilt_learns_from_face_and_text_together(fitted):
    teacher, report = fitted
    cases = [case for case in make_cases(120, seed=3) if case.text and case.image]
    assert share_right(teacher, cases) > 0.9
    without_face = [case.model_copy(update={"image": None}) for case in cases]
    without_text = [case.model_copy(update={"text": None}) for case in cases]
    assert share_right(teacher, without_face) < 0.75
    assert share_right(teacher, without_text) < 0.75
    assert report["num_train_without_photo"] == 11
    assert report["num_train_without_text"] == 10


def test_vilt_text_only_control_cannot_see_the_photo():
    teacher = make_teacher(inputs="text_only", num_epochs=6)
    teacher.fit(make_cases(160, seed=1), make_cases(40, seed=2))
    cases = [case for case in make_cases(60, seed=3) if case.text and case.image]
    blind = teacher.score([case.model_copy(update={"image": None}) for case in cases])
    assert np.array_equal(teacher.score(cases), blind)


def test_vilt_keeps_the_best_epoch(fitted):
    teacher, report = fitted
    validation = make_cases(40, seed=2)
    truth = [int(case.label_id.removeprefix("OMIM:")) for case in validation]
    likelihood = -teacher.score(validation)[np.arange(40), truth].mean()
    assert likelihood == pytest.approx(min(row["validation_nll"] for row in report["history"]), abs=1e-5)


def test_vilt_read_back_scores_alike_to_the_bit(fitted, tmp_path):
    teacher, _ = fitted
    teacher.save(tmp_path)
    cases = make_cases(20, seed=4)
    assert np.array_equal(ViltTeacher.load(tmp_path, LABELS).score(cases), teacher.score(cases))
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    with pytest.raises(InvalidInput, match="not the 4 given"):
        ViltTeacher.load(tmp_path, LABELS[::-1])


def test_vilt_seed_decides_the_weights_and_nothing_global_does(tmp_path):
    import torch

    digests = []
    for name, seed, noise in (("a", 1, 5), ("b", 1, 6), ("c", 2, 5)):
        torch.manual_seed(noise)
        teacher = make_teacher(seed=seed, num_epochs=2)
        teacher.fit(make_cases(48, seed=1), make_cases(12, seed=2))
        folder = tmp_path / name
        folder.mkdir()
        teacher.save(folder)
        digests.append(hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest())
    assert digests[0] == digests[1] != digests[2]


def test_vilt_score_of_a_case_does_not_depend_on_its_batch(fitted):
    teacher, _ = fitted
    cases = make_cases(40, seed=5)
    alone = np.concatenate([teacher.score([case]) for case in cases[:5]])
    assert teacher.score(cases)[:5] == pytest.approx(alone, abs=1e-4)


def test_vilt_long_text_is_read_to_its_end(fitted):
    teacher, _ = fitted
    [case] = make_cases(1, seed=6)
    padded = case.model_copy(update={"text": "boy " * 40, "image": None})
    ending = padded.model_copy(update={"text": padded.text + "seizure brain"})
    brain = np.exp(teacher.score([padded, ending]))[:, 2:].sum(axis=1)
    assert brain[1] > brain[0]


def test_vilt_windows_hold_every_word_in_order():
    words = [f"word{number}" for number in range(50)]
    tokenizer = make_word_tokenizer([" ".join(words)], min_count=1)
    windows = split_windows(tokenizer, " ".join(words), window_tokens=16)
    assert all(len(window) <= 16 for window in windows)
    read = [tokenizer.id_to_token(token) for window in windows for token in window[1:-1]]
    assert list(dict.fromkeys(read)) == words


def test_vilt_tokenizer_is_the_same_for_the_same_texts_and_folds_rare_words():
    texts = ["Short boy, short girl", "tall boy", "tall girl with 1q21.1"]
    tokenizer = make_word_tokenizer(texts, min_count=2)
    assert tokenizer.to_str() == make_word_tokenizer(texts[::-1], min_count=2).to_str()
    assert tokenizer.encode("Short fever").tokens == ["[CLS]", "short", "[UNK]", "[SEP]"]


def test_vilt_edges_ignore_light_and_tell_directions_apart():
    rng = np.random.default_rng(0)
    upright, lying = (read_photo(draw_face(rng, upright=side), side_pixels=32, case_id="c") for side in (True, False))
    darker = (upright * 0.5 + 10).astype(np.uint8)
    assert np.abs(find_edges(upright) - find_edges(darker)).mean() < 0.2
    assert np.abs(find_edges(upright) - find_edges(lying)).mean() > 0.4
    assert find_edges(np.full((3, 32, 32), 128, dtype=np.uint8)).max() == 0


def test_vilt_varied_photo_keeps_shape_and_type():
    photo = np.random.default_rng(0).integers(0, 255, size=(3, 32, 32)).astype(np.uint8)
    varied = [vary_photo(photo, np.random.default_rng(seed)) for seed in range(4)]
    assert all(item.shape == photo.shape and item.dtype == np.uint8 for item in varied)
    assert len({item.tobytes() for item in varied}) == 4


@pytest.mark.parametrize("image", [b"no image", b"\x89PNG\r\n\x1a\n"])
def test_vilt_photo_that_cannot_be_read_is_named_by_its_case(image):
    with pytest.raises(InvalidInput, match="case-7"):
        read_photo(image, side_pixels=32, case_id="case-7")


def test_vilt_without_labelled_training_cases_is_refused():
    with pytest.raises(InvalidInput, match="train has none"):
        make_teacher().fit([], make_cases(4, seed=1))


@pytest.mark.parametrize(
    "changes",
    [
        {"pretrained": "dandelin/vilt-b32-mlm"},
        {"architecture": None},
        {"drop_face_share": 0.6, "drop_text_share": 0.6},
        {"inputs": "face_only"},
        {"architecture": {"image_size": 30, "patch_size": 16}},
        {"architecture": {"image_size": 36, "patch_size": 6}},
        {"architecture": {"hidden_size": 30, "num_heads": 4}},
    ],
)
def test_vilt_config_that_fits_no_model_is_refused(changes):
    with pytest.raises(ValidationError):
        make_teacher(**changes)


def test_vilt_varied_findings_stay_whole_and_within_their_sentence():
    stop, comma = 1, 2
    words = [10, 11, comma, 12, comma, 13, stop, 20, comma, 21, 22, stop]
    phrases = {(10, 11, comma), (12, comma), (13, stop), (20, comma), (21, 22, stop)}
    orders = set()
    for seed in range(20):
        varied = vary_findings(words, np.random.default_rng(seed), separators=[stop, comma], drop_share=0.0)
        assert sorted(varied) == sorted(words)
        assert max(varied.index(word) for word in (10, 12, 13)) < min(varied.index(word) for word in (20, 21))
        assert varied[varied.index(21) + 1] == 22
        orders.add(tuple(varied))
    assert len(orders) > 3
    kept = vary_findings(words * 50, np.random.default_rng(0), separators=[stop, comma], drop_share=0.3)
    assert 0.6 < len(kept) / (50 * len(words)) < 0.8
    assert any(tuple(kept[:size]) in phrases for size in (2, 3))


@pytest.fixture
def pretrained(tmp_path):
    """A folder as `save_pretrained` leaves it, with random weights in ViLT's own format."""
    import torch
    from transformers import BertTokenizerFast, ViltConfig, ViltModel

    folder = tmp_path / "pretrained"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", ",", "boy", "girl", "heart", "brain", "##s"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = ViltConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=16,
        max_position_embeddings=12,
    )
    ViltModel(config).save_pretrained(folder)
    return folder


def test_vilt_starts_from_pretrained_weights_and_is_read_back_without_them(pretrained, tmp_path):
    changes = {"architecture": None, "pretrained": str(pretrained), "max_text_tokens": 12, "num_epochs": 1}
    teacher = make_teacher(**changes, learning_rate=1e-12)
    report = teacher.fit(make_cases(16, seed=1), make_cases(8, seed=2))
    from safetensors.torch import load_file

    saved = tmp_path / "saved"
    saved.mkdir()
    teacher.save(saved)
    name = "embeddings.text_embeddings.word_embeddings.weight"
    before, after = load_file(pretrained / "model.safetensors"), load_file(saved / "model.safetensors")
    assert np.allclose(after[f"encoder.{name}"], before[name], atol=1e-6)
    assert report["history"][0]["epoch"] == 1
    cases = make_cases(6, seed=3)
    (pretrained / "model.safetensors").unlink()
    assert np.array_equal(ViltTeacher.load(saved, LABELS).score(cases), teacher.score(cases))


def test_vilt_window_longer_than_the_pretrained_one_is_refused(pretrained):
    teacher = make_teacher(architecture=None, pretrained=str(pretrained), max_text_tokens=13)
    with pytest.raises(InvalidInput, match="more than the 12"):
        teacher.fit(make_cases(8, seed=1), make_cases(4, seed=2))
