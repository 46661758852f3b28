"""How an embedding model pools its hidden states, as a sentence-transformers folder says. Pure: no torch.

`modules.json` lists the model's modules; that of pooling has a folder of its own. Embeddings are always brought to
length 1, so a Normalize module changes nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sp_backend.commands import Pooling
from sp_backend.models.fields import Fields

MODULES = "modules.json"
MODES: dict[str, Pooling] = {"lasttoken": "last", "mean": "mean"}  # sentence-transformers' names
FLAGS = {  # older files have a flag for each mode
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
IGNORED = ("Transformer", "Normalize")


def read_pooling(folder: str | Path) -> Pooling | None:
    """None if the folder says nothing. Raises ValueError with the file and field for what is not supported."""
    path = Path(folder) / MODULES
    if not path.is_file():
        return None
    pooling: Pooling | None = None
    for module in _modules(path):
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind == "Pooling":
            pooling = _mode(Fields.load(Path(folder) / str(module.get("path", "")) / "config.json"))
        elif kind not in IGNORED:
            raise ValueError(
                f"{path}: module {kind!r} is not supported; expected Pooling or one of {', '.join(IGNORED)}"
            )
    return pooling


def _modules(path: Path) -> list[dict[str, Any]]:
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ValueError(f"{path}: expected a list of JSON objects")
    return modules


def _mode(fields: Fields) -> Pooling:
    named = fields.text("pooling_mode", "")
    asked = [named] if named else [mode for flag, mode in FLAGS.items() if fields.flag(flag, False)]
    if len(asked) != 1 or asked[0] not in MODES:
        raise fields.error(
            "pooling_mode", asked, f"one of {', '.join(MODES)} (--pooling last or mean overrules the file)"
        )
    return MODES[asked[0]]
