"""Surrogates instead of identifiers: what goes on is clean, the same for the same patient, and else nothing goes on."""

import datetime
import io
import logging
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import ValidationError

from mint_lib.deidentification.config import KEY_VARIABLE, DeidentificationConfig, read_key
from mint_lib.deidentification.deidentifier import Cleaned, CleanedCase, Deidentifier, Unsure
from mint_lib.deidentification.notes import write_notes
from mint_lib.deidentification.surrogates import Surrogates, draw_pseudonym
from mint_lib.deidentification.vocabulary import load_vocabulary, plain
from mint_lib.errors import GateFailed, InvalidInput
from mint_lib.records import Case, Finding

KEY = b"0123456789abcdef0123456789abcdef"
CANARIES = {
    "name": "Ysolde Quarrington-Vane",
    "doctor": "Thaddeus Oxenbridge",
    "birth": "07/23/1958",
    "visit": "19 November 2017",
    "phone": "(614) 555-8273",
    "fax": "+44 1632 960 847",
    "email": "yq.vane@postbox.example",
    "url": "https://records.example/yqvane/88231",
    "mrn": "MRN 84720193",
    "ssn": "517-83-2946",
    "plan": "XKQ774829105",
    "ip": "10.84.23.197",
    "street": "4817 Larkspur Lane",
    "town": "Tarnbrook Hollow",
    "hospital": "Saint Wilfrida Hospital",
    "age": "97-year-old",
}
NOTE = (
    "{hospital}\n{street}, {town}, Ohio\n\n{visit}\n\nDear Dr. {doctor},\n\n"
    "Re: {name}, DOB {birth}, {mrn}, SSN {ssn}\n\n"
    "This {age} woman from {town} has Marfan syndrome (FBN1) with seizures (HP:0001250). She takes Losartan 25 mg. "
    "Health plan ID {plan}. Call {phone}, fax {fax}, or write to {email}; see {url}, sent from {ip}.\n"
)
SECRETS = sorted(
    {word for value in CANARIES.values() for word in re.findall(r"[A-Za-z]{5,}|\d{4,}", value)}
    - {"https", "records", "example", "November", "Hospital", "Saint", "postbox", "Hollow"}
    - {"1958", "2017"}  # years may stay, and a moved date may keep its own
)
MEDICINE = (
    "The child has Noonan syndrome.", "Short stature and seizures were noted.", "Plan: levetiracetam 250 mg daily.",
    "Apgar scores were 8 and 9.", "A variant in KMT2D was found.", "No hearing loss.", "Review in 6 months.",
)  # fmt: skip


@pytest.fixture(scope="module")
def deidentifier() -> Deidentifier:
    return Deidentifier(DeidentificationConfig(), key=KEY)


def _png(comment: str) -> bytes:
    info = PngInfo()
    info.add_text("Patient", comment)
    buffer = io.BytesIO()
    Image.new("L", (4, 4)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def _note() -> str:
    return NOTE.format(**CANARIES)


def test_clean_of_a_note_with_canaries_leaves_none_anywhere(
    deidentifier: Deidentifier, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        outcome = deidentifier.clean(_note(), group_id="p1")

    assert isinstance(outcome, Cleaned), outcome
    shown = " ".join((repr(outcome), repr(deidentifier), caplog.text))
    assert [secret for secret in SECRETS if secret.casefold() in shown.casefold()] == []
    assert not any(value in shown for value in CANARIES.values())
    assert KEY.decode() not in shown
    assert set(outcome.counts) >= {"name", "date", "age", "phone", "email", "url", "ip", "number", "address", "place"}
    for kept in ("Marfan syndrome (FBN1)", "seizures (HP:0001250)", "Losartan 25 mg", "90 or older", "Ohio"):
        assert kept in outcome.text


def test_clean_of_the_same_patient_draws_the_same_people_and_of_another_one_others(deidentifier: Deidentifier) -> None:
    first = deidentifier.clean("Mr. Whitcombe was seen. MRN: 4417882.", group_id="p1")
    again = deidentifier.clean("Seen today: Mr. WHITCOMBE. MRN: 4417882.", group_id="p1")
    other = deidentifier.clean("Mr. Whitcombe was seen. MRN: 4417882.", group_id="p2")

    assert isinstance(first, Cleaned)
    assert isinstance(again, Cleaned)
    assert isinstance(other, Cleaned)
    name = re.match(r"Mr\. (\w+) was seen\. MRN: (\d{7})\.", first.text)
    assert name is not None
    assert again.text == f"Seen today: Mr. {name[1].upper()}. MRN: {name[2]}."
    assert other.text != first.text
    other_key = Deidentifier(DeidentificationConfig(), key=KEY[::-1]).clean(
        "Mr. Whitcombe was seen. MRN: 4417882.", group_id="p1"
    )
    assert isinstance(other_key, Cleaned)
    assert other_key.text != first.text


def test_clean_of_dates_keeps_the_days_between_them(deidentifier: Deidentifier) -> None:
    for patient in range(20):
        one = deidentifier.clean("Admitted on 2019-03-14 with seizures.", group_id=str(patient))
        two = deidentifier.clean("Seen again on April 3, 2019 in clinic.", group_id=str(patient))
        assert isinstance(one, Cleaned)
        assert isinstance(two, Cleaned)
        admitted = datetime.date.fromisoformat(one.text[12:22])
        seen = datetime.datetime.strptime(re.search(r"on (.*) in", two.text)[1], "%B %d, %Y").date()  # type: ignore[index]
        assert (seen - admitted).days == 20
        assert 32 <= abs((admitted - datetime.date(2019, 3, 14)).days) < 334


def test_clean_of_labelled_notes_leaves_no_identifier_that_was_found() -> None:
    deidentifier = Deidentifier(DeidentificationConfig(), key=KEY)
    num_cleaned = 0
    for index, note in enumerate(write_notes("development", num_notes=100, seed=2)):
        outcome = deidentifier.clean(note.text, group_id=str(index))
        if isinstance(outcome, Unsure):
            continue
        num_cleaned += 1
        after = {plain(word) for word in re.findall(r"[^\W_]{4,}", outcome.text)}
        for span in note.identifying:
            if span.type in ("name", "phone", "email", "number", "ip"):
                words = re.findall(r"[^\W_]{4,}", note.text[span.start : span.end])
                assert not {plain(word) for word in words if not load_vocabulary().is_safe(word)} & after
        for span in note.kept:
            assert note.text[span.start : span.end] in outcome.text
    assert num_cleaned >= 90


def test_clean_of_a_text_without_identifiers_changes_nothing(deidentifier: Deidentifier) -> None:
    text = " ".join(MEDICINE)

    assert deidentifier.clean(text, group_id="p1") == Cleaned(text, {})


@pytest.mark.parametrize(
    "text",
    [
        "DOB 3/2/1931, seizures.",
        "Born in 1931, she has seizures.",
        "Seen on 3/2/2035. Born on 1 May 1944 at term.",
    ],
)
def test_clean_of_a_year_of_birth_that_tells_an_age_over_89_leaves_no_year(
    deidentifier: Deidentifier, text: str
) -> None:
    outcome = deidentifier.clean(text, group_id="p1")

    assert isinstance(outcome, Cleaned), outcome
    assert "90 or more years ago" in outcome.text
    assert not re.search(r"19\d\d", outcome.text)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("Seen with \u0418\u0432\u0430\u043d today.", "characters"),
        ("Seen with Whit\u200bcombe today.", "characters"),
        ("Sm\u00adith has seizures.", "characters"),
        ("Der Junge kommt mit seinen Eltern in die Sprechstunde und hat keine Beschwerden angegeben.", "language"),
        ("Seen today: W h i t c o m b e was well.", "spelled"),
        ("x" * 60_000, "length"),
        ("write to me @ the usual place", "contact"),
    ],
)
def test_clean_of_a_text_that_cannot_be_read_is_unsure(deidentifier: Deidentifier, text: str, cause: str) -> None:
    outcome = deidentifier.clean(text, group_id="p1")

    assert outcome == Unsure(cause)


_PIECES = st.lists(st.sampled_from(sorted(CANARIES)) | st.sampled_from(MEDICINE) | st.text(max_size=12), max_size=8)


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(pieces=_PIECES, separator=st.sampled_from([" ", "\n", ". ", ", "]))
def test_clean_of_any_mixture_never_raises_and_never_lets_a_canary_through(
    deidentifier: Deidentifier, pieces: list[str], separator: str
) -> None:
    cues = {"name": "Mrs. ", "doctor": "Dr. ", "town": "She lives in ", "plan": "plan ID "}
    text = separator.join(cues.get(piece, "") + CANARIES.get(piece, piece) for piece in pieces)

    outcome = deidentifier.clean(text, group_id="p1")

    if isinstance(outcome, Cleaned):
        after = outcome.text.casefold()
        assert [piece for piece in pieces if piece in CANARIES and CANARIES[piece].casefold() in after] == []
    else:
        assert re.fullmatch(r"[a-z]+", outcome.cause)


def test_surrogates_are_never_an_original_of_the_text() -> None:
    vocabulary = load_vocabulary()
    surrogates = Surrogates(KEY, "p1", vocabulary)
    drawn = plain(surrogates.replace("Whitcombe", "name", avoid=()))

    assert plain(surrogates.replace("Whitcombe", "name", avoid={drawn})) != drawn
    for kind, value in (("phone", "555 1234"), ("number", "AB-1234"), ("address", "44113"), ("name", "J.A.S.")):
        assert surrogates.replace(value, kind, avoid=()) != value  # type: ignore[arg-type]
        assert len(surrogates.replace(value, kind, avoid=())) == len(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        ("O'Brien", r"O'[A-Z][a-z]+"),
        ("Garcia-Lopez", r"[A-Z][a-z]+-[A-Z][a-z]+"),
        ("SMITH, JOHN A.", r"[A-Z]+, [A-Z]+ [A-Z]\."),
        ("van der Berg", r"van der [A-Z][a-z]+"),
        ("smith", r"[a-z]+"),
    ],
)
def test_surrogates_of_a_name_have_its_form(value: str, shape: str) -> None:
    assert re.fullmatch(shape, Surrogates(KEY, "p1", load_vocabulary()).replace(value, "name", avoid=()))


def test_clean_attributes_groups_old_ages_hides_sites_and_drops_names(deidentifier: Deidentifier) -> None:
    attributes = {
        "sex": "female",
        "age_years": "93.5",
        "site": "Saint Wilfrida",
        "patient_name": "Whitcombe",
        "dob": "1931",
    }

    cleaned = deidentifier.clean_attributes(attributes, group_id="p1")

    assert cleaned == {
        "sex": "female",
        "age_years": "90 or older",
        "site": draw_pseudonym(KEY, "site", "Saint Wilfrida"),
    }
    assert deidentifier.clean_attributes({"age_years": "89.0"}, group_id="p1") == {"age_years": "89.0"}


@pytest.mark.parametrize("value", ["seen by Dr Whitcombe", "07/23/1958", "Ysolde"])
def test_clean_attributes_with_an_identifier_in_a_value_is_unsure(deidentifier: Deidentifier, value: str) -> None:
    assert deidentifier.clean_attributes({"remark": value}, group_id="p1") == Unsure("attribute")


def test_clean_case_replaces_ids_and_text_and_leaves_what_is_coded(deidentifier: Deidentifier) -> None:
    case = Case(
        case_id="84720193",
        group_id="Quarrington",
        text=_note(),
        findings=(Finding(id="HP:0001250", label="Seizure"),),
        label_id="OMIM:154700",
        attributes={"age_years": "97"},
        image=_png("Ysolde Quarrington"),
        source="clinic",
        synthetic=False,
    )

    outcome = deidentifier.clean_case(case)

    assert isinstance(outcome, CleanedCase), outcome
    shown = repr(outcome)
    assert [secret for secret in SECRETS if secret in shown] == []
    assert outcome.case.image is not None
    assert b"Quarrington" not in outcome.case.image
    assert deidentifier.clean_case(case.model_copy(update={"image": b"no image"})) == Unsure("image")
    assert outcome.case.findings == case.findings
    assert outcome.case.label_id == case.label_id
    assert re.fullmatch(r"patient-[0-9a-f]{16}", outcome.case.group_id)
    assert deidentifier.clean_case(case) == outcome


def test_clean_case_with_a_name_among_its_findings_is_unsure(deidentifier: Deidentifier) -> None:
    case = Case(
        case_id="1",
        group_id="1",
        text="Seizures.",
        findings=(Finding(id="", label="as Dr. Oxenbridge noted"),),
        source="clinic",
        synthetic=False,
    )

    assert deidentifier.clean_case(case) == Unsure("finding")


def test_check_recall_below_what_the_config_asks_for_fails_without_content() -> None:
    deidentifier = Deidentifier(DeidentificationConfig(least_recall=1.0), key=KEY)

    with pytest.raises(GateFailed, match="least_recall") as error:
        deidentifier.check_recall()
    assert KEY.decode() not in repr(error.value)
    assert Deidentifier(DeidentificationConfig(), key=KEY).check_recall().recall.value >= 0.98


@pytest.mark.parametrize("environment", [{}, {KEY_VARIABLE: ""}, {KEY_VARIABLE: "short-but-secret"}], ids=str)
def test_read_key_that_is_missing_or_short_says_how_to_make_one_and_not_what_it_was(
    environment: dict[str, str],
) -> None:
    with pytest.raises(InvalidInput, match="openssl rand -hex 32") as error:
        read_key(environment)
    assert "short-but-secret" not in repr(error.value)


def test_read_key_of_the_environment_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY.decode())

    assert read_key() == KEY


def test_deidentification_config_refuses_what_it_cannot_do() -> None:
    for values in ({"language": "de"}, {"least_recall": 0}, {"least_recall": 1.2}, {"key": "x"}):
        with pytest.raises(ValidationError):
            DeidentificationConfig.model_validate(values)
