"""model.py: the encoders, the decoder and what joins them."""

import copy
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import jax_reference
import model
from model import HybridViT, ResNet50, UNet, build_encoder, build_unet, freeze

HERE = Path(__file__).parent


def tiny_unet(**kwargs):
    torch.manual_seed(0)
    return UNet(build_encoder("hybrid-small"), width=1 / 16, **kwargs)


# ------------------------------------------------------------------------------------------------ Hybrid-ViT


def test_hybrid_vit_has_the_published_size_and_maps():
    with torch.device("meta"):
        encoder = HybridViT()
        maps = encoder(torch.zeros(1, 3, 64, 96))
    assert (sum(p.numel()
                for p in encoder.parameters()) == sum(map(math.prod,
                                                          jax_reference.key_shapes().values())) == 97_890_112)
    assert [tuple(m.shape) for m in maps] == [(1, 64, 32, 48), (1, 256, 16, 24), (1, 512, 8, 12),
                                              (1, 768, 4, 6)]
    assert encoder.channels == (64, 256, 512, 768) and encoder.strides == (2, 4, 8, 16)


def test_same_padding_puts_the_odd_row_below_and_right():
    x = torch.ones(1, 1, 8, 7)
    padded = model.same_padding(x, kernel=7, stride=2,
                                value=5.0)  # 8 -> (2, 3); 7 -> 4 outputs, 6 missing: (3, 3)
    assert padded.shape == (1, 1, 13, 13)
    assert (padded[0, 0] == 1).nonzero().min(0).values.tolist() == [
        2, 3
    ] and (padded[0, 0] == 1).nonzero().max(0).values.tolist() == [9, 9]
    assert model.same_padding(x, 3, 2).shape == (1, 1, 9, 9)  # 8 -> (0, 1); 7 -> (1, 1)


def test_standardised_weights_have_the_epsilon_outside_the_root():
    conv = model.StdConv2d(3, 2, 1)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[1e-5, 0, -1e-5], [1, 2, 3]]).reshape(2, 3, 1, 1))
    columns = conv(torch.eye(3).reshape(3, 3, 1, 1)).flatten(1)  # unit inputs read the weights off
    std = 1e-5 * math.sqrt(2 / 3)
    assert columns[0].tolist() == pytest.approx([1e-5 / (std + 1e-5), -1 / (math.sqrt(2 / 3) + 1e-5)],
                                                rel=1e-4)


@torch.no_grad()
def test_the_position_grid_is_interpolated_as_ndimage_zoom_does():
    encoder = HybridViT(8, (2, 2, 2), (1, 1, 1), dim=8, depth=1, heads=2, mlp_dim=8,
                        image_size=64)  # a 4x4 grid
    grid = encoder.pos_embedding[0, 1:].reshape(4, 4, -1).numpy()
    height, width = 7, 2
    position = encoder.position(height, width)
    assert torch.equal(position[:, 0], encoder.pos_embedding[:, 0])
    for y in range(height):
        for x in range(width):  # corners map to corners
            v, u = y * 3 / (height - 1), x * 3 / (width - 1)
            v0, u0 = min(int(v), 2), min(int(u), 2)
            a, b = v - v0, u - u0
            wanted = (1 - a) * ((1 - b) * grid[v0, u0] + b * grid[v0, u0 + 1]) + a * (
                (1 - b) * grid[v0 + 1, u0] + b * grid[v0 + 1, u0 + 1])
            np.testing.assert_allclose(position[0, 1 + y * width + x].numpy(), wanted, atol=1e-6)
    assert encoder.position(4, 4) is encoder.pos_embedding


# ------------------------------------------------------------------------------------------------ ResNet-50


@torch.no_grad()
def test_resnet50_answers_what_torchvision_answers_to_its_own_preprocessing():
    from torchvision.models import resnet50
    from torchvision.models.feature_extraction import create_feature_extractor

    torch.manual_seed(0)
    reference, encoder = resnet50(weights=None).double().eval(), ResNet50().double().eval()
    encoder.load_state_dict({k: v for k, v in reference.state_dict().items() if not k.startswith("fc.")})
    values = torch.randint(0, 256, (1, 3, 64, 96), generator=torch.Generator().manual_seed(0)).double()
    normalised = (values / 255 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor(
        [0.229, 0.224, 0.225])[:, None, None]
    wanted = create_feature_extractor(reference, ["relu", "layer1", "layer2", "layer3", "layer4"])(normalised)
    for ours, theirs in zip(encoder((values - 127.5) / 127.5), wanted.values()):
        assert torch.linalg.vector_norm(ours - theirs) < 1e-5 * torch.linalg.vector_norm(
            theirs)  # its constants are float32
    assert (sum(p.numel() for p in encoder.parameters()) == 25_557_032 - 2048 * 1000 - 1000
            )  # torchvision's count without its head


def batch_normed(x, batch_norm):
    """(output, gradient of x) of a BatchNorm for the loss sum(y^3)."""
    x = x.clone().requires_grad_()
    y = batch_norm(x)
    y.pow(3).sum().backward()
    return y.detach(), x.grad


def test_a_fresh_resnet50_normalises_by_the_batch_and_a_trained_one_by_what_is_stored():
    torch.manual_seed(0)
    x = torch.randn(6, 3, 64, 64) * 3 + 1
    for batch_statistics in (True, False):
        encoder = ResNet50(batch_statistics).train()
        seen = []
        encoder.bn1.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
        encoder(x)
        (inputs, output), = seen
        wanted = F.batch_norm(inputs, torch.zeros(64), torch.ones(64), training=batch_statistics)
        torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)
        assert (encoder.bn1.running_mean.abs().sum() > 0) == batch_statistics
        encoder.eval()
        before = encoder.bn1.running_mean.clone()
        encoder(x)
        assert torch.equal(encoder.bn1.running_mean, before)


# ------------------------------------------------------------------------------------------------ the decoder


@pytest.mark.parametrize("upsample_conv", [model.upsample_conv_coarse, model.upsample_conv_fine])
def test_upsample_conv_is_nearest_upsampling_and_a_3x3_convolution(upsample_conv):
    x = torch.randn(2, 5, 7, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    ours, theirs = (upsample_conv(x, weight),
                    F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, padding=1))
    torch.testing.assert_close(ours, theirs)
    out = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad(ours, (x, weight), out),
                    torch.autograd.grad(theirs, (x, weight), out)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name, channels, strides, upsampling",
                         [("hybrid", (64, 256, 512, 768), (2, 4, 8, 16), [False, True, True, True, True]),
                          ("resnet50", (64, 256, 512, 1024, 2048), (2, 4, 8, 16, 32), [True] * 5)])
@pytest.mark.parametrize("width", [1, 2, 3])
def test_the_decoder_has_the_papers_five_blocks_and_the_parameters_they_need(name, channels, strides,
                                                                             upsampling, width):
    with torch.device("meta"):
        decoder = model.UNetDecoder(channels, strides, width)
    widths = [c * width for c in (1024, 512, 256, 128, 64)]
    assert [block.conv2.out_channels for block in decoder.blocks] == widths
    assert [block.upsample_conv is not None for block in decoder.blocks] == upsampling
    skips = [0, 512, 256, 64, 0] if name == "hybrid" else [1024, 512, 256, 64, 0]
    count = 3 * widths[-1] * 9 + 3  # the head
    for inputs, skip, out in zip([channels[-1], *widths], skips, widths):
        count += (9 * (inputs + skip) * out + 9 * out * out + 4 * out
                  )  # two bias-free convolutions, two norms of 2 x out
    assert sum(p.numel() for p in decoder.parameters()) == count


@pytest.mark.parametrize("upsample_conv", [model.upsample_conv_coarse, model.upsample_conv_fine])
def test_a_block_is_upsample_concatenate_and_twice_conv_norm_relu(upsample_conv):
    torch.manual_seed(0)
    block = model.DecoderBlock(6, 4, 8, upsample_conv)
    x, skip = torch.randn(2, 6, 5, 3), torch.randn(2, 4, 10, 6)
    y = torch.cat([F.interpolate(x, scale_factor=2, mode="nearest"), skip], dim=1)
    for conv, norm in ((block.conv1, block.norm1.norm), (block.conv2, block.norm2.norm)):
        y = F.relu(F.group_norm(conv(y), 4, norm.weight, norm.bias, 1e-6))
    torch.testing.assert_close(block(x, skip), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (33, 50), (1, 70), (16, 1), (1, 1)])
@torch.no_grad()
def test_the_output_has_the_size_of_the_input_whatever_that_is(size):
    assert tiny_unet(out_channels=5).eval()(torch.randn(2, 3, *size)).shape == (2, 5, *size)
    if size == (33, 50):
        assert UNet(ResNet50(), 1 / 16, 2).eval()(torch.randn(1, 3, *size)).shape == (1, 2, *size)


@pytest.mark.parametrize("size", [(224, 224), (512, 512), (1024, 1024), (1024, 2048), (500, 333)])
@torch.no_grad()
def test_the_full_size_network_takes_the_papers_sizes(size):
    with torch.device("meta"):
        assert build_unet("hybrid", 1, 19)(torch.zeros(1, 3, *size)).shape == (1, 19, *size)


@torch.no_grad()
def test_what_an_image_gets_does_not_depend_on_its_batch():
    unet, x = tiny_unet(), torch.randn(4, 3, 48, 32)
    torch.testing.assert_close(unet(x)[1:2], unet(x[1:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["hybrid", "resnet50"])
def test_the_sizes_at_the_head_of_model_py_are_true(name):
    from torch.utils.flop_counter import FlopCounterMode

    line = next(line for line in model.__doc__.splitlines() if line.split()[:1] == [name])
    said = re.findall(r"([\d,]+) +([\d.]+) G", line)
    assert len(said) == 4

    def measure(module, *inputs):
        with FlopCounterMode(display=False) as counter:
            module(*inputs)
        return f"{sum(p.numel() for p in module.parameters()):,}", f"{counter.get_total_flops() / 2e9:.1f}"

    with torch.device("meta"), torch.no_grad():
        encoder, x = build_encoder(name), torch.zeros(1, 3, 224, 224)
        maps = encoder(x)
        measured = [measure(encoder, x)
                    ] + [measure(UNet(encoder, width).decoder, maps, (224, 224)) for width in (1, 2, 3)]
    assert measured == said


class SomebodysEncoder(nn.Module):
    channels, strides = (8, 24), (4, 8)

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 4, stride=4), nn.Conv2d(8, 24, 2, stride=2)

    def forward(self, x):
        a = self.a(x)
        return a, self.b(a)


def test_any_module_with_channels_and_strides_is_an_encoder():
    unet = UNet(SomebodysEncoder(), width=1 / 16, out_channels=3)
    assert [block.upsample_conv is not None for block in unet.decoder.blocks] == [False, False, True, True, True]
    y = unet(torch.randn(2, 3, 21, 30))
    assert y.shape == (2, 3, 21, 30)
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0
               for p in unet.encoder.parameters())  # the skip is connected


@pytest.mark.parametrize("encoder", ["hybrid-small", "resnet50"])
def test_the_unet_is_exported_once_for_any_batch_height_and_width(encoder):
    unet = build_unet(encoder, 1 / 32, out_channels=5).eval()
    any_size = torch.export.Dim.DYNAMIC
    exported = torch.export.export(unet, (torch.rand(2, 3, 100, 75), ), dynamic_shapes=({0: any_size, 2: any_size,
                                                                                         3: any_size}, )).module()
    for shape in ((2, 3, 100, 75), (1, 3, 224, 224), (3, 3, 64, 64), (1, 3, 37, 301)):
        x = torch.rand(shape) * 2 - 1
        with torch.no_grad():
            torch.testing.assert_close(exported(x), unet(x))


@pytest.mark.parametrize("encoder", ["hybrid-small", "resnet50"])
@pytest.mark.parametrize("bands", [1, 4])
def test_a_network_takes_any_number_of_bands(encoder, bands):
    unet = build_unet(encoder, 1 / 32, out_channels=bands, bands=bands).eval()
    x = torch.rand(1, bands, 50, 40)
    assert unet(x).shape == (1, bands, 50, 40)
    changed = x.clone()
    changed[:, -1] = 0
    assert not torch.equal(unet(x), unet(changed))  # the last band is seen


def test_replacing_the_head_keeps_everything_else():
    unet = tiny_unet()
    before = copy.deepcopy(unet.state_dict())
    unet.decoder.replace_head(19)
    after = unet.state_dict()
    assert unet(torch.randn(1, 3, 32, 32)).shape == (1, 19, 32, 32)
    assert set(before) == set(after)
    assert [k for k in after
            if not torch.equal(after[k], before[k])] == ["decoder.head.weight", "decoder.head.bias"]


def test_a_width_without_channels_is_refused():
    with pytest.raises(ValueError, match="width 0.001"):
        tiny = model.UNetDecoder((8, ), (16, ), width=0.001)
        assert tiny is None


# ------------------------------------------------------------------------------------------------ conditioning (4.4)


def test_a_decoder_without_conditioning_has_no_trace_of_it():
    plain, conditioned = tiny_unet(), tiny_unet(condition_on_gamma=True)
    extra = set(conditioned.state_dict()) - set(plain.state_dict())
    assert (not any("gamma" in name for name in plain.state_dict()) and extra
            and all("gamma" in name for name in extra))


@torch.no_grad()
def test_gamma_enters_the_norms_as_scale_and_shift():
    norm = model.DecoderNorm(8, gamma_dim=2)
    norm.gamma.weight.copy_(torch.arange(32.0).reshape(16, 2) / 10)
    x, gamma = torch.randn(2, 8, 3, 3), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    for i in range(2):
        column = torch.arange(32.0).reshape(16, 2)[:, i] / 10
        wanted = (F.group_norm(x[i:i + 1], 4, eps=1e-6) * (1 + column[:8, None, None]) +
                  column[8:, None, None])
        torch.testing.assert_close(norm(x, gamma)[i:i + 1], wanted)


@torch.no_grad()
def test_each_image_is_conditioned_on_its_own_gamma_and_none_means_clean():
    unet, x = tiny_unet(condition_on_gamma=True), torch.randn(1, 3, 32, 32).expand(3, -1, -1, -1)
    assert torch.equal(unet(x, 0.3), unet(x, 0.9))  # fresh: as if there were none
    for module in unet.modules():
        if isinstance(module, model.DecoderNorm):
            nn.init.normal_(module.gamma.weight)
    y = unet(x, torch.tensor([0.3, 0.9, 1.0]))
    torch.testing.assert_close(y[:1], unet(x[:1], 0.3), rtol=1e-3, atol=1e-4)
    assert (y[0] - y[1]).abs().max() > 1e-2
    torch.testing.assert_close(y[2:], unet(x[:1]), rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------------ freezing


def test_frozen_means_that_no_byte_moves_whatever_is_called():
    unet = UNet(ResNet50(), 1 / 32)  # ResNet-50: its BatchNorm statistics are the trap
    freeze(unet.encoder)
    before = copy.deepcopy(unet.encoder.state_dict())
    unet.train()
    unet.encoder.train()
    unet.encoder.layer1[0].bn1.train()
    optimizer = torch.optim.Adam(unet.parameters(), lr=0.1, weight_decay=0.1)
    decoder_before = unet.decoder.head.weight.clone()
    unet(torch.randn(2, 3, 64, 64)).square().mean().backward()
    optimizer.step()
    assert not any(part.training for part in unet.encoder.modules()) and unet.decoder.training
    assert all(torch.equal(value, before[name]) for name, value in unet.encoder.state_dict().items())
    assert not torch.equal(unet.decoder.head.weight, decoder_before)


# ------------------------------------------------------------------------------------------------ copy and paste


def test_model_py_and_noise_py_work_alone_in_an_empty_folder(tmp_path):
    code = {
        "model": "import torch, model; u = model.build_unet('hybrid-small', 1/16, 3); y = u(torch.zeros(1, 3, 40, 30)); "
        "c = model.build_classifier('hybrid-small', 6); torch.save({'model': c.state_dict(), 'model_args': {}}, 'w.pt'); "
        "model.load_encoder_weights(u.encoder, 'w.pt'); assert torch.equal(u.encoder.cls, c.encoder.cls); "
        "u.decoder.replace_head(4); print(tuple(y.shape), 'torchvision' in __import__('sys').modules)",
        "noise": "import torch, noise; x = torch.zeros(2, 3, 4, 4); e = noise.sample_noise(x.shape, [0, 1]); "
        "print(tuple(noise.scaled_additive_noise(x, e, 0.95).shape), noise.denoising_loss(x, e).item() > 0)"
    }
    for name, wanted in (("model", "(1, 3, 40, 30) False"), ("noise", "(2, 3, 4, 4) True")):
        (tmp_path / name).mkdir()
        shutil.copy(HERE.parent / f"{name}.py", tmp_path / name)
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run([sys.executable, "-c", code[name]], cwd=tmp_path / name, env=environment,
                              capture_output=True, text=True)
        assert done.stdout.strip() == wanted, done.stderr


def test_a_unet_of_plain_arguments_is_the_one_that_they_describe():
    unet = build_unet(encoder="hybrid-small", width=1 / 16, out_channels=4, condition_on_gamma=True, image_size=96)
    state = unet.state_dict()
    assert [block.conv2.out_channels for block in unet.decoder.blocks] == [64, 32, 16, 8, 4]
    assert state["decoder.head.weight"].shape == (4, 4, 3, 3) and state["encoder.conv_root.weight"].shape[0] == 48
    assert state["decoder.gamma_mlp.0.weight"].shape == (256, 64)
    assert state["encoder.pos_embedding"].shape == (1, 1 + 6 * 6, 128)
    assert isinstance(build_unet("resnet50", 1 / 16).encoder, ResNet50)
