"""Self-distilled kernel ridge regression as scikit-learn estimators (arXiv 2102.13088).

    model = KernelSelfDistiller(kernel="rbf", gamma=0.1, penalty=0.1, rounds=4).fit(X, y)
    model.predict(X_test);  model.alphas_;  list(model.staged_predict(X_test))

`alpha` is the weight of the true targets (1 - alpha that of the last round's predictions); "auto" finds the best one
of every round by a formula, on held-out data. `penalty` is lambda in (K + lambda I), not multiplied by n.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, MultiOutputMixin, RegressorMixin
from sklearn.metrics.pairwise import PAIRWISE_KERNEL_FUNCTIONS, pairwise_kernels
from sklearn.preprocessing import LabelBinarizer
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from kd_classification.engine.kernel_rounds import (
    AlphaEstimate,
    Spectrum,
    Validation,
    choose_alphas,
    coefficients,
    dual_coefficients,
    round_filters,
    spectrum,
)
from kdcore.errors import InputError


class _KernelRounds(BaseEstimator):
    """What the regressor and the classifier share."""

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "kernel": [StrOptions(set(PAIRWISE_KERNEL_FUNCTIONS) | {"precomputed"}), callable],
        "gamma": [Interval(Real, 0, None, closed="left"), None],
        "penalty": [Interval(Real, 0, None, closed="neither")],
        "rounds": [Interval(Integral, 1, None, closed="left")],
        "alpha": [StrOptions({"auto"}), Real, "array-like"],
        "clip": ["boolean"],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        kernel: str | Callable[..., Any] = "rbf",
        *,
        gamma: float | None = None,
        penalty: float = 1.0,
        rounds: int = 2,
        alpha: float | str | Sequence[float] = "auto",
        clip: bool = True,
        validation_fraction: float = 0.2,
        random_state: Any = None,
    ):
        self.kernel = kernel
        self.gamma = gamma
        self.penalty = penalty
        self.rounds = rounds
        self.alpha = alpha
        self.clip = clip
        self.validation_fraction = validation_fraction
        self.random_state = random_state

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.pairwise = self.kernel == "precomputed"
        return tags

    def _kernel(self, X: np.ndarray, Y: np.ndarray) -> torch.Tensor:
        options = {} if callable(self.kernel) else {"gamma": self.gamma}
        values = (
            X
            if self.kernel == "precomputed"
            else pairwise_kernels(X, Y, metric=self.kernel, filter_params=True, **options)
        )
        return torch.from_numpy(np.array(values, dtype=np.float64))

    def _fit(self, X: np.ndarray, targets: np.ndarray, validation: tuple[np.ndarray, np.ndarray] | None) -> None:
        kernel, y = self._kernel(X, X), torch.from_numpy(np.array(targets, dtype=np.float64))
        if isinstance(self.alpha, str):
            chosen = self._estimates(X, kernel, y, validation)
        else:
            chosen = [AlphaEstimate(alpha, alpha) for alpha in self._given_alphas()]
        basis = spectrum(kernel)
        self.alphas_ = np.array([estimate.alpha for estimate in chosen])
        self.alphas_raw_ = np.array([estimate.raw for estimate in chosen])
        self.eigenvalues_ = basis.values.numpy()
        self.filters_ = round_filters(basis.values, self.penalty, self.alphas_.tolist()).numpy()
        self.effective_degrees_ = self.filters_.sum(axis=1)
        self.round_coef_ = self._coefficients(basis, y)
        self.dual_coef_ = self.round_coef_[-1]
        self.X_fit_ = X

    def _coefficients(self, basis: Spectrum, y: torch.Tensor) -> np.ndarray:
        """(R, n, c): the dual coefficients of every round."""
        before = [None, *torch.from_numpy(self.filters_[:-1])]
        rounds = [
            dual_coefficients(basis, coefficients(basis.values, self.penalty, alpha, filter_), y)
            for alpha, filter_ in zip(self.alphas_.tolist(), before, strict=True)
        ]
        return torch.stack(rounds).numpy()

    def _given_alphas(self) -> list[float]:
        alphas = np.atleast_1d(np.asarray(self.alpha, dtype=np.float64))
        if alphas.size == 1:
            alphas = np.full(self.rounds, float(alphas[0]))
        if alphas.shape != (self.rounds,) or alphas.min() < 0 or alphas.max() > 1:
            raise InputError(
                f"alpha = {self.alpha!r}: allowed: 'auto', a number in [0, 1], "
                f"or one of each of the {self.rounds} rounds"
            )
        return alphas.tolist()

    def _estimates(
        self, X: np.ndarray, kernel: torch.Tensor, y: torch.Tensor, validation: tuple[np.ndarray, np.ndarray] | None
    ) -> list[AlphaEstimate]:
        """The best alphas on `validation`, or on a held-out share; the fit itself then uses every training point."""
        if self.rounds == 1:
            return [AlphaEstimate(1.0, 1.0)]
        if validation is not None:
            held = Validation(self._kernel(validation[0], X), torch.from_numpy(np.array(validation[1], np.float64)))
            return choose_alphas(spectrum(kernel), self.penalty, y, self.rounds, held, clip=self.clip)
        count = round(self.validation_fraction * len(y))
        if not 0 < count < len(y):
            raise InputError(
                f"alpha = 'auto': validation_fraction = {self.validation_fraction} of n_samples={len(y)} holds out "
                f"{count}; give more samples, validation=(X, y), or alpha in [0, 1]"
            )
        order = torch.from_numpy(check_random_state(self.random_state).permutation(len(y)))
        out, kept = order[:count], order[count:]
        held = Validation(kernel[out][:, kept], y[out])
        return choose_alphas(spectrum(kernel[kept][:, kept]), self.penalty, y[kept], self.rounds, held, clip=self.clip)

    def _staged(self, X: Any) -> Iterator[np.ndarray]:
        check_is_fitted(self)
        kernel = self._kernel(validate_data(self, X, reset=False, dtype=np.float64), self.X_fit_).numpy()
        for coefficient in self.round_coef_:
            yield kernel @ coefficient

    def _last(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64)
        return self._kernel(X, self.X_fit_).numpy() @ self.dual_coef_


class KernelSelfDistiller(MultiOutputMixin, RegressorMixin, _KernelRounds):
    """Kernel ridge regression distilled from itself in closed form; one eigendecomposition for all rounds.

    Parameters: `kernel` a name of `sklearn.metrics.pairwise`, "precomputed" (any kernel, a neural tangent kernel say)
    or a function of two rows; `gamma` of the rbf, polynomial, sigmoid, laplacian and chi2 kernels; `penalty` lambda;
    `rounds` R; `alpha` "auto", a number, or one of each round (that of round 1 has no effect); `clip` limits automatic
    ones to [0, 1]; `validation_fraction` and `random_state` hold data out for them where `fit` gets none.

    Attributes: `alphas_` (R,), `alphas_raw_` before clipping, `eigenvalues_` (n,), `filters_` B (R, n),
    `effective_degrees_` (R,) the sums of B, `dual_coef_` (n, c) of the last round, `round_coef_` (R, n, c), `X_fit_`.

    >>> import numpy as np
    >>> X = np.linspace(0, 1, 20)[:, None]
    >>> model = KernelSelfDistiller(gamma=10.0, penalty=0.1, rounds=3, alpha=0.5).fit(X, np.sin(6 * X[:, 0]))
    >>> model.predict(X).shape, bool(np.all(np.diff(model.effective_degrees_) < 0))
    ((20,), True)
    """

    def fit(self, X: Any, y: Any, validation: tuple[Any, Any] | None = None) -> KernelSelfDistiller:
        """X (n, D), or the kernel (n, n) if precomputed; y (n,) or (n, c). `validation`: (X, y) that alpha is found on,
        with a precomputed kernel the one of these points against the training points; never the test set."""
        self._validate_params()
        X, y = validate_data(self, X, y, multi_output=True, y_numeric=True, dtype=np.float64)
        self._flat = y.ndim == 1
        if validation is not None:
            validation = (
                validate_data(self, validation[0], reset=False, dtype=np.float64),
                self._columns(np.asarray(validation[1], dtype=np.float64)),
            )
        self._fit(X, self._columns(y), validation)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """(m,) or (m, c), as y was: the last round's predictions."""
        return self._shaped(self._last(X))

    def staged_predict(self, X: Any) -> Iterator[np.ndarray]:
        """The predictions of round 1, 2, ..., R."""
        return (self._shaped(values) for values in self._staged(X))

    def _columns(self, y: np.ndarray) -> np.ndarray:
        return y[:, None] if y.ndim == 1 else y

    def _shaped(self, values: np.ndarray) -> np.ndarray:
        return values[:, 0] if self._flat else values


class KernelSelfDistillationClassifier(ClassifierMixin, _KernelRounds):
    """`KernelSelfDistiller` on one-hot targets; `decision_function` gives the fitted values, `predict` the argmax."""

    def fit(self, X: Any, y: Any, validation: tuple[Any, Any] | None = None) -> KernelSelfDistillationClassifier:
        """X (n, D), or the kernel (n, n) if precomputed; y (n,) class labels. `validation` as in the regressor."""
        self._validate_params()
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self._binarizer = LabelBinarizer().fit(y)
        self.classes_ = self._binarizer.classes_
        if len(self.classes_) < 2:
            raise InputError(f"y: holds only one class ({self.classes_[0]!r}); a classifier needs at least two")
        if validation is not None:
            known = validate_data(self, validation[0], reset=False, dtype=np.float64)
            validation = (known, self._one_hot(np.asarray(validation[1])))
        self._fit(X, self._one_hot(y), validation)
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """(m, K) fitted values of the one-hot targets; (m,), the second minus the first, for two classes."""
        return self._decision(self._last(X))

    def predict(self, X: Any) -> np.ndarray:
        """The class labels (m,) of the last round."""
        values = self._last(X)
        return self.classes_[values.argmax(axis=1)]

    def staged_predict(self, X: Any) -> Iterator[np.ndarray]:
        """The class labels of round 1, 2, ..., R."""
        return (self.classes_[values.argmax(axis=1)] for values in self._staged(X))

    def _one_hot(self, y: np.ndarray) -> np.ndarray:
        columns = self._binarizer.transform(y).astype(np.float64)
        return np.hstack([1 - columns, columns]) if columns.shape[1] == 1 else columns

    def _decision(self, values: np.ndarray) -> np.ndarray:
        return values[:, 1] - values[:, 0] if len(self.classes_) == 2 else values
