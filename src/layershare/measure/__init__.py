"""Quality, parameters, bytes, memory, FLOPs and latency of model folders.  Importing it loads no torch."""

from layershare.measure.compare import compare
from layershare.measure.cost import flops
from layershare.measure.latency import latency
from layershare.measure.machine import machine
from layershare.measure.memory import peak_memory
from layershare.measure.size import bytes_on_disk

__all__ = ["bytes_on_disk", "compare", "flops", "latency", "machine", "peak_memory"]
