"""Small awkward networks: whatever an operator does to channels, the small network is right, or the channels stay."""

import functools

import numpy as np
import pytest
import torch
from helpers import (captured, error_of_cutting, fvcore_macs, images, parameter_count, planned_macs, random_plan)
from torch import nn
from torch.nn import functional as F

from s2h_cli.errors import UserError
from s2h_cli.graph import capture
from s2h_cli.plan import Plan, Space
from s2h_cli.rebuild import rebuild

SIZE = (3, 8, 8)


@torch.library.custom_op("s2h_test::mystery", mutates_args=())
def mystery(x: torch.Tensor) -> torch.Tensor:
    """Mixes neighbouring channels: an operator that nobody described."""
    return x + x.roll(1, 1)


@mystery.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def conv(inputs: int, outputs: int, kernel: int = 1, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


class Net(nn.Module):
    """Three convolutions and a head; subclasses say what happens in the middle."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.fc = conv(3, 16, 3), conv(16, 16), conv(16, 16), nn.Linear(16, 5)
        self.more()

    def more(self):
        pass

    def middle(self, x):
        return x

    def forward(self, x):
        return self.fc(self.middle(F.relu(self.a(x))).mean((2, 3)))


class Tokens(Net):
    """The same for tokens (B, 64, 16)."""

    def forward(self, x):
        return self.fc(self.middle(self.a(x).flatten(2).transpose(1, 2)).mean(1))


CASES: dict[str, type[Net]] = {}
REASONS: dict[str, str] = {}  # what must be among the reasons why channels are frozen
FREE: dict[str, set[int]] = {}  # numbers of atoms of groups that must exist


def case(reason: str | None = None, free: set[int] = frozenset()):
    def register(cls):
        CASES[cls.__name__] = cls
        if reason:
            REASONS[cls.__name__] = reason
        if free:
            FREE[cls.__name__] = free
        return cls
    return register


def middle(name: str, function, reason: str | None = None, free: set[int] = frozenset(), base: type = Net, **layers):
    """Registers a case of one line: `function(net, x)` with `layers` made anew for each network."""
    def more(self):
        for attribute, make in layers.items():
            made = make()
            if isinstance(made, torch.Tensor) and not isinstance(made, nn.Parameter):
                self.register_buffer(attribute, made)
            else:
                setattr(self, attribute, made)
    case(reason, free)(type(name, (base,), {"more": more, "middle": lambda self, x: function(self, x)}))


def norm(groups: int):
    return lambda: nn.GroupNorm(groups, 16)


# -- operators without a rule, or over channels: frozen, with the reason ----------------------------------------------

middle("mystery", lambda n, x: n.c(mystery(n.b(x))), "no rule for operator s2h_test::mystery")
middle("transposed_in_groups", lambda n, x: n.e(n.d(n.b(x))), "grouped transposed convolution",
       d=lambda: nn.ConvTranspose2d(16, 8, 2, 2, groups=2), e=lambda: conv(8, 16))
middle("softmax", lambda n, x: n.c(n.b(x).softmax(1)), "softmax over channels")
middle("roll", lambda n, x: n.c(x + n.b(x).roll(3, 1)), "roll over channels")
middle("flip", lambda n, x: n.c(x + n.b(x).flip(1)), "flip over channels")
middle("mean_over_channels", lambda n, x: n.c(n.b(x) * n.b(x).mean(1)[:, None]), "mean over channels")
middle("max_over_channels", lambda n, x: n.c(n.b(x) * n.b(x).max(1, keepdim=True)[0]), "max over channels")
middle("mean_over_all", lambda n, x: n.c(n.b(x) - n.b(x).mean()), "mean over channels")
middle("index", lambda n, x: n.c(n.b(x)[:, [3, 1, 2, 0, *range(4, 16)]]), "index")
middle("linear_between_activations", lambda n, x: n.c(x * F.linear(n.b(x).flatten(2).transpose(1, 2), n.c(x).mean((0, 3)).t()).mean((1, 2))[:, None, None, None]),
       "head dimension")
middle("einsum_of_activations", lambda n, x: n.e(torch.einsum("bchw,bcij->bhwij", n.b(x), n.c(x)).flatten(3)), "head dimension",
       e=lambda: conv(8, 16))
middle("sorted_channels", lambda n, x: n.c(n.b(x).sort(1)[0]), "sort over channels")
middle("weight_from_the_images", lambda n, x: n.e(F.conv2d(n.b(x), n.c.weight * n.u(x).amax())),
       "amax over channels", {16}, e=lambda: conv(16, 16), u=lambda: conv(16, 8))
middle("depthwise_kernel_of_each_image", lambda n, x: n.c(batched(n.b(x), n.l(x.mean((2, 3))), 16)), free={16}, l=lambda: nn.Linear(16, 16 * 9))
middle("kernel_of_each_image", lambda n, x: n.e(batched(n.b(x), n.l(x.mean((2, 3))), 1)), free={16, 8}, l=lambda: nn.Linear(16, 8 * 16 * 9),
       e=lambda: conv(8, 16))
middle("grouped_kernel_of_each_image", lambda n, x: n.e(batched(n.b(x), n.l(x.mean((2, 3))), 2)), free={8, 4}, l=lambda: nn.Linear(16, 8 * 8 * 9),
       e=lambda: conv(8, 16))
middle("mixed_kernels", lambda n, x: n.e(batched(n.b(x), n.l(x.mean((2, 3))).softmax(1) @ n.k, 1)), free={8}, l=lambda: nn.Linear(16, 3),
       k=lambda: nn.Parameter(torch.randn(3, 8 * 16 * 9)), e=lambda: conv(8, 16))
middle("strided_slice", lambda n, x: n.e(n.b(x)[:, ::2]), "strided slice of channels", e=lambda: conv(8, 16))
middle("cumsum", lambda n, x: n.c(n.b(x).cumsum(1)), "cumsum over channels")
middle("constant_added", lambda n, x: n.c(n.b(x) + torch.arange(16.).view(16, 1, 1)), "cannot be cut")
middle("where_over_channels", lambda n, x: n.c(torch.where(n.m, n.b(x), 0.)), free={16},
       m=lambda: (torch.arange(16) % 2 == 0).view(16, 1, 1))
middle("outer_with_itself", lambda n, x: n.e((n.u(x).unsqueeze(1) * n.u(x).unsqueeze(2)).flatten(1, 2)),
       e=lambda: conv(64, 16), u=lambda: conv(16, 8))
middle("eca", lambda n, x: n.c(n.b(x) * n.k(n.b(x).mean((2, 3)).unsqueeze(1)).sigmoid().transpose(1, 2).unsqueeze(-1)),
       "spatial positions of a convolution", k=lambda: nn.Conv1d(1, 1, 3, padding=1))
middle("zeroed_in_place", lambda n, x: n.c(zero_some(n.b(x))), free={16})
middle("shifted_by_padding", lambda n, x: n.c(x + n.b(F.pad(x, (0, 0, 0, 0, 1, -1)))), "padded channels")
middle("variance_of_all", lambda n, x: n.l(x) / n.l(x).var(unbiased=False), "var over channels", base=Tokens,
       l=lambda: nn.Linear(16, 16))
middle("std_of_all", lambda n, x: n.l(x) / n.l(x).std(), "std over channels", base=Tokens, l=lambda: nn.Linear(16, 16))
middle("sum_with_dtype", lambda n, x: n.l(x) / n.l(x).abs().sum(dtype=torch.float32), "sum over channels", base=Tokens,
       l=lambda: nn.Linear(16, 16))
middle("pool_of_three_axes", lambda n, x: F.max_pool2d(n.b(x).flatten(2), 3, 1, 1)[..., None], "max_pool2d over channels")
middle("norm_by_batch_over_tokens", lambda n, x: F.batch_norm(n.l(x), None, None, training=True), base=Tokens,
       l=lambda: nn.Linear(16, 16))


def mixed(layer, y):
    """(B, 64, 16) in four heads, each of which mixes the 64 positions: SwinMLP."""
    y = layer(y.unflatten(-1, (4, 4)).transpose(1, 2).reshape(-1, 4 * 64, 4))
    return y.view(-1, 4, 64, 4).transpose(1, 2).reshape(-1, 64, 16)


def batched(y, kernels, groups):
    """A convolution with kernels (N, ...) of each image, which are made one with the batch in the groups."""
    n, c, h, w = y.shape
    y = F.conv2d(y.reshape(1, n * c, h, w), kernels.reshape(-1, c // groups, 3, 3), padding=1, groups=n * groups)
    return y.reshape(n, -1, h, w)


def zero_some(y):
    y[:, 2:4].zero_()
    return y


class Blur(nn.Module):
    """A filter that does not train, in a buffer that is called as a layer's weight is."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.rand(16, 1, 3, 3))

    def forward(self, x):
        return F.conv2d(x, self.weight, padding=1, groups=16)


class BufferNorm(nn.Module):
    """A batch norm whose weight and bias are buffers."""

    def __init__(self):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(16) + 0.5)

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)


# -- what must stay free ----------------------------------------------------------------------------------------------

middle("filter_in_a_buffer", lambda n, x: n.c(n.f(n.b(x))), f=Blur)
middle("norm_with_buffers", lambda n, x: n.c(n.f(n.b(x))), f=BufferNorm)
middle("norm_of_the_root", lambda n, x: n.c(F.batch_norm(n.b(x), n.m, n.v, n.w, n.s, n.training)), m=lambda: torch.zeros(16), v=lambda: torch.ones(16),
       w=lambda: nn.Parameter(torch.rand(16)), s=lambda: nn.Parameter(torch.rand(16)))
middle("with_itself", lambda n, x: n.e(torch.cat([n.b(x), n.b(x)], 1)), free={16}, e=lambda: conv(32, 16))
middle("concatenated_relu", lambda n, x: n.e(twice(n.b(x))), free={16}, e=lambda: conv(32, 16))
middle("different_sources", lambda n, x: n.e(torch.cat([n.b(x), n.u(x), x], 1)), free={16, 8},
       e=lambda: conv(40, 16), u=lambda: conv(16, 8))
middle("split", lambda n, x: n.e(torch.cat([F.relu(p) for p in n.b(x).split([3, 13], 1)][::-1], 1)), e=lambda: conv(16, 16))
middle("chunk_product", lambda n, x: n.e(product(*n.b(x).chunk(2, 1))), free={8}, e=lambda: conv(8, 16))
middle("slices", lambda n, x: n.c(torch.cat([n.b(x)[:, -6:], n.b(x)[:, :-6]], 1)), free={16})
middle("overlapping_slices", lambda n, x: n.e(n.b(x)[:, :10] + n.b(x)[:, 6:]), e=lambda: conv(10, 16))
middle("pooled_halves", lambda n, x: n.c(halves(n.b(x))))
middle("squeeze_excite", lambda n, x: n.c(n.b(x) * n.e(F.relu(n.r(F.adaptive_avg_pool2d(n.b(x), 1)))).sigmoid()),
       free={16, 4}, r=lambda: conv(16, 4), e=lambda: conv(4, 16))
middle("group_norm", lambda n, x: n.c(n.n(n.b(x))), free={4}, n=norm(4))
middle("group_norm_of_one_group", lambda n, x: n.c(n.n(n.b(x))), free={16}, n=norm(1))
middle("group_norm_of_single_channels", lambda n, x: n.c(n.n(n.b(x))), n=norm(16))
middle("layer_scale", lambda n, x: n.c(x + n.b(x) * n.s), free={16}, s=lambda: nn.Parameter(torch.ones(16, 1, 1)))
middle("residual", lambda n, x: n.c(x + n.b(x)), free={16})
middle("residual_broadcast", lambda n, x: n.c(x + n.b(x).mean((2, 3), keepdim=True)), free={16})
middle("one_output_channel", lambda n, x: n.c(n.b(x) * n.o(n.b(x)).sigmoid()), free={16}, o=lambda: conv(16, 1))
middle("one_channel", lambda n, x: n.i(n.o(n.b(x))), free={16}, o=lambda: conv(16, 1), i=lambda: conv(1, 16, 3))
middle("depthwise", lambda n, x: n.c(n.g(n.b(x))), free={16}, g=lambda: conv(16, 16, 3, groups=16))
middle("depthwise_multiplier", lambda n, x: n.e(n.g(n.b(x))), free={16}, g=lambda: conv(16, 32, 3, groups=16), e=lambda: conv(32, 16))
middle("many_groups", lambda n, x: n.c(n.g(n.b(x))), free={8}, g=lambda: conv(16, 16, 3, groups=8))
middle("few_groups", lambda n, x: n.e(n.g(torch.cat([n.b(x), n.c(x)], 1))), free={8}, g=lambda: conv(32, 32, 3, groups=4),
       e=lambda: conv(32, 16))
middle("grouped_after_itself_twice", lambda n, x: n.e(n.g(twice(n.b(x)))), g=lambda: conv(32, 32, groups=2), e=lambda: conv(32, 16))
middle("channel_shuffle_of_two", lambda n, x: n.c(shuffle(torch.cat([n.b(x), n.u(x)], 1), 2)[:, :16]), u=lambda: conv(16, 16))
middle("shuffle_between_groups", lambda n, x: n.c(n.h(shuffle(n.g(n.b(x)), 4))), g=lambda: conv(16, 16, groups=4),
       h=lambda: conv(16, 16, groups=4))
middle("pixel_shuffle_by_hand", lambda n, x: n.e(depth_to_space(n.b(x))), free={4}, e=lambda: conv(4, 16))
middle("space_to_depth", lambda n, x: n.e(space_to_depth(n.b(x))), free={16}, e=lambda: conv(64, 16))
middle("interpolate", lambda n, x: n.c(F.interpolate(n.b(x), size=(5, 7), mode="bilinear")), free={16})
middle("masked_fill", lambda n, x: n.c(n.b(x).masked_fill(n.m, -1.)), free={16}, m=lambda: (torch.arange(64) % 2 == 0).view(8, 8))
middle("where_over_space", lambda n, x: n.c(torch.where(n.m, n.b(x), n.c(x))), m=lambda: (torch.arange(64) % 2 == 0).view(8, 8))
middle("buffer_added", lambda n, x: n.c(n.b(x) + n.off), free={16}, off=lambda: torch.randn(16, 1, 1))
middle("layer_outside_the_batch", lambda n, x: n.c(n.b(x) + n.e(n.at)), free={16}, e=lambda: conv(3, 16),
       at=lambda: torch.randn(1, 3, 8, 8))
middle("mixed_positions_of_each_head", lambda n, x: n.p(mixed(n.s, n.l(x)) + x), base=Tokens, free={4}, l=lambda: nn.Linear(16, 16),
       s=lambda: nn.Conv1d(4 * 64, 4 * 64, 1, groups=4), p=lambda: nn.Linear(16, 16))
middle("made_of_one_value", lambda n, x: n.c(n.b(x) + torch.full(n.b(x).shape, 0.5) * torch.ones(16, 1, 1)), free={16})
middle("picked_places", lambda n, x: n.c(n.b(x).flatten(2).gather(2, torch.zeros(len(x), 16, 64, dtype=torch.long)).view(-1, 16, 8, 8)), free={16})
middle("scattered_into_some_images", lambda n, x: n.c(n.b(x).flatten(2).scatter(2, torch.zeros(1, 16, 1, dtype=torch.long), 0.).view(-1, 16, 8, 8)),
       "no rule for operator scatter")
middle("shuffled", lambda n, x: n.c(F.channel_shuffle(n.b(x), 4)), free={4})
middle("pooled_with_indices", lambda n, x: n.c(F.adaptive_max_pool2d(n.b(x), 4, return_indices=True)[0]), free={16})
middle("pooled_over_channels", lambda n, x: n.c(F.adaptive_max_pool2d(n.b(x).flatten(2), (16, 64))[..., None]), "adaptive_max_pool2d over channels")
middle("resampled", lambda n, x: n.c(F.grid_sample(n.b(x), n.g(x.mean((2, 3))).view(-1, 4, 4, 2), align_corners=False)), free={16}, g=lambda: nn.Linear(16, 32))
middle("nearest_exact", lambda n, x: n.c(F.interpolate(n.b(x), scale_factor=2, mode="nearest-exact")), free={16})
middle("sum_of_three", lambda n, x: n.c(torch.einsum("nchw,c,...hw->nchw", n.b(x), n.s, n.b(x)[0])), s=lambda: nn.Parameter(torch.randn(16)))
middle("einsum_of_dots", lambda n, x: n.c(torch.einsum("...hw,hv", n.b(x), n.m).view(-1, 16, 8, 8)), free={16}, m=lambda: torch.randn(8, 8))
middle("einsum_of_one", lambda n, x: n.l(torch.einsum("nc...->n...c", n.b(x))).permute(0, 3, 1, 2), free={16}, l=lambda: nn.Linear(16, 16))
middle("contracted_of_three", lambda n, x: n.e(torch.einsum("nchw,cd,de->nehw", n.b(x), n.m, n.m)), "no rule for operator einsum",
       m=lambda: nn.Parameter(torch.randn(16, 16)), e=lambda: conv(16, 16))
middle("same_padding", lambda n, x: n.c(n.g(n.b(x))), free={16}, g=lambda: nn.Conv2d(16, 16, 3, padding="same"))
middle("outer_product", lambda n, x: n.e((n.u(x).unsqueeze(1) * n.v(x).unsqueeze(2)).flatten(1, 2)), free={8},
       e=lambda: conv(64, 16), u=lambda: conv(16, 8), v=lambda: conv(16, 8))
middle("repeated_by_expand", lambda n, x: n.e(n.b(x).unsqueeze(2).expand(-1, 16, 2, 8, 8).reshape(-1, 32, 8, 8)), free={16},
       e=lambda: conv(32, 16))
middle("groups_in_the_batch", lambda n, x: n.c(n.g(n.b(x).view(-1, 4, 8, 8)).view(-1, 16, 8, 8)), g=lambda: conv(4, 4, 3))
middle("padded_and_cropped", lambda n, x: n.c(F.pad(n.b(x), (1, -1, 1, -1))), free={16})
middle("own_statistics", lambda n, x: n.c(n.n(n.b(x))), free={16}, n=lambda: nn.BatchNorm2d(16, track_running_stats=False))
middle("layer_used_twice", lambda n, x: n.b(F.relu(n.b(x))), free={16})
middle("weights_as_matrix", lambda n, x: n.c(n.b(x)) * n.b.weight.abs().amax(), "amax over channels")
middle("computed_weight", lambda n, x: F.conv2d(n.c(x), n.b.weight * n.g, n.b.bias), g=lambda: nn.Parameter(torch.ones(16, 1, 1, 1)))
middle("transposed_weight", lambda n, x: F.conv2d(F.relu(n.b(x)), n.b.weight.transpose(0, 1)))
middle("standardised_weight", lambda n, x: n.c(standardised(n, x * n.e(x.mean((2, 3), keepdim=True)).sigmoid())),
       e=lambda: conv(16, 16))


def rms(y, dim):
    return y * (y.pow(2).mean(dim, keepdim=True) + 1e-6).rsqrt()


def response_norm(n, y):
    """Global response normalisation (ConvNeXt-V2)."""
    size = y.norm(p=2, dim=(2, 3), keepdim=True)
    return y + torch.addcmul(n.off, n.s, y * (size / (size.mean(1, keepdim=True) + 1e-6)))


def rotate(q, angles):
    """Rotary embedding of channel pairs."""
    half = torch.stack([-q[..., 1::2], q[..., ::2]], -1).reshape(q.shape)
    return q * angles.cos() + half * angles.sin()


def heads(n, x, count=4):
    return n.qkv(x).reshape(x.shape[0], 64, 3, count, -1).permute(2, 0, 3, 1, 4).unbind(0)


def attend(n, x, q, k, v):
    return n.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape[0], 64, -1))


def attend_by_hand(n, x):
    q, k, v = heads(n, x)
    return n.proj((((q * 0.5) @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).reshape(x.shape[0], 64, -1))


def one_key_for_all(n, x):
    """Multi-query attention: four heads of queries, one of keys and values."""
    q = n.l(x).reshape(x.shape[0], 64, 4, 4).transpose(1, 2)
    k, v = (layer(x)[:, None] for layer in (n.k, n.v))
    return n.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape[0], 64, -1))


ATTENTION = dict(base=Tokens, qkv=lambda: nn.Linear(16, 48), proj=lambda: nn.Linear(16, 16))
middle("attention", lambda n, x: x + attend(n, x, *heads(n, x)), free={4}, **ATTENTION)
middle("attention_by_hand", lambda n, x: x + attend_by_hand(n, x), free={4}, **ATTENTION)
middle("rotary_attention", lambda n, x: x + attend(n, x, *(rotate(t, n.at) for t in heads(n, x)[:2]), heads(n, x)[2]), free={4},
       at=lambda: torch.randn(64, 4), **ATTENTION)
middle("cosine_attention", lambda n, x: x + attend(n, x, *(F.normalize(t, dim=-1) for t in heads(n, x)[:2]), heads(n, x)[2]),
       free={4}, **ATTENTION)
middle("one_key_for_all", lambda n, x: x + one_key_for_all(n, x), free={4}, base=Tokens, l=lambda: nn.Linear(16, 16),
       k=lambda: nn.Linear(16, 4), v=lambda: nn.Linear(16, 4), proj=lambda: nn.Linear(16, 16))
middle("transposed", lambda n, x: n.e(n.d(n.b(x))), free={16, 8}, d=lambda: nn.ConvTranspose2d(16, 8, 2, 2), e=lambda: conv(8, 16))
middle("glu", lambda n, x: n.e(F.glu(n.b(x), 1)), free={8}, e=lambda: conv(8, 16))
middle("flip_space", lambda n, x: n.c(n.b(x).flip(2, 3)), free={16})
middle("pixel_shuffle", lambda n, x: n.e(F.pixel_shuffle(n.b(x), 2)), free={4}, e=lambda: conv(4, 16))
middle("pixel_unshuffle", lambda n, x: n.e(F.pixel_unshuffle(n.b(x), 2)), free={16}, e=lambda: conv(64, 16))
middle("einsum", lambda n, x: torch.einsum("bchw,dc->bdhw", n.b(x), n.c.weight[:, :, 0, 0]), free={16})
middle("times_a_matrix", lambda n, x: n.l(x) @ n.m, free={16}, base=Tokens, l=lambda: nn.Linear(16, 16),
       m=lambda: nn.Parameter(torch.randn(16, 16)))
middle("matrix_times", lambda n, x: (n.m @ n.b(x).flatten(2)).unflatten(2, (8, 8)), free={16}, m=lambda: nn.Parameter(torch.randn(16, 16)))
middle("bias_and_product", lambda n, x: torch.addmm(n.o, n.l(x.mean(1)), n.m)[:, None], base=Tokens, free={16},
       l=lambda: nn.Linear(16, 16), o=lambda: nn.Parameter(torch.randn(16)), m=lambda: nn.Parameter(torch.randn(16, 16)))
middle("instance_norm", lambda n, x: n.c(n.n(n.b(x))), free={16}, n=lambda: nn.InstanceNorm2d(16, affine=True))
middle("prelu", lambda n, x: n.c(n.p(n.b(x))), free={16}, p=lambda: nn.PReLU(16))
middle("rms_norm", lambda n, x: n.l(n.n(x)), free={16}, base=Tokens, l=lambda: nn.Linear(16, 16), n=lambda: nn.RMSNorm(16))
middle("rms_norm_by_hand", lambda n, x: n.c(rms(n.b(x), 1)), free={16})
middle("variance_norm", lambda n, x: n.c(n.b(x) / n.b(x).std(1, keepdim=True)), free={16})
middle("response_norm", lambda n, x: n.c(response_norm(n, n.b(x))), free={16}, s=lambda: nn.Parameter(torch.randn(16, 1, 1)),
       off=lambda: nn.Parameter(torch.randn(16, 1, 1)))
middle("normalised", lambda n, x: n.c(F.normalize(n.b(x), dim=1)), free={16})
middle("stacked", lambda n, x: n.c(torch.stack([n.b(x), n.c(x)], 1).amax(1)), free={16})
middle("stacked_channels", lambda n, x: n.e(torch.stack([n.b(x), n.c(x)], 2).flatten(1, 2)), free={16}, e=lambda: conv(32, 16))
middle("repeat_interleave", lambda n, x: n.e(n.b(x).repeat_interleave(2, 1)), free={16}, e=lambda: conv(32, 16))
middle("repeat", lambda n, x: n.e(n.b(x).repeat(1, 2, 1, 1)), free={16}, e=lambda: conv(32, 16))
middle("unfold_patches", lambda n, x: n.e(F.unfold(n.b(x), 2, stride=2).unflatten(2, (4, 4))), free={16}, e=lambda: conv(64, 16))
middle("fold_patches", lambda n, x: n.e(F.fold(n.b(x).flatten(2), (16, 16), 2, stride=2)), free={4}, e=lambda: conv(4, 16))
middle("windows", lambda n, x: n.c(n.b(x).unfold(2, 4, 4).unfold(3, 4, 4).mean((-2, -1))), free={16})
middle("expand_as", lambda n, x: n.c(n.b(x) * n.o(x).expand_as(n.b(x))), free={16}, o=lambda: conv(16, 1))
middle("index_in_space", lambda n, x: n.c(n.b(x)[:, :, n.i][..., n.i]), free={16}, i=lambda: torch.tensor([3, 0, 5, 1]))
middle("index_with_a_gap", lambda n, x: n.c(n.b(x)[:, None, :, n.i].squeeze(1).transpose(1, 1)), free={16}, i=lambda: torch.tensor([3, 0]))
middle("select_positions", lambda n, x: n.c(n.b(x).index_select(2, n.i)), free={16}, i=lambda: torch.tensor([3, 0, 5]))
middle("embedded_positions", lambda n, x: n.l(x) + n.t(n.i), free={16}, base=Tokens, l=lambda: nn.Linear(16, 16),
       t=lambda: nn.Embedding(64, 16), i=lambda: torch.arange(64))
middle("standardised_weight_alone", lambda n, x: n.c(standardised(n, x)), free={16})
middle("scaled_weight", lambda n, x: F.conv2d(n.b(x), n.c.weight * n.s, n.c.bias), free={16}, s=lambda: nn.Parameter(torch.randn(16, 1, 1, 1)))
middle("merged_weights", lambda n, x: F.conv2d(n.b(x), F.pad(n.c.weight, (1, 1, 1, 1)) + n.k.weight, padding=1), free={16},
       k=lambda: conv(16, 16, 3))
middle("lstm", lambda n, x: n.l(n.r(n.l(x))[0]), free={16}, base=Tokens, l=lambda: nn.Linear(16, 16),
       r=lambda: nn.LSTM(16, 8, batch_first=True, bidirectional=True))
middle("attention_over_sequences_first", lambda n, x: x + n.m(*[x.transpose(0, 1)] * 2, 2 * x.transpose(0, 1))[0].transpose(0, 1), free={4},
       base=Tokens, m=lambda: nn.MultiheadAttention(16, 4))
middle("gru", lambda n, x: n.l(n.r(n.l(x))[0]), free={16}, base=Tokens, l=lambda: nn.Linear(16, 16),
       r=lambda: nn.GRU(16, 16, batch_first=True))
middle("movedim", lambda n, x: n.l(n.b(x).movedim(1, -1)).movedim(-1, 1), free={16}, l=lambda: nn.Linear(16, 16))
middle("narrowed", lambda n, x: n.e(n.b(x).narrow(1, 4, 10)), e=lambda: conv(10, 16))


def twice(y):
    return torch.cat([y, -y], 1).relu()


def product(u, v):
    return u * v.sigmoid()


def halves(y):
    return torch.cat([F.max_pool2d(y[:, :4], 3, 1, 1), F.avg_pool2d(y[:, 4:], 3, 1, 1)], 1)


def shuffle(y, groups):
    batch, channels, height, width = y.shape
    return y.view(batch, groups, channels // groups, height, width).transpose(1, 2).reshape(batch, channels, height, width)


def depth_to_space(y):
    return y.view(-1, 4, 2, 2, 8, 8).permute(0, 1, 4, 2, 5, 3).reshape(-1, 4, 16, 16)


def space_to_depth(y):
    return y.view(-1, 16, 4, 2, 4, 2).permute(0, 3, 5, 1, 2, 4).reshape(-1, 64, 4, 4)


def standardised(n, x):
    weight = F.batch_norm(n.b.weight.reshape(1, 16, -1), None, None, training=True, momentum=0.)
    return F.conv2d(x, weight.reshape(n.b.weight.shape), n.b.bias)


@case(free={16})
class TiedWeights(Net):
    def more(self):
        self.c.weight = self.b.weight

    def middle(self, x):
        return self.c(F.relu(self.b(x)))


@case(free={16})
class TiedFromTheStart(Net):
    def more(self):
        self.d = conv(3, 16, 3)
        self.d.weight = self.a.weight

    def forward(self, x):
        return self.fc(self.b(F.relu(self.a(x)) - self.c(self.d(x))).mean((2, 3)))


@case(free={16})
class FlattenLinear(Net):
    def more(self):
        self.fc = nn.Linear(16 * 64, 5)

    def forward(self, x):
        return self.fc(self.b(F.relu(self.a(x))).flatten(1))


@case(free={16})
class ViewByBatch(FlattenLinear):
    def forward(self, x):
        y = self.b(F.relu(self.a(x)))
        return self.fc(y.view(y.shape[0], -1))


@case(free={16})
class FlattenWithTheImage(Net):
    def more(self):
        self.fc = nn.Linear(19 * 64, 5)

    def forward(self, x):
        return self.fc(torch.cat([self.b(F.relu(self.a(x))), x], 1).flatten(1))


@case(free={16})
class OneByOne(Net):
    def forward(self, x):
        return self.fc(self.b(F.adaptive_avg_pool2d(F.relu(self.a(x)), 1)).flatten(1))


@case(free={8})
class SqueezedToOneChannel(Net):
    def more(self):
        self.a, self.fc = conv(3, 8), nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(F.adaptive_avg_pool2d(self.a(x), 1).squeeze())


@case(free={16})
class BufferNamedMean(Net):
    def more(self):
        self.register_buffer("mean", torch.randn(1, 3, 1, 1))
        self.register_buffer("std", torch.rand(1, 3, 1, 1) + 1)

    def forward(self, x):
        return self.fc(self.a((x - self.mean) / self.std).mean((2, 3)))


@case(free={16})
class ParameterNamedAdd(Net):
    def more(self):
        self.add = nn.Parameter(torch.randn(16, 1, 1))

    def middle(self, x):
        return self.b(x + self.add) + self.add


@case()
class PooledVector(Net):
    def forward(self, x):
        return self.fc(F.max_pool1d(self.b(F.relu(self.a(x))).mean((2, 3)), 3, 1, 1))


@case("irregular")
class Gram(Net):
    def more(self):
        self.fc = nn.Linear(256, 5)

    def forward(self, x):
        y = self.b(F.relu(self.a(x))).flatten(2)
        return self.fc((y @ y.transpose(1, 2)).flatten(1))


@case(free={8})
class TwoSourceGram(Net):
    def more(self):
        self.u, self.v, self.fc = conv(16, 8), conv(16, 8), nn.Linear(64, 5)

    def forward(self, x):
        x = self.a(x)
        return self.fc((self.u(x).flatten(2) @ self.v(x).flatten(2).transpose(1, 2)).flatten(1))


@case()
class MatrixTimesVector(Net):
    def more(self):
        self.v = nn.Parameter(torch.randn(16))

    def forward(self, x):
        y = self.b(F.relu(self.a(x))).mean((2, 3))
        return self.fc(y) * (y @ self.v)[:, None]


# -- in place ---------------------------------------------------------------------------------------------------------


@case(free={16})
class InPlace(Net):
    def middle(self, x):
        y = self.b(x)
        y += x
        return self.c(F.relu(y, inplace=True).mul_(2))


@case()
class InPlaceOnASlice(Net):
    def middle(self, x):
        y = self.b(x)
        y[:, :4] += self.c(x)[:, 4:8]
        return self.c(y)


@case()
class AssignedSlice(Net):
    def middle(self, x):
        y = self.b(x)
        y[:, :4] = self.c(x)[:, 4:8]
        return self.c(y)


@case()
class InPlaceOnAViewOfASlice(Net):
    def middle(self, x):
        y = self.b(x)
        F.relu_(y[:, :8].flatten(2))
        return self.c(y)


@case(free={16})
class InPlaceAfterAView(Net):
    def middle(self, x):
        y = self.b(x)
        z = F.relu(y, inplace=True).flatten(2)
        y.mul_(2)
        return self.c(z.reshape(y.shape) + y)


# -- attention --------------------------------------------------------------------------------------------------------


@case(free={4})
class MultiheadAttention(Tokens):
    def more(self):
        self.l, self.m = nn.Linear(16, 16), nn.MultiheadAttention(16, 4, batch_first=True)

    def middle(self, x):
        x = self.l(x)
        return x + self.m(x, x, x, need_weights=False)[0]


@case(free={4})
class MultiheadAttentionWithWeights(MultiheadAttention):
    def middle(self, x):
        x = self.l(x)
        return x + self.m(x, x, x)[0]


@case(free={4, 8})
class SeparateQueriesAndRotation(Tokens):
    """Matmul attention; q and k are turned in the plane, v has a width of its own."""

    def more(self):
        self.q, self.k, self.v, self.o = (nn.Linear(*io) for io in ((16, 16), (16, 16), (16, 32), (32, 16)))
        self.register_buffer("cos", torch.randn(64, 4))
        self.register_buffer("sin", torch.randn(64, 4))

    def turned(self, x):
        u, v = x.chunk(2, -1)
        return x * self.cos + torch.cat([-v, u], -1) * self.sin

    def attend(self, q, k, v):
        return ((q @ k.transpose(-2, -1)) * 0.5).softmax(-1) @ v

    def middle(self, x):
        q, k, v = (layer(x).reshape(-1, 64, 4, layer.out_features // 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = self.attend(self.turned(q), self.turned(k), v)
        return x + self.o(y.transpose(1, 2).reshape(-1, 64, 32))


@case(free={4, 8})
class SeparateQueriesFused(SeparateQueriesAndRotation):
    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


@case(free={4})
class JointQkv(Tokens):
    def more(self):
        self.qkv, self.o = nn.Linear(16, 48), nn.Linear(16, 16)

    def middle(self, x):
        q, k, v = self.qkv(x).reshape(-1, 64, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return x + self.o(y.transpose(1, 2).reshape(-1, 64, 16))


@case(free={4})
class ChannelAttention(JointQkv):
    def middle(self, x):
        q, k, v = self.qkv(x).reshape(-1, 64, 3, 4, 4).permute(2, 0, 3, 4, 1).unbind(0)
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return x + self.o(y.permute(0, 3, 1, 2).reshape(-1, 64, 16))


@case()
class OneKeyForAllHeads(Tokens):
    def more(self):
        self.q, self.kv, self.o = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 16)

    def middle(self, x):
        q = self.q(x).view(-1, 64, 4, 4).transpose(1, 2)
        k, v = self.kv(x).unsqueeze(1).chunk(2, -1)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 64, 16))


@case()
class GroupedQueries(Tokens):
    def more(self):
        self.q, self.k, self.v, self.o = (nn.Linear(*io) for io in ((16, 32), (16, 16), (16, 16), (32, 16)))

    def middle(self, x):
        q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).reshape(-1, 64, 32))


# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def space_of(name: str):
    torch.manual_seed(0)
    model = CASES[name]()
    network = captured(model, SIZE).network
    return model, network, Space(network)


def plans(space: Space):
    """Random ones, and the narrowest with the first and with the last atoms."""
    ends = [Plan.from_widths(space, space.least, sign * np.arange(space.size)) for sign in (-1, 1)]
    return ends + [random_plan(space, seed, share) for seed, share in enumerate((0.01, 0.2, 0.35, 0.35, 0.6))]


@pytest.mark.parametrize("name", CASES)
def test_graph_is_the_model(name):
    model, network, _ = space_of(name)
    with torch.no_grad():
        torch.testing.assert_close(network(images(network)), model.eval()(images(network)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_cutting_is_zeroing(name):
    _, network, space = space_of(name)
    assert max(error_of_cutting(network, plan, masked=True) for plan in plans(space)) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_macs(name):
    model, network, space = space_of(name)
    plan = random_plan(space)
    assert planned_macs(space, plan.widths) == fvcore_macs(rebuild(network, plan), SIZE)


@pytest.mark.parametrize("name", CASES)
def test_parameters(name):
    _, network, space = space_of(name)
    plan = random_plan(space)
    assert space.parameters.total(plan.widths) == parameter_count(rebuild(network, plan))


@pytest.mark.parametrize("name", REASONS)
def test_the_reason_is_told(name):
    _, _, space = space_of(name)
    assert any(REASONS[name] in frozen.reason for frozen in space.frozen), space.frozen


@pytest.mark.parametrize("name", FREE)
def test_free_channels(name):
    _, _, space = space_of(name)
    assert {group.size for group in space.groups} >= FREE[name]


HEADS = ["attention", "attention_by_hand", "cosine_attention", "one_key_for_all", "einsum_of_activations"]


@pytest.mark.parametrize("name", HEADS)
def test_the_head_dimension_is_cut_when_asked_for(name):
    """And the softmax scale stays: the reference computes the whole network's."""
    _, network, whole = space_of(name)
    space = Space(network, prune_head_dim=True)
    assert space.size > whole.size and not any("head dimension" in frozen.reason for frozen in space.frozen)
    assert max(error_of_cutting(network, plan, masked=True) for plan in plans(space)) < 1e-5


@pytest.mark.parametrize("name", HEADS)
def test_macs_of_cut_heads(name):
    _, network, _ = space_of(name)
    space = Space(network, prune_head_dim=True)
    plan = random_plan(space)
    assert planned_macs(space, plan.widths) == fvcore_macs(rebuild(network, plan), SIZE)


def test_rotary_channels_stay_whole():
    """They come in pairs of one angle, cut or not."""
    _, network, whole = space_of("rotary_attention")
    assert Space(network, prune_head_dim=True).size == whole.size


def test_an_operator_without_a_rule_is_named():
    assert space_of("mystery")[2].unknown == {"s2h_test::mystery": ["mystery"]}


def test_an_operator_without_a_rule_freezes_its_input_alone():
    frozen = space_of("mystery")[2].frozen
    assert [f.layers for f in frozen if "no rule" in f.reason] == [("b",)]


def test_no_channel_to_prune():
    model = nn.Sequential(nn.Conv2d(3, 7, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(UserError, match="no channel of this model can be pruned.*the network's output"):
        Space(captured(model, SIZE).network)


def test_excluded_layers_stay_whole():
    _, network, _ = space_of("squeeze_excite")
    plan = random_plan(Space(network, exclude=("[bc]",)))
    small = rebuild(network, plan)
    assert small.b.weight.shape == network.b.weight.shape and small.c.weight.shape == network.c.weight.shape
    assert small.r.out_channels < network.r.out_channels


def test_excluding_a_stage_of_resnet():
    import timm

    network = captured(timm.create_model("resnet18", num_classes=5), (3, 32, 32)).network
    plan = random_plan(Space(network, exclude=("layer1.*",)))
    small = rebuild(network, plan)
    whole = {name: p.shape for name, p in network.named_parameters()}
    cut = {name: p.shape for name, p in small.named_parameters()}
    assert all(cut[name] == whole[name] for name in whole if name.startswith("layer1."))
    assert cut["layer2.0.conv1.weight"] != whole["layer2.0.conv1.weight"]


def test_a_glob_that_matches_nothing():
    with pytest.raises(UserError, match="matches no layer"):
        Space(space_of("residual")[1], exclude=("layer9.*",))


def test_two_outputs_are_refused():
    class Two(Net):
        def forward(self, x):
            return self.a(x), x

    with pytest.raises(UserError, match="2 outputs"):
        capture(Two(), SIZE)


def test_widths_of_a_random_plan_respect_the_step():
    space = space_of("residual")[2]
    assert (random_plan(space, share=0.0).widths == space.least).all()


def test_kept_channels_keep_their_order():
    _, network, space = space_of("residual")
    plan = random_plan(space)
    kept = np.flatnonzero(plan.kept(space.params["fc.weight"][1]))
    assert torch.equal(rebuild(network, plan).fc.weight, network.fc.weight[:, kept])
