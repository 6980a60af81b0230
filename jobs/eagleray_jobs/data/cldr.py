"""Two corpora from the Unicode CLDR, which Babel carries: translation and language identification.

The phrases are curated names, dates, times, units, amounts, numbers and lists of many languages: real text,
but localised phrases and not general text. Everything is deterministic. The key of an example is what the
phrase is about (a territory, a currency, a calendar day, a number), so that no split learns what another one
asks: a day that is held out is held out in all its formats and years, a number in all its units, and a list
is made of names from the training split alone.
"""

from __future__ import annotations

import datetime
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Literal, TypeVar, get_args

from babel import Locale
from babel.dates import format_date, format_skeleton, format_time, format_timedelta
from babel.lists import format_list
from babel.numbers import format_compact_decimal, format_currency, format_decimal, format_percent
from babel.units import format_unit

from eagleray_jobs.data.split import SplitShares

LANGUAGES = ("de", "el", "en", "es", "fi", "fr", "it", "nl", "pl", "pt", "ru", "tr")
"""The languages of `cldr-langid` by default."""

Say = Callable[[str], str]
"""Says one thing in a language, given as a CLDR code."""

NAMES = ("territories", "languages", "scripts", "currencies")
KIND_OF_NAME = {"territories": "territory", "languages": "language", "scripts": "script", "currencies": "currency"}

YEARS = range(1950, 2051)
DATE_FORMATS = ("full", "long", "medium", "MMMd", "MMMEd", "yMMMEd")
NUMBERS = (*range(1, 130), *range(150, 1000, 13), *range(1000, 10000, 271))
FRACTIONS = tuple(whole + tenth / 10 for whole in range(40) for tenth in (1, 2, 5, 7))
UNITS = (
    "length-kilometer", "length-meter", "length-centimeter", "length-millimeter", "length-mile", "length-yard",
    "length-foot", "length-inch", "length-light-year", "length-nautical-mile", "area-square-kilometer",
    "area-hectare", "area-square-meter", "area-square-mile", "area-acre", "area-square-foot",
    "volume-cubic-kilometer", "volume-cubic-meter", "volume-liter", "volume-deciliter", "volume-centiliter",
    "volume-milliliter", "volume-pint", "volume-cup", "volume-gallon", "volume-quart", "volume-tablespoon",
    "volume-teaspoon", "volume-fluid-ounce", "mass-kilogram", "mass-gram", "mass-milligram", "mass-pound",
    "mass-ounce", "mass-carat", "duration-century", "duration-year", "duration-month", "duration-week",
    "duration-day", "duration-hour", "duration-minute", "duration-second", "duration-millisecond",
    "digital-terabyte", "digital-gigabyte", "digital-megabyte", "digital-kilobyte", "digital-byte", "digital-bit",
    "energy-kilocalorie", "energy-calorie", "energy-kilojoule", "energy-joule", "energy-kilowatt-hour",
    "frequency-gigahertz", "frequency-megahertz", "frequency-kilohertz", "frequency-hertz", "power-megawatt",
    "power-kilowatt", "power-watt", "power-horsepower", "pressure-bar", "pressure-millibar", "pressure-pascal",
    "speed-kilometer-per-hour", "speed-meter-per-second", "speed-mile-per-hour", "speed-knot",
    "temperature-celsius", "temperature-fahrenheit", "temperature-kelvin", "electric-volt", "electric-ampere",
    "electric-ohm", "angle-degree", "light-lux", "graphics-pixel", "graphics-megapixel", "concentr-karat",
)  # fmt: skip
"""Units that every language of CLDR names."""
AMOUNTS = 3500
TimeFormat = Literal["short", "medium"]
Interval = Literal["second", "minute", "hour", "day", "week"]
DURATIONS: Mapping[Interval, int] = {"second": 1, "minute": 60, "hour": 3600, "day": 86400, "week": 7 * 86400}
ListStyle = Literal["standard", "or"]
LIST_STYLES: tuple[ListStyle, ...] = get_args(ListStyle)
NUM_LISTS = 4000
COMMON: Mapping[str, frozenset[str]] = {
    "territories": frozenset(
        "AR AT AU BE BR CA CH CL CN CO CU CZ DE DK DZ EG ES FI FR GB GR HU IE IN IS IT JP KE KR LB LU MA MX "
        "NG NL NO NZ PE PL PT RO RU SE SN TN TR UA US VN ZA".split()
    ),
    "languages": frozenset(
        "ar bg ca cs da de el en es et eu fi fr ga he hi hr hu id is it ja ko la lt lv mt nl no pl pt ro ru "
        "sk sl sq sr sv sw th tr uk vi zh".split()
    ),
    "currencies": frozenset(
        "ARS AUD BRL CAD CHF CLP CNY COP CZK DKK EGP EUR GBP HUF ILS INR JPY KRW MAD MXN NGN NOK NZD PEN PLN "
        "RON RUB SEK THB TND TRY UAH USD VND ZAR".split()
    ),
}
"""What lists and amounts of a translation are made of: few enough to be learnt in a minute or two."""
PHRASES_PER_KIND = {
    "territory": 300, "language": 700, "currency": 300, "date": 350, "unit": 350, "amount": 500, "duration": 250,
    "list": 1000,
}  # fmt: skip
"""About how many of each kind tell the languages apart, so that names do not drown among dates."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Phrase:
    """One thing that every language says in its own way.

    Attributes:
        kind: What sort of phrase it is; scores are shown per kind.
        key: What it is about; equal keys stay in one split.
        say: Says it in a language.
    """

    kind: str
    key: str
    say: Say


def translation_examples(source: str, target: str, shares: SplitShares) -> list[dict[str, str]]:
    """Return the rows of a translation corpus: `source`, `target`, `kind`, `key`.

    A text that has several translations is dropped, and of several equal rows the first one stays.
    """
    targets: dict[str, dict[str, Phrase]] = defaultdict(dict)
    for phrase in phrases((source, target), shares, common=True):
        said = _typed(phrase.say(source)), phrase.say(target)
        if all(said):
            targets[said[0]].setdefault(said[1], phrase)
    return [
        {"source": text, "target": answer, "kind": phrase.kind, "key": phrase.key}
        for text, answers in targets.items()
        if len(answers) == 1
        for answer, phrase in answers.items()
    ]


def language_examples(languages: Sequence[str], shares: SplitShares) -> list[dict[str, str]]:
    """Return the rows of a language-identification corpus: `text`, `label`, `kind`, `key`.

    A text that more than one language says is dropped.
    """
    speakers: dict[str, dict[str, Phrase]] = defaultdict(dict)
    for phrase in _thinned(phrases(languages, shares)):
        for language in languages:
            if text := _typed(phrase.say(language)):
                speakers[text].setdefault(language, phrase)
    return [
        {"text": text, "label": language, "kind": phrase.kind, "key": phrase.key}
        for text, by_language in speakers.items()
        if len(by_language) == 1
        for language, phrase in by_language.items()
    ]


def _thinned(said: Iterable[Phrase]) -> Iterator[Phrase]:
    """Yield evenly spaced phrases of each kind that tells languages apart."""
    by_kind: dict[str, list[Phrase]] = defaultdict(list)
    for phrase in said:
        if phrase.kind in PHRASES_PER_KIND:
            by_kind[phrase.kind].append(phrase)
    for kind, found in by_kind.items():
        yield from found[:: max(1, len(found) // PHRASES_PER_KIND[kind])]


def phrases(languages: Sequence[str], shares: SplitShares, *, common: bool = False) -> Iterator[Phrase]:
    """Yield everything there is to say in all of these languages.

    Args:
        languages: CLDR codes.
        shares: Which keys are held out; lists and amounts are made of names that are not.
        common: Make lists and amounts of common names alone.
    """
    yield from _names(languages)
    yield from _dates()
    yield from _times()
    yield from _units()
    yield from _amounts(_training_codes(languages, "currencies", shares, common))
    yield from _numbers()
    yield from _durations()
    yield from _lists(
        {group: _training_codes(languages, group, shares, common) for group in ("territories", "languages")}
    )


def _names(languages: Sequence[str]) -> Iterator[Phrase]:
    for group in NAMES:
        for code in _shared_codes(languages, group):
            yield Phrase(KIND_OF_NAME[group], f"{KIND_OF_NAME[group]}:{code}", partial(_name, group, code))


def _shared_codes(languages: Sequence[str], group: str) -> list[str]:
    """Return the codes that every language has a name for; a code that is its own name is none."""
    known = [{code for code, name in _table(language, group).items() if name != code} for language in languages]
    return sorted(str(code) for code in set.intersection(*known) if not str(code).isdigit())


def _table(language: str, group: str) -> Mapping[str, str]:
    names: Mapping[str, str] = getattr(Locale.parse(language), group)
    return names


def _name(group: str, code: str, language: str) -> str:
    return _table(language, group)[code]


def _dates() -> Iterator[Phrase]:
    first = datetime.date(2024, 1, 1)
    for day in (first + datetime.timedelta(days=n) for n in range(366)):
        key = f"day:{day:%m-%d}"
        for date_format in DATE_FORMATS:
            for year in sorted({_draw(f"{key} {date_format} {n}", YEARS) for n in range(4)}):
                if (day.month, day.day) != (2, 29) or year % 4 == 0:
                    yield Phrase("date", key, partial(_date, day.replace(year=year), date_format))


def _date(day: datetime.date, date_format: str, language: str) -> str:
    if date_format in ("full", "long", "medium"):
        return format_date(day, date_format, locale=language)
    return format_skeleton(date_format, datetime.datetime(day.year, day.month, day.day), locale=language)


def _times() -> Iterator[Phrase]:
    for minute in range(24 * 60):
        time = datetime.time(*divmod(minute, 60))
        yield Phrase("time", f"time:{time:%H:%M}", partial(_time, time, "short"))
        with_seconds = time.replace(second=_draw(f"second {time}", range(60)))
        yield Phrase("time", f"time:{time:%H:%M}", partial(_time, with_seconds, "medium"))


def _time(time: datetime.time, width: TimeFormat, language: str) -> str:
    return format_time(time, width, locale=language)


def _units() -> Iterator[Phrase]:
    for unit in UNITS:
        for number in _some_numbers(f"unit {unit}", 60):
            yield Phrase("unit", f"number:{number}", partial(_unit, unit, number))


def _unit(unit: str, number: float, language: str) -> str:
    return format_unit(number, unit, locale=language)


def _amounts(codes: Sequence[str]) -> Iterator[Phrase]:
    for code in codes:
        for number in _some_numbers(f"amount {code}", AMOUNTS // len(codes)):
            yield Phrase("amount", f"number:{number}", partial(_amount, code, number))


def _amount(code: str, number: float, language: str) -> str:
    return format_currency(number, code, locale=language, format_type="name")


def _numbers() -> Iterator[Phrase]:
    for number in (*NUMBERS, *FRACTIONS):
        for number_format in ("decimal", "percent", "millions") if isinstance(number, int) else ("decimal",):
            yield Phrase("number", f"number:{number}", partial(_number, number, number_format))


def _number(number: float, number_format: str, language: str) -> str:
    if number_format == "decimal":
        return format_decimal(number, locale=language)
    if number_format == "percent":
        return format_percent(number / 100, locale=language)
    return format_compact_decimal(number * 10**6, format_type="long", locale=language, fraction_digits=1)


def _durations() -> Iterator[Phrase]:
    for unit, seconds in DURATIONS.items():
        for number in NUMBERS[:120]:
            for sign in (1, -1):
                delta = datetime.timedelta(seconds=sign * number * seconds)
                yield Phrase("duration", f"number:{number}", partial(_duration, unit, delta))


def _duration(unit: Interval, delta: datetime.timedelta, language: str) -> str:
    return format_timedelta(delta, granularity=unit, threshold=10**9, add_direction=True, locale=language)


def _lists(codes: Mapping[str, Sequence[str]]) -> Iterator[Phrase]:
    """Yield lists of two to four territories or languages.

    The key is the set of members, so that no other order of them is in another split.
    """
    pools = {group: found for group, found in codes.items() if found}
    for n in range(NUM_LISTS if pools else 0):
        group = _draw(f"list {n} group", tuple(pools))
        size = _draw(f"list {n} size", range(2, 5))
        members = list(dict.fromkeys(_draw(f"list {n} {i}", pools[group]) for i in range(size)))
        style = _draw(f"list {n} style", LIST_STYLES)
        if len(members) > 1:
            yield Phrase("list", f"list:{' '.join(sorted(members))}", partial(_list, group, members, style))


def _list(group: str, members: Sequence[str], style: ListStyle, language: str) -> str:
    names = _table(language, group)
    return format_list([names[code] for code in members], style=style, locale=language)


def _training_codes(languages: Sequence[str], group: str, shares: SplitShares, common: bool) -> list[str]:
    """Return the codes whose names are not held out: what is made of them gives nothing away."""
    kind = KIND_OF_NAME[group]
    return [
        code
        for code in _shared_codes(languages, group)
        if shares.of(f"{kind}:{code}") == "train" and (not common or code in COMMON[group])
    ]


def _some_numbers(what: str, count: int) -> list[float]:
    """Draw numbers for a phrase: mostly whole ones."""
    drawn = [_draw(f"{what} {n}", FRACTIONS if n % 4 == 0 else NUMBERS) for n in range(count)]
    return list(dict.fromkeys(drawn))


def _draw(what: str, options: Sequence[T]) -> T:
    """Choose by a hash of what is chosen for: the same on every machine and in every version of Python."""
    return options[int.from_bytes(sha256(what.encode()).digest()[:8]) % len(options)]


def _typed(text: str) -> str:
    """Replace the spaces that nobody has on a keyboard."""
    return text.replace("\N{NARROW NO-BREAK SPACE}", " ").replace("\N{NO-BREAK SPACE}", " ")
