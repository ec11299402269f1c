"""What to add to a model: one typed, frozen configuration for all methods."""

from typing import Literal, Self

from pydantic import Field, model_validator

from layershare.config import Config

Method = Literal["houlsby", "pfeiffer", "lora", "prefix", "ia3"]
_BOTTLENECK = ("size", "activation", "dropout")
FIELDS: dict[str, tuple[str, ...]] = {
    "houlsby": _BOTTLENECK,
    "pfeiffer": _BOTTLENECK,
    "lora": ("rank", "alpha", "parts", "dropout"),
    "prefix": ("tokens",),
    "ia3": (),
}
"""The fields that a method reads beside those that all of them read."""


class AdaptConfig(Config):
    """Which small modules are added, of what size, and how many of them.

    With d the width of the hidden states, a module has this many parameters: ``houlsby`` (Houlsby et al. 2019,
    arXiv 1902.00751) and ``pfeiffer`` (Pfeiffer et al. 2020, arXiv 2005.00247) ``2 d size + d + size``; ``lora`` (Hu et
    al. 2021, arXiv 2106.09685) ``rank (in + out)`` a linear map; ``ia3`` (Liu et al. 2022, arXiv 2205.05638) ``out`` a
    map into the attention and ``in`` for the map out of the FFN; ``prefix`` (Li, Liang 2021, arXiv 2101.00190) ``2
    tokens (key-value width)`` a layer.
    """

    method: Method = Field("lora", description="The kind of module.")
    size: int = Field(64, ge=1, description="houlsby, pfeiffer: inner width of the bottleneck.")
    activation: Literal["relu", "gelu", "silu", "tanh"] = Field(
        "relu", description="houlsby, pfeiffer: the nonlinearity inside the bottleneck."
    )
    rank: int = Field(8, ge=1, description="lora: rank of the correction of each linear map.")
    alpha: float = Field(16.0, gt=0, description="lora: the correction is scaled by alpha / rank.")
    parts: tuple[Literal["attention", "ffn"], ...] = Field(
        ("attention", "ffn"), min_length=1, description="lora: the parts whose linear maps are corrected."
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="houlsby, pfeiffer, lora: dropout inside the modules."
    )
    tokens: int = Field(20, ge=1, description="prefix: virtual tokens before the text.")
    share: Literal["position", "group"] = Field(
        "position",
        description="A module for each position, or one for all positions that share the map it stands at.",
    )
    train_head: bool = Field(
        True,
        description="Train and save the task head too; a language-model head is part of the frozen base.",
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Of the first values of the modules.")

    @model_validator(mode="after")
    def _fields_of_the_method(self) -> Self:
        every = {name for names in FIELDS.values() for name in names}
        foreign = (self.model_fields_set & every) - set(FIELDS[self.method])
        if idle := sorted(n for n in foreign if getattr(self, n) != type(self).model_fields[n].default):
            takes = ", ".join(FIELDS[self.method]) or "no settings of its own"
            raise ValueError(f"{idle[0]} is no setting of the method {self.method!r}, which takes {takes}")
        if self.method == "prefix" and self.share == "group":
            raise ValueError("a prefix belongs to one position's cache: share = 'group' needs another method")
        return self
