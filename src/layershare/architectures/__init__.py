"""Which architectures can be shared, and whether the laws hold on each: by structure, for every model type."""

from layershare.architectures.table import Row, Table, survey, table, write

__all__ = ["Row", "Table", "survey", "table", "write"]
