"""Self-supervised pretraining: objectives, one contrastive step, and evaluation of the encoders; built on `train`.

The names in `__all__` are the public interface, each loaded on first use. The programs are functions of their modules,
such as `pretrain.run.run` and `pretrain.evaluate.evaluate`.
"""

from train import lazy_names

__all__, __getattr__ = lazy_names(
    "pretrain",
    {
        "config": "PretrainConfig ViewConfig",
        "features": "Extractor Features frozen_accuracy",
        "heads": "MLP Network Prototypes",
        "health": "collapse_step verdict",
        "knn": "knn_accuracy",
        "linear": "linear_probe probe_accuracy",
        "objectives": "OBJECTIVES Objective Views",
        "state": "PretrainState encoder_of init_pretrain_state pretrain_digest",
        "steps": "contrastive_step feature_step view_step",
        "views": "make_views view",
    },
)
