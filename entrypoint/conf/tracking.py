"""`tracking`: where metrics go beside metrics.jsonl and TensorBoard, which are always written."""

from __future__ import annotations

from dataclasses import dataclass

from entrypoint.conf.key import key


@dataclass
class Tracking:
    mlflow_uri: str | None = key(None, "MLflow tracking server; parameters, metrics and the final model are put there.")
    experiment: str = key("preference-tuning", "MLflow experiment.")
    run_name: str | None = key(None, "MLflow run name; default: the last part of output.path.")
    registered_model: str = key("preference-tuned", "Name under which the final model is registered in MLflow.")
