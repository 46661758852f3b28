"""On PYTHONPATH of the tests: torchvision from PyPI, a CUDA build, can be imported beside torch's CPU build.

SGLang imports it for models with images. Its compiled part cannot load then, so operators that it names are declared
here, just before its import. Nothing calls them.
"""

from __future__ import annotations

import importlib.abc
import sys
from typing import Any


class _DeclareOperators(importlib.abc.MetaPathFinder):
    library: Any = None

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "torchvision" and self.library is None:
            import torch

            if torch.version.cuda is not None:  # a CUDA build of torch: torchvision's own operators load
                return
            self.library = torch.library.Library("torchvision", "DEF")
            self.library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            self.library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, _DeclareOperators())
