"""timm's networks as backbones (extra `timm`), with the normalization and the image size that each was trained with."""

import difflib
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor, nn

from bacon_fast.models.backbone import Backbone, load_strictly
from bacon_fast.models.batchnorm import convert_batchnorm
from bacon_fast.models.convolution import convert_convolutions

PREFIX = "timm/"
MAX_DEFAULT_SIZE = 224
"""Side of the images unless another is asked for: weights of larger ones serve it too, at a fraction of the cost."""


@dataclass(frozen=True)
class PretrainedInput:
    """What a network of timm was trained on, and where its weights are.

    Attributes:
        native_size: side of its images in pixels.
        default_size: the side to take: at most 224, and a multiple of the patch.
        mean, std: by channel, of pixels in 0..1.
        interpolation: of the resizing in its training: bilinear or bicubic, in timm 1.0.
        licence: of the weights, as timm says.
        hub: repository and file on the Hugging Face hub, or None.
    """

    native_size: int
    default_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    licence: str
    hub: tuple[str, str] | None


def timm_package() -> ModuleType:
    """timm. Raises ValueError, which says how to get it, where it is not installed."""
    try:
        import timm
    except ImportError as error:
        raise ValueError(
            f"backbone: timm/NAME needs the extra timm: pip install 'bacon_fast[timm]' ({error})"
        ) from error
    return timm


@cache
def pretrained_input(name: str) -> PretrainedInput:
    """Of the network "timm/NAME". Raises ValueError for a name that timm does not have, with similar ones.

    Example:
        >>> pretrained_input("timm/vit_small_patch14_dinov2.lvd142m").default_size
        224
    """
    timm, model = timm_package(), name.removeprefix(PREFIX)
    architecture, _, tag = model.partition(".")
    tags = list(timm.models.get_arch_pretrained_cfgs(architecture))
    if not timm.is_model(architecture) or (tag and model not in tags):
        known = tags or timm.list_models()
        similar = ", ".join(PREFIX + other for other in difflib.get_close_matches(model, known, 3, 0.3)) or "none"
        raise ValueError(f"backbone: expected a network of timm {timm.__version__}, found {name!r}; similar: {similar}")
    found = timm.models.get_pretrained_cfg(model)
    pixels = timm.data.resolve_data_config(pretrained_cfg=found.to_dict())
    native = pixels["input_size"][-1]
    patch = int(match[1]) if (match := re.search(r"patch(\d+)", model)) else 1
    hub = (found.hf_hub_id, found.hf_hub_filename or "model.safetensors") if found.hf_hub_id else None
    return PretrainedInput(
        native,
        min(native, MAX_DEFAULT_SIZE) // patch * patch,
        tuple(pixels["mean"]),
        tuple(pixels["std"]),
        pixels["interpolation"],
        found.license or "unknown",
        hub,
    )


class TimmBackbone(Backbone):
    """A network of timm without its classifier: images [N,3,H,W] to features [N, num_features].

    Stochastic depth and dropout are off: they draw from torch's generator, and a step of ours is a function of seed and
    step. num_features is read from a pass, as timm's own attribute is wrong for some networks (mobilenetv4).

    Args:
        name: "timm/NAME" or "timm/NAME.TAG".
        image_size: side H = W of the images, for networks with a fixed grid of patches; None: `default_size`.

    Raises:
        ValueError: timm is not installed, has no such network, or the size is no multiple of the patch.
    """

    def __init__(self, name: str, image_size: int | None = None) -> None:
        super().__init__()
        self.name, self.image_size = name, image_size or pretrained_input(name).default_size
        self.net = self._create()
        self.eval()
        with torch.no_grad():
            features = self.net(torch.zeros(1, 3, self.image_size, self.image_size))
        if features.dim() != 2:
            raise ValueError(f"backbone: expected features [N, F] of {name}, found shape {list(features.shape)}")
        self.num_features = features.shape[1]
        self.train()

    @property
    def body(self) -> nn.Module:
        return self.net

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def _load(self, weights: dict[str, Tensor]) -> None:
        timm = timm_package()
        classifiers = timm.models.get_pretrained_cfg(self.name.removeprefix(PREFIX)).classifier or ()
        classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
        dropped = {f"{layer}.{part}" for layer in classifiers for part in ("weight", "bias")}
        kept = {name: value for name, value in weights.items() if name not in dropped}
        # timm renames older files' weights and resizes the grid of positions, and is strict if the classes agree.
        overlay = {"state_dict": kept, "num_classes": 0}
        try:
            loaded = self._create(pretrained=True, pretrained_cfg_overlay=overlay)
        except (RuntimeError, KeyError) as error:
            raise ValueError(
                f"weights: of another network than {self.name}: {' '.join(str(error).split())[:600]}"
            ) from error
        load_strictly(self.net, loaded.state_dict())

    def _create(self, **options: object) -> nn.Module:
        name = self.name.removeprefix(PREFIX)
        wanted = {"img_size": self.image_size, "drop_path_rate": 0.0}
        with _quiet():
            net = _without_refused(
                lambda **taken: timm_package().create_model(name, num_classes=0, **taken, **options), wanted
            )
        patch = getattr(getattr(net, "patch_embed", None), "patch_size", None)
        if patch is not None and any(
            self.image_size % side for side in (patch if isinstance(patch, tuple) else (patch,))
        ):
            raise ValueError(
                f"image_size: expected a multiple of the patch {patch} of {self.name}, found {self.image_size}"
            )
        for module in net.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0
        convert_batchnorm(net)
        convert_convolutions(net)
        return net

    def layer_scales(self, decay: float) -> dict[str, float]:
        """decay**d by name of a parameter of the body, d its layer's distance from the heads, whose own is 0 (BEiT,
        arXiv 2106.08254), with timm's layers. What timm puts into no layer counts as the heads', as it does there.
        """
        head = "~"  # a name that no layer has, in the place of timm's classifier, which is not here
        named = [*self.net.named_parameters(), (head, None)]
        module = SimpleNamespace(named_parameters=lambda: named)
        layers = timm_package().models.group_parameters(module, self.net.group_matcher(coarse=False), reverse=True)
        return {name: decay ** (layers[head] - layers[name]) for name, _ in named[:-1]}


def _without_refused(create: Callable[..., nn.Module], wanted: Mapping[str, object]) -> nn.Module:
    """`create` with those of the wanted arguments that the network takes: timm knows only by trying."""
    taken = dict(wanted)
    while True:
        try:
            return create(**taken)
        except TypeError as error:
            refused = [name for name in taken if f"'{name}'" in str(error)]
            if not refused:
                raise
            del taken[refused[0]]


class _quiet:
    """Inside, timm logs nothing: what matters of a file's weights is an error of ours."""

    def __enter__(self) -> None:
        self._logger = logging.getLogger("timm")
        self._level = self._logger.level
        self._logger.setLevel(logging.ERROR)

    def __exit__(self, *exception: object) -> None:
        self._logger.setLevel(self._level)
