"""The server's page in a real headless browser: answers of the real server, and rare ones put in the browser's way."""

import base64
import dataclasses
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from PIL import Image
from serving_process import ServerOptions, running_server

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CASE = "Invented case. Short stature, wide-spaced eyes, a murmur."
HOSTILE = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'
LONG = "Developmental" + "andepileptic" * 12 + " encephalopathy with a name that nobody can break"
WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => window.violations.push(event.violatedDirective));
"""
# Every visible text against what is painted behind it (WCAG 2.2, 1.4.3): 4.5, or 3 from 24 px or 18.66 px bold on.
LOW_CONTRAST = """() => {
  const parse = (text) => [...text.match(/[\\d.]+/g).map(Number), 1].slice(0, 4);
  const over = (top, below) => top.slice(0, 3).map((value, i) => value * top[3] + below[i] * (1 - top[3]));
  const behind = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) layers.push(parse(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
  };
  const light = (rgb) => rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()) || "value" in element;
    if (!own || !element.checkVisibility() || ["SCRIPT", "STYLE", "OPTION"].includes(element.tagName)) continue;
    const style = getComputedStyle(element);
    const ground = behind(element);
    const [a, b] = [light(over(parse(style.color), ground)), light(ground)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const size = parseFloat(style.fontSize);
    const limit = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700) ? 3 : 4.5;
    if (ratio < limit) found.push(`${element.tagName} ${element.className} ${ratio.toFixed(2)}`);
  }
  return found;
}"""


def answer(*labels: tuple[str, float], **prediction: Any) -> dict[str, Any]:
    """A V1 answer of a student with these labels."""
    shown = [
        {"id": f"OMIM:{number}", "name": name, "probability": share} for number, (name, share) in enumerate(labels)
    ]
    facts = {"abstained": False, "exact": True, "calibrated": True, "prompt_tokens": 87, "cached_tokens": 16}
    model = {
        "name": "other",
        "reference": "model/other@v000001#sha256:" + "0f" * 32,
        "intended_use": "Research.",
        "limits": ["Not a medical device."],
        "precision": "float32",
    }
    return {"predictions": [{"labels": shown, **facts, **prediction}], "model": model}


class Visitor:
    """One tab, with a note of everything that went wrong in it and of every request it sent."""

    def __init__(self, page: Any, url: str):
        self.page = page
        self.url = url
        self.problems: list[str] = []
        self.requests: list[Any] = []
        page.on("console", lambda message: self._note(message) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("request", lambda request: self.requests.append(request))
        page.add_init_script(WATCH)

    def _note(self, message: Any) -> None:
        # The browser itself reports every status above 399 here; those are wanted in the tests that cause them.
        if not message.text.startswith("Failed to load resource"):
            self.problems.append(message.text)

    def open(self, token: str | None) -> Any:
        self.page.goto(self.url + ("/" if token is None else f"/#token={urllib.parse.quote(token)}"))
        self.page.wait_for_selector("#access:not([hidden]), #work:not([hidden])")
        return self.page

    def answer_with(self, content: Any, status: int = 200, **headers: str) -> None:
        """Let every prediction be answered like this, without the server."""
        body = content if isinstance(content, str) else json.dumps(content)
        sent = {
            "content-type": "application/json",
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }
        self.page.route("**/*:predict", lambda route: route.fulfill(status=status, headers=sent, body=body))

    def ask(self, text: str = CASE) -> None:
        self.page.fill("#text", text)
        self.page.click("#ask")

    def words(self, selector: str) -> str:
        return self.page.inner_text(selector)


@dataclasses.dataclass(frozen=True)
class Served:
    """The server under test and a token that it accepts."""

    url: str
    token: str


@pytest.fixture(scope="module")
def served(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The real server with the tiny student; after `browser`, so that none is started where there is no browser."""
    token = "odd+token/with~signs=="
    entry = {
        "sha256": hashlib.sha256(token.encode()).hexdigest(),
        "tenant": "clinic",
        "models": ["*"],
        "scopes": ["infer"],
        "expires": None,
    }
    tokens = tmp_path_factory.mktemp("tokens") / "tokens.json"
    tokens.write_text(json.dumps({"tokens": [entry]}))
    with running_server(ServerOptions(tokens_file=str(tokens), page=True)) as server:
        yield Served(server.url, token)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any, served: Any) -> Iterator[Callable[..., Visitor]]:
    """A function that opens a tab; at the end no tab may have met an error or a violation of the policy."""
    visitors: list[Visitor] = []

    def make(url: str = served.url, **options: Any) -> Visitor:
        context = browser.new_context(**options)
        visitor = Visitor(context.new_page(), url)
        visitors.append(visitor)
        return visitor

    yield make
    for visitor in visitors:
        assert visitor.problems == []
        assert visitor.page.evaluate("window.violations") == []
        assert {
            request.url.partition("#")[0].split("/")[2] for request in visitor.requests if "http" in request.url[:5]
        } == {visitor.url.split("/")[2]}
        visitor.page.context.close()


def test_page_with_a_token_in_its_address_ranks_a_case(visit: Callable[..., Visitor], served: Any) -> None:
    visitor = visit()
    page = visitor.open(served.token)
    assert page.url == served.url + "/", "the token must not stay in the address"
    visitor.ask()
    page.wait_for_selector("ol.labels li")
    names = page.locator("ol.labels .name").all_inner_texts()
    shares = [float(text.strip("<> %")) for text in page.locator("ol.labels .share").all_inner_texts()]
    assert 1 <= len(names) <= 5
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) <= 100.5  # five shares, each rounded by at most 0.05, or written as 0.1 where it is less
    assert names[0].splitlines()[0] in visitor.words("#status") or "abstains" in visitor.words("#status")
    answered = visitor.words("#answer")
    assert re.search(r"(model|student)/[a-z0-9-]+@v\d{6}#sha256:[0-9a-f]{64}", answered)
    assert re.search(r"\d+ tokens, \d+ of them from the cache", answered)
    assert re.search(r"\d+ ms", answered)
    assert "Intended use" in answered
    assert "Limits" in answered


def test_page_keeps_the_token_for_the_tab_and_the_case_nowhere(visit: Callable[..., Visitor], served: Any) -> None:
    visitor = visit()
    page = visitor.open(served.token)
    visitor.ask()
    page.wait_for_selector("ol.labels li")
    assert page.evaluate("[Object.values(sessionStorage), localStorage.length, document.cookie]") == [
        [served.token],
        0,
        "",
    ]
    assert all(
        CASE[:8] not in request.url and served.token not in request.url.partition("#")[0]
        for request in visitor.requests
    )
    page.reload()
    page.wait_for_selector("#work:not([hidden])")
    assert page.input_value("#text") == ""
    page.click("#forget")
    assert page.evaluate("sessionStorage.length") == 0
    page.reload()
    page.wait_for_selector("#access:not([hidden])")


def test_page_of_a_server_without_tokens_asks_for_none(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    visitor.page.route("**/v1/models", lambda route: route.fulfill(json={"models": ["open"]}))
    visitor.page.route("**/v2/models/open", lambda route: route.fulfill(json={"inputs": [{"name": "text"}]}))
    page = visitor.open(None)
    assert page.locator("#work").is_visible()
    assert page.locator("#forget").is_hidden()


def test_page_with_a_wrong_token_says_so_and_asks_again(visit: Callable[..., Visitor], served: Any) -> None:
    visitor = visit()
    page = visitor.open(None)
    assert page.locator("#access-error").is_hidden(), "having no token yet is no error"
    page.fill("#token", "not-a-token")
    page.press("#token", "Enter")
    page.wait_for_selector("#access-error:not([hidden])")
    assert "not accepted" in visitor.words("#access-error")
    assert "Request id" in visitor.words("#access-error")
    assert page.evaluate("[document.activeElement.id, sessionStorage.length]") == ["token", 0]
    page.fill("#token", served.token)
    page.get_by_role("button", name="Connect").click()
    page.wait_for_selector("#work:not([hidden])")


def test_page_asked_to_connect_without_a_token_says_that_one_is_missing(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    page = visitor.open(None)
    page.get_by_role("button", name="Connect").click()
    page.wait_for_selector("#access-error:not([hidden])")
    assert "missing" in visitor.words("#access-error")


@pytest.mark.parametrize("token", ["pässword", "two words", "tab\ttab"])
def test_page_given_a_token_that_no_header_can_hold_refuses_it_in_words(
    token: str, visit: Callable[..., Visitor]
) -> None:
    visitor = visit()
    page = visitor.open(token)
    page.wait_for_selector("#access-error:not([hidden])")
    assert "not accepted" in visitor.words("#access-error")


@pytest.mark.parametrize("cause", ["starting", "unreachable"])
def test_page_of_a_server_that_is_not_there_yet_keeps_the_token_for_another_try(
    cause: str, visit: Callable[..., Visitor], served: Any
) -> None:
    visitor = visit()
    page = visitor.page
    if cause == "starting":
        page.route("**/v1/models", lambda route: route.fulfill(status=503, json={"error": "The models are loading."}))
    else:
        page.route("**/v1/models", lambda route: route.abort())
    visitor.open(served.token)
    assert ("not ready" if cause == "starting" else "cannot be reached") in visitor.words("#access-error")
    page.unroute("**/v1/models")
    page.get_by_role("button", name="Connect").click()
    page.wait_for_selector("#work:not([hidden])")


def test_page_whose_token_expires_goes_back_to_access_with_the_case_kept(
    visit: Callable[..., Visitor], served: Any
) -> None:
    visitor = visit()
    page = visitor.open(served.token)
    visitor.answer_with({"error": "The token has expired."}, status=401, x_request_id="r-1")
    visitor.ask()
    page.wait_for_selector("#access-error:not([hidden])")
    assert "r-1" in visitor.words("#access-error")
    page.fill("#token", served.token)
    page.press("#token", "Enter")
    page.wait_for_selector("#work:not([hidden])")
    assert page.input_value("#text") == CASE


def test_page_shows_hostile_labels_as_text(visit: Callable[..., Visitor], served: Any) -> None:
    visitor = visit()
    page = visitor.open(served.token)
    hostile = answer((HOSTILE, 0.6), ("Plain", 0.4))
    hostile["model"] |= {"reference": HOSTILE, "intended_use": HOSTILE, "limits": [HOSTILE], "name": HOSTILE}
    visitor.answer_with(hostile)
    visitor.ask()
    page.wait_for_selector("ol.labels li")
    assert visitor.words("ol.labels li .name").startswith(HOSTILE)
    assert visitor.words("#answer").count(HOSTILE) == 5
    assert page.locator("#answer-panel img, #answer-panel script").count() == 0
    assert page.evaluate("window.hacked") is None


def test_page_counts_down_when_the_server_is_busy(visit: Callable[..., Visitor], served: Any) -> None:
    visitor = visit()
    page = visitor.open(served.token)
    visitor.answer_with({"error": "64 requests wait."}, status=429, retry_after="2", x_request_id="r-429")
    visitor.ask()
    page.wait_for_selector("#error:not([hidden])")
    shown = visitor.words("#error")
    for words in ("busy", "64 requests wait.", "You can ask again in 2 s.", "r-429"):
        assert words in shown
    page.wait_for_selector("text=You can ask again.", timeout=5000)
    page.unroute("**/*:predict")
    visitor.answer_with(answer(("Found", 0.9)))
    page.click("#ask")
    page.wait_for_selector("ol.labels li")
    assert page.locator("#error").is_hidden()


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (400, "cannot answer"),
        (403, "may not use"),
        (404, "does not know"),
        (413, "too large"),
        (500, "failed (status 500)"),
        (503, "not ready"),
        (504, "longer"),
    ],
)
def test_page_puts_an_error_into_words_with_its_request_id(
    status: int, words: str, visit: Callable[..., Visitor], served: Any
) -> None:
    visitor = visit()
    page = visitor.open(served.token)
    visitor.answer_with({"error": f"Told by the server. {HOSTILE}"}, status=status, x_request_id=f"r-{status}")
    visitor.ask()
    page.wait_for_selector("#error:not([hidden])")
    shown = visitor.words("#error")
    assert words in shown
    assert f"Told by the server. {HOSTILE}" in shown
    assert f"r-{status}" in shown
    assert page.locator("ol.labels").count() == 0


@pytest.mark.parametrize("content", ["", "<html>a proxy's page</html>", "[1"])
def test_page_given_something_else_than_json_says_so(content: str, visit: Callable[..., Visitor], served: Any) -> None:
    visitor = visit()
    page = visitor.open(served.token)
    visitor.answer_with(content)
    visitor.ask()
    page.wait_for_selector("#error:not([hidden])")
    assert "not JSON" in visitor.words("#error")


def test_page_without_its_server_says_that_it_cannot_be_reached(visit: Callable[..., Visitor], served: Any) -> None:
    visitor = visit()
    page = visitor.open(served.token)
    page.route("**/*:predict", lambda route: route.abort())
    visitor.ask()
    page.wait_for_selector("#error:not([hidden])")
    assert "cannot be reached" in visitor.words("#error")


def test_page_with_a_case_that_is_too_long_shows_the_servers_counts(visit: Callable[..., Visitor], served: Any) -> None:
    visitor = visit()
    page = visitor.open(served.token)
    visitor.ask("many words " * 3000)
    page.wait_for_selector("#error:not([hidden])")
    assert re.search(r"\d+ tokens", visitor.words("#error"))


@pytest.mark.parametrize("way", ["button", "escape"])
def test_page_cancels_a_running_request(way: str, visit: Callable[..., Visitor], served: Any) -> None:
    visitor = visit()
    page = visitor.open(served.token)
    page.route("**/*:predict", lambda route: None)  # never answered
    visitor.ask()
    page.wait_for_selector("#cancel:not([hidden])")
    assert page.locator("#ask").is_disabled()
    if way == "button":
        page.click("#cancel")
    else:
        page.keyboard.press("Escape")
    page.wait_for_selector("text=Cancelled.")
    assert page.locator("#ask").is_enabled()
    assert page.locator("#error").is_hidden()
    assert page.evaluate("document.activeElement.id") == "ask", "the focus must not be lost with the button"


def test_page_without_a_case_asks_for_one_and_sends_nothing(visit: Callable[..., Visitor], served: Any) -> None:
    visitor = visit()
    page = visitor.open(served.token)
    visitor.ask("  \n ")
    assert "Write or paste a case first" in visitor.words("#status")
    assert not [request for request in visitor.requests if request.method == "POST"]
    assert page.evaluate("document.activeElement.id") == "text"


def test_page_says_in_words_when_the_model_abstains_or_is_uncertain(visit: Callable[..., Visitor], served: Any) -> None:
    visitor = visit()
    page = visitor.open(served.token)
    visitor.answer_with(answer(("A", 0.9996), ("B", 0.0003), abstained=True, calibrated=False, exact=False))
    visitor.ask()
    page.wait_for_selector("ol.labels li")
    assert visitor.words("#status") == "The model abstains."
    shown = visitor.words("#answer")
    for words in ("it is not an answer", "Not calibrated", "not every label was scored", "> 99.9 %", "< 0.1 %"):
        assert words in shown


def test_page_is_used_with_the_keyboard_alone(visit: Callable[..., Visitor], served: Any) -> None:
    visitor = visit()
    page = visitor.open(None)
    page.keyboard.type(served.token)
    page.keyboard.press("Enter")
    page.wait_for_selector("#work:not([hidden])")
    assert page.evaluate("document.activeElement.id") == "text"
    order = []
    for key in ["Shift+Tab"] * 3 + ["Tab"] * 5:
        page.keyboard.press(key)
        identifier, outline = page.evaluate(
            """() => { const style = getComputedStyle(document.activeElement);
              return [document.activeElement.id, `${style.outlineStyle} ${style.outlineWidth}`]; }"""
        )
        assert outline == "solid 3px", f"{identifier} does not show that it has the focus"
        order.append(identifier)
    assert order == ["example", "top-k", "model", "top-k", "example", "text", "ask", "forget"]
    page.focus("#text")
    page.keyboard.type(CASE)
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("ol.labels li")
    assert page.evaluate("document.activeElement.id") == "text"


def test_page_announces_the_answer_and_errors_to_screen_readers(visit: Callable[..., Visitor], served: Any) -> None:
    page = visit().open(served.token)
    assert page.get_attribute("#status", "aria-live") == "polite"
    assert page.get_attribute("#error", "role") == "alert"
    assert page.get_attribute("#access-error", "role") == "alert"


def test_page_inserts_an_example_that_says_it_is_invented(visit: Callable[..., Visitor], served: Any) -> None:
    visitor = visit()
    page = visitor.open(served.token)
    page.click("#example")
    assert page.input_value("#text").startswith("Invented example, not a patient.")


@pytest.fixture(scope="module")
def seeing_url(browser: Any) -> Iterator[str]:
    """The real server with the tiny image student, without tokens."""
    with running_server(ServerOptions(page=True, reads_images=True)) as server:
        yield server.url


@pytest.fixture(scope="module")
def photo() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (300, 200), (180, 120, 90)).save(buffer, "PNG")
    return buffer.getvalue()


def give_picture(page: Any, data: bytes, *, way: str = "chosen", name: str = "tile.png") -> None:
    """Choose a file in the form, or drop one on it."""
    if way == "chosen":
        page.set_input_files("#picture", {"name": name, "mimeType": "image/png", "buffer": data})
        return
    page.evaluate(
        """([encoded, name]) => {
          const bytes = Uint8Array.from(atob(encoded), (letter) => letter.charCodeAt(0));
          const dataTransfer = new DataTransfer();
          dataTransfer.items.add(new File([bytes], name, { type: "image/png" }));
          const options = { dataTransfer, bubbles: true, cancelable: true };
          document.getElementById("drop").dispatchEvent(new DragEvent("drop", options));
        }""",
        [base64.b64encode(data).decode(), name],
    )


def list_sent(visitor: Visitor) -> list[Any]:
    """Instances of the predictions that were asked for."""
    return [request.post_data_json["instances"] for request in visitor.requests if request.method == "POST"]


def test_page_of_a_text_student_offers_no_picture(visit: Callable[..., Visitor], served: Any) -> None:
    page = visit().open(served.token)
    assert page.locator("#picture-field").is_hidden()
    assert page.locator("#text-field").is_visible()


@pytest.mark.parametrize("way", ["chosen", "dropped"])
def test_page_of_an_image_student_shows_and_ranks_the_picture_and_asks_for_no_text(
    way: str, visit: Callable[..., Visitor], seeing_url: str, photo: bytes
) -> None:
    visitor = visit(seeing_url)
    page = visitor.open(None)
    page.wait_for_selector("#picture-field:not([hidden])")
    assert page.locator("#text-field").is_hidden()
    give_picture(page, photo, way=way)
    page.wait_for_function("() => document.getElementById('preview').naturalWidth === 300")
    page.click("#ask")
    page.wait_for_selector("ol.labels li")
    assert page.locator("ol.labels li").count() == 5
    ((sent,),) = list_sent(visitor)
    assert sent.keys() == {"image"}
    assert base64.b64decode(sent["image"]["b64"], validate=True) == photo


def test_page_of_an_image_student_without_a_picture_asks_for_one_and_sends_nothing(
    visit: Callable[..., Visitor], seeing_url: str, photo: bytes
) -> None:
    visitor = visit(seeing_url)
    page = visitor.open(None)
    page.wait_for_selector("#picture-field:not([hidden])")
    page.click("#ask")
    assert "Choose a picture first" in visitor.words("#status")
    give_picture(page, photo)
    page.click("#remove")
    assert page.locator("#preview").is_hidden()
    page.click("#ask")
    assert "Choose a picture first" in visitor.words("#status")
    assert list_sent(visitor) == []


def test_page_shows_the_servers_words_about_a_picture_that_is_none(
    visit: Callable[..., Visitor], seeing_url: str
) -> None:
    visitor = visit(seeing_url)
    page = visitor.open(None)
    page.wait_for_selector("#picture-field:not([hidden])")
    give_picture(page, b"<svg xmlns='http://www.w3.org/2000/svg' onload='window.hacked = 1'/>", name="x.svg")
    page.click("#ask")
    page.wait_for_selector("#error:not([hidden])")
    assert "neither PNG, JPEG nor WebP" in visitor.words("#error")
    assert page.evaluate("window.hacked") is None


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_page_of_an_image_student_is_readable_and_fits(
    scheme: str, width: int, visit: Callable[..., Visitor], seeing_url: str, photo: bytes
) -> None:
    visitor = visit(seeing_url, color_scheme=scheme, viewport={"width": width, "height": 900})
    page = visitor.open(None)
    page.wait_for_selector("#picture-field:not([hidden])")
    give_picture(page, photo)
    page.click("#ask")
    page.wait_for_selector("ol.labels li")
    assert page.evaluate(LOW_CONTRAST) == []
    scroll, client = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert scroll <= client
    if folder := os.environ.get("MINT_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/image-student-{scheme}.png", full_page=True)


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_page_never_scrolls_sideways(width: int, visit: Callable[..., Visitor], served: Any) -> None:
    visitor = visit(viewport={"width": width, "height": 800})
    page = visitor.open(None)
    measure = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    scroll, client = page.evaluate(measure)
    assert scroll <= client
    page.fill("#token", served.token)
    page.press("#token", "Enter")
    page.wait_for_selector("#work:not([hidden])")
    long = answer((LONG, 0.6), (LONG.replace(" ", ""), 0.4), abstained=True)
    long["model"] |= {"name": "m" * 63, "intended_use": LONG, "limits": [LONG]}
    visitor.answer_with(long)
    visitor.ask("w" * 400)
    page.wait_for_selector("ol.labels li")
    scroll, client = page.evaluate(measure)
    assert scroll <= client


@pytest.mark.parametrize("width", [320, 1280])
def test_page_brings_the_answer_into_view(width: int, visit: Callable[..., Visitor], served: Any) -> None:
    visitor = visit(viewport={"width": width, "height": 640}, reduced_motion="reduce")
    page = visitor.open(served.token)
    visitor.ask()
    page.wait_for_selector("ol.labels li")
    page.wait_for_function("() => document.getElementById('status').getBoundingClientRect().bottom < innerHeight")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_has_readable_contrast_in_every_state(scheme: str, visit: Callable[..., Visitor], served: Any) -> None:
    visitor = visit(color_scheme=scheme)
    page = visitor.open(None)
    page.fill("#token", "wrong")
    page.press("#token", "Enter")
    page.wait_for_selector("#access-error:not([hidden])")
    assert page.evaluate(LOW_CONTRAST) == []
    page.fill("#token", served.token)
    page.press("#token", "Enter")
    page.wait_for_selector("#work:not([hidden])")
    visitor.answer_with(answer(("A", 0.4), ("B", 0.3), abstained=True))
    visitor.ask()
    page.wait_for_selector("ol.labels li")
    assert page.evaluate(LOW_CONTRAST) == []
    page.unroute("**/*:predict")
    visitor.answer_with({"error": "Full."}, status=429, retry_after="9", x_request_id="r")
    page.click("#ask")
    page.wait_for_selector("#error:not([hidden])")
    assert page.evaluate(LOW_CONTRAST) == []


def test_contrast_check_finds_pale_text(visit: Callable[..., Visitor]) -> None:
    page = visit().open(None)
    page.evaluate("document.querySelector('h1').style.color = '#c8c8c8'")
    assert [found for found in page.evaluate(LOW_CONTRAST) if found.startswith("H1")]


def test_page_names_every_control_and_orders_its_headings(visit: Callable[..., Visitor], served: Any) -> None:
    visitor = visit()
    page = visitor.open(served.token)
    page.evaluate(
        "document.getElementById('access').hidden = false; document.getElementById('picture-field').hidden = false"
    )
    visitor.answer_with(answer(("A", 0.9)))
    visitor.ask()
    page.wait_for_selector("ol.labels li")
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("input, select, textarea, button")]
          .filter((e) => !((e.labels && e.labels.length) || e.textContent.trim() || e.getAttribute("aria-label")))
          .map((e) => e.id)"""
    )
    assert unnamed == []
    small = page.evaluate(
        """() => [...document.querySelectorAll("input, select, textarea, button")].filter((e) => e.checkVisibility())
          .filter((e) => e.getBoundingClientRect().height < 24).map((e) => e.id)"""
    )
    assert small == [], "WCAG 2.2, 2.5.8: targets of 24 px"
    levels = page.evaluate(
        "[...document.querySelectorAll('h1, h2, h3')].filter((e) => e.checkVisibility()).map((e) => +e.tagName[1])"
    )
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert page.evaluate(
        "[document.documentElement.lang, document.title !== '', document.querySelectorAll('main').length]"
    ) == ["en", True, 1]
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))
    points_at = page.evaluate(
        """[...document.querySelectorAll("[aria-labelledby], [aria-describedby]")]
          .map((e) => e.getAttribute("aria-labelledby") || e.getAttribute("aria-describedby"))"""
    )
    assert set(points_at) <= set(ids)


@pytest.mark.parametrize(("motion", "animation"), [("reduce", "none"), ("no-preference", "turn")])
def test_page_stands_still_for_who_wants_no_motion(
    motion: str, animation: str, visit: Callable[..., Visitor], served: Any
) -> None:
    visitor = visit(reduced_motion=motion)
    page = visitor.open(served.token)
    page.route("**/*:predict", lambda route: None)
    visitor.ask()
    page.wait_for_selector(".wait")
    assert page.evaluate("getComputedStyle(document.querySelector('.wait'), '::before').animationName") == animation
    page.click("#cancel")


def test_page_runs_nothing_without_its_nonce(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    page = visitor.open(None)
    nonces = []
    for _ in range(2):
        response = page.request.get(visitor.url + "/")
        policy = response.headers["content-security-policy"]
        (nonce,) = set(re.findall(r'nonce="([^"]+)"', response.text()))
        assert f"script-src 'nonce-{nonce}'" in policy
        assert "default-src 'none'" in policy
        assert "{{nonce}}" not in response.text()
        nonces.append(nonce)
    assert nonces[0] != nonces[1]
    page.evaluate(
        """() => { const script = document.createElement("script"); script.textContent = "window.hacked = 1";
          document.body.append(script); }"""
    )
    assert page.evaluate("window.hacked") is None
    page.wait_for_function("() => window.violations.length === 1")
    page.evaluate("window.violations = []")
    visitor.problems.clear()
