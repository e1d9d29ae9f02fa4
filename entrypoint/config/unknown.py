"""A key that does not exist: which one was meant."""

from __future__ import annotations

from difflib import get_close_matches

from entrypoint.conf import METHODS
from entrypoint.config.keys import groups, keys
from entrypoint.config.value import spell
from entrypoint.errors import ConfigError

# What other programs call our keys; `method.` ones stand under both methods where both have them.
OTHER_NAMES = {
    "adam_weight_decay": "train.weight_decay",
    "base_model": "model.path",
    "cliprange": "method.clip_range",
    "dataset": "data.path",
    "epochs": "train.num_epochs",
    "epsilon": "method.clip_range",
    "experiment_name": "tracking.experiment",
    "global_batch_size": "train.batch_size",
    "grad_clip": "train.max_grad_norm",
    "gradient_clipping": "train.max_grad_norm",
    "lora_alpha": "model.lora.alpha",
    "lora_r": "model.lora.rank",
    "lr": "train.learning_rate",
    "lr_scheduler_type": "train.lr_scheduler",
    "mlflow_tracking_uri": "tracking.mlflow_uri",
    "model_name": "model.path",
    "model_name_or_path": "model.path",
    "num_iterations": "train.max_steps",
    "num_train_epochs": "train.num_epochs",
    "output_dir": "output.path",
    "resume_from_checkpoint": "checkpoint.resume",
    "s3_endpoint": "data.endpoint_url",
    "save_interval": "checkpoint.save_every",
    "save_steps": "checkpoint.save_every",
    "save_total_limit": "checkpoint.keep",
    "strategy": "train.sharding",
    "train_batch_size": "train.batch_size",
    "warmup_steps": "train.warmup_ratio",
}
# What other programs have and this one has not, and why.
NOT_HERE = {
    "access_key": "credentials come from the usual AWS chain, never from the configuration; remove it",
    "aws_access_key_id": "credentials come from the usual AWS chain, never from the configuration; remove it",
    "aws_secret_access_key": "credentials come from the usual AWS chain, never from the configuration; remove it",
    "entropy_coef": "it needs the whole batch at once, which is computed in parts; remove it",
    "top_entropy_quantile": "it needs the whole batch at once, which is computed in parts; remove it",
    "devices": "the launcher takes the number of ranks from LOCAL_WORLD_SIZE; remove it",
    "gradient_accumulation_steps": "derived from train.batch_size and train.micro_batch_tokens; remove it",
    "num_generations": "the traces say how many responses a prompt has; remove it",
    "num_nodes": "the launcher takes the number of nodes from NNODES; remove it",
    "per_device_train_batch_size": "give train.batch_size, over all ranks; train.micro_batch_tokens bounds the memory",
    "secret_key": "credentials come from the usual AWS chain, never from the configuration; remove it",
    "trust_remote_code": "code that comes with a model is never run; remove it",
}
# The same idea under the other method.
COUNTERPARTS = {"method.beta": "method.kl_coeff", "method.kl_coeff": "method.beta"}


def unknown_key(name: str, method: str) -> ConfigError:
    """The refusal of `name`, which is no key of a run of `method`; it names the nearest key that is."""
    leaf, shown = name.rpartition(".")[2], spell(name)
    if leaf in ("vf_coeff", "vf_coef"):
        return ConfigError(f"{shown}: {method.upper()} has no value function; remove it")
    if leaf in NOT_HERE:
        return ConfigError(f"{shown}: no such key; {NOT_HERE[leaf]}")
    for other in METHODS:
        if name in keys(other):
            twin = COUNTERPARTS.get(name)
            meant = f"did you mean {twin}?" if twin else f"it is one of method={other}"
            return ConfigError(f"{shown}: no such key of method={method}; {meant}")
    return ConfigError(f"{shown}: no such key; did you mean {nearest(name, method)}?")


def nearest(name: str, method: str) -> str:
    """The key or group of a run of `method` that is nearest to `name`.

    A near name in the same group wins over the same name in another, and that over the nearest spelling.
    """
    parent, _, leaf = name.rpartition(".")
    known = [*keys(method), *groups(method)]
    leaves = [key.rpartition(".")[2] for key in known]
    siblings = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == parent}
    if close := get_close_matches(leaf, siblings, n=1, cutoff=0.7):
        return siblings[close[0]]
    if OTHER_NAMES.get(leaf) in known:
        return OTHER_NAMES[leaf]
    if close := get_close_matches(leaf, leaves, n=1, cutoff=0.7):
        known = [key for key in known if key.rpartition(".")[2] == close[0]]
    named_alike = [key for key in known if ("." in key) == ("." in name)]
    return get_close_matches(name, named_alike or known, n=1, cutoff=0.0)[0]
