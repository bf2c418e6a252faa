"""Contrastive self-supervised pretraining: the place is kept, nothing is built yet."""
