"""Trial: what is found out about a model and a text on the way to a plan, and used again when it is carried out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from mpo_tn.exceptions import MPOError
from mpo_tn.planning.spec import ModuleSpec
from mpo_tn.torch.models.calibration import Calibration, Moments
from mpo_tn.torch.models.fitting import Fitted, Fitter
from mpo_tn.torch.models.samples import Samples, is_biased
from mpo_tn.torch.models.survey import DenseUnit


@dataclass(eq=False)
class Trial:
    """What was found out on the way to a plan, and what carrying it out can use again.

    Attributes:
        samples: the text, if there is any.
        calibration: of the dense model.
        fits: of units in structures, from the moments of the dense model.
        finished: the structures of all units of the plan, by name, and the best there is for them, if that is known;
            see :func:`~mpo_tn.torch.models.anchoring.best_fits`.
    """

    samples: Samples | None
    calibration: Calibration
    fits: dict[tuple[str, ModuleSpec], Fitted]
    finished: tuple[dict[str, ModuleSpec], dict[str, Fitted]] | None = None

    def fit(self, unit: DenseUnit, spec: ModuleSpec) -> Fitted:
        """A unit fitted on its own, in the metric of what its layer gets in the dense model."""
        self.fit_all(unit, [spec])
        return self.fits[unit.name, spec]

    def fit_all(self, unit: DenseUnit, specs: Iterable[ModuleSpec]) -> None:
        """A unit in several structures, what they have in common done once."""
        missing = [spec for spec in dict.fromkeys(specs) if (unit.name, spec) not in self.fits]
        if not missing:
            return
        known = self.calibration.of(unit.name) or Moments(0)
        try:
            with torch.no_grad():
                fitter = Fitter(unit.matrix(), known, biased=is_biased(unit))
                for spec in missing:
                    self.fits[unit.name, spec] = fitter.fit(spec, rounds=1)
        except MPOError as error:
            raise MPOError(f"{unit.name}: {error}") from error
