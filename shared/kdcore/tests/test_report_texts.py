"""Texts side by side in the report."""

from __future__ import annotations

import pytest

from kdcore.report.samples import _shown
from kdcore.report.texts import texts


def item(**more):
    return {"prompt": "def f(", "truth": "x): pass", "student": {"text": "y): <b>"}, **more}


def test_every_text_is_there_and_escaped():
    html = texts([item(teacher={"text": "x)", "probability": 0.25})])
    assert "y): &lt;b&gt;" in html
    assert "<b>" not in html
    assert html.index("<dt>prompt</dt>") < html.index("<dt>truth</dt>") < html.index("<dt>teacher</dt>")
    assert "25 %" in html


def test_a_method_without_a_teacher_has_no_row_for_it():
    assert "teacher" not in texts([item()])
    assert "teacher" not in texts([item(teacher=None)])


def test_items_with_prompts_are_shown_as_texts():
    assert _shown([item(), item()]).title == "Texts"


def test_an_item_without_a_student_is_refused():
    with pytest.raises(KeyError, match="student"):
        texts([{"prompt": "", "truth": ""}])
