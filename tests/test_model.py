"""model.py: the networks against JAX, torchvision and torch's own operations, and weights of every kind."""
import argparse
import copy
import math
import pickle
import re
import runpy
import sys

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models import resnet50
from torchvision.models.feature_extraction import create_feature_extractor

import jax_reference
import model
import noise
from conftest import DEVICES, ROOT, same_tensors
from model import Classifier, HybridViT, ResNet50, UNet, build_encoder, build_unet, freeze

SMALL = ["hybrid-small", "resnet50"]  # the encoders that a test can afford
on_devices = pytest.mark.parametrize("device", DEVICES)
torch.backends.cudnn.allow_tf32 = False  # references are float32


def tiny(encoder="hybrid-small", **options):
    torch.manual_seed(0)
    return build_unet(encoder, 1 / 32, **options)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Full-size, from a stand-in for Google's file, which is known by its content, not by its name."""
    heads = {name: np.zeros(3, np.float32) for name in ("head/kernel", "head/bias", "pre_logits/bias")}
    path = tmp_path_factory.mktemp("google") / "whatever.bin"
    with open(path, "wb") as file:
        np.savez(file, **jax_reference.make_weights(0), **heads)
    encoder, made_with = HybridViT().eval(), model.read_weights(path)[1]
    assert made_with == {"encoder": "hybrid", "image_size": 224}
    model.load_encoder_weights(encoder, path)
    path.unlink()  # 390 MB
    return encoder


@on_devices
@torch.no_grad()
def test_hybrid_vit_answers_what_the_original_jax_model_answers(published, device):
    """At stride 16 the float32 features of JAX lie 2.65e-5 from the exact ones: no port can come closer."""
    expected = np.load(ROOT / "tests" / "jax_hybrid_vit_b16.npz")
    maps = published.to(device)(torch.from_numpy(jax_reference.make_image(0)).to(device))
    parts = (np.s_[:, ::8, ::7, ::7], np.s_[:, ::8, ::5, ::5], np.s_[:, ::8, ::3, ::3], np.s_[:, ::4])
    for stride, ours, part, limit in zip((2, 4, 8, 16), maps, parts, (1e-6, 4e-6, 1.2e-5, 3e-5)):
        theirs = torch.from_numpy(expected[f"stride{stride}"]).double()
        limit *= torch.linalg.vector_norm(theirs) * (1 if device == "cpu" else 4)
        assert torch.linalg.vector_norm(ours[part].cpu().double() - theirs) <= limit, stride


@torch.no_grad()
def test_the_position_grid_is_interpolated_with_corners_on_corners():
    encoder = HybridViT(8, (2, 2, 2), (1, 1, 1), dim=8, depth=1, heads=2, mlp_dim=8, image_size=64)  # 4x4
    wanted = encoder.pos_embedding[0, 1:].reshape(4, 4, 8).numpy()
    for axis, size in ((0, 7), (1, 2)):  # along one axis, then along the other
        places = np.linspace(0, 3, size)
        wanted = np.apply_along_axis(lambda values: np.interp(places, np.arange(4), values), axis, wanted)
    position = encoder.position(7, 2)
    assert torch.equal(position[:, 0], encoder.pos_embedding[:, 0])
    np.testing.assert_allclose(position[0, 1:].numpy(), wanted.reshape(14, 8), atol=1e-6)


@on_devices
@torch.no_grad()
def test_resnet50_answers_what_torchvision_answers_to_its_own_preprocessing(device):
    torch.manual_seed(0)
    reference, encoder = resnet50(weights=None).double().eval().to(device), ResNet50().double().to(device)
    encoder.load_state_dict({k: v for k, v in reference.state_dict().items() if k[:3] != "fc."})
    values = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.float64, device=device)
    mean, std = values.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).reshape(2, 3, 1, 1)
    names = ["relu", "layer1", "layer2", "layer3", "layer4"]
    wanted = create_feature_extractor(reference, names)((values / 255 - mean) / std).values()
    for ours, theirs in zip(encoder((values - 127.5) / 127.5), wanted, strict=True):
        assert torch.linalg.vector_norm(ours - theirs) < 1e-5 * torch.linalg.vector_norm(theirs)


@pytest.mark.parametrize("name, encoder_count, channels, skips", [
    ("hybrid", sum(map(math.prod, jax_reference.key_shapes().values())), 768, (0, 512, 256, 64, 0)),
    ("resnet50", 25_557_032 - 2048 * 1000 - 1000, 2048, (1024, 512, 256, 64, 0))])  # torchvision's but fc
def test_the_networks_have_the_sizes_of_the_paper(name, encoder_count, channels, skips):
    with torch.device("meta"):
        encoder = build_encoder(name)
        assert sum(p.numel() for p in encoder.parameters()) == encoder_count
        for width in (1, 2, 3):
            outs = [c * width for c in (1024, 512, 256, 128, 64)]
            blocks = zip([channels, *outs], skips, outs)  # of two bias-free convolutions and two norms
            count = sum(9 * (i + s) * o + 9 * o * o + 4 * o for i, s, o in blocks) + 3 * outs[-1] * 9 + 3
            assert sum(p.numel() for p in UNet(encoder, width).decoder.parameters()) == count


@on_devices
@pytest.mark.parametrize("size", [(7, 4), (1, 1), (1, 6)])
@pytest.mark.parametrize("upsample_conv", [model.upsample_conv_coarse, model.upsample_conv_fine])
def test_upsample_conv_is_nearest_upsampling_and_a_3x3_convolution(upsample_conv, size, device):
    x = torch.randn(2, 5, *size, dtype=torch.float64, requires_grad=True, device=device)
    weight = torch.randn(6, 5, 3, 3, dtype=torch.float64, requires_grad=True, device=device)
    ours = upsample_conv(x, weight)
    theirs = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, padding=1)
    torch.testing.assert_close(ours, theirs)
    out = torch.randn_like(ours)
    torch.testing.assert_close(*(torch.autograd.grad(y, (x, weight), out) for y in (ours, theirs)))


@pytest.mark.parametrize("upsample_conv", [model.upsample_conv_coarse, model.upsample_conv_fine])
def test_a_block_is_upsample_concatenate_and_twice_conv_norm_relu(upsample_conv):
    block = model.DecoderBlock(6, 4, 8, upsample_conv)
    x, skip = torch.randn(2, 6, 5, 3), torch.randn(2, 4, 10, 6)
    y = torch.cat([F.interpolate(x, scale_factor=2, mode="nearest"), skip], dim=1)
    for conv in (block.conv1, block.conv2):
        y = F.relu(F.group_norm(F.conv2d(y, conv.weight, padding=1), 4, eps=1e-6))
    torch.testing.assert_close(block(x, skip), y, rtol=1e-4, atol=1e-5)


@on_devices
@pytest.mark.parametrize("encoder", SMALL)
@torch.no_grad()
def test_the_output_has_the_size_of_the_input_and_does_not_depend_on_the_batch(encoder, device):
    unet = tiny(encoder, out_channels=5).to(device)
    for size in ((64, 64), (33, 50), (1, 70), (16, 1), (1, 1)):
        x = torch.randn(2, 3, *size, device=device)
        y = unet(x)
        assert y.shape == (2, 5, *size)
        torch.testing.assert_close(unet(x[1:]), y[1:], rtol=1e-3, atol=1e-4)


@on_devices
@torch.no_grad()
def test_conditioning_starts_as_none_then_follows_each_images_gamma(device):
    plain, unet = tiny().to(device), tiny(condition_on_gamma=True).to(device)
    extra = unet.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert extra and all("gamma" in name for name in extra)
    x = torch.randn(1, 3, 32, 32, device=device).expand(3, -1, -1, -1)
    torch.testing.assert_close(unet(x, 0.3), plain(x))
    for module in unet.modules():
        if isinstance(module, model.DecoderNorm):
            nn.init.normal_(module.gamma.weight)
    y = unet(x, torch.tensor([0.3, 0.9, 1.0], device=device))
    alone = torch.cat([unet(x[:1], gamma) for gamma in (0.3, 0.9, None)])  # None: a clean image
    torch.testing.assert_close(y, alone, rtol=1e-3, atol=1e-4)
    assert (y[0] - y[1]).abs().max() > 1e-2 and (y[1] - y[2]).abs().max() > 1e-2


@on_devices
@pytest.mark.parametrize("encoder", SMALL)
def test_a_frozen_encoder_keeps_every_byte_and_has_no_gradients(encoder, device):
    unet = tiny(encoder).to(device)
    freeze(unet.encoder)
    unet = pickle.loads(pickle.dumps(copy.deepcopy(unet)))  # as for a running mean of its weights
    before, head = copy.deepcopy(unet.encoder.state_dict()), unet.decoder.head.weight.clone()
    model.use_batch_statistics(unet, sync=False)  # BatchNorm's statistics are the trap
    nn.Sequential(unet.eval()).train()
    optimizer = torch.optim.Adam(unet.parameters(), lr=0.1, weight_decay=0.1)
    unet(torch.randn(2, 3, 64, 64, device=device)).square().mean().backward()
    optimizer.step()
    assert not any(part.training for part in unet.encoder.modules()) and unet.decoder.training
    assert not any(p.requires_grad or p.grad is not None for p in unet.encoder.parameters())
    assert same_tensors(unet.encoder.state_dict(), before)
    assert not torch.equal(unet.decoder.head.weight, head)


@torch.no_grad()
def test_the_unet_is_exported_at_a_fixed_size():
    unet, x = tiny().eval(), torch.rand(1, 3, 50, 64)
    torch.testing.assert_close(torch.export.export(unet, (x,)).module()(x), unet(x))


def test_model_py_and_noise_py_need_torch_alone(monkeypatch):
    for name in ("torchvision", "numpy", "PIL", "tqdm", *(path.stem for path in ROOT.glob("*.py"))):
        monkeypatch.setitem(sys.modules, name, None)
    theirs, noise = (runpy.run_path(str(ROOT / name)) for name in ("model.py", "noise.py"))
    eps = noise["sample_noise"]((1, 3, 20, 30), [0])
    assert noise["denoising_loss"](theirs["build_unet"]("hybrid-small", 1 / 32)(eps), eps) > 0


def as_timm(state):
    """HybridViT's tensors under timm's names."""
    renamed = {r"block(\d)\.unit(\d+)": lambda m: f"stages.{int(m[1]) - 1}.blocks.{int(m[2]) - 1}",
               r"(conv|gn)_proj": r"downsample.\1", r"(conv|gn)_root": r"stem.\1", r"\bgn": "norm",
               r"^(stem|stages)": r"patch_embed.backbone.\1", "^embedding": "patch_embed.proj",
               r"^(transformer\.\d+\.)(qkv|proj)": r"\1attn.\2", r"^(transformer\.\d+\.)fc": r"\1mlp.fc",
               "^transformer": "blocks", "^cls": "cls_token", "^pos_.*": "pos_embed", "^encoder_norm": "norm"}
    for ours, theirs in renamed.items():
        state = {re.sub(ours, theirs, name): value for name, value in state.items()}
    return state


UNET = {"encoder": "hybrid-small", "width": 1 / 32, "out_channels": 3, "image_size": 384}  # its grid: 24x24
KINDS = ["torchvision", "stage 1", "stage 2", "timm", "timm in model", "timm in state_dict", "timm of DDP",
         "timm and Namespace", "timm.safetensors", "model and model_ema", "state_dict and state_dict_ema"]


def write(kind, path):
    """Write a file of random weights -> (the encoder's state, what it decides of the network)."""
    torch.manual_seed(1)
    net = {"torchvision": resnet50, "stage 2": lambda: build_unet(**UNET)}.get(
        kind, lambda: Classifier(build_encoder("hybrid-small", 384), 6))()
    state = {k: nn.init.normal_(v) if v.is_floating_point() else v for k, v in net.state_dict().items()}
    if kind == "torchvision":
        torch.save({k: v for k, v in state.items() if "num_batches" not in k}, path)  # as older files
        return {k: v for k, v in state.items() if k[:3] != "fc."}, {"encoder": "resnet50"}
    made_with = {"stage 1": {"encoder": "hybrid-small"}, "stage 2": UNET}.get(kind, {"encoder": "hybrid"})
    timm = {**as_timm(net.encoder.state_dict()), "head.weight": torch.zeros(5, 128)}
    contents = {"timm": timm, "timm in model": {"model": timm, "epoch": 3},
                "timm in state_dict": {"state_dict": timm},
                "timm of DDP": {f"module.{name}": value for name, value in timm.items()},
                "timm and Namespace": {"model": timm, "args": argparse.Namespace(lr=0.1)},
                **{f"{name} and {name}_ema": {f"{name}_ema": {k: v + 1 for k, v in timm.items()}, name: timm}
                   for name in ("model", "state_dict")}}
    if kind == "timm.safetensors":
        pytest.importorskip("safetensors.torch").save_file(timm, path)
    else:
        torch.save(contents.get(kind, {"model": state, "model_args": made_with, "step": 3}), path)
    return net.encoder.state_dict(), {"image_size": 384, **made_with}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_every_kind_are_taken_whole_and_of_two_in_a_file_the_raw_ones(kind, tmp_path):
    path = tmp_path / kind
    state, made_with = write(kind, path)
    assert model.read_weights(str(path))[1].items() >= made_with.items()
    encoder = build_encoder(SMALL[kind == "torchvision"], made_with.get("image_size"))
    model.load_encoder_weights(encoder, str(path))
    assert same_tensors(encoder.state_dict(), state)


@pytest.mark.parametrize("spoil", [
    lambda state: state.pop("encoder.cls"), lambda state: state.update({"encoder.more": torch.zeros(1)}),
    lambda state: state.update({"encoder.cls": torch.zeros(128)}),
    lambda state: state["encoder.cls"][..., 5].fill_(math.nan)])
def test_weights_that_do_not_fit_are_refused_and_change_no_tensor(spoil, tmp_path):
    path, unet = tmp_path / "last.pt", tiny(image_size=384)
    write("stage 2", path)
    content, before = torch.load(path), copy.deepcopy(unet.state_dict())
    spoil(content["model"])
    torch.save(content, path)
    with pytest.raises(ValueError, match="last.pt"):
        model.load_encoder_weights(unet.encoder, path)
    with pytest.raises(ValueError, match="last.pt"):
        model.load_weights(unet, content["model"], path)
    assert same_tensors(unet.state_dict(), before)


@pytest.mark.parametrize("spoil", [
    lambda p: p.unlink(), lambda p: (p.unlink(), p.mkdir()), lambda p: p.write_bytes(p.read_bytes()[:-999]),
    lambda p: p.write_text("<html>"), lambda p: p.write_bytes(pickle.dumps({"a": [1]}, protocol=2)),
    lambda p: torch.save([1, 2], p), lambda p: torch.save({"a": torch.zeros(1)}, p),
    lambda p: torch.save(nn.Linear(1, 1), p), lambda p: p.write_bytes(b"")])
@pytest.mark.parametrize("name", ["a.pt", "a.npz", "a.safetensors"])
def test_what_cannot_be_read_as_weights_is_named_in_one_line(spoil, name, tmp_path):
    path = tmp_path / name
    write("stage 1", path)
    spoil(path)
    with pytest.raises(ValueError) as caught:
        model.read_weights(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_published_weights_are_fetched_once(tmp_path, monkeypatch):
    there = tmp_path / "there.pth"
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setitem(model.PUBLISHED, "imagenet1k", (there.as_uri(), None))
    with pytest.raises(ValueError, match="there.pth"):  # as without a network
        model.read_weights("imagenet1k")
    write("stage 1", there)
    assert model.read_weights("imagenet1k")
    there.unlink()
    assert model.read_weights("imagenet1k")[1]["encoder"] == "hybrid-small"


def cuda_autocast(dtype):
    return torch.autocast("cuda", dtype, enabled=dtype != torch.float32)


@pytest.mark.parametrize("name, condition", [("hybrid-small", True), ("resnet50", False)])
def test_on_a_gpu_no_tensor_lies_elsewhere_and_maps_have_the_dtype_of_autocast(name, condition, fake_cuda):
    network, x, gamma = build_unet(name, 1, 5, condition), torch.rand(2, 3, 96, 64), torch.rand(2)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with cuda_autocast(dtype):
            maps = network.encode(x)
            logits = network.decoder(maps, (96, 64), gamma)
        assert {(tensor.dtype, tensor.device.type) for tensor in (*maps, logits)} == {(dtype, "cuda")}


def test_in_bf16_stage_2_keeps_half_the_memory_of_fp32(fake_cuda):
    network, x = build_unet("hybrid"), torch.rand(16, 3, 224, 224)
    freeze(network.encoder)
    weights = {parameter.untyped_storage()._cdata for parameter in network.parameters()}

    def kept(dtype):
        tensors = {}  # by their storage

        def keep(tensor):
            tensors[tensor.untyped_storage()._cdata] = tensor
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), cuda_autocast(dtype):
            noise.denoising_loss(network(x), x)
        return sum(tensor.untyped_storage().nbytes() for at, tensor in tensors.items() if at not in weights)
    assert 0.4 < kept(torch.bfloat16) / kept(torch.float32) < 0.55
