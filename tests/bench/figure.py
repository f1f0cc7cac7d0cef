# SPDX-License-Identifier: Apache-2.0
"""One measured figure, with its baseline and its goal."""

import dataclasses
import operator
from typing import Literal

_COMPARE = {"<=": operator.le, ">=": operator.ge, "==": operator.eq}


@dataclasses.dataclass(frozen=True, slots=True)
class Figure:
    """`key` is stable (it is the key in bench.json); `baseline` is what `value` was measured against in the same run.

    `low` and `high` are the quartiles over rounds. What is not `shown` is a point of a plot: in bench.json, not in the table.
    """

    key: str
    what: str
    value: float
    unit: str
    compare: Literal["<=", ">=", "=="] | None = None
    goal: float | None = None
    baseline: str = ""
    rounds: int = 1
    low: float | None = None
    high: float | None = None
    shown: bool = True

    @property
    def reached(self) -> bool | None:
        """Whether the goal is reached; None where there is none."""
        if self.compare is None or self.goal is None:
            return None
        return bool(_COMPARE[self.compare](self.value, self.goal))
