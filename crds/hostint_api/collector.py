# SPDX-License-Identifier: Apache-2.0
"""IntCollector: where reports go. Mirrors crds/intcollector.yaml."""

from typing import Annotated, Literal, Self

import pydantic

from hostint_api import model, names

Format = Literal["TelemetryReportV05"]

MIN_SNAP_LENGTH = 34
MAX_SNAP_LENGTH = 128


class ServiceRef(model.Model):
    """A UDP Service whose endpoints get the reports, without NAT in the way."""

    namespace: Annotated[str, pydantic.Field(min_length=1, max_length=63)]
    name: Annotated[str, pydantic.Field(min_length=1, max_length=63)]
    port: model.Port = names.DEFAULT_PORT


class RateLimit(model.Model):
    """How much one node may send."""

    reports_per_second: Annotated[int, pydantic.Field(ge=10, le=10_000_000)]


class CollectorSpec(model.Model):
    """A destination of reports and how they look there."""

    address: (
        Annotated[str, pydantic.Field(min_length=1, max_length=253, pattern="^[A-Za-z0-9:._-]+$")]
        | None
    ) = None
    port: model.Port | None = None
    service: ServiceRef | None = None
    format: Format = "TelemetryReportV05"
    snap_length: Annotated[int, pydantic.Field(ge=MIN_SNAP_LENGTH, le=MAX_SNAP_LENGTH)] = (
        MAX_SNAP_LENGTH
    )
    dscp: Annotated[int, pydantic.Field(ge=0, le=63)] = 0
    rate_limit: RateLimit | None = None

    @pydantic.model_validator(mode="after")
    def _one_destination(self) -> Self:
        if (self.address is None) == (self.service is None):
            raise ValueError("exactly one of address and service must be set")
        if self.service is not None and self.port is not None:
            raise ValueError("port goes with address; a service names its port in service.port")
        return self

    @property
    def reports_per_second(self) -> int:
        """Rate limit of one node; 0: none."""
        return self.rate_limit.reports_per_second if self.rate_limit else 0
