"""The networks: two encoders, Hybrid-ViT and ResNet-50, the decoder, and the UNet of both (Figure 2, 4.3).

    unet = build_unet("hybrid", width=1, out_channels=3)  # R50+ViT-B/16, decoder [1024, 512, 256, 128, 64]
    load_encoder_weights(unet.encoder, "R50+ViT-B_16.npz")
    eps_hat = unet(x)                                     # (B, 3, H, W) in [-1, 1] -> (B, 3, H, W), any H, W
    unet.decoder.replace_head(19)                         # segmentation: (B, 19, H, W) logits

AN ENCODER is any module with two tuples, `channels` and `strides` (powers of two up to 32), from fine to
coarse. Its forward takes (B, 3, H, W) in [-1, 1], H and W multiples of strides[-1], and returns a map per
stride: (B, channels[i], H / strides[i], W / strides[i]). UNet(your_encoder) works with any.

IT NEEDS torch; ResNet50 needs torchvision, weights in .npz files numpy, in .safetensors files safetensors.

SIZES: parameters, and multiply-adds for a 224x224 image by torch's counter; decoders with a head of 3.

              encoder             decoder x1          decoder x2           decoder x3
    hybrid    97,890,112  21.5 G  28,947,907  21.2 G  95,570,819   72.6 G  199,868,739  154.2 G
    resnet50  23,508,032   4.1 G  50,181,571  22.6 G  138,038,147  75.4 G  263,569,731  158.4 G
"""
import argparse
import math
import os
import re
import zipfile

import torch
import torch.nn as nn
import torch.nn.functional as F

ENCODERS = ("hybrid", "hybrid-small", "resnet50")


def build_encoder(name, image_size=None):
    """One of ENCODERS with fresh weights. image_size: see HybridViT; None: 224, hybrid-small 64."""
    if name == "hybrid":  # PAPER SILENT on its size: R50+ViT-B/16
        return HybridViT(image_size=image_size or 224)
    if name == "hybrid-small":  # for the toy data on a CPU
        return HybridViT(stem=48, widths=(16, 24, 32), units=(1, 2, 2), dim=128, depth=2, heads=4,
                         mlp_dim=256, image_size=image_size or 64)
    if name == "resnet50":  # Table 7
        return ResNet50()
    raise ValueError(f"no encoder called {name!r}; there are {', '.join(ENCODERS)}")


def build_unet(encoder="hybrid", width=1, out_channels=3, condition_on_gamma=False, image_size=None):
    """A UNet from plain arguments, the "model_args" in the checkpoints of stages 2 and 3."""
    return UNet(build_encoder(encoder, image_size), width, out_channels, condition_on_gamma)


def unet_of(checkpoint):
    """The UNet of a checkpoint of stage 2 or 3, with its weights."""
    unet = build_unet(**checkpoint["model_args"])
    unet.load_state_dict(checkpoint["model"])
    return unet


# ---- Encoder 1: Hybrid-ViT (Dosovitskiy et al., 2021)


def same_padding(x, kernel, stride, value=0.0):
    """JAX's SAME padding: ceil(size / stride) outputs, the odd row below, the odd column right. At even sizes
    7x7/2 pads (2, 3), 3x3/2 (0, 1). Symmetric padding would shift features by half a pixel."""
    total = [max(kernel - (size % stride or stride), 0) for size in x.shape[-2:]]
    top, left = total[0] // 2, total[1] // 2
    return F.pad(x, (left, total[1] - left, top, total[0] - top), value=value) if any(total) else x


class StdConv2d(nn.Conv2d):
    """Convolution without bias, SAME padding, standardised weights: (w - mean) / (std + 1e-5) per output."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1):
        super().__init__(in_channels, out_channels, kernel_size, stride, bias=False)

    def forward(self, x):
        std, mean = torch.std_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        weight = (self.weight - mean) / (std + 1e-5)  # epsilon OUTSIDE the root, population std
        return F.conv2d(same_padding(x, self.kernel_size[0], self.stride[0]), weight, stride=self.stride)


def group_norm(channels):
    """GroupNorm of 32 groups as published; narrow layers have fewer, of at least two channels each."""
    groups = math.gcd(32, channels)
    if groups == channels > 1:
        groups //= 2
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResidualUnit(nn.Module):
    """POST-activation bottleneck: 1x1, 3x3 (which has the stride), 1x1 to 4 * width; ReLU after the sum."""

    def __init__(self, in_channels, width, stride=1):
        super().__init__()
        out_channels = 4 * width
        self.conv_proj = None
        if in_channels != out_channels or stride != 1:
            self.conv_proj = StdConv2d(in_channels, out_channels, 1, stride)
            self.gn_proj = group_norm(out_channels)
        self.conv1, self.gn1 = StdConv2d(in_channels, width, 1), group_norm(width)
        self.conv2, self.gn2 = StdConv2d(width, width, 3, stride), group_norm(width)
        self.conv3, self.gn3 = StdConv2d(width, out_channels, 1), group_norm(out_channels)
        nn.init.zeros_(self.gn3.weight)  # a fresh unit starts as its shortcut

    def forward(self, x):
        shortcut = x if self.conv_proj is None else self.gn_proj(self.conv_proj(x))
        y = F.relu(self.gn1(self.conv1(x)))
        y = F.relu(self.gn2(self.conv2(y)))
        return F.relu(shortcut + self.gn3(self.conv3(y)))


class TransformerBlock(nn.Module):
    """Pre-LayerNorm transformer block on tokens (B, N, dim); GELU is the tanh approximation."""

    def __init__(self, dim, heads, mlp_dim):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.fc1, self.fc2 = nn.Linear(dim, mlp_dim), nn.Linear(mlp_dim, dim)
        query_key_value = self.qkv.weight.chunk(3)  # three matrices, each with its own fan
        for weight in (self.proj.weight, self.fc1.weight, self.fc2.weight, *query_key_value):
            nn.init.xavier_uniform_(weight)
        for linear in (self.proj, self.fc1, self.fc2, self.qkv):
            nn.init.zeros_(linear.bias)

    def forward(self, x):
        batch, tokens, dim = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # three of (B, heads, N, dim / heads)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, dim)
        x = x + self.proj(y)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))


class HybridViT(nn.Module):
    """A ResNet to stride 16, then a ViT on its positions. Without arguments: R50+ViT-B/16, as in JAX.

    stem: channels of the 7x7 root convolution. widths, units: bottleneck width (a quarter of the output
    channels) and number of units of the blocks at strides 4, 8, 16. dim, depth, heads, mlp_dim: of the
    transformer. image_size: what the position grid is made for: 224 -> 14x14. Other H x W interpolate it.

    forward: (B, 3, H, W) in [-1, 1] -> maps at strides 2 (before the max-pool), 4, 8 and 16 (after the last
    LayerNorm). PAPER SILENT on the class token: it takes part in the attention and is then dropped.
    """

    def __init__(self, stem=64, widths=(64, 128, 256), units=(3, 4, 9), dim=768, depth=12, heads=12,
                 mlp_dim=3072, image_size=224):
        super().__init__()
        self.channels, self.strides = (stem, 4 * widths[0], 4 * widths[1], dim), (2, 4, 8, 16)
        self.conv_root, self.gn_root = StdConv2d(3, stem, 7, stride=2), group_norm(stem)
        self.block1 = self._block(stem, widths[0], units[0], stride=1)
        self.block2 = self._block(4 * widths[0], widths[1], units[1], stride=2)
        self.block3 = self._block(4 * widths[1], widths[2], units[2], stride=2)
        self.embedding = nn.Conv2d(4 * widths[2], dim, 1)
        self.grid = image_size // 16
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embedding = nn.Parameter(0.02 * torch.randn(1, 1 + self.grid ** 2, dim))  # class token first
        self.transformer = nn.Sequential(*(TransformerBlock(dim, heads, mlp_dim) for _ in range(depth)))
        self.encoder_norm = nn.LayerNorm(dim, eps=1e-6)

    @staticmethod
    def _block(in_channels, width, units, stride):
        block = nn.Sequential()
        block.add_module("unit1", ResidualUnit(in_channels, width, stride))  # the published names
        for i in range(2, units + 1):
            block.add_module(f"unit{i}", ResidualUnit(4 * width, width))
        return block

    def forward(self, x):                                  # (B, 3, H, W)
        stride2 = F.relu(self.gn_root(self.conv_root(x)))  # (B, 64, H/2, W/2)
        y = F.max_pool2d(same_padding(stride2, 3, 2, value=-math.inf), 3, 2)
        stride4 = self.block1(y)                           # (B, 256, H/4, W/4)
        stride8 = self.block2(stride4)                     # (B, 512, H/8, W/8)
        y = self.embedding(self.block3(stride8))           # (B, 768, H/16, W/16)
        tokens = y.flatten(2).transpose(1, 2)              # (B, N, 768)
        tokens = torch.cat([self.cls.expand(y.shape[0], -1, -1), tokens], dim=1)
        tokens = tokens + self.position(*y.shape[-2:])     # (B, 1 + N, 768)
        tokens = self.encoder_norm(self.transformer(tokens))
        stride16 = tokens[:, 1:].transpose(1, 2).reshape(y.shape)
        return stride2, stride4, stride8, stride16

    def position(self, height, width):
        """(1, 1 + height * width, dim): bilinear, corners on corners, as the original's ndimage.zoom."""
        if (height, width) == (self.grid, self.grid):
            return self.pos_embedding
        cls, grid = self.pos_embedding[:, :1], self.pos_embedding[:, 1:]
        grid = grid.transpose(1, 2).reshape(1, -1, self.grid, self.grid)
        grid = F.interpolate(grid, size=(height, width), mode="bilinear", align_corners=True)
        return torch.cat([cls, grid.flatten(2).transpose(1, 2)], dim=1)


# ---- Encoder 2: ResNet-50 (Table 7)


class ResNet50(nn.Module):
    """torchvision's ResNet-50 (v1.5) without its classifier, under its names, so that its weights load.

    forward: (B, 3, H, W) in [-1, 1] -> maps at strides 2 (after conv1, bn1, ReLU), 4, 8, 16, 32, of 64, 256,
    512, 1024, 2048 channels.

    batch_statistics: what BatchNorm uses in training mode. PAPER SILENT. False: the stored statistics, which
    then never change. True: those of the batch, for fresh weights, whose stored 0 and 1 normalise nothing.
    """

    def __init__(self, batch_statistics=False):
        super().__init__()
        from torchvision.models import resnet50  # here, since the rest of the file needs torch alone
        self.channels, self.strides = (64, 256, 512, 1024, 2048), (2, 4, 8, 16, 32)
        self.batch_statistics = batch_statistics
        net = resnet50(weights=None, zero_init_residual=True)
        self.conv1, self.bn1, self.maxpool = net.conv1, net.bn1, net.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = net.layer1, net.layer2, net.layer3, net.layer4
        # From [-1, 1] to what torchvision's weights expect: ((x + 1) / 2 - mean) / std
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).reshape(2, 3, 1, 1)
        self.register_buffer("shift", 2 * mean - 1, persistent=False)
        self.register_buffer("scale", 2 * std, persistent=False)
        self.train()

    def train(self, mode=True):
        super().train(mode)
        for part in self.modules():
            if isinstance(part, (nn.BatchNorm2d, nn.SyncBatchNorm)):
                part.train(mode and self.batch_statistics)
        return self

    def forward(self, x):
        stride2 = F.relu(self.bn1(self.conv1((x - self.shift) / self.scale)))
        stride4 = self.layer1(self.maxpool(stride2))
        stride8 = self.layer2(stride4)
        stride16 = self.layer3(stride8)
        return stride2, stride4, stride8, stride16, self.layer4(stride16)


# ---- The decoder (Figure 2, section 4.3)


class UpsampledConv2d(nn.Conv2d):
    """A 3x3 convolution of x, upsampled by 2 (nearest), beside a skip: (B, I, H, W), (B, S, 2H, 2W) -> (B, O, 2H, 2W).

    forward(x, skip) is the same function as these two plain lines, which a copy may use instead:

        x = torch.cat([F.interpolate(x, scale_factor=2), skip], dim=1)
        return F.conv2d(x, self.weight, padding=1)

    They take 36 multiply-adds for a position of x and a pair of channels. upsample_conv, one of the two functions
    below, takes 9 or 16; a step of stage 2 is 1.3 to 1.4 times as fast.
    """

    def __init__(self, in_channels, skip_channels, out_channels, upsample_conv):
        super().__init__(in_channels + skip_channels, out_channels, 3, padding=1, bias=False)
        self.upsample_conv = upsample_conv

    def forward(self, x, skip=None):
        weight_x, weight_skip = self.weight.tensor_split([x.shape[1]], dim=1)
        y = self.upsample_conv(x, weight_x)
        return y if skip is None else y + F.conv2d(skip, weight_skip, padding=1)


def upsample_conv_coarse(x, weight):
    """9 multiply-adds: products of x with the nine taps, then sums for the four copies of a position."""
    taps = weight.permute(2, 3, 0, 1).flatten(0, 2)                            # (9 O, I)
    products = F.linear(x.permute(0, 2, 3, 1), taps).unflatten(3, (3, 3, -1))  # (B, H, W, 3, 3, O)
    rows = sum_taps(products.unbind(3), dim=1)                                 # (B, 2H, W, 3, O)
    return sum_taps(rows.unbind(3), dim=2).permute(0, 3, 1, 2)                 # (B, O, 2H, 2W)


def sum_taps(taps, dim):
    """Products of taps -1, 0, 1 with n positions along `dim` -> 2n sums; 2i and 2i + 1 are copies of i."""
    before, here, after = taps
    n, zero = here.shape[dim], torch.zeros_like(here.narrow(dim, 0, 1))
    even = torch.cat([zero, before], dim).narrow(dim, 0, n) + here + after  # 2i sees the copies i - 1, i, i
    odd = before + here + torch.cat([after, zero], dim).narrow(dim, 1, n)   # 2i + 1 sees i, i, i + 1
    return torch.stack([even, odd], dim + 1).flatten(dim, dim + 1)


def upsample_conv_fine(x, weight):
    """16 multiply-adds: ONE 4x4 stride-2 transposed convolution. Its kernel is the 3x3 one, summed over shifts:
    little work where channels are few and positions many."""
    kernel = weight.flip(2, 3).transpose(0, 1)                          # (I, O, 3, 3)
    kernel = F.pad(kernel, (0, 0, 1, 0)) + F.pad(kernel, (0, 0, 0, 1))  # (I, O, 4, 3)
    kernel = F.pad(kernel, (1, 0)) + F.pad(kernel, (0, 1))              # (I, O, 4, 4)
    return F.conv_transpose2d(x, kernel.contiguous(memory_format=torch.channels_last), stride=2, padding=1)


class DecoderNorm(nn.Module):
    """GroupNorm; with conditioning (4.4) then a scale and shift per channel, linear in the embedded gamma.

    PAPER SILENT on both. With GroupNorm an image does not depend on the rest of its (small) batch.
    """

    def __init__(self, channels, gamma_dim=None):
        super().__init__()
        self.norm = group_norm(channels)
        self.gamma = None
        if gamma_dim is not None:
            self.gamma = nn.Linear(gamma_dim, 2 * channels)
            nn.init.zeros_(self.gamma.weight)  # starts as no conditioning at all
            nn.init.zeros_(self.gamma.bias)

    def forward(self, x, gamma=None):  # (B, C, H, W), (B, gamma_dim) or None
        x = self.norm(x)
        if self.gamma is None:
            return x
        scale, shift = self.gamma(gamma)[:, :, None, None].chunk(2, dim=1)
        return x * (1 + scale) + shift


class DecoderBlock(nn.Module):
    """[x2 upsampling] -> [concatenate the skip] -> (3x3 convolution -> norm -> ReLU) twice (Figure 2).

    PAPER SILENT on the block. It is that of TransUNet (Chen et al., 2021), which the paper names, but with
    GroupNorm for BatchNorm and nearest for bilinear upsampling. upsample_conv: see UpsampledConv2d; None: the
    block keeps the size, and has no skip.
    """

    def __init__(self, in_channels, skip_channels, out_channels, upsample_conv=None, gamma_dim=None):
        super().__init__()
        if upsample_conv:
            self.conv1 = UpsampledConv2d(in_channels, skip_channels, out_channels, upsample_conv)
        else:
            self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm1 = DecoderNorm(out_channels, gamma_dim)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = DecoderNorm(out_channels, gamma_dim)
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")

    def forward(self, x, skip=None, gamma=None):
        y = self.conv1(x) if skip is None else self.conv1(x, skip)
        y = F.relu(self.norm1(y, gamma))
        return F.relu(self.norm2(self.conv2(y), gamma))


class UNetDecoder(nn.Module):
    """Blocks of [1024, 512, 256, 128, 64] * width channels, from the coarsest map to full size; 3x3 head.

    channels, strides: the encoder's. width: 1, 2 or 3 in the paper. The last log2(strides[-1]) blocks
    upsample. PAPER SILENT on how five widths meet the hybrid's stride 16 (four upsample), and on the skips:
    every map of the encoder but the coarsest is one.

    forward: maps, fine to coarse; size (H, W) -> (B, out_channels, H, W). gamma: see UNet.
    """

    def __init__(self, channels, strides, width=1, out_channels=3, condition_on_gamma=False):
        super().__init__()
        assert strides[-1] in (1, 2, 4, 8, 16, 32), f"coarsest stride: {strides[-1]}"
        widths = [max(1, round(width * c)) for c in (1024, 512, 256, 128, 64)]
        gamma_dim = 256 if condition_on_gamma else None
        self.gamma_mlp = nn.Sequential(nn.Linear(64, 256), nn.SiLU()) if condition_on_gamma else None
        self.skip_levels, self.blocks = [], nn.ModuleList()  # level: which of the maps is the skip, or None
        stride, in_channels = strides[-1], channels[-1]
        for i, out in enumerate(widths):
            upsample_conv = None
            if i >= 5 - math.log2(strides[-1]):
                upsample_conv = upsample_conv_coarse if i < 2 else upsample_conv_fine  # measured
                stride //= 2
            level = strides.index(stride) if stride in strides[:-1] else None
            skip = 0 if level is None else channels[level]
            self.blocks.append(DecoderBlock(in_channels, skip, out, upsample_conv, gamma_dim))
            self.skip_levels.append(level)
            in_channels = out
        self.replace_head(out_channels)

    def replace_head(self, out_channels):
        """A fresh head (3 outputs: denoising, N: classes); the rest stays."""
        last = self.blocks[-1].conv2
        self.head = nn.Conv2d(last.out_channels, out_channels, 3, padding=1).to(last.weight)

    def forward(self, maps, size, gamma=None):
        y = maps[-1]
        gamma = None if self.gamma_mlp is None else self.embed_gamma(gamma, y)
        for block, skip in zip(self.blocks, self.skip_levels):
            y = block(y, None if skip is None else maps[skip], gamma)
        y = self.head(y)
        return y[..., :size[0], :size[1]]  # without what UNet.encode padded

    def embed_gamma(self, gamma, like):
        """gamma in [0, 1], a float or (B,), or None (1) -> (B, 256)."""
        gamma = torch.as_tensor(1.0 if gamma is None else gamma, device=like.device, dtype=torch.float32)
        frequencies = torch.exp(torch.linspace(0, math.log(1000), 32, device=like.device))
        phase = gamma.expand(like.shape[0])[:, None] * frequencies  # (B, 32)
        return self.gamma_mlp(torch.cat([phase.sin(), phase.cos()], dim=1))


class UNet(nn.Module):
    """encoder + decoder: (B, 3, H, W) in [-1, 1] -> (B, out_channels, H, W), any H and W.

    gamma: the noise level, for condition_on_gamma (4.4): a float or (B,); None means a clean image.
    """

    def __init__(self, encoder, width=1, out_channels=3, condition_on_gamma=False):
        super().__init__()
        self.encoder = encoder
        self.decoder = UNetDecoder(encoder.channels, encoder.strides, width, out_channels, condition_on_gamma)

    def train(self, mode=True):
        super().train(mode)
        if getattr(self.encoder, "frozen", False):
            self.encoder.eval()
        return self

    def encode(self, x):
        """The maps of x, padded (PAPER SILENT) below and right to a multiple of the coarsest stride."""
        stride = self.encoder.strides[-1]
        padding = (0, -x.shape[-1] % stride, 0, -x.shape[-2] % stride)
        return self.encoder(F.pad(x, padding, mode="replicate") if any(padding) else x)

    def forward(self, x, gamma=None):
        return self.decoder(self.encode(x), x.shape[-2:], gamma)


class Classifier(nn.Module):
    """Stage 1: encoder, mean of the coarsest map, linear: (B, 3, H, W) in [-1, 1] -> (B, num_classes).

    PAPER SILENT on the head. The mean works for any encoder; Dosovitskiy et al. read the class token.
    """

    def __init__(self, encoder, num_classes):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.channels[-1], num_classes)

    def forward(self, x):
        return self.head(self.encoder(x)[-1].mean(dim=(2, 3)))


def use_batch_statistics(model, sync):
    """ResNet-50 alone: normalise with the statistics of the batch, as fresh weights need; sync: over all
    processes, on CUDA. PAPER SILENT."""
    if isinstance(model.encoder, ResNet50):
        model.encoder.batch_statistics = True
        if sync:
            model.encoder = nn.SyncBatchNorm.convert_sync_batchnorm(model.encoder)


def freeze(encoder):
    """Freeze the encoder of a UNet for good, and return it: no gradients, and eval mode, which UNet.train keeps.

    requires_grad alone would not do: BatchNorm updates its statistics in training mode.
    """
    encoder.frozen = True
    return encoder.requires_grad_(False).eval()


# ---- Weights

PUBLISHED = {  # name: (address, first digits of its SHA-256 or None)
    "imagenet21k": ("https://storage.googleapis.com/vit_models/imagenet21k/R50+ViT-B_16.npz", None),
    "imagenet1k": ("https://download.pytorch.org/models/resnet50-0676ba61.pth", "0676ba61"),  # V1
}


def load_encoder_weights(encoder, source):
    """Set every tensor of `encoder` from weights of a kind that read_weights knows, or raise ValueError."""
    state, _ = read_weights(source)
    prefix = "encoder."
    state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    load_weights(encoder, state, source)


def load_weights(model, state, source, fresh=()):
    """Set every tensor of `model` but those whose names begin with one of `fresh`, or raise ValueError."""
    ours, theirs = ({name: value for name, value in tensors.items() if not name.startswith(tuple(fresh))}
                    for tensors in (model.state_dict(), state))
    for name in ours.keys() - theirs.keys():
        if name.endswith("num_batches_tracked"):  # older files lack these counters, which nothing reads
            theirs[name] = ours[name]
    shared = ours.keys() & theirs.keys()
    faults = {"missing": ours.keys() - theirs.keys(), "unexpected": theirs.keys() - ours.keys(),
              "of another shape": {name for name in shared if ours[name].shape != theirs[name].shape},
              "not finite": {name for name in shared if not theirs[name].isfinite().all()}}
    found = [f"{len(names)} {fault} ({', '.join(sorted(names)[:3])})" for fault, names in faults.items()
             if names]
    if found:
        raise ValueError(f"{source}: does not fit the network: {'; '.join(found)}")
    model.load_state_dict(theirs, strict=False)


def read_weights(source):
    """(state, made_with) of one of PUBLISHED or of a file, recognised by its content. Raises ValueError.

    state: our names -> tensors, "encoder.*" and, from stages 2 and 3, "decoder.*". made_with: what the file
    decides of the arguments of build_unet, and the class names of stage 3.
    """
    content = read_file(download(source) if source in PUBLISHED else source)
    if "model_args" in content:  # a checkpoint of ours
        made_with = {**content["model_args"], "class_names": content.get("class_names")}
        state = {name: value for name, value in content["model"].items() if not name.startswith("head.")}
    else:
        for wrapper in ("model", "state_dict"):
            content = content[wrapper] if isinstance(content.get(wrapper), dict) else content
        content = {str(name).removeprefix("module."): value for name, value in content.items()}  # of DDP
        if "conv_root/kernel" in content:
            made_with, state = {"encoder": "hybrid"}, from_google(content)
        elif "patch_embed.backbone.stem.conv.weight" in content:
            made_with, state = {"encoder": "hybrid"}, from_timm(content)
        elif "layer4.2.conv3.weight" in content:
            made_with, state = {"encoder": "resnet50"}, {k: v for k, v in content.items() if k[:3] != "fc."}
        else:
            raise ValueError(f"{source}: unknown weights (first keys: {list(content)[:3]}); expected those "
                             "of these scripts, Google's R50+ViT-B_16.npz, timm's vit_base_r50_s16 or "
                             "torchvision's ResNet-50")
        state = {f"encoder.{name}": value for name, value in state.items()}
    if "encoder.pos_embedding" in state:  # the grid of 224 pixels is 14x14, of 384 24x24
        made_with["image_size"] = 16 * math.isqrt(state["encoder.pos_embedding"].shape[1] - 1)
    return state, made_with


def read_file(path):
    """The dict in a file of torch.save, .npz or .safetensors. Raises ValueError."""
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file
            return load_file(path)
        if zipfile.is_zipfile(path) and any(n.endswith(".npy") for n in zipfile.ZipFile(path).namelist()):
            import numpy
            return dict(numpy.load(path))
        with torch.serialization.safe_globals([argparse.Namespace]):  # torchvision's scripts save one
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: cannot be read as weights ({type(error).__name__}: {reason})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a dict of tensors")
    return content


def download(name):
    """The path of one of PUBLISHED, fetched once into torch.hub's cache."""
    address, sha256 = PUBLISHED[name]
    path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(address))
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            torch.hub.download_url_to_file(address, path, sha256)
        except (OSError, RuntimeError) as error:  # no network, or another hash
            raise ValueError(f"{name}: cannot fetch {address} ({error}); pass the path of a copy") from None
    return path


def from_google(arrays):
    """The arrays of R50+ViT-B_16.npz (name -> array) as a state dict of HybridViT.

    Kernels: (h, w, in, out), (in, out), query (in, heads, 64), out (heads, 64, dim). GroupNorm: (1, 1, 1, C).
    """
    renamed = {"Transformer/": "", "posembed_input/": "", "encoderblock_": "transformer/",
               "MultiHeadDotProductAttention_1/": "", "/out/": "/proj/", "LayerNorm_0": "norm1",
               "LayerNorm_2": "norm2", "MlpBlock_3/Dense_0": "fc1", "MlpBlock_3/Dense_1": "fc2",
               "kernel": "weight", "scale": "weight", "/": "."}
    state = {}
    for name, array in arrays.items():
        if name.startswith(("head/", "pre_logits/")):
            continue
        value = torch.as_tensor(array)
        if name.endswith(("bias", "scale")):
            value = value.flatten()
        elif name.endswith("out/kernel"):
            value = value.flatten(0, 1).T
        elif name.endswith("kernel"):
            value = value.permute(3, 2, 0, 1) if value.dim() == 4 else value.flatten(1).T
        for theirs, ours in renamed.items():
            name = name.replace(theirs, ours)
        state[name] = value
    for query in [name for name in state if ".query." in name]:
        parts = [query.replace("query", part) for part in ("query", "key", "value")]
        if all(part in state for part in parts):
            state[query.replace("query", "qkv")] = torch.cat([state.pop(part) for part in parts])
    return state


def from_timm(tensors):
    """timm's names as HybridViT's; the tensors are the same."""
    renamed = {r"(backbone\..*)norm": r"\1gn", r"^patch_embed\.backbone\.": "",
               r"^stem\.(conv|gn)": r"\1_root", r"downsample\.(conv|gn)": r"\1_proj",
               r"^stages\.(\d+)\.blocks\.(\d+)": lambda m: f"block{int(m[1]) + 1}.unit{int(m[2]) + 1}",
               r"^patch_embed\.proj": "embedding", "^cls_token": "cls", "^pos_embed": "pos_embedding",
               r"^norm\.": "encoder_norm.", r"^blocks\.": "transformer.", r"\.(attn|mlp)\.": "."}
    state = {}
    for name, value in tensors.items():
        if name.startswith(("head.", "pre_logits.", "fc_norm.")):
            continue
        for theirs, ours in renamed.items():
            name = re.sub(theirs, ours, name)
        state[name] = value
    return state
