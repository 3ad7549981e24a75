"""Every error that quantmill raises on purpose.

    QuantmillError
    ├── UserError (ValueError)        the user can fix it; never retried
    │   ├── ZooError                  the zoo file or the command line
    │   ├── ModelNotFound             no such repository, revision or folder
    │   ├── CheckpointError           files that are not a readable checkpoint
    │   ├── UnsupportedModel          no causal LM head, remote code, pickle weights
    │   ├── UnsupportedRecipe         a recipe that this model or runtime can't take
    │   ├── CalibrationError          unreadable text, too few samples
    │   ├── PreflightError            everything that this machine lacks
    │   ├── DeviceUnusable            a card that this build, driver or process can't use
    │   └── HubRefused                token, permission, a repository changed by someone else
    ├── NumericalError (ArithmeticError)   NaN or Inf in weights, activations or results
    ├── DiskFull (OSError)            stops the job; the user has to free space
    ├── OutOfMemory (MemoryError)     host or device; an identical retry would fail, too
    └── TransientError                a retry without changes may help
        ├── HubUnavailable            429, 5xx, resets, stalls
        ├── StageHung                 no end within many times its estimate
        ├── WorkerDied                the process or its node ended
        ├── DeviceLost                a card failed, or an error poisoned its context; another card may do
        └── ClusterLost               Ray doesn't start, or its head ended

A message names the thing, the actual value, what was expected, and the remedy.
"""

from __future__ import annotations


class QuantmillError(Exception):
    """Root of all errors raised on purpose."""


class UserError(QuantmillError, ValueError):
    """An error that the user has to fix."""


class ZooError(UserError):
    """The zoo file or the command line is wrong; nothing was started."""


class PluginError(UserError):
    """A plugin can't be imported; the message names it, the reason and the remedy."""


class ModelNotFound(UserError):
    """There is no such repository, revision or folder."""


class CheckpointError(UserError):
    """The files are not a readable checkpoint."""


class UnsupportedModel(UserError):
    """quantmill can't load or stream the model, or refuses to."""


class UnsupportedRecipe(UserError):
    """This model, or any runtime, doesn't support the recipe."""


class CalibrationError(UserError):
    """The calibration or verification text can't be used."""


class PreflightError(UserError):
    """The machine lacks something that the job needs; the message lists every problem."""


class DeviceUnusable(UserError):
    """A card can't be used from here: the build has no kernels for it, the driver is too old, or others hold it."""


class HubRefused(UserError):
    """The Hub refused permanently: token, permission, or a repository changed by someone else."""


class NumericalError(QuantmillError, ArithmeticError):
    """NaN or Inf in weights, activations or results."""


class DiskFull(QuantmillError, OSError):
    """There is no space left for the stage's output."""


class OutOfMemory(QuantmillError, MemoryError):
    """Host or device memory ran out."""


class TransientError(QuantmillError):
    """An error that a retry without changes may fix."""


class HubUnavailable(TransientError):
    """The Hub did not answer, or asked to wait.

    ``retry_after`` is the requested wait in seconds, if any; ``reached`` is False if nothing answered at its address.
    """

    def __init__(self, message: str, retry_after: float | None = None, *, reached: bool = True) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.reached = reached


class StageHung(TransientError):
    """A stage was ended because it took many times its estimate."""


class WorkerDied(TransientError):
    """The worker process, or its node, ended before it answered."""


class DeviceLost(TransientError):
    """A card failed, or an error poisoned its context; its process has to end, and another card may do."""


class ClusterLost(TransientError):
    """Ray doesn't start, or its head ended while the run was at work."""
