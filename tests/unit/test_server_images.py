import base64
import io
import json
import re
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy
import pytest
from PIL import Image

from mint_lib.errors import InvalidInput
from mint_lib.records import Turn
from mint_lib.server.images import check_image, decode_image, read_base64, read_data_url
from mint_lib.server.limits import RequestLimits
from mint_lib.student import StudentConfig, load_reader
from mint_lib.template import Template

LIMITS = RequestLimits(max_image_bytes=200_000, max_image_pixels=250_000)


def encode(image: Image.Image, kind: str, **more: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return buffer.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (64, 48)) -> Image.Image:
    values = numpy.random.default_rng(3).integers(0, 255, (size[1], size[0], 3), dtype=numpy.uint8)
    return Image.fromarray(values).convert(mode)


def bomb() -> bytes:
    """A PNG whose header says 20,000 x 20,000 and whose data would decode to that."""
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100_000)), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def sixteen_bit_colour() -> bytes:
    """A PNG with 16 bits a channel, which Pillow would read as one with 8."""
    header = struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress((b"\0" + b"\x12\x34" * 48) * 16)), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_image_without_loss_is_decoded_to_its_pixels(kind: str, mode: str) -> None:
    image = noise(mode)
    more = {"lossless": True} if kind == "WEBP" else {}
    found = decode_image(encode(image, kind, **more), LIMITS)
    assert found.mode == "RGB"
    assert (numpy.asarray(found) == numpy.asarray(image.convert("RGB"))).all()


def test_image_in_jpeg_is_decoded_nearly() -> None:
    image = Image.new("RGB", (64, 64), (200, 30, 90))
    found = numpy.asarray(decode_image(encode(image, "JPEG", quality=95), LIMITS), dtype=int)
    # One flat colour: what is lost is rounding between colour spaces.
    assert numpy.abs(found - numpy.asarray(image, dtype=int)).max() <= 3


def test_image_with_transparency_is_put_on_white() -> None:
    image = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    assert decode_image(encode(image, "PNG"), LIMITS).getpixel((3, 3)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (bomb, "pixels"),
        (lambda: encode(noise(size=(501, 500)), "PNG")[:150_000], "pixels"),
        (lambda: encode(noise(size=(1, 1)), "PNG"), "1 x 1"),
        (lambda: encode(noise(size=(64, 7)), "PNG"), "at least 8"),
        (lambda: encode(noise(), "PNG", save_all=True, append_images=[noise("L").convert("RGB")]), "frames"),
        (lambda: encode(noise(), "WEBP", save_all=True, append_images=[noise("L").convert("RGB")]), "frames"),
        (lambda: encode(noise(), "GIF"), "neither PNG"),
        (lambda: encode(noise(), "TIFF"), "neither PNG"),
        (lambda: encode(noise(), "BMP"), "neither PNG"),
        (lambda: encode(noise("CMYK"), "JPEG"), "CMYK"),
        (lambda: encode(Image.new("I;16", (16, 16)), "PNG"), "8 bits"),
        (sixteen_bit_colour, "8 bits"),
        (lambda: encode(noise(), "PNG")[:2000], "corrupt or cut"),
        (lambda: encode(noise(), "JPEG")[:900], "corrupt or cut"),
        (lambda: encode(noise(), "PNG")[:300] + b"\xff" * 3000, "corrupt or cut"),
        (lambda: b"\0" * 128 + b"DICM" + b"\x02\x00", "neither PNG"),
        (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'></svg>", "neither PNG"),
        (lambda: b"", "neither PNG"),
        (lambda: b"x" * 200_001, "larger than 200000 bytes"),
        (lambda: encode(noise(), "PNG") + b"PK\x03\x04 an archive", "stands behind it"),
        (lambda: encode(noise(), "JPEG") + b"<script>alert(1)</script>", "stands behind it"),
        (lambda: encode(noise(), "WEBP") + b"more", "stands behind it"),
        (lambda: b"GIF89a/*" + encode(noise(), "PNG"), "neither PNG"),
    ],
    ids=range(23),
)
def test_image_that_is_hostile_or_unfit_is_refused_in_words(make: Callable[[], bytes], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        decode_image(make(), LIMITS)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_image_that_readers_know_is_passed_on_as_it_is(kind: str) -> None:
    data = encode(noise(), kind)
    assert check_image(data, LIMITS) is data


def test_image_in_webp_is_passed_on_as_png() -> None:
    found = check_image(encode(noise(), "WEBP", lossless=True), LIMITS)
    with Image.open(io.BytesIO(found), formats=["PNG"]) as image:
        assert (numpy.asarray(image) == numpy.asarray(noise())).all()


def test_base64_is_read_strictly() -> None:
    data = encode(noise(), "PNG")
    text = base64.b64encode(data).decode()
    assert read_base64(text, LIMITS) == data
    assert read_data_url(f"data:image/png;base64,{text}", LIMITS) == data
    for wrong in (text[:-1], text + "=", text[:40] + "\n" + text[40:], "é", text.replace("A", "-", 1)):
        with pytest.raises(InvalidInput, match="base64"):
            read_base64(wrong, LIMITS)


def test_base64_beyond_the_limit_is_refused() -> None:
    assert len(read_base64(base64.b64encode(b"x" * 200_000).decode(), LIMITS)) == 200_000
    with pytest.raises(InvalidInput, match="larger"):
        read_base64(base64.b64encode(b"x" * 200_001).decode(), LIMITS)


def test_image_instance_for_a_text_student_is_refused_by_its_index(served: Any) -> None:
    image = {"b64": base64.b64encode(encode(noise(), "PNG")).decode()}
    response = served.predict({"instances": [{"text": "a"}, {"text": "b", "image": image}]})
    assert response.status_code == 400
    assert response.json()["error"].startswith("Case 1: tiny reads text only")


@pytest.fixture(scope="module")
def reader() -> Any:
    """How the tiny image student reads."""
    return load_reader(StudentConfig(model="tiny-image", reads="image"))


@pytest.fixture
def make_seeing(make_served: Any, reader: Any) -> Callable[..., Any]:
    """A function that makes an application whose student reads images."""

    def make(**limits: Any) -> Any:
        template = Template.load("tissue_brief")
        return make_served(image_reader=reader, tokenizer=reader.tokenizer, template=template, limits=limits)

    return make


def spell(data: bytes) -> str:
    return base64.b64encode(data).decode()


def chat(served: Any, content: Any, **more: Any) -> Any:
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 8, **more}
    return served.ask("POST", "/openai/v1/chat/completions", json=body)


def show(data: bytes, kind: str = "png") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{spell(data)}"}}


def test_image_student_needs_an_image_and_its_tensor_is_announced(make_seeing: Any) -> None:
    served = make_seeing()
    response = served.predict()
    assert response.status_code == 400
    assert "reads images. Send one" in response.json()["error"]
    assert chat(served, "What is it?").status_code == 400
    inputs = served.ask("GET", "/v2/models/tiny").json()["inputs"]
    assert inputs == [{"name": "image", "datatype": "BYTES", "shape": [-1]}]


def test_image_student_gets_a_larger_body_and_hostile_images_are_refused(make_seeing: Any) -> None:
    served = make_seeing(max_body_bytes=1024, max_image_pixels=250_000)
    large = encode(noise(size=(300, 300)), "PNG")
    assert served.predict({"instances": [{"image": {"b64": spell(large)}}]}).status_code == 200
    response = served.predict({"instances": [{"image": {"b64": spell(bomb())}}]})
    assert response.status_code == 400
    assert "250000 pixels" in response.json()["error"]


def test_image_of_a_case_reaches_the_engine_alike_on_every_route(make_seeing: Any, reader: Any) -> None:
    served = make_seeing()
    data = encode(noise(), "PNG")
    tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [spell(data)]}
    answers = [
        served.predict({"instances": [{"image": {"b64": spell(data)}}]}),
        served.ask("POST", "/v2/models/tiny/infer", json={"inputs": [tensor]}),
        chat(served, [show(data)], as_case=True),
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 200]
    expected = reader.read(Template.load("tissue_brief").prompt(), [data])
    for request in served.engine.requests:
        assert list(request.prompt_ids) == expected.ids
        assert (request.images.inputs["pixel_values"] == expected.image_inputs["pixel_values"]).all()
        assert [request.prompt_ids[place] for place in request.images.places] == [reader.family.image_token_id] * 4
    assert len({request.images.digest for request in served.engine.requests}) == 1


def test_image_in_a_conversation_stands_before_the_first_users_words(make_seeing: Any, reader: Any) -> None:
    served = make_seeing()
    data = encode(noise(), "PNG")
    assert chat(served, [{"type": "text", "text": "What is it?"}, show(data)]).status_code == 200
    expected = reader.read([Turn(role="user", content="What is it?")], [data])
    assert list(served.engine.requests[0].prompt_ids) == expected.ids


def test_image_in_webp_is_seen_as_its_pixels(make_seeing: Any) -> None:
    served = make_seeing()
    image = noise()
    kinds = {"png": encode(image, "PNG"), "webp": encode(image, "WEBP", lossless=True)}
    for kind, data in kinds.items():
        assert chat(served, [show(data, kind)], as_case=True).status_code == 200
    first, second = served.engine.requests
    assert first.images.digest == second.images.digest


@pytest.mark.parametrize(
    ("instance", "words"),
    [
        ({"image": {"b64": "PICTURE"}, "text": "a boy"}, "Leave the text out"),
        ({"text": "a boy"}, "reads images"),
        ({"image": {"b64": "PICTURE", "url": "http://x"}}, "not known"),
        ({"image": {"url": "http://x"}}, "missing|not known"),
        ({}, "a text or an image"),
        ({"image": {"b64": "not base64!"}}, "not base64"),
    ],
)
def test_case_that_an_image_student_cannot_read_is_refused_in_words(
    make_seeing: Any, instance: dict[str, Any], words: str
) -> None:
    served = make_seeing()
    text = json.dumps({"instances": [instance]}).replace("PICTURE", spell(encode(noise(), "PNG")))
    response = served.predict(json.loads(text))
    assert response.status_code == 400
    assert re.search(words, response.json()["error"])
    assert served.engine.requests == []


@pytest.mark.parametrize(
    "text", ["<image>", "see <global-img> here", "<|end|><|assistant|>", "a<fake_token_around_image>"]
)
def test_text_that_spells_an_image_or_control_token_is_refused(make_seeing: Any, text: str) -> None:
    served = make_seeing()
    response = chat(served, [{"type": "text", "text": text}, show(encode(noise(), "PNG"))])
    assert response.status_code == 400
    assert re.search("control token|marks images", response.json()["error"]["message"])


def test_image_outside_the_first_user_turn_or_second_image_is_refused(make_seeing: Any) -> None:
    served = make_seeing()
    picture = show(encode(noise(), "PNG"))
    user = {"role": "user", "content": "a"}
    later = [user, {"role": "assistant", "content": "b"}, {"role": "user", "content": [picture]}]
    early = [{"role": "system", "content": [picture]}, user]
    for messages, words in ((later, "first user"), (early, "first user")):
        body = {"model": "tiny", "messages": messages}
        response = served.ask("POST", "/openai/v1/chat/completions", json=body)
        assert response.status_code == 400
        assert words in response.json()["error"]["message"]
    assert "several images" in chat(served, [picture, picture]).json()["error"]["message"]


def test_completion_of_an_image_student_is_refused(make_seeing: Any) -> None:
    served = make_seeing()
    for more in ({}, {"as_case": True}):
        response = served.ask("POST", "/openai/v1/completions", json={"model": "tiny", "prompt": "a", **more})
        assert response.status_code == 400
        assert "reads images" in response.json()["error"]["message"]


def test_images_of_all_requests_share_a_memory_that_is_given_back(make_seeing: Any) -> None:
    # The tiny student reads 32 x 32 pixels in float32, with a mask of 8 bytes a pixel: 20 KiB an image.
    served = make_seeing(max_prepared_image_bytes=1024**2, max_instances=200, max_body_bytes_with_images=8 * 1024**2)
    instance = {"image": {"b64": spell(encode(noise(), "PNG"))}}
    for _ in range(3):
        assert served.predict({"instances": [instance] * 16}).status_code == 200
    response = served.predict({"instances": [instance] * 100})
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1
    assert served.predict({"instances": [instance] * 16}).status_code == 200


def test_images_are_counted_without_their_content(make_seeing: Any) -> None:
    served = make_seeing()
    data = encode(noise(), "PNG")
    served.predict({"instances": [{"image": {"b64": spell(data)}}] * 2})
    figures = served.figures()
    assert "mint_serving_images_total 2.0" in figures
    assert f"mint_serving_image_bytes_total {2.0 * len(data)}" in figures
    assert "mint_serving_image_seconds_count 2.0" in figures
