"""Checks of answers: a response and a reference, as text, to right or wrong. No parameters, the same every time."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from fractions import Fraction

from kdcore.errors import InputError, did_you_mean

Verifier = Callable[[str, str], bool]
"""(response, reference) -> whether the response is right."""

NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?")


def exact(response: str, reference: str) -> bool:
    """The same text, without blanks at the ends."""
    return response.strip() == reference.strip()


def number(response: str, reference: str) -> bool:
    """The last number of the response equals the last number of the reference, as exact fractions.

    >>> number("so 3 * 4 = 12.0.", "12"), number("12 or 13", "12"), number("none", "12")
    (True, False, False)
    """
    given, wanted = last_number(response), last_number(reference)
    return given is not None and given == wanted


def math(response: str, reference: str) -> bool:
    r"""The answer in the last \boxed{...} (or after "Answer:"), else the last number, equals the reference's.

    Numbers are compared as fractions, \frac{a}{b} among them; anything else as text without blanks, \left, \right,
    \!, a dollar sign or a full stop at the end.

    >>> math(r"Hence \boxed{\frac{1}{2}}.", "0.5"), math("Answer: x+1", "$x + 1$"), math(r"\boxed{3}", "4")
    (True, True, False)
    """
    given, wanted = final_answer(response), final_answer(reference)
    return given is not None and given == (wanted if wanted is not None else _plain(reference))


def final_answer(text: str) -> Fraction | str | None:
    """What `math` compares; None where a text of several words names no answer."""
    found = _boxed(text)
    if found is None:
        marked = re.findall(r"answer(?:\s+is)?\s*[:=]\s*(.+)", text, flags=re.IGNORECASE)
        found = marked[-1] if marked else None
    if found is None:
        found = text if len(text.split()) <= 5 and "\n" not in text.strip() else None
    if found is None:
        return last_number(text)
    plain = _plain(found)
    whole = NUMBER.fullmatch(plain)
    value = last_number(plain) if whole else None
    return value if value is not None else plain or None


def last_number(text: str) -> Fraction | None:
    """The last number in a text: integer, decimal, fraction, with or without thousands commas."""
    for found in reversed(NUMBER.findall(text)):
        numerator, _, denominator = found.replace(",", "").partition("/")
        if not denominator or int(denominator) != 0:
            return Fraction(numerator) / (int(denominator) if denominator else 1)
    return None


def _boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} whose braces close."""
    for start in reversed([match.end() for match in re.finditer(r"\\boxed\s*\{", text)]):
        depth = 1
        for position in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[start:position]
    return None


def _plain(text: str) -> str:
    text = re.sub(r"\\d?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}", r"\1/\2", text.strip().rstrip("."))
    text = re.sub(r"\\left|\\right|\\!|\\,|\\;|\$|\s", "", text)
    return text.rstrip(".")


REGISTRY: dict[str, Verifier] = {"exact": exact, "number": number, "math": math}


def verifier(name: str) -> Verifier:
    """A verifier by name, or by import path `package.module:function`. InputError where there is none."""
    if name in REGISTRY:
        return REGISTRY[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise InputError(f"verifier '{name}': not known{did_you_mean(name, REGISTRY)}; or give package.module:function")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"verifier '{name}': cannot be imported ({error})") from None
    if not callable(found):
        raise InputError(f"verifier '{name}': is a {type(found).__name__}; allowed: a function (response, reference)")
    return found
