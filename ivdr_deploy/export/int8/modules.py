"""The network itself with convolutions of 8 bits, for a compiler that takes torch modules.

oneDNN convolves over three axes without joining frames first, and leaves out what is padding; what lies between two
convolutions stays as it is in the network, and the compiler makes one loop of it.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor, nn

from ivdr_deploy.errors import ExportError
from ivdr_deploy.export.int8.quantise import Quantised
from ivdr_deploy.export.int8.scales import Scale, fused_output, tensor_scales
from ivdr_deploy.export.int8.weights import Weights
from ivdr_deploy.export.layers import layer_name, module_of


def quantise_modules(model: nn.Module, made: Quantised, kept: Collection[str] = ()) -> None:
    """Replace the convolutions of a network, and take away the batch norms that were folded into them.

    Args:
        model: The network that the fp32 graph was exported from, in eval mode; it is changed.
        made: Its 8-bit form.
        kept: Names of nodes that stay in fp32.

    Raises:
        ExportError: if a convolution of the graph is none of the network.
    """
    source = made.source
    scales = tensor_scales(source, made.ranges)
    for node in source.nodes:
        if node.op_type != "Conv":
            continue
        path = module_of(node)
        parent, _, name = path.rpartition(".")
        try:
            given = model.get_submodule(path)
        except AttributeError:
            given = model
        if not path or not isinstance(given, nn.Conv3d):
            raise ExportError(f"{layer_name(node)} is no convolution of three axes of the network")
        bias = source.constants[node.input[2]] if len(node.input) > 2 else np.zeros(given.out_channels)
        if node.name in kept:
            put: nn.Module = _folded(given, source.constants[node.input[1]], bias)
        else:
            read = source.padded(node)[0]
            put = Conv8(
                given, made.rounded[node.input[1]], bias, scales[read], scales[fused_output(source, node)]
            )
        setattr(model.get_submodule(parent), name, put)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm3d):  # the graph has none: it would have been refused
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, nn.Identity())


class Conv8(nn.Module):
    """A convolution of 8 bits between values in fp32.

    Args:
        given: The convolution that it stands for.
        weights: Its weights, with a batch norm folded in.
        bias: float32 (outputs,).
        read: Scale of what it reads.
        made: Scale of what it makes; where zero is the smallest value, it does what a ReLU does.
    """

    def __init__(
        self, given: nn.Conv3d, weights: Weights, bias: np.ndarray, read: Scale, made: Scale
    ) -> None:
        super().__init__()
        assert not isinstance(given.padding, str)
        self.geometry = [list(given.stride), list(given.padding), list(given.dilation)]
        self.read, self.made = [(float(one.scale), int(one.zero_point)) for one in (read, made)]
        self.register_buffer("weight", torch.from_numpy(weights.stored.copy()))
        self.register_buffer("scale", torch.from_numpy(weights.scale.copy()))
        self.register_buffer("zero", torch.zeros(len(bias), dtype=torch.int64))
        self.register_buffer("bias", torch.from_numpy(bias.astype(np.float32)))

    def forward(self, x: Tensor) -> Tensor:
        """Map float32 (N, C, T, H, W) to float32."""
        (scale, zero), (scale_out, zero_out) = self.read, self.made
        stored = torch.clamp(torch.round(x * (1 / scale)) + zero, 0, 255).to(torch.uint8)
        stored = stored.contiguous(memory_format=torch.channels_last_3d)
        packed = torch.ops.onednn.qconv_prepack(
            self.weight, self.scale, scale, zero, *self.geometry, 1, [1, *x.shape[1:]]
        )
        result: Tensor = torch.ops.onednn.qconv_pointwise(
            *(stored, scale, zero, packed, self.scale, self.zero, self.bias, *self.geometry, 1),
            *(scale_out, zero_out, torch.uint8, "none", [], ""),
        )
        return (result.to(torch.float32) - zero_out) * scale_out


def _folded(given: nn.Conv3d, weights: np.ndarray, bias: np.ndarray) -> nn.Conv3d:
    """Return a convolution in fp32 with a batch norm folded in."""
    kept = nn.Conv3d(
        given.in_channels,
        given.out_channels,
        given.kernel_size,  # type: ignore[arg-type]
        stride=given.stride,  # type: ignore[arg-type]
        padding=given.padding,  # type: ignore[arg-type]
        dilation=given.dilation,  # type: ignore[arg-type]
    )
    with torch.no_grad():
        kept.weight.copy_(torch.tensor(weights))
        assert kept.bias is not None
        kept.bias.copy_(torch.tensor(bias))
    return kept


@torch.library.register_fake("onednn::qconv_prepack")  # type: ignore[untyped-decorator]
def _prepacked(weight: Tensor, *_: object) -> Tensor:
    """Tell the compiler of what shape packed weights are; it packs them when it folds constants."""
    return weight.new_empty(weight.shape)
