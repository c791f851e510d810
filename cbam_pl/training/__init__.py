"""Training: the LightningModule, its metrics, the run's files, checkpoints, callbacks and logger."""
