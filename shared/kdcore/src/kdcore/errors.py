"""The two kinds of failure a user meets, and the exit codes they get from the `kd` command."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class InputError(ValueError):
    """Bad input: a config, a path, a shape (exit 2). The message names the field, the value and what is allowed."""


class RunFailed(RuntimeError):
    """A run that started and could not go on (exit 1); `checkpoint` is the last good one, or None."""

    def __init__(self, message: str, checkpoint: Path | None = None):
        super().__init__(message)
        self.checkpoint = checkpoint


class NonFiniteLoss(RunFailed):
    """A loss term became NaN or infinite; carries the optimiser step and the term's name."""

    def __init__(self, step: int, player: str, term: str, value: float, checkpoint: Path | None = None):
        super().__init__(f"step {step}: loss term '{term}' of player '{player}' is {value}", checkpoint)
        self.step, self.player, self.term, self.value = step, player, term, value

    def __reduce__(self):  # the default one would call __init__ with the message
        return type(self), (self.step, self.player, self.term, self.value, self.checkpoint)


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest allowed name, else the list of what is allowed.

    >>> did_you_mean("epoch", ["epochs", "lr"])
    "; did you mean 'epochs'?"
    """
    allowed = sorted(allowed)
    near = difflib.get_close_matches(given, allowed, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; allowed: {', '.join(allowed)}" if allowed else ""
