"""Verbs that look into a model: encode."""

from layershare import options as opt
from layershare.cli.answer import Shown, note


def encode(
    text: opt.OneText, *, model: opt.OneModel, out: opt.TensorsOut = None, plot: opt.Plot = None
) -> Shown:
    """Print what a Transformer makes of a text: tokens, hidden states, pooled output, attention maps."""
    from layershare.analyse.draw import save_attention
    from layershare.analyse.encode import encode

    found = encode(text, model)
    if out is not None:
        found.save(out)
        note(f"Saved in {out}")
    if plot is not None:
        save_attention(found.attentions, found.tokens, plot, text)
        note(f"Drawn in {plot}")
    return Shown(str(found), found.to_dict())
