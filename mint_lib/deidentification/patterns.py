"""Identifiers that have a form of their own: ages over 89, contact data, numbers of records, addresses.

Goes in: a text. Comes out: spans, and the spans of codes, variants and measurements that look like numbers of somebody
and must stay. The list is that of HIPAA Safe Harbor, 45 CFR 164.514(b)(2)(i). Knows neither names nor dates.
"""

import re

from mint_lib.deidentification.spans import IdentifierType, Span

_UNIT = r"(?:[mµuknp]?g|kg|mcg|lbs?|oz|[mudµ]?l|[µmnp]mol|mmol|mol|m?iu|[mk]?u|units?|mm|cm|m|%|mmhg|bpm|hz|kcal|k?cells?|years?|yrs?|months?|weeks?|wks?|days?|hours?|hrs?|min(?:utes)?|seconds?)"  # noqa: E501
_STATES = (
    "Alabama|Alaska|Arizona|Arkansas|California|Colorado|Connecticut|Delaware|Florida|Georgia|Hawaii|Idaho|Illinois|"
    "Indiana|Iowa|Kansas|Kentucky|Louisiana|Maine|Maryland|Massachusetts|Michigan|Minnesota|Mississippi|Missouri|"
    "Montana|Nebraska|Nevada|New Hampshire|New Jersey|New Mexico|New York|North Carolina|North Dakota|Ohio|Oklahoma|"
    "Oregon|Pennsylvania|Rhode Island|South Carolina|South Dakota|Tennessee|Texas|Utah|Vermont|Virginia|Washington|"
    "West Virginia|Wisconsin|Wyoming|Puerto Rico|A[KLRZ]|C[AOT]|D[CE]|FL|GA|HI|I[ADLN]|K[SY]|LA|M[ADEINOST]|"
    "N[CDEHJMVY]|O[HKR]|PA|PR|RI|S[CD]|T[NX]|UT|V[AT]|W[AIVY]"
)
STATE = rf"(?:{_STATES})"
"""The states of the USA: a geographic unit that may stay."""
_STATE_NAMED = re.compile(rf"(?:,[ \n]+|\b(?:in|from|of|to|near|across|state)\s+)(?P<state>{STATE})\b")
_STREET = (
    r"(?:Street|St|Road|Rd|Avenue|Ave|Lane|Ln|Drive|Dr|Boulevard|Blvd|Court|Ct|Place|Pl|Terrace|Ter|Way|Close|Crescent|"
    r"Square|Sq|Highway|Hwy|Parkway|Pkwy|Circle|Cir|Trail|Trl|View|Row|Mews|Gardens|Grove|Hill|Park|Walk|Green|Rise|"
    r"Quay|Wharf|Loop|Pike|Alley|Heights|Plaza|Route)"
)
_FLAT = r"(?:(?:Flat|Apt|Apartment|Unit|Suite|Ste|Room|Rm|No)\.?\s*#?\w{1,5},?\s+)?"
_CUE = (
    r"(?:m\.?r\.?n\.?|medical record|(?:hosp(?:ital)?|chart|record|file|case|account|acct|policy|plan|group|member|"
    r"subscriber|insurance|claim|invoice|encounter|visit|specimen|sample|accession|reference|ref|patient|nhs|chi|"
    r"medicare|medicaid|passport|driver'?s? licen[cs]e|licen[cs]e|certificate|registration|serial|device|implant|lot|"
    r"imei|plate|vin|vehicle|order|barcode|study)\b)"
)
_LABEL = r"(?:\s*(?:number|numbers|no|nos|num|nr|id|ids|identifier|plan|record|s/n|code)\b\.?)"
_ID = r"(?:[A-Z]{1,4}[ ](?=\d))?(?=[\w./-]*\d)[A-Za-z0-9](?:[A-Za-z0-9]|[-/.](?=\w)|[ ](?=\d)){2,24}"
_NUMBER_WORD = (
    r"(?:ninety(?:[-\s](?:one|two|three|four|five|six|seven|eight|nine))?(?:\s*-?\s*(?:first|second|third|fourth|fifth|"
    r"sixth|seventh|eighth|ninth))?|(?:one|a)\s+hundred(?:\s+and\s+\w+)?)"
)
_OLD = rf"(?:9\d|1[0-3]\d|{_NUMBER_WORD})"
_YEARS_OLD = r"(?:[-\s]*(?:years?|yrs?|yr|y)[-\s./]*(?:old|o|of\s+age)?\b|\s*yo\b|\s*y\.?\s?/?o\.?\b)"

_IDENTIFYING: tuple[tuple[IdentifierType, re.Pattern[str]], ...] = (
    ("age", re.compile(rf"\b{_OLD}{_YEARS_OLD}", re.IGNORECASE)),
    ("age", re.compile(rf"\b(?:aged?|age\s+of|age\s*:|turned|turning|is\s+now)\s+(?P<value>{_OLD})\b(?!\s?%)", re.I)),
    ("age", re.compile(r"\bin\s+(?:his|her|their)\s+(?P<value>(?:9\d|1[0-3]\d)(?:th|st|nd|rd)\s+year|nineties|"
        r"90s)\b", re.I)),
    ("age", re.compile(r"\b(?:nonagenarian|centenarian|supercentenarian)\b", re.IGNORECASE)),
    ("age", re.compile(r"(?<=, )(?P<value>9\d|1[0-3]\d)(?=\s*,|\s+(?:and|year))")),
    ("email", re.compile(r"[\w.+'-]{1,64}\s?(?:@|\(at\)|\[at\])\s?[\w-]+(?:\s?(?:\.|\(dot\))\s?[\w-]+)+")),
    ("url", re.compile(r"\b(?:https?|ftp)://[^\s<>\"']+|\bwww\.[^\s<>\"']+", re.IGNORECASE)),
    ("url", re.compile(r"\b(?:[\w-]{1,63}\.){1,8}"
        r"(?:com|org|net|edu|gov|example|health|care|io|uk|us|de|fr|info)\b(?:/[^\s<>\"']*)?", re.I)),
    ("url", re.compile(r"(?<!\w)@\w{3,}")),
    ("ip", re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}\b(?:/\d{1,2})?")),
    ("ip", re.compile(r"(?<![\w:])(?:[0-9a-f]{0,4}:){3,7}[0-9a-f]{1,4}\b", re.IGNORECASE)),
    ("number", re.compile(r"\b[0-9a-f]{2}(?::[0-9a-f]{2}){5}\b", re.IGNORECASE)),
    ("number", re.compile(r"\b(?:\d{3}|[xX*]{3})[- ](?:\d{2}|[xX*]{2})[- ]\d{4}(?:-[A-Z])?\b")),
    ("phone", re.compile(r"(?<![\w.])(?:\+|00)\d{1,3}[-\s./]*(?:\(0\))?"
        r"(?:\(?\d{1,5}\)?[-\s./]*){2,5}\d(?:\s*(?:ext|x)\.?\s*\d+)?", re.I)),
    ("phone", re.compile(r"(?<![\w.])(?:1[-\s.])?\(?\d{3}\)?[-\s./]{1,2}\d{3}[-\s.]\d{4}\b"
        r"(?:\s*(?:ext|x)\.?\s*\d+)?", re.I)),
    ("phone", re.compile(r"(?<![\w.,/])\(?0\d{2,4}\)?[-\s.]\d{3,4}[-\s.]?\d{3,4}\b")),
    ("phone", re.compile(r"(?<![\w.,/])07\d{3}\s?\d{6}\b")),
    ("phone", re.compile(r"(?<![\w.,/-])\d{3}[-.\s]\d{4}\b(?!\s*(?:-|/|\d))(?:\s*(?:ext|x)\.?\s*\d+)?", re.I)),
    ("phone", re.compile(
        r"\b(?:tel|telephone|phone|fax|mobile|cell|pager|bleep|beeper|ext|extension|call(?:ed|\s+back)?(?:\s+on|\s+at)?|ring|"
        r"direct line)\b[\s:.#]*(?:is\s+|on\s+|at\s+)?(?P<value>[+(]?\d[\d\s()./-]{1,18}\d)", re.I)),
    ("number", re.compile(rf"\b{_CUE}\.?(?:{_LABEL}|\s*\#)*[\s:.#]*(?:is\s+)?(?P<value>{_ID})", re.IGNORECASE)),
    ("number", re.compile(rf"\b(?:id|identifier|s/n|no|nos|number|ssn|sin|nino|dea|npi|lcsw|gmc|nmc)\b"
        rf"\.?\s*[:#]*\s*(?P<value>{_ID})", re.I)),
    ("number", re.compile(rf"\#[\s:.]*(?P<value>{_ID})")),
    ("number", re.compile(r"\b(?:[A-Z]{2}\s?\d{2}\s?\d{2}\s?\d{2}\s?[A-D])\b")),
    ("number", re.compile(r"\b(?=[A-Z0-9-]{0,30}\d{3})(?=[A-Z0-9-]{0,30}[A-Z])(?=(?:[A-Z-]{0,9}\d){4})"
        r"[A-Z0-9]{1,40}(?:-[A-Z0-9]{1,40}){0,6}\b")),
    ("number", re.compile(r"(?<![\w.,-])\d{3,}(?:[-\s]\d{2,})+(?![\w%])")),
    ("number", re.compile(r"(?<![\w.,])\d{2}(?:-\d{2}){2,}\b")),
    ("number", re.compile(r"(?<![\w.,])\d{6,}\b")),
    ("number", re.compile(rf"\b(?!{STATE}\s)[A-Z]{{1,3}}\s\d{{5,}}\b")),
    ("address", re.compile(r"\bP\.?\s?O\.?\s*Box\s+\d+", re.IGNORECASE)),
    ("address", re.compile(
        rf"\b{_FLAT}\d{{1,5}}[A-Za-z]?,?[ ]+(?:[NSEW]{{1,2}}\.?[ ]+|(?:North|South|East|West)[ ]+)?"
        rf"(?:(?:[A-Z][\w'’-]*|\d+(?:st|nd|rd|th)|of|the)[ ]+){{0,4}}{_STREET}\b\.?(?:[ ]+\d+\b)?"
        rf"(?:,?[ ]+(?:Apt|Apartment|Unit|Suite|Ste|Flat|Room|\#)\.?[ ]*\w{{1,5}})?")),
    ("address", re.compile(rf"(?<=\b)(?:{STATE}),?\s+(?P<value>\d{{5}}(?:-\d{{4}})?)\b")),
    ("address", re.compile(r"\b(?:zip|postcode|post code|postal code)\b(?:\s*code)?"
        r"[\s:]*(?P<value>[A-Z0-9][A-Z0-9 -]{2,9})", re.I)),
    ("address", re.compile(r"\b(?!HP|CD)[A-Z]{1,2}\d[A-Z\d]?\s\d[A-Z]{2}\b")),
    ("address", re.compile(r"(?<=\b)\d{5}-\d{4}\b")),
)  # fmt: skip
_STAYS: tuple[re.Pattern[str], ...] = tuple(
    re.compile(pattern)
    for pattern in (
        r"\b(?:HP|MONDO|ORPHA|Orphanet|OMIM|MIM|ICD-?(?:9|10|11)?|SNOMED(?: CT)?|LOINC|UMLS|"
        r"DOID|GO|HGNC|MP|NCT)[:#\s]{1,2}\d{3,9}\b",
        r"\bN[MRPCG]_\d+(?:\.\d+)?(?::[cgmnpr]\.[\w.+>*?=()-]+)?",
        r"\bENS[TGP]\d+(?:\.\d+)?\b",
        r"\b[cgmnpr]\.\(?[\w.+>*?=()-]+",
        r"\brs\d{3,}\b",
        r"\bchr(?:omosome)?\s?[\dXY]{1,2}:[\d,]+(?:-[\d,]+)?",
        r"\b\d{2},X[XY]?(?:,[\w()+;.-]+)?",
        r"\b[A-TV-Z]\d{2}(?:\.\d{1,4})?\b(?!-)",
        rf"(?<![\w-])\d+(?:[.,]\d+)?(?:\s?(?:x\s?10\^?\d+))?\s?/?(?i:{_UNIT})(?:/\w+)?(?!\w)(?!-\d)",
        r"(?<![\w-])\d{1,3}(?:,\d{3})+\b",
        r"\b(?:[01]?\d|2[0-3]):[0-5]\d(?::[0-5]\d)?\b",
        r"\b\d{2,3}/\d{2,3}\s?mm\s?Hg\b|(?<=BP )\d{2,3}/\d{2,3}\b",
    )
)


def find_patterns(text: str) -> list[Span]:
    """Every identifier that has a form of its own; spans may overlap."""
    stays = find_codes(text)
    found = []
    for kind, pattern in _IDENTIFYING:
        has_value = "value" in pattern.groupindex
        for match in pattern.finditer(text):
            start, end = match.span("value" if has_value else 0)
            span = Span(start, end, kind)
            is_code = kind in ("number", "phone") and any(code.start <= start and end <= code.end for code in stays)
            if not is_code:
                found.append(span)
    return found


def find_codes(text: str) -> list[Span]:
    """Codes of ontologies, variants, times and measurements: numbers that identify nobody."""
    return [Span(match.start(), match.end(), "other") for pattern in _STAYS for match in pattern.finditer(text)]


def find_states(text: str) -> list[Span]:
    """States of the USA where a state is meant: behind a comma, or behind `in`, `from`, `of` and the like."""
    return [Span(*match.span("state"), "other") for match in _STATE_NAMED.finditer(text)]
