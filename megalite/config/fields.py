"""Types of values in a run file, and the base class of its sections."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from megalite import env
from megalite.errors import CommandError

Count = Annotated[int, Field(ge=1, le=10**12)]
TokenCount = Annotated[int, Field(ge=1, le=10**16)]
CountOrZero = Annotated[int, Field(ge=0, le=10**12)]
SmallCount = Annotated[int, Field(ge=1, le=10**4)]  # layers, heads: code makes lists of them
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PositiveOrZero = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]


def _expand(path: str) -> str:
    try:
        return env.expand_user(path)
    except CommandError:
        raise ValueError("a path whose ~name is a user with a home folder here") from None


PathText = Annotated[Text, AfterValidator(_expand)]  # `~` is the home folder


class Section(BaseModel):
    """Base of all sections: frozen and strict. Null stands for a default that is computed."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_is_computed(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        computed = {name for name, field in cls.model_fields.items() if field.default_factory}
        return {k: v for k, v in data.items() if not (v is None and k in computed)}
