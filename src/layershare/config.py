"""The base of every frozen, typed configuration: unknown keys raise and name the nearest valid one."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from layershare.errors import LayershareError, OptionError, nearest


class Config(BaseModel):
    """A frozen pydantic model. Build it from user input with :meth:`parse`, which raises our own errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def parse(cls, values: Any, *, where: str = "", error: type[LayershareError] = OptionError) -> Self:
        """Validate ``values`` (a dict). ``where`` names the file or argument in the message.

        Raises ``error`` with the first thing that is wrong, in the user's own words.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as failure:
            raise _explain(cls, failure, where, error) from None


def _explain(
    cls: type[BaseModel], failure: ValidationError, where: str, error: type[LayershareError]
) -> LayershareError:
    # A misspelt key is said before what is missing because of it.
    first = min(failure.errors(), key=lambda found: found["type"] != "extra_forbidden")
    path = ".".join(str(step) for step in first["loc"]) or cls.__name__
    place = f"{where}: " if where else ""
    if first["type"] == "extra_forbidden":
        owner = _model_at(cls, first["loc"][:-1])
        return error(f"{place}unknown key {path!r}.", nearest(str(first["loc"][-1]), owner.model_fields))
    if isinstance(cause := first.get("ctx", {}).get("error"), Exception):
        return error(f"{place}{cause}")
    return error(f"{place}{path}: {first['msg']} (given: {first['input']!r}).")


def _model_at(cls: type[BaseModel], loc: tuple) -> type[BaseModel]:
    """The config class that an error's location points into, through tuples, lists and options."""
    for step in loc:
        if isinstance(step, str) and step in cls.model_fields:
            todo = [cls.model_fields[step].annotation]
            while todo:
                kind: Any = todo.pop()
                if isinstance(kind, type) and issubclass(kind, BaseModel):
                    cls = kind
                    break
                todo.extend(getattr(kind, "__args__", ()))
    return cls
