"""Self-supervised pretraining: objectives, one contrastive step, and what its encoders are worth; on top of `train`."""

__all__: list[str] = []
