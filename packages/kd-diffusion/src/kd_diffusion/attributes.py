"""What can be measured on a drawn digit, and prompts that say it.

Two quantities per image, on the ink v = (pixel + 1) / 2 in [0, 1] (mean over channels):

    ink    mean of v: how much of the image the strokes cover
    slant  -m_xy / m_yy, with m the central second moments of v and y pointing down: pixels that the stroke moves to the
           right per pixel upwards, so that positive leans to the right

Both depend on the digit (a six leans left by its shape), so words compare an image with the others of its class: the
lower third of the class is "thin" or "tilted left", the upper third "bold" or "tilted right", the middle of the slants
is "upright" and the middle of the inks has no word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kdcore.errors import InputError

WEIGHTS = ("thin", "medium", "bold")
TILTS = ("left", "upright", "right")
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_TILT_PHRASES = ("tilted left", "upright", "tilted right")


@dataclass(frozen=True)
class Attributes:
    """Of N images: ink and slant (N,) float64, and their words as int64 (N,) indices into WEIGHTS and TILTS."""

    ink: Tensor
    slant: Tensor
    weight: Tensor
    tilt: Tensor


@dataclass(frozen=True)
class AttributeRule:
    """Where the thirds of each class end: `ink` and `slant` are (K, 2) float64."""

    ink: Tensor
    slant: Tensor

    @classmethod
    def fit(cls, pixels: Tensor, labels: Tensor, num_classes: int) -> AttributeRule:
        """The terciles of every class among `pixels` (N, C, H, W); InputError for a class without images."""
        bounds = []
        for values in measure(pixels):
            rows = []
            for label in range(num_classes):
                of_class = values[labels == label]
                if len(of_class) == 0:
                    raise InputError(f"labels: class {label} has no image; attributes are relative to their class")
                rows.append(torch.quantile(of_class, torch.tensor([1 / 3, 2 / 3], dtype=values.dtype)))
            bounds.append(torch.stack(rows))
        return cls(*bounds)


def measure(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """(ink (N,), slant (N,)) float64 of images (N, C, H, W) in [-1, 1]; a blank image, or a flat one, has slant 0.

    >>> stroke = torch.full((1, 1, 4, 4), -1.0)
    >>> stroke[0, 0, [0, 1, 2, 3], [3, 2, 1, 0]] = 1.0
    >>> measure(stroke)
    (tensor([0.2500], dtype=torch.float64), tensor([1.], dtype=torch.float64))
    """
    if pixels.ndim != 4 or 0 in pixels.shape[1:]:
        raise InputError(f"pixels: shape {tuple(pixels.shape)}; allowed: (N, C, H, W)")
    v = ((pixels.detach().double() + 1) / 2).clamp(0, 1).mean(1)
    height, width = v.shape[-2:]
    y = torch.arange(height, dtype=v.dtype, device=v.device).view(1, -1, 1)
    x = torch.arange(width, dtype=v.dtype, device=v.device).view(1, 1, -1)
    mass = v.sum((1, 2), keepdim=True).clamp(min=1e-12)
    dy = y - (v * y).sum((1, 2), keepdim=True) / mass
    dx = x - (v * x).sum((1, 2), keepdim=True) / mass
    m_xy, m_yy = (v * dx * dy).sum((1, 2)), (v * dy * dy).sum((1, 2))
    return v.mean((1, 2)), torch.where(m_yy > 1e-9, -m_xy / m_yy.clamp(min=1e-9), torch.zeros_like(m_yy))


def attributes(pixels: Tensor, labels: Tensor, rule: AttributeRule) -> Attributes:
    """The words of images (N, C, H, W) in [-1, 1] that show the classes `labels` (N,).

    Raises InputError on labels that do not fit the images or the rule's classes.
    """
    ink, slant = measure(pixels)
    if labels.shape != ink.shape:
        raise InputError(f"labels: shape {tuple(labels.shape)} for {len(ink)} images; allowed: one label an image")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(rule.ink):
        raise InputError(f"labels: {int(labels.min())} to {int(labels.max())}; allowed: 0 to {len(rule.ink) - 1}")
    return Attributes(ink, slant, _third(ink, rule.ink, labels), _third(slant, rule.slant, labels))


def _third(values: Tensor, bounds: Tensor, labels: Tensor) -> Tensor:
    return (values[:, None] > bounds.to(values.device)[labels]).sum(1)


# ---------------------------------------------------------------- prompts


def digit_prompts(found: Attributes, labels: Tensor, generator: np.random.Generator) -> list[str]:
    """One English prompt an image. Some leave out the digit, the weight or the tilt, never all that is known.

    >>> a = Attributes(torch.zeros(1), torch.zeros(1), torch.tensor([2]), torch.tensor([0]))
    >>> sentence("seven", WEIGHTS[2], TILTS[0], 0)
    'a bold seven, tilted left'
    """
    prompts = []
    for label, weight, tilt in zip(labels.tolist(), found.weight.tolist(), found.tilt.tolist(), strict=True):
        drop = generator.random(3) < (0.15, 0.25, 0.25)
        form = int(generator.integers(4))
        if drop[0]:  # without the digit, the attributes stay
            drop[1:] = False
        prompts.append(
            sentence(
                None if drop[0] else NUMBER_WORDS[label],
                None if drop[1] or WEIGHTS[weight] == "medium" else WEIGHTS[weight],
                None if drop[2] else TILTS[tilt],
                form,
            )
        )
    return prompts


def sentence(digit: str | None, weight: str | None = None, tilt: str | None = None, form: int = 0) -> str:
    """A prompt about a digit (a number word, or None for "digit"); `form` 0 to 3 chooses the wording.

    >>> [sentence("eight", "bold", "right", form) for form in range(4)]
    ['a bold eight, tilted right', 'a bold digit eight that is tilted right', 'a bold eight tilted right', \
'the digit eight, bold, tilted right']
    >>> sentence("three", None, "upright", 2), sentence(None, "thin", "left")
    ('an upright three', 'a thin digit, tilted left')
    """
    noun = digit or "digit"
    phrase = None if tilt is None else _TILT_PHRASES[TILTS.index(tilt)]
    if form == 1:
        noun = f"digit {digit}" if digit else "digit"
        return _with_article([weight, noun]) + (f" that is {phrase}" if phrase else "")
    if form == 2:
        if phrase == "upright":
            return _with_article([phrase, weight, noun])
        return _with_article([weight, noun]) + (f" {phrase}" if phrase else "")
    if form == 3 and digit:
        return ", ".join(part for part in (f"the digit {digit}", weight, phrase) if part)
    return _with_article([weight, noun]) + (f", {phrase}" if phrase else "")


def _with_article(words: Sequence[str | None]) -> str:
    text = " ".join(word for word in words if word)
    return f"{'an' if text[0] in 'aeiu' and not text.startswith('one') else 'a'} {text}"


def class_prompts(labels: Tensor, class_names: Sequence[str]) -> list[str]:
    """`a photo of a <class>` for images that have nothing but a class."""
    return [f"a photo of {_with_article([class_names[label].replace('_', ' ')])}" for label in labels.tolist()]
