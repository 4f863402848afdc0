"""The networks of Figure 2 and section 4.3: two encoders, the decoder, and the UNet that joins them.

    unet = build_unet("hybrid", width=1, out_channels=3)  # encoder R50+ViT-B/16
    load_encoder_weights(unet.encoder, "R50+ViT-B_16.npz")
    eps_hat = unet(x)              # x: (B, 3, H, W) in [-1, 1], any H and W
    unet.decoder.replace_head(19)  # segmentation: (B, 19, H, W) logits

UNet(encoder) takes any encoder with two tuples, `channels` and `strides` (powers of two up to 32), finest
first. It gets (B, 3, H, W) in [-1, 1], where strides[-1] divides H and W, and returns a map (B, channels[i],
H / strides[i], W / strides[i]) per stride.
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
    """One of ENCODERS, with fresh weights. image_size: see HybridViT."""
    if name == "hybrid":  # PAPER SILENT on the size of its Hybrid-ViT: here R50+ViT-B/16
        return HybridViT(image_size=image_size or 224)
    if name == "hybrid-small":  # for the toy data on a CPU
        return HybridViT(stem=48, widths=(16, 24, 32), units=(1, 2, 2), dim=128, depth=2, heads=4,
                         mlp_dim=256, image_size=image_size or 64)
    if name == "resnet50":
        return ResNet50()
    raise ValueError(f"{name}: expected one of {', '.join(ENCODERS)}")


def build_unet(encoder="hybrid", width=1, out_channels=3, condition_on_gamma=False, image_size=None):
    """A new UNet. Checkpoints store these arguments as "model_args"."""
    return UNet(build_encoder(encoder, image_size), width, out_channels, condition_on_gamma)


def unet_of(checkpoint):
    """The UNet of a checkpoint of stage 2 or 3, with its weights."""
    unet = build_unet(**checkpoint["model_args"])
    unet.load_state_dict(checkpoint["model"])
    return unet


# ---- Encoder 1: Hybrid-ViT (Dosovitskiy et al., 2021)


def same_padding(x, kernel, stride, value=0.0):
    """Pad x as JAX's SAME: ceil(size / stride) outputs, odd rows below, odd columns to the right."""
    rows, columns = (max(kernel - (size % stride or stride), 0) for size in x.shape[-2:])
    if not rows and not columns:
        return x
    top, left = rows // 2, columns // 2
    return F.pad(x, (left, columns - left, top, rows - top), value=value)


class StdConv2d(nn.Conv2d):
    """Convolution with SAME padding and weights standardised per output channel."""

    def forward(self, x):
        std, mean = torch.std_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        weight = (self.weight - mean) / (std + 1e-5)  # epsilon outside the root, as Google's
        return F.conv2d(same_padding(x, self.kernel_size[0], self.stride[0]), weight, self.bias, self.stride)


class GroupNorm(nn.GroupNorm):
    """GroupNorm in its input's dtype, sums in float32. CUDA's autocast returns float32: twice the memory."""

    def forward(self, x):
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def group_norm(channels):
    """GroupNorm with gcd(32, channels) groups, 32 as published, but at least two channels each."""
    groups = math.gcd(32, channels)
    if groups == channels > 1:
        groups //= 2
    return GroupNorm(groups, channels, eps=1e-6)


class ResidualUnit(nn.Module):
    """Bottleneck: 1x1, 3x3 with the stride, 1x1 to 4 * width channels."""

    def __init__(self, in_channels, width, stride=1):
        super().__init__()
        out_channels = 4 * width
        self.conv_proj = None
        if in_channels != out_channels or stride != 1:
            self.conv_proj = StdConv2d(in_channels, out_channels, 1, stride, bias=False)
            self.gn_proj = group_norm(out_channels)
        self.conv1, self.gn1 = StdConv2d(in_channels, width, 1, bias=False), group_norm(width)
        self.conv2, self.gn2 = StdConv2d(width, width, 3, stride, bias=False), group_norm(width)
        self.conv3, self.gn3 = StdConv2d(width, out_channels, 1, bias=False), group_norm(out_channels)
        nn.init.zeros_(self.gn3.weight)  # a fresh unit starts as its shortcut

    def forward(self, x):
        shortcut = x if self.conv_proj is None else self.gn_proj(self.conv_proj(x))
        y = F.relu(self.gn1(self.conv1(x)))
        y = F.relu(self.gn2(self.conv2(y)))
        return F.relu(shortcut + self.gn3(self.conv3(y)))


class TransformerBlock(nn.Module):
    """Tokens (B, N, dim) -> the same, with LayerNorm first."""

    def __init__(self, dim, heads, mlp_dim):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, mlp_dim), nn.Linear(mlp_dim, dim)
        for weight in (self.proj.weight, self.fc1.weight, self.fc2.weight, *self.qkv.weight.chunk(3)):
            nn.init.xavier_uniform_(weight)  # query, key, value: each has its own fan
        for linear in (self.proj, self.fc1, self.fc2, self.qkv):
            nn.init.zeros_(linear.bias)

    def forward(self, x):
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, dim / heads)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.proj(y)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))  # as Google's


class HybridViT(nn.Module):
    """A ResNet to stride 16, then a ViT on its positions. The defaults are Google's R50+ViT-B/16.

    stem: the root convolution's channels. widths, units: bottleneck widths and counts at strides 4, 8, 16.
    image_size: sets the position grid (224: 14x14), interpolated for other sizes.

    forward: (B, 3, H, W) in [-1, 1] -> maps at strides 2, 4, 8 and 16 (after the last LayerNorm).
    PAPER SILENT on the class token: here attended to, then dropped.
    """

    def __init__(self, stem=64, widths=(64, 128, 256), units=(3, 4, 9), dim=768, depth=12, heads=12,
                 mlp_dim=3072, image_size=224):
        super().__init__()
        self.channels, self.strides = (stem, 4 * widths[0], 4 * widths[1], dim), (2, 4, 8, 16)
        self.conv_root, self.gn_root = StdConv2d(3, stem, 7, stride=2, bias=False), group_norm(stem)
        self.block1 = self._block(stem, widths[0], units[0], stride=1)
        self.block2 = self._block(4 * widths[0], widths[1], units[1], stride=2)
        self.block3 = self._block(4 * widths[1], widths[2], units[2], stride=2)
        self.embedding = nn.Conv2d(4 * widths[2], dim, 1)
        self.grid = image_size // 16
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embedding = nn.Parameter(0.02 * torch.randn(1, 1 + self.grid ** 2, dim))  # class token first
        self.transformer = nn.Sequential(*[TransformerBlock(dim, heads, mlp_dim) for _ in range(depth)])
        self.encoder_norm = nn.LayerNorm(dim, eps=1e-6)

    @staticmethod
    def _block(in_channels, width, units, stride):
        block = nn.Sequential()
        for i in range(units):
            block.add_module(f"unit{i + 1}", ResidualUnit(in_channels, width, stride))  # Google's names
            in_channels, stride = 4 * width, 1
        return block

    def forward(self, x):
        stride2 = F.relu(self.gn_root(self.conv_root(x)))  # (B, 64, H/2, W/2)
        y = F.max_pool2d(same_padding(stride2, 3, 2, value=-math.inf), 3, 2)
        stride4 = self.block1(y)  # (B, 256, H/4, W/4)
        stride8 = self.block2(stride4)  # (B, 512, H/8, W/8)
        y = self.embedding(self.block3(stride8))  # (B, 768, H/16, W/16)
        tokens = y.flatten(2).transpose(1, 2)  # (B, N, 768)
        tokens = torch.cat([self.cls.expand(y.shape[0], -1, -1), tokens], dim=1)
        tokens = tokens + self.position(*y.shape[-2:])  # (B, 1 + N, 768)
        tokens = self.encoder_norm(self.transformer(tokens))
        stride16 = tokens[:, 1:].transpose(1, 2).reshape(y.shape).to(y.dtype)
        return stride2, stride4, stride8, stride16

    def position(self, height, width):
        """(1, 1 + height * width, dim), bilinear with aligned corners, like scipy.ndimage.zoom."""
        if (height, width) == (self.grid, self.grid):
            return self.pos_embedding
        cls, grid = self.pos_embedding[:, :1], self.pos_embedding[:, 1:]
        grid = grid.transpose(1, 2).reshape(1, -1, self.grid, self.grid)
        grid = F.interpolate(grid, size=(height, width), mode="bilinear", align_corners=True)
        return torch.cat([cls, grid.flatten(2).transpose(1, 2)], dim=1)


# ---- Encoder 2: ResNet-50 (Table 7)


class ResNet50(nn.Module):
    """torchvision's ResNet-50 (v1.5) without its classifier, under the same names.

    forward: (B, 3, H, W) in [-1, 1] -> maps at strides 2, 4, 8, 16 and 32.
    batch_statistics: PAPER SILENT on BatchNorm in training. False: the stored statistics, which never change.
    True: those of the batch, which fresh weights need.
    """

    def __init__(self):
        super().__init__()
        from torchvision.models import resnet50  # the rest needs torch alone
        self.channels, self.strides = (64, 256, 512, 1024, 2048), (2, 4, 8, 16, 32)
        self.batch_statistics = False
        net = resnet50(weights=None, zero_init_residual=True)
        self.conv1, self.bn1, self.maxpool = net.conv1, net.bn1, net.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = net.layer1, net.layer2, net.layer3, net.layer4
        # torchvision's weights expect ((x + 1) / 2 - mean) / std
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).reshape(2, 3, 1, 1)
        self.register_buffer("shift", 2 * mean - 1, persistent=False)
        self.register_buffer("scale", 2 * std, persistent=False)
        self.train()  # for BatchNorm's mode

    def train(self, mode=True):
        super().train(mode)
        for part in self.modules():
            if isinstance(part, nn.BatchNorm2d) and not self.batch_statistics:
                part.eval()
        return self

    def forward(self, x):
        stride2 = F.relu(self.bn1(self.conv1((x - self.shift) / self.scale)))
        stride4 = self.layer1(self.maxpool(stride2))
        stride8 = self.layer2(stride4)
        stride16 = self.layer3(stride8)
        return stride2, stride4, stride8, stride16, self.layer4(stride16)


# ---- The decoder (Figure 2, section 4.3)


class UpsampledConv2d(nn.Conv2d):
    """Upsample x by 2, concatenate the skip, convolve: (B, I, H, W), (B, S, 2H, 2W) -> (B, O, 2H, 2W).

    These two lines do the same as forward(x, skip):

        x = torch.cat([F.interpolate(x, scale_factor=2), skip], dim=1)
        return F.conv2d(x, self.weight, padding=1)

    They take 36 multiply-adds per position of x and pair of channels, the functions below 9 or 16: stage 2 is
    1.3 to 1.4 times as fast (ResNet-50, one CPU core).
    """

    def __init__(self, in_channels, skip_channels, out_channels, upsample_conv):
        super().__init__(in_channels + skip_channels, out_channels, 3, padding=1, bias=False)
        self.upsample_conv = upsample_conv

    def forward(self, x, skip=None):
        weight_x, weight_skip = self.weight.tensor_split([x.shape[1]], dim=1)
        y = self.upsample_conv(x, weight_x)
        return y if skip is None else y + F.conv2d(skip, weight_skip, padding=1)


def upsample_conv_coarse(x, weight):
    """9 multiply-adds: multiply x by each of the nine taps, then add up what each output sees."""
    taps = weight.permute(2, 3, 0, 1).flatten(0, 2)  # (9 O, I)
    products = F.linear(x.permute(0, 2, 3, 1), taps).unflatten(3, (3, 3, -1))  # (B, H, W, 3, 3, O)
    rows = sum_taps(products, dim=1)  # (B, 2H, W, 3, O)
    return sum_taps(rows, dim=2).permute(0, 3, 1, 2)  # (B, O, 2H, 2W)


def sum_taps(products, dim):
    """A 3-tap convolution along `dim` after upsampling by 2: 2i and 2i + 1 are copies of input i.

    products: of n inputs with the taps before, at and after the centre (dimension 3). Returns 2n sums.
    """
    before, here, after = products.unbind(3)
    n, zero = here.shape[dim], torch.zeros_like(here.narrow(dim, 0, 1))
    even = torch.cat([zero, before], dim).narrow(dim, 0, n) + here + after  # 2i sees i - 1, i, i
    odd = before + here + torch.cat([after, zero], dim).narrow(dim, 1, n)  # 2i + 1 sees i, i, i + 1
    return torch.stack([even, odd], dim + 1).flatten(dim, dim + 1)


def upsample_conv_fine(x, weight):
    """16 multiply-adds: a 4x4 transposed convolution with the sum of four shifted copies of the kernel."""
    kernel = weight.flip(2, 3).transpose(0, 1)  # (I, O, 3, 3)
    kernel = F.pad(kernel, (0, 0, 1, 0)) + F.pad(kernel, (0, 0, 0, 1))  # (I, O, 4, 3)
    kernel = F.pad(kernel, (1, 0)) + F.pad(kernel, (0, 1))  # (I, O, 4, 4)
    return F.conv_transpose2d(x, kernel.contiguous(memory_format=torch.channels_last), stride=2, padding=1)


class DecoderNorm(nn.Module):
    """GroupNorm, which suits small batches. Conditioning (4.4) adds a scale and shift per channel.

    PAPER SILENT on the norm and its conditioning: here linear in gamma's embedding.
    """

    def __init__(self, channels, gamma_dim):
        super().__init__()
        self.norm, self.gamma = group_norm(channels), None
        if gamma_dim:
            self.gamma = nn.Linear(gamma_dim, 2 * channels)
            nn.init.zeros_(self.gamma.weight)  # starts without effect
            nn.init.zeros_(self.gamma.bias)

    def forward(self, x, gamma):  # (B, C, H, W), (B, gamma_dim) or None
        x = self.norm(x)
        if self.gamma is None:
            return x
        scale, shift = self.gamma(gamma)[:, :, None, None].chunk(2, dim=1)
        return x * (1 + scale) + shift


class DecoderBlock(nn.Module):
    """Upsample by 2, concatenate the skip, then 3x3 convolution, norm and ReLU, twice (Figure 2).

    PAPER SILENT on the block; it names TransUNet (Chen et al., 2021). Here TransUNet's, with GroupNorm for
    BatchNorm and nearest for bilinear upsampling.
    """

    def __init__(self, in_channels, skip_channels, out_channels, upsample_conv, gamma_dim=None):
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

    def forward(self, x, skip, gamma=None):
        y = self.conv1(x) if skip is None else self.conv1(x, skip)
        y = F.relu(self.norm1(y, gamma))
        return F.relu(self.norm2(self.conv2(y), gamma))


class UNetDecoder(nn.Module):
    """Blocks of [1024, 512, 256, 128, 64] * width channels from the coarsest map to full size, a 3x3 head.

    channels, strides: the encoder's. width: 1, 2 or 3 in the paper.
    PAPER SILENT on five blocks at the hybrid's stride 16: here the last four upsample.
    PAPER SILENT on the skips: here all maps but the coarsest.

    forward: maps, finest first, and size (H, W) -> (B, out_channels, H, W). gamma: see UNet.
    """

    def __init__(self, channels, strides, width, out_channels, condition_on_gamma):
        super().__init__()
        assert {*strides} <= {1, 2, 4, 8, 16, 32}, strides
        gamma_dim = 256 if condition_on_gamma else None
        self.gamma_mlp = nn.Sequential(nn.Linear(64, 256), nn.SiLU()) if condition_on_gamma else None
        self.strides, self.blocks = strides, nn.ModuleList()
        self.block_strides = [min(stride, strides[-1]) for stride in (16, 8, 4, 2, 1)]
        skips = dict(zip(strides[:-1], channels))
        stride, in_channels = strides[-1], channels[-1]
        for features, end in zip((1024, 512, 256, 128, 64), self.block_strides):
            out, upsample_conv = round(width * features), None
            if end < stride:
                upsample_conv = upsample_conv_coarse if end >= 8 else upsample_conv_fine  # faster on CPUs
            self.blocks.append(DecoderBlock(in_channels, skips.get(end, 0), out, upsample_conv, gamma_dim))
            stride, in_channels = end, out
        self.replace_head(out_channels)

    def replace_head(self, out_channels):
        """Replace the last convolution: 3 channels for denoising, one per class for segmentation."""
        last = self.blocks[-1].conv2
        self.head = nn.Conv2d(last.out_channels, out_channels, 3, padding=1).to(last.weight)

    def forward(self, maps, size, gamma=None):
        y = maps[-1]
        gamma = None if self.gamma_mlp is None else self.embed_gamma(gamma, y)
        skips = dict(zip(self.strides, maps[:-1]))
        for block, stride in zip(self.blocks, self.block_strides):
            y = block(y, skips.get(stride), gamma)
        return self.head(y)[..., :size[0], :size[1]]  # cuts off the padding of UNet.encode

    def embed_gamma(self, gamma, like):
        """The embedding (B, 256) of gamma, see UNet. PAPER SILENT on it."""
        gamma = torch.as_tensor(1.0 if gamma is None else gamma, device=like.device, dtype=torch.float32)
        frequencies = torch.exp(torch.linspace(0, math.log(1000), 32, device=like.device))
        phase = gamma.expand(like.shape[0])[:, None] * frequencies  # (B, 32)
        waves = torch.cat([phase.sin(), phase.cos()], dim=1)
        return self.gamma_mlp(waves.to(self.gamma_mlp[0].weight))


class UNet(nn.Module):
    """Encoder and decoder: (B, 3, H, W) in [-1, 1] -> (B, out_channels, H, W), any H and W.

    gamma: with condition_on_gamma (4.4) the noise level in [0, 1], a float or (B,); None: 1, a clean image.
    """

    def __init__(self, encoder, width=1, out_channels=3, condition_on_gamma=False):
        super().__init__()
        self.encoder = encoder
        self.decoder = UNetDecoder(encoder.channels, encoder.strides, width, out_channels, condition_on_gamma)

    def train(self, mode=True):  # keeps a frozen encoder in eval mode
        super().train(mode)
        if getattr(self.encoder, "frozen", False):
            self.encoder.eval()
        return self

    def encode(self, x):
        """PAPER SILENT on sizes that the coarsest stride does not divide: pad x below and right."""
        stride = self.encoder.strides[-1]
        padding = (0, -x.shape[-1] % stride, 0, -x.shape[-2] % stride)
        return self.encoder(F.pad(x, padding, mode="replicate") if any(padding) else x)

    def forward(self, x, gamma=None):
        return self.decoder(self.encode(x), x.shape[-2:], gamma)


class Classifier(nn.Module):
    """Stage 1: (B, 3, H, W) -> (B, num_classes) logits. PAPER SILENT: linear in the coarsest map's mean."""

    def __init__(self, encoder, num_classes):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.channels[-1], num_classes)

    def forward(self, x):
        return self.head(self.encoder(x)[-1].mean(dim=(2, 3)))


def use_batch_statistics(model, sync):
    """Let a ResNet-50 use the batch's statistics; sync: all processes', on CUDA only (PAPER SILENT)."""
    if isinstance(model.encoder, ResNet50):
        model.encoder.batch_statistics = True
        if sync:
            model.encoder = nn.SyncBatchNorm.convert_sync_batchnorm(model.encoder)


def freeze(encoder):
    """No gradients, and eval mode, so that BatchNorm's statistics stay, too."""
    encoder.frozen = True
    encoder.requires_grad_(False).eval()


# ---- Weights

PUBLISHED = {  # name: (address, first digits of its SHA-256 or None)
    "imagenet21k": ("https://storage.googleapis.com/vit_models/imagenet21k/R50+ViT-B_16.npz", None),
    "imagenet1k": ("https://download.pytorch.org/models/resnet50-0676ba61.pth", "0676ba61"),  # V1
}


def load_encoder_weights(encoder, source):
    """Set every tensor of `encoder`; source: see read_weights. Raises ValueError."""
    state, _ = read_weights(source)
    state = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
    load_weights(encoder, state, source)


def load_weights(model, state, source, fresh=()):
    """Set every tensor of `model`, but names that begin with one of `fresh`. Raises ValueError."""
    ours, theirs = ({k: v for k, v in tensors.items() if not k.startswith(fresh)}
                    for tensors in (model.state_dict(), state))
    shared, missing = ours.keys() & theirs.keys(), ours.keys() - theirs.keys()
    missing = {k for k in missing if not k.endswith("num_batches_tracked")}  # not in older files
    faults = {"missing": missing, "unexpected": theirs.keys() - ours.keys(),
              "of another shape": {k for k in shared if ours[k].shape != theirs[k].shape},
              "not finite": {k for k in shared if not theirs[k].isfinite().all()}}
    found = [f"{len(keys)} {fault} ({', '.join(sorted(keys)[:3])})" for fault, keys in faults.items() if keys]
    if found:
        raise ValueError(f"{source}: does not fit the network: {'; '.join(found)}")
    model.load_state_dict(theirs, strict=False)


def read_weights(source):
    """Read one of PUBLISHED or a file of any known kind: (state, made_with). Raises ValueError.

    state: tensors under our names, "encoder.*" and, from stages 2 and 3, "decoder.*".
    made_with: the arguments of build_unet that the file fixes, and stage 3's class names.
    """
    state = file = read_file(download(source) if source in PUBLISHED else source)
    for wrapper in ("model", "state_dict"):
        if isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    state = {str(k).removeprefix("module."): v for k, v in state.items()}  # DDP's prefix
    state = {k: v for k, v in state.items() if not re.match("(head|fc|fc_norm|pre_logits)[./]", k)}
    if "model_args" in file:  # a checkpoint of ours
        made_with = {**file["model_args"], "class_names": file.get("class_names")}
    else:
        made_with = {"encoder": "hybrid"}
        if "conv_root/kernel" in state:
            state = from_google(state)
        elif "patch_embed.backbone.stem.conv.weight" in state:
            state = from_timm(state)
        elif "layer4.2.conv3.weight" in state:
            made_with = {"encoder": "resnet50"}
        else:
            raise ValueError(f"{source}: unknown weights ({list(state)[:3]} ...); expected ours, Google's "
                             "R50+ViT-B_16.npz, timm's vit_base_r50_s16 or torchvision's ResNet-50")
        state = {f"encoder.{k}": v for k, v in state.items()}
    if "encoder.pos_embedding" in state:  # the grid tells the size
        made_with["image_size"] = 16 * math.isqrt(state["encoder.pos_embedding"].shape[1] - 1)
    return state, made_with


def read_file(path):
    """The dict in a file of torch.save, .npz or .safetensors."""
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file
            return load_file(path)
        if zipfile.is_zipfile(path) and any(n.endswith(".npy") for n in zipfile.ZipFile(path).namelist()):
            import numpy
            return dict(numpy.load(path))
        with torch.serialization.safe_globals([argparse.Namespace]):  # torchvision saves one
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise all kinds
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: cannot be read as weights ({type(error).__name__}: {reason})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a dict of tensors")
    return content


def download(name):
    """The path of one of PUBLISHED, fetched once into torch.hub's cache."""
    address, sha256 = PUBLISHED[name]
    path = f"{torch.hub.get_dir()}/checkpoints/{os.path.basename(address)}"
    if not os.path.exists(path):
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            torch.hub.download_url_to_file(address, path, sha256)
        except (OSError, RuntimeError) as error:  # no network, another hash, no space
            raise ValueError(f"{name}: cannot fetch {address} ({error}); pass the path of a copy") from None
    return path


def from_google(arrays):
    """HybridViT's state dict from the arrays of R50+ViT-B_16.npz.

    Its kernels: (h, w, in, out), (in, out), query, key and value (in, heads, 64), out (heads, 64, dim).
    """
    state = {}
    for name, array in arrays.items():
        value = torch.as_tensor(array)
        if name.endswith(("bias", "scale")):
            value = value.flatten()  # GroupNorm's are (1, 1, 1, C)
        elif name.endswith("out/kernel"):
            value = value.flatten(0, 1).T
        elif name.endswith("kernel"):
            value = value.permute(3, 2, 0, 1) if value.dim() == 4 else value.flatten(1).T
        state[name] = value
    state = rename(state, {
        "Transformer/|posembed_input/|MultiHeadDotProductAttention_1/|MlpBlock_3/": "",
        "encoderblock_": "transformer/", "/out/": "/proj/", "LayerNorm_0": "norm1", "LayerNorm_2": "norm2",
        "Dense_0": "fc1", "Dense_1": "fc2", "kernel|scale": "weight", "/": "."})
    for query in [name for name in state if ".query." in name]:
        parts = [query.replace("query", part) for part in ("query", "key", "value")]
        if {*parts} <= state.keys():
            state[query.replace("query", "qkv")] = torch.cat([state.pop(part) for part in parts])
    return state


def from_timm(tensors):
    """HybridViT's state dict from timm's: only the names differ."""
    return rename(tensors, {
        r"(backbone\..*)norm": r"\1gn", r"^patch_embed\.backbone\.": "", r"^stem\.(conv|gn)": r"\1_root",
        r"downsample\.(conv|gn)": r"\1_proj",
        r"^stages\.(\d+)\.blocks\.(\d+)": lambda m: f"block{int(m[1]) + 1}.unit{int(m[2]) + 1}",
        r"^patch_embed\.proj": "embedding", "^cls_token": "cls", "^pos_embed": "pos_embedding",
        r"^norm\.": "encoder_norm.", r"^blocks\.": "transformer.", r"\.(attn|mlp)\.": "."})


def rename(state, patterns):
    """Apply {regular expression: replacement} to every name, in turn."""
    for pattern, replacement in patterns.items():
        state = {re.sub(pattern, replacement, name): value for name, value in state.items()}
    return state
