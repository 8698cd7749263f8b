"""The layers and functions of torch that are known to process every example of a batch independently."""

from __future__ import annotations

import operator

import torch
from torch import nn
from torch.nn import functional as F

EXAMPLEWISE_LAYERS = {  # layers that process every example independently
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus,
    nn.Softsign, nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Tanhshrink, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid,
    nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.Upsample,
}  # fmt: skip
ELEMENTWISE_FUNCTIONS = {
    operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.pow,
    operator.gt, operator.ge, operator.lt, operator.le, torch.where, torch.maximum, torch.minimum, torch.nan_to_num,
    torch.add, torch.sub, torch.mul, torch.div, torch.neg, torch.abs, torch.exp, torch.log, torch.sqrt, torch.square,
    torch.sin, torch.cos, torch.clamp, torch.tanh, torch.sigmoid, F.tanh, F.sigmoid, F.relu6, F.leaky_relu, F.elu,
    F.selu, F.celu, F.gelu, F.silu, F.mish, F.softplus, F.softsign, F.logsigmoid, F.hardtanh, F.hardswish,
    F.hardsigmoid, "add", "sub", "mul", "div", "neg", "abs", "exp", "log", "sqrt", "square", "clamp", "tanh", "sigmoid",
    "float", "contiguous",
}  # fmt: skip
POOLING = {F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d}
ALONG_A_DIMENSION = {
    F.softmax, F.log_softmax, torch.softmax, torch.log_softmax, torch.mean, torch.sum, "softmax", "log_softmax", "mean",
    "sum",
}  # fmt: skip
RELU_FUNCTIONS = {torch.relu, F.relu, "relu"}
