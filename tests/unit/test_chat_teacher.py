"""The chat teacher against a real HTTP server whose model is made of rules: what it shows, asks, counts and refuses."""

import base64
import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from chat_endpoint import Say, read_image_urls, read_texts, refuse, running_endpoint
from PIL import Image
from pydantic import ValidationError

from mint_lib.errors import GateFailed, IntegrityError, InvalidInput, RefusedData
from mint_lib.records import Case, Label
from mint_lib.teacher import digest_folder, qualify
from mint_lib.teachers.chat import ChatTeacher

NAMES = ("Adrenal Glands", "Bile Duct", "Bladder", "Breast", "Cervix", "Colon")
LABELS = [Label(id=f"tissue:{place}", name=name) for place, name in enumerate(NAMES)]
RANKING = {"name": "ranking", "shows": ["image"], "prompt": "Which tissue?\n{label_names}", "max_tokens": 60}
CHAIN = [
    {"name": "differential", "shows": ["image", "text"], "prompt": "Look. {case_text}", "max_tokens": 200},
    {
        **{"name": "ranking", "shows": ["differential"], "max_tokens": 60},
        "prompt": "Rank by this:\n{differential}\nfrom:\n{label_names}",
    },
]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MINT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("mint_lib.chat.transport._FIRST_PAUSE_SECONDS", 0.01)


def make_image(column, number=0):
    data = io.BytesIO()
    Image.new("RGB", (8, 8), (40 * column, 7, number)).save(data, "PNG")
    return data.getvalue()


def make_cases(count=12, *, shows=("image", "text")):
    return [
        Case(
            case_id=f"case-{number}",
            group_id=f"patient-{number}",
            image=make_image(number % 6, number) if "image" in shows else None,
            text=f"canary nuclei, patient {number}" if "text" in shows else None,
            label_id=f"tissue:{number % 6}",
            source="toy",
            synthetic=True,
        )
        for number in range(count)
    ]


def make_config(server, *, endpoint=None, **changes):
    values = {
        "endpoint": {"base_url": server.base_url, "model": "rules", "max_attempts": 2, **(endpoint or {})},
        "inputs": "image",
        "steps": [RANKING],
        **changes,
    }
    return ChatTeacher.Config.model_validate(values)


def make_teacher(server, **changes):
    return ChatTeacher(make_config(server, **changes), LABELS, seed=0)


def see(body):
    """The column of the tissue in the picture of a request, by its colour."""
    [url] = read_image_urls(body)
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
        return image.getpixel((0, 0))[0] // 40


def write_list(*columns):
    return "RANKED_LIST:\n" + "\n".join(f"{rank}. '{NAMES[column]}'" for rank, column in enumerate(columns, 1))


def know(body):
    """Answers as an expert does who mistakes every sixth tissue's neighbour for it in rank 2."""
    return Say(write_list(see(body), (see(body) + 1) % 6))


def list_own_texts(server):
    return [" ".join(read_texts(body)) for body in server.bodies]


def test_teacher_ranks_by_what_it_sees_and_its_probabilities_follow():
    cases = make_cases(24)
    with running_endpoint(know) as server:
        scores = make_teacher(server).score(cases)
    assert scores.argmax(axis=1).tolist() == [number % 6 for number in range(24)]
    order = np.argsort(-scores, axis=1, kind="stable")
    assert order[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert order[3].tolist() == [3, 4, 0, 1, 2, 5]  # labels without a place keep the order of the label set
    found = qualify(scores, cases, LABELS, seed=0)
    assert found["metrics"]["top_1"]["value"] == 1.0
    assert found["nll_after"] < found["nll_before"]


def test_teacher_that_reads_images_never_sends_text_or_labels():
    with running_endpoint(know) as server:
        make_teacher(server).score(make_cases(6))
    sent = json.dumps(server.bodies)
    assert not [word for word in ("canary", "patient", "tissue:", "case-") if word in sent]
    assert all(len(read_image_urls(body)) == 1 for body in server.bodies)
    assert all(all(name in text for name in NAMES) for text in list_own_texts(server))


def test_teacher_that_reads_text_never_sends_images():
    step = RANKING | {"shows": ["text"], "prompt": "{case_text}\n{label_names}"}

    def answer(body):
        number = int(re.search(r"patient (\d+)", read_texts(body)[0])[1])
        return Say(write_list(number % 6))

    with running_endpoint(answer) as server:
        scores = make_teacher(server, inputs="text", steps=[step]).score(make_cases(6))
    assert scores.argmax(axis=1).tolist() == list(range(6))
    assert not any(read_image_urls(body) for body in server.bodies)


def answer_in_steps(body):
    """Step 1 sees a picture and tells a number; step 2 turns the number that it is told into a ranking."""
    text = read_texts(body)[-1]
    if text.startswith("Look."):
        return Say(f"reasons, so code {see(body)}")
    return Say(write_list(int(re.search(r"so code (\d)", text)[1])))


def test_chain_s_second_step_sees_only_what_it_declares():
    with running_endpoint(answer_in_steps) as server:
        scores = make_teacher(server, inputs="image_and_text", steps=CHAIN).score(make_cases(6))
    assert scores.argmax(axis=1).tolist() == list(range(6))
    first = [body for body in server.bodies if read_texts(body)[0].startswith("Look.")]
    second = [body for body in server.bodies if body not in first]
    assert len(first) == len(second) == 6
    assert all(read_image_urls(body) and "canary nuclei" in read_texts(body)[0] for body in first)
    assert not any(name in json.dumps(first) for name in NAMES)
    for body in second:
        assert [message["role"] for message in body["messages"]] == ["user"]
        assert isinstance(body["messages"][0]["content"], str)
        assert re.fullmatch(
            r"Rank by this:\nreasons, so code \d\nfrom:\n(- [\w ]+\n){6}\nList exactly 5 .*", read_texts(body)[0], re.S
        )
    assert "canary" not in json.dumps(second)
    assert [body["max_tokens"] for body in (first[0], second[0])] == [200, 60]


def test_chain_s_second_step_sees_the_image_where_it_declares_it():
    steps = [CHAIN[0], CHAIN[1] | {"shows": ["differential", "image"]}]
    with running_endpoint(answer_in_steps) as server:
        make_teacher(server, inputs="image_and_text", steps=steps).score(make_cases(2))
    second = [body for body in server.bodies if "Rank by this" in read_texts(body)[0]]
    assert len(second) == 2
    assert all(read_image_urls(body) for body in second)
    assert "canary" not in json.dumps(second)


def test_chain_whose_first_step_says_nothing_is_not_asked_on():
    with running_endpoint(lambda body: Say(None)) as server:
        teacher = make_teacher(server, inputs="image_and_text", steps=CHAIN, max_unparsed_share=1.0)
        assert teacher.score(make_cases(2)).tolist() == [[0.0] * 6] * 2
    assert len(server.bodies) == 2


def test_case_with_one_of_two_inputs_shows_that_one():
    with running_endpoint(lambda body: Say("x") if "Look" in str(body) else Say(write_list(2))) as server:
        teacher = make_teacher(server, inputs="image_and_text", steps=CHAIN)
        teacher.score([*make_cases(1, shows=["image"]), *make_cases(1, shows=["text"])])
    first = [body for body in server.bodies if "Look." in str(body)]
    assert sorted((len(read_image_urls(body)), "(no text)" in str(body)) for body in first) == [(0, False), (1, True)]


@pytest.mark.parametrize(("inputs", "shown"), [("image", "text"), ("text", "image")])
def test_case_without_what_is_to_be_shown_is_refused_before_anything_is_sent(inputs, shown):
    place = {"image": "", "text": "{case_text} "}[inputs]
    step = RANKING | {"shows": [inputs], "prompt": place + "{label_names}"}
    with running_endpoint(know) as server:
        with pytest.raises(InvalidInput, match=f"3 of 3 cases have no {inputs}.*case-0, case-1"):
            make_teacher(server, inputs=inputs, steps=[step]).score(make_cases(3, shows=[shown]))
        assert server.bodies == []


@pytest.mark.parametrize("bad", ["", "It is a colon.", "1. 'Bone'\n2. 'Colom'", "RANKED_LIST:\n"])
def test_unreadable_ranking_is_reminded_of_the_form_once(bad):
    def answer(body):
        return Say(bad) if len(body["messages"]) == 1 else know(body)

    with running_endpoint(answer) as server:
        teacher = make_teacher(server)
        assert teacher.score(make_cases(6)).argmax(axis=1).tolist() == list(range(6))
    assert len(server.bodies) == 12
    reminded = [body for body in server.bodies if len(body["messages"]) == 3]
    assert [message["role"] for message in reminded[0]["messages"]] == ["user", "assistant", "user"]
    assert "does not have the form" in reminded[0]["messages"][2]["content"]
    facts = teacher.facts()
    assert (facts["num_reminders"], facts["num_unparsed"], facts["num_cases"]) == (6, 0, 6)
    assert facts["num_unknown_names"] == (12 if "Bone" in bad else 0)


def test_case_without_a_readable_ranking_is_uniform_and_counted():
    cases = make_cases(12)

    def answer(body):
        return Say("I cannot tell.") if see(body) == 0 else know(body)

    with running_endpoint(answer) as server:
        teacher = make_teacher(server, max_unparsed_share=0.2)
        scores = teacher.score(cases)
    assert scores[0].tolist() == scores[6].tolist() == [0.0] * 6
    assert scores[1:6].argmax(axis=1).tolist() == [1, 2, 3, 4, 5]
    assert teacher.facts()["num_unparsed"] == 2


def test_too_many_unreadable_rankings_end_the_stage_early_with_counts():
    with running_endpoint(lambda body: Say("I cannot tell, canary.")) as server:
        teacher = make_teacher(server, endpoint={"num_concurrent": 1}, max_unparsed_share=0.1)
        with pytest.raises(RefusedData, match="lists no label for 5 of 5 cases asked about") as caught:
            teacher.score(make_cases(40))
    assert len(server.bodies) < 80  # two for each case, had all been asked
    assert caught.value.counts == {"unparsed": 5, "asked": 5, "cases": 40}
    assert len(caught.value.case_ids["unparsed"]) == 5
    assert "canary" not in str(caught.value)


def test_refusal_of_one_case_s_content_counts_as_unreadable_without_a_reminder():
    def answer(body):
        return refuse(400, "content_filter") if see(body) == 2 else know(body)

    with running_endpoint(answer) as server:
        teacher = make_teacher(server, max_unparsed_share=0.2)
        assert teacher.score(make_cases(6))[2].tolist() == [0.0] * 6
    assert len(server.bodies) == 6
    assert teacher.facts()["finish_reasons"] == {"content_filter": 1, "stop": 5}


def test_samples_are_asked_apart_and_their_ranks_averaged():
    lists = iter([(0, 1), (1, 0), (1, 2)])
    with running_endpoint(lambda body: Say(write_list(*next(lists)))) as server:
        teacher = make_teacher(server, temperature=0.8, num_samples=3)
        [scores] = teacher.score(make_cases(1))
    assert np.argsort(-scores, kind="stable")[:3].tolist() == [1, 0, 2]
    assert [body["temperature"] for body in server.bodies] == [0.8] * 3


def test_schema_is_sent_and_its_answer_read():
    with running_endpoint(lambda body: Say(json.dumps({"ranked_list": [NAMES[see(body)]]}))) as server:
        scores = make_teacher(server, answer_format="json_schema").score(make_cases(6))
    assert scores.argmax(axis=1).tolist() == list(range(6))
    schema = server.bodies[0]["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["ranked_list"]["items"]["enum"] == list(NAMES)


def test_schema_is_sent_with_the_ranking_step_only():
    def answer(body):
        return Say(f"so code {see(body)}") if "Look." in str(body) else Say('{"ranked_list": ["Colon"]}')

    with running_endpoint(answer) as server:
        make_teacher(server, inputs="image_and_text", steps=CHAIN, answer_format="json_schema").score(make_cases(2))
    assert sorted(("response_format" in body, "Look." in str(body)) for body in server.bodies) == [
        *[(False, True)] * 2,
        *[(True, False)] * 2,
    ]


def test_repeated_run_sends_nothing_and_scores_the_same():
    cases = make_cases(6)
    with running_endpoint(answer_in_steps) as server:
        config = {"inputs": "image_and_text", "steps": CHAIN}
        first = make_teacher(server, **config).score(cases)
        num_sent = len(server.bodies)
        again = make_teacher(server, **config)
        assert np.array_equal(again.score(cases), first)
        assert len(server.bodies) == num_sent == 12
    assert (again.facts()["num_calls"], again.facts()["num_cached"]) == (0, 12)


def test_case_that_was_asked_about_is_not_asked_about_again_by_the_same_teacher():
    cases = make_cases(6)
    with running_endpoint(know) as server:
        teacher = make_teacher(server)
        scores = teacher.score(cases[:4])
        assert np.array_equal(teacher.score(cases)[:4], scores)
    assert len(server.bodies) == 6
    assert len(teacher.trace().splitlines()) == 6
    assert teacher.facts()["num_cached"] == 0


def test_budget_ends_the_stage_and_a_larger_one_asks_only_what_is_missing():
    cases = make_cases(12)
    prices = {"price_per_million_input": 10_000.0, "price_per_million_output": 0.0, "image_tokens": 100}
    with running_endpoint(know) as server:
        with pytest.raises(GateFailed, match="max_cost of 9"):
            make_teacher(server, endpoint={**prices, "max_cost": 9.0}).score(cases)
        num_sent = len(server.bodies)
        assert 0 < num_sent <= 9
        teacher = make_teacher(server, endpoint={**prices, "max_cost": 100.0})
        assert teacher.score(cases).argmax(axis=1).tolist() == [0, 1, 2, 3, 4, 5] * 2
        assert len(server.bodies) == 12
    assert teacher.facts()["cost"] == pytest.approx(12 - num_sent)


def test_calls_run_side_by_side_and_never_more_than_allowed():
    with running_endpoint(lambda body: know(body)._replace(wait_seconds=0.05)) as server:
        make_teacher(server, endpoint={"num_concurrent": 3}).score(make_cases(12))
    assert server.most_at_once == 3


def test_endpoint_that_refuses_ends_the_stage_with_the_calls_under_way():
    with running_endpoint(lambda body: refuse(401, "invalid_api_key")) as server:
        with pytest.raises(InvalidInput, match="status 401"):
            make_teacher(server, endpoint={"num_concurrent": 2}).score(make_cases(40))
        assert len(server.bodies) < 40


def test_trace_holds_every_call_by_case_without_content():
    with running_endpoint(answer_in_steps) as server:
        teacher = make_teacher(server, inputs="image_and_text", steps=CHAIN)
        teacher.score(make_cases(3))
    lines = [json.loads(line) for line in teacher.trace().splitlines()]
    assert [(line["subject"], line["step"]) for line in lines] == [
        (f"case-{number}", step) for number in range(3) for step in ("differential", "ranking")
    ]
    assert {line["num_input_tokens"] for line in lines} == {100}
    assert all(line["request"].startswith("sha256:") and line["seconds"] > 0 for line in lines)
    assert not [word for word in ("canary", "code", *NAMES) if word in teacher.trace().decode()]


def test_fitting_asks_nobody():
    with running_endpoint(know) as server:
        facts = make_teacher(server).fit(make_cases(6), make_cases(6))
        assert server.bodies == []
    assert facts == {"host": "127.0.0.1", "model": "rules", "steps": ["ranking"]}


def test_saved_teacher_is_the_same_and_holds_no_key(tmp_path, monkeypatch):
    monkeypatch.setenv("CHAT_KEY", "canary-key")
    folders = [tmp_path / name for name in ("a", "b", "c", "d")]
    for folder in folders:
        folder.mkdir()
    endpoint = {"api_key_variable": "CHAT_KEY"}
    with running_endpoint(know) as server:
        teacher = make_teacher(server, endpoint=endpoint)
        scores = teacher.score(make_cases(3))
        teacher.save(folders[0])
        loaded = ChatTeacher.load(folders[0], LABELS)
        assert loaded.config == teacher.config
        assert np.array_equal(loaded.score(make_cases(3)), scores)
        loaded.save(folders[1])
        make_teacher(server, endpoint=endpoint, steps=[RANKING | {"system": "Be kind."}]).save(folders[2])
        ChatTeacher(teacher.config, LABELS[:-1], seed=0).save(folders[3])
    first, second, third, fourth = map(digest_folder, folders)
    assert first == second
    assert len({first, third, fourth}) == 3
    assert "canary" not in (folders[0] / "config.json").read_text()
    with pytest.raises(IntegrityError, match="other prompts"):
        ChatTeacher.load(folders[0], LABELS[:-1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_samples": 2}, "needs a temperature above 0"),
        ({"inputs": "image_and_text"}, "no step shows text"),
        ({"steps": []}, "at least 1 item"),
        ({"endpoint": {"base_url": "https://api.example.org/v1"}}, "allow_sending_cases_to: api.example.org"),
        ({"labels": []}, "Extra inputs"),
    ],
)
def test_config_that_does_not_fit_together_is_refused(change, words):
    with running_endpoint(know) as server, pytest.raises(ValidationError, match=words):
        make_config(server, **change)


def test_plugin_loads_without_a_network_library():
    code = "import sys, mint_lib.teachers.chat; print([m for m in ('httpx', 'torch', 'openai') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
