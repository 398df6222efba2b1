"""Names of people in a text: by lists, by titles and kinship words, by capitals that ordinary English does not have.

Goes in: the words of a text and what is medical in it. Comes out: spans of type `name`. What no list knows counts as a
name where it is written like one: names are open-ended, and the words of clinical English are not (the principle of
Philter, Norgeot et al. 2020). Knows no patient.
"""

import itertools
import re
from collections.abc import Sequence

from mint_lib.deidentification.spans import Span
from mint_lib.deidentification.vocabulary import Vocabulary
from mint_lib.deidentification.word_lists import read_words
from mint_lib.deidentification.words import TITLES, Word

_HONORIFICS = frozenset(read_words("honorifics"))
_KIN = frozenset(read_words("kin"))
_FIELDS = frozenset(read_words("fields"))
# Words that follow a title or a name and are none, although the lists have some of them among the names.
_NEVER = frozenset(read_words("never_names"))
_INITIALS = re.compile(r"(?<![\w.])(?:[A-Z]\.[ -]?){2,4}(?![\w])|(?<![\w.])[A-Z]\.[A-Z]\b(?!\.)")
_NOT_INITIALS = re.compile(
    r"(?:M\.?D|D\.?O|R\.?N|N\.?P|P\.?A|U\.?S(?:\.?A)?|U\.?K|P\.?O|I\.?V|I\.?M|B\.?I\.?D|T\.?I\.?D|Q\.?I\.?D|P\.?R\.?N|"
    r"Q\.?D|O\.?D|O\.?S|E\.?R|E\.?D|H\.?P\.?I|D\.?O\.?B|M\.?R\.?N|Y\.?O|A\.?M|P\.?M|E\.?G|I\.?E|N\.?B|C\.?C|P\.?S|"
    r"B\.?P|H\.?R|R\.?R|S\.?C|P\.?T|O\.?T|D\.?C)\.?",
    re.IGNORECASE,
)
_SIGNED_INITIALS = re.compile(
    r"\b(?:initials?|initialled|signed|dictated by|typed by|seen by|reviewed by|entered by|d/w)"
    r"\s*:?\s+(?P<value>[A-Z]{2,3})\b"
)
_CREDENTIALS = re.compile(
    r"(?:,|\s)\s*(?:M\.?D|D\.?O|Ph\.?D|R\.?N|MBBS|MBChB|MRCP|FRCP|NP|PA-C|LCSW|MSc|DPhil|FAAP|CGC)\b"
)
_FIELD_ENDS = re.compile(r"[ \t]*(?:$|[\n,.;:()\d]|[ \t]{2})")
_PERSONAL_VERB = re.compile(
    r"(?:'s)?[ ](?:\([^)]{1,12}\)[ ])?(?:is|was|has|had|does|did|reports?|reported|denie[sd]|takes?|took|lives?|lived|"
    r"says|"
    r"said|states?|stated|complains?|complained|feels?|felt|presents?|presented|attends?|attended|came|comes|went|"
    r"remains?|appears?|describes?|described|wants?|wishes|asks?|asked|called|rang|weighs?|walks|speaks|attends|needs|"
    r"underwent|received|returned|and (?:his|her|their))\b"
)
_LINKS = frozenset(read_words("links"))
_BEFORE_NAME = re.compile(
    r"(?:(?<![\w./])(?:[A-Z]\.[ \t]?|[A-Z][ \t]){1,3}|\b(?:de|la|von|van|der|den|di|del|St\.?)[ \t]+)+$"
)
_LOOK_BACK_CHARACTERS = 24
_MOST_AFTER_CUE = 4


def find_names(
    text: str, words: Sequence[Word], vocabulary: Vocabulary, *, medical: Sequence[tuple[int, int]]
) -> list[Span]:
    """Every name of a person, first and last names and initials; capitals that nothing explains are taken for one."""
    is_medical = [any(start <= word.start < end for start, end in medical) for word in words]
    is_name = [not is_medical[index] and _looks_like_name(text, word, vocabulary) for index, word in enumerate(words)]
    _add_after_cues(text, words, is_name, is_medical, vocabulary)
    _add_neighbours(text, words, is_name, is_medical, vocabulary)
    _add_repeats(words, is_name, is_medical, vocabulary)
    spans = _join(text, words, is_name)
    for match in _INITIALS.finditer(text):
        if not _NOT_INITIALS.fullmatch(match[0].strip()):
            spans.append(Span(match.start(), match.start() + len(match[0].rstrip()), "name"))
    spans += [Span(*match.span("value"), "name") for match in _SIGNED_INITIALS.finditer(text)]
    return spans


def _looks_like_name(text: str, word: Word, vocabulary: Vocabulary) -> bool:
    """By the word itself, whatever stands around it."""
    if len(word.plain) < 2 or word.plain in _NEVER | TITLES | _KIN | _FIELDS:
        return False
    is_safe = vocabulary.is_safe(word.text)
    is_listed = vocabulary.is_name(word.text)
    if is_safe:
        # Faith, Young, Field: a name where English writes no capital, or where somebody acts.
        if not (is_listed and word.is_capitalised) or word.text.isupper():
            return False
        return not word.starts_sentence or _PERSONAL_VERB.match(text, word.end) is not None
    if word.is_acronym and not word.in_capitals:
        return False
    if word.in_capitals:
        return is_listed or len(word.text) > 5
    if word.text[0].isupper():
        return True
    # Of a word such as down-sloping only what is no ordinary word can tell.
    parts = re.split(r"['’-]", word.text)
    return len(word.plain) > 2 and any(vocabulary.is_name(part) for part in parts if not vocabulary.is_safe(part))


def _add_after_cues(
    text: str, words: Sequence[Word], is_name: list[bool], is_medical: Sequence[bool], vocabulary: Vocabulary
) -> None:
    """Mark what follows `Dr`, `mother` or `Patient:` and what stands before `, MD`."""
    for index, word in enumerate(words[:-1]):
        is_title = word.plain in TITLES
        is_field = word.plain in _FIELDS and (":" in words[index + 1].before or word.plain in ("pt", "re", "patient"))
        if not (is_title or is_field or word.plain in _KIN):
            continue
        for offset in range(1, _MOST_AFTER_CUE + 1):
            if index + offset >= len(words):
                break
            following = words[index + offset]
            gap = following.before.strip(" \t.,:()'’")
            is_near = gap == "" or re.fullmatch(r"[A-Z]\.?", gap) is not None
            if not is_near or "\n" in following.before or is_medical[index + offset]:
                break
            if offset > 1 and following.starts_sentence:
                break
            if is_name[index + offset]:
                continue
            if following.plain in _LINKS and following.plain not in _NEVER:
                continue
            is_addressed = word.plain in _HONORIFICS and offset == 1 and following.is_capitalised
            if (following.plain in _NEVER and not is_addressed) or following.plain in TITLES | _KIN | _FIELDS:
                break
            if _is_initial(following):
                continue
            is_safe = vocabulary.is_safe(following.text)
            listed = vocabulary.is_name(following.text)
            if is_safe and _starts_pair(words, index + offset, vocabulary):
                is_name[index + offset] = is_name[index + offset + 1] = True
                continue
            written = following.text[0].isupper() and not following.in_capitals
            if is_title and (written or not is_safe or listed) and not (following.is_acronym and is_safe):
                is_name[index + offset] = True
            elif not is_safe or (listed and (written or following.in_capitals or offset > 1)):
                is_name[index + offset] = not following.is_acronym or following.in_capitals
            else:
                break
    for index, word in enumerate(words[1:]):
        family = words[index]
        if word.plain in ("family", "household") and family.is_capitalised and vocabulary.is_last_name(family.text):
            is_name[index] = is_name[index] or not is_medical[index]
    for match in _CREDENTIALS.finditer(text):
        for index in range(len(words) - 1, -1, -1):
            if words[index].end <= match.start():
                if words[index].is_capitalised and match.start() - words[index].end <= 1 and not is_medical[index]:
                    is_name[index] = is_name[index] or vocabulary.is_name(words[index].text)
                break


def _starts_pair(words: Sequence[Word], index: int, vocabulary: Vocabulary) -> bool:
    """`mary brown` behind a cue: a listed first name and a listed last name, both of them ordinary words."""
    if index + 1 >= len(words) or words[index + 1].before != " ":
        return False
    word, following = words[index], words[index + 1]
    return (
        vocabulary.is_first_name(word.text)
        and vocabulary.is_last_name(following.text)
        and following.plain not in _NEVER | TITLES | _KIN | _FIELDS
    )


def _add_neighbours(
    text: str, words: Sequence[Word], is_name: list[bool], is_medical: Sequence[bool], vocabulary: Vocabulary
) -> None:
    """Mark listed words next to a name, and pairs such as `Hope Stone` of which each is an ordinary word."""
    for index in range(len(words) - 1):
        word, following = words[index], words[index + 1]
        if is_medical[index] or is_medical[index + 1] or "\n" in following.before:
            continue
        pair = word.is_capitalised and following.is_capitalised and following.before == " "
        if (
            pair
            and not (is_name[index] or is_name[index + 1])
            and vocabulary.is_first_name(word.text)
            and vocabulary.is_last_name(following.text)
        ):
            is_name[index] = is_name[index + 1] = True
    order = [index for index, word in enumerate(words) if not _is_initial(word)]
    for way, is_forward in ((order, True), (order[::-1], False)):
        for neighbour, index in itertools.pairwise(way):
            if is_name[index] or is_medical[index] or not is_name[neighbour]:
                continue
            word = words[index]
            gap = text[min(words[neighbour].end, word.end) : max(words[neighbour].start, word.start)]
            if not _is_name_gap(gap) or word.plain in TITLES | _KIN | _FIELDS:
                continue
            if word.plain in _NEVER and not word.is_capitalised:
                continue
            listed = vocabulary.is_last_name(word.text) if is_forward else vocabulary.is_first_name(word.text)
            if word.is_acronym and not word.in_capitals and not (listed and words[neighbour].text.isupper()):
                continue
            same_case = word.text[0].isupper() == words[neighbour].text[0].isupper()
            is_pair = is_forward and word.is_capitalised and vocabulary.is_first_name(words[neighbour].text)
            is_turned = not is_forward and gap.strip() == "," and word.before.rstrip().endswith((":", "-"))
            fills_field = is_forward and gap == " " and word.in_capitals and _FIELD_ENDS.match(text, word.end)
            is_pair = is_pair and "," not in gap
            if (listed and same_case) or is_pair or fills_field or (is_turned and word.is_capitalised):
                is_name[index] = word.text[0].isupper() or gap == " "


def _is_name_gap(gap: str) -> bool:
    return re.fullmatch(r",?[ \t](?:[A-Z]\.?[ \t])?|-", gap) is not None


def _add_repeats(
    words: Sequence[Word], is_name: list[bool], is_medical: Sequence[bool], vocabulary: Vocabulary
) -> None:
    """Mark every other place where a name of this text stands; an ordinary word only if it is written like a name."""
    known = {word.plain for word, name in zip(words, is_name, strict=True) if name and len(word.plain) > 2}
    for index, word in enumerate(words):
        if word.plain in known and not is_name[index] and not is_medical[index]:
            is_plain_word = vocabulary.is_safe(word.text) or word.plain in _NEVER
            is_name[index] = word.text[0].isupper() or not is_plain_word


def _join(text: str, words: Sequence[Word], is_name: Sequence[bool]) -> list[Span]:
    """Spans of neighbouring name words with the initials and small words between and around them."""
    spans: list[Span] = []
    index = 0
    while index < len(words):
        if not is_name[index]:
            index += 1
            continue
        start, end = words[index].start, words[index].end
        index += 1
        while index < len(words):
            link = index
            while link < len(words) and words[link].plain in _LINKS and _is_name_gap(words[link].before):
                link += 1
            inner = index
            while inner < link + 1 and inner < len(words) and _is_initial(words[inner]) and inner - index < 2:
                inner += 1
            last = max(link, inner) if max(link, inner) < len(words) else None
            if last is None or not is_name[last] or "\n" in text[end : words[last].start]:
                break
            if not re.fullmatch(r"[\s,.'’-]*", "".join(word.before for word in words[index : last + 1])):
                break
            end = words[last].end
            index = last + 1
        spans.append(_with_initials(text, start, end))
    return spans


def _is_initial(word: Word) -> bool:
    return len(word.text) == 1 and word.text.isupper()


def _with_initials(text: str, start: int, end: int) -> Span:
    """The span with `A.` and `de la` before it and `, J.` or ` B.` behind it."""
    near = text[max(0, start - _LOOK_BACK_CHARACTERS) : start]
    before = _BEFORE_NAME.search(near)
    if before and before[0].strip() not in ("I", "A"):
        start -= len(before[0])
    after = re.match(r"(?:,?[ \t]+[A-Z]\.(?!\w)|,?[ \t]+[A-Z](?=[\s,;)]))+", text[end : end + _LOOK_BACK_CHARACTERS])
    if after:
        end += after.end()
    return Span(start, end, "name")
