"""A recipe: a chain, or a small graph, of the verbs as one YAML file."""

from layershare.recipe.graph import Recipe, load
from layershare.recipe.run import Planned, Report, plan, run

__all__ = ["Planned", "Recipe", "Report", "load", "plan", "run"]
