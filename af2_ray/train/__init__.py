"""Training: a recipe's steps on Ray Train and DeepSpeed, restartable and accounted for."""
