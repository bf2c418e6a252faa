"""Search of hyper-parameters with Optuna: `python -m train.search PRESET --trials N`."""
