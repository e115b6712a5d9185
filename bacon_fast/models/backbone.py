"""What every backbone is: images [N,C,H,W] to features [N, num_features], with weights that it can take."""

from collections.abc import Mapping

from torch import Tensor, nn

_WRAPPERS = ("module.", "network.")  # DistributedDataParallel's, and a checkpoint's of ours
_CLASSIFIERS = ("fc.", "head.", "classifier.", "balanced_head.")


class Backbone(nn.Module):
    """Base of the backbones.

    Attributes:
        num_features: F.
        frozen: the network is used as it is, but for single parameters: it stays in evaluation mode, so that its
            BatchNorm layers normalize with the statistics that they have, and keep them.
    """

    num_features: int
    frozen: bool = False

    @property
    def body(self) -> nn.Module:
        """The module whose names a file of weights has."""
        return self

    def train(self, mode: bool = True) -> "Backbone":
        return super().train(mode and not self.frozen)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Takes these weights: all of its own, and nothing else but a classifier's, which is dropped.

        Names may have `module.` before them, or be those of a whole network (backbone., head.).
        Raises ValueError, which lists the names and shapes that do not fit.
        """
        self._load(_body_weights(weights))

    def _load(self, weights: dict[str, Tensor]) -> None:
        own = self.body.state_dict()
        fitting = {k: v for k, v in weights.items() if k in own or not k.startswith(_CLASSIFIERS)}
        load_strictly(self.body, fitting)


def load_strictly(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """`load_state_dict`, whose refusal is a ValueError."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"weights: {' '.join(str(error).split())[:600]}") from error


def _body_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, value in weights.items():
        while wrapper := next((w for w in _WRAPPERS if name.startswith(w)), ""):
            name = name.removeprefix(wrapper)
        found[name] = value
    if any(name.startswith("backbone.") for name in found):
        found = {k.removeprefix("backbone."): v for k, v in found.items() if k.startswith("backbone.")}
    return {name.removeprefix("net."): value for name, value in found.items()}
