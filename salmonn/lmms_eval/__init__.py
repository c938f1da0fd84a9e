"""Plugin for lmms-eval (EvolvingLMMs-Lab/lmms-eval), which finds `manifest` by the entry points "lmms_eval.models"."""

from typing import Any

MODEL_NAME = "salmonn"


def manifest() -> Any:
    """Return how lmms-eval loads the model; called by lmms-eval, and without importing torch."""
    from lmms_eval.models.registry_v2 import ModelManifest  # noqa: PLC0415 - only where lmms-eval is installed

    return ModelManifest(model_id=MODEL_NAME, simple_class_path="salmonn.lmms_eval.model.SalmonnModel")
