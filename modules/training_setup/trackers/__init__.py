"""Loggers of other packages: Weights & Biases, MLflow and Trackio, offline or in a local store."""

from descant.modules.training_setup.trackers.base import Tracker as Tracker
from descant.modules.training_setup.trackers.mlflow import MLflow as MLflow
from descant.modules.training_setup.trackers.trackio import Trackio as Trackio
from descant.modules.training_setup.trackers.wandb import Wandb as Wandb
