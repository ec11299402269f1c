"""How exits are trained and chosen."""

from pydantic import Field

from layershare.config import Config


class ExitsConfig(Config):
    """Heads behind earlier layers, trained to say what the last one says, and the threshold to leave with."""

    positions: tuple[int, ...] | None = Field(
        None, description="Exits behind these positions, counted from 0; default: all but the last."
    )
    max_loss: float = Field(
        0.005, ge=0, lt=1, description="Most of the metric on the validation split to lose, as a fraction."
    )
    epochs: int = Field(8, ge=1, description="Times through the pooled states of the training texts.")
    batch_size: int = Field(64, ge=1, description="Texts a step.")
    learning_rate: float = Field(1e-3, gt=0, description="Of AdamW, falling linearly to 0.")
    weight_decay: float = Field(0.01, ge=0, description="Of AdamW.")
    rows: int = Field(20_000, ge=0, description="Train on at most so many texts, evenly spread; 0: all.")
    max_length: int = Field(128, ge=4, description="Longer texts are cut to this many tokens.")
    timed: int = Field(64, ge=1, description="So many held-out texts are timed, one by one.")
    seed: int = Field(0, description="Of the order of the texts.")
