"""Run what ``layershare export --format onnx`` wrote, with onnxruntime, numpy and tokenizers; without torch.

::

    from layershare.onnx import load

    load("encoder").encode(["one text", "another"])            # [2, d], unit length
    load("classifier").classify(["one text"])                  # [("positive", 0.98)]
    load("writer").generate(["Once upon"], max_new_tokens=20)  # [" a time ..."]: what follows
"""

from layershare.onnx.runner import MANIFEST, Runner, load

__all__ = ["MANIFEST", "Runner", "load"]
