"""Training: one loop, its data, losses, schedules and checkpoints.

from headway.train import train
trained = train(model, batches, steps=1000, learning_rate=1e-3, warmup=100, folder="run", checkpoint_every=100)
"""

from __future__ import annotations

from headway.train.checkpoints import Checkpoint, checkpoint_steps, load_checkpoint, save_checkpoint
from headway.train.groups import adamw, parameter_groups
from headway.train.log import read_log
from headway.train.loop import Trained, train
from headway.train.losses import Loss, classification_loss, model_loss, next_token_loss, token_loss
from headway.train.run import Callback, EarlyStop, GradientNorms, Measure, Run
from headway.train.schedules import SCHEDULES, Schedule, constant, cosine, linear, wsd
from headway.train.streams import Batch, Drawn, Stream

__all__ = [
    "SCHEDULES",
    "Batch",
    "Callback",
    "Checkpoint",
    "Drawn",
    "EarlyStop",
    "GradientNorms",
    "Loss",
    "Measure",
    "Run",
    "Schedule",
    "Stream",
    "Trained",
    "adamw",
    "checkpoint_steps",
    "classification_loss",
    "constant",
    "cosine",
    "linear",
    "load_checkpoint",
    "model_loss",
    "next_token_loss",
    "parameter_groups",
    "read_log",
    "save_checkpoint",
    "token_loss",
    "train",
    "wsd",
]
