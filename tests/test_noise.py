"""noise.py: equations 1 to 6 by hand, and what the noise of an image depends on."""
import math

import pytest
import torch

import noise
from conftest import DEVICES

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def batch(dtype=torch.float64):  # images and noise
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 4, 3, 8, 6, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("gamma, sigma", [(0.95, 0.2294), (0.90, 0.3333), (0.6098, 0.8)])
def test_gamma_and_sigma_are_the_papers_pairs_and_two_ways_to_write_one_noise(gamma, sigma):
    assert noise.sigma_to_gamma(sigma) == pytest.approx(gamma, abs=1e-4)
    x, eps = batch()
    simple = noise.simple_additive_noise(x, eps, sigma) / math.sqrt(1 + sigma ** 2)
    torch.testing.assert_close(noise.scaled_additive_noise(x, eps, noise.sigma_to_gamma(sigma)), simple)
    assert noise.sigma_to_gamma(torch.tensor([0.0, 1.0, 2.0])).tolist() == pytest.approx([1, 0.5, 0.2])


def test_equations_1_and_5_by_hand():
    x, eps = torch.full((1, 1, 1, 2), 0.5), torch.tensor([[[[2.0, -1.0]]]])
    assert noise.simple_additive_noise(x, eps, 0.25).flatten().tolist() == [1.0, 0.25]
    scaled = noise.scaled_additive_noise(x, eps, 0.36).flatten().tolist()
    assert scaled == pytest.approx([0.6 * 0.5 + 0.8 * 2, 0.6 * 0.5 - 0.8])


@pytest.mark.parametrize("device", DEVICES)
def test_a_gamma_or_sigma_per_image_is_that_images_own_and_removing_its_noise_gives_it_back(device):
    x, eps = batch().to(device)
    values = torch.tensor([0.0, 0.3, 0.95, 1.0], dtype=torch.float64)  # on the CPU, as sample_gamma gives it
    scaled, simple = (f(x, eps, values) for f in (noise.scaled_additive_noise, noise.simple_additive_noise))
    for i, v in enumerate(values.tolist()):
        torch.testing.assert_close(scaled[i], math.sqrt(v) * x[i] + math.sqrt(1 - v) * eps[i])
        torch.testing.assert_close(simple[i], x[i] + v * eps[i])
    torch.testing.assert_close(noise.remove_noise(scaled[1:], eps[1:], values[1:]), x[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value, per_image", [(0.95, False), (0.999, False), (0.999, True)])
def test_every_float_dtype_is_kept_and_right_to_its_precision(dtype, value, per_image):
    """In bf16 1 - 0.999 would be 0: the noise would be lost."""
    x, eps = batch(dtype)
    gamma = torch.full((4,), value, dtype=torch.float64) if per_image else value
    noisy, finest = noise.scaled_additive_noise(x, eps, gamma), torch.finfo(dtype).eps
    wanted = math.sqrt(value) * x.double() + math.sqrt(1 - value) * eps.double()
    assert ((noisy.double() - wanted).abs() <= finest * (wanted.abs() + 3 * eps.double().abs())).all()
    assert noisy.dtype == dtype
    assert noise.simple_additive_noise(x, eps, 0.8).dtype == noise.remove_noise(x, eps, gamma).dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_loss_is_the_mean_of_squares_in_float32(dtype):
    prediction = torch.tensor([1.0, 2.0, 3.0, 256.0], dtype=dtype).reshape(1, 1, 2, 2)
    target = torch.tensor([0.0, 4.0, 3.0, -1.0], dtype=dtype).reshape(1, 1, 2, 2)
    loss = noise.denoising_loss(prediction, target)
    assert loss.dtype == torch.float32
    assert loss.item() == (1 + 4 + 0 + 257 ** 2) / 4  # 257 is no bf16, 66049 beyond fp16


@pytest.mark.parametrize("device", DEVICES)
def test_an_images_noise_depends_on_its_seed_and_on_nothing_else(device):
    together = noise.sample_noise((3, 3, 5, 7), [11, 12, 13], device)
    torch.manual_seed(99)
    assert torch.equal(noise.sample_noise((2, 3, 5, 7), torch.tensor([13, 11]), device), together[[2, 0]])
    assert not torch.equal(together[0], together[1])
    many = noise.sample_noise((32, 3, 64, 64), range(32), device)
    assert many.dtype == torch.float32 and many.device.type == device
    assert many.mean().abs() < 0.01 and abs(many.std() - 1) < 0.01


def test_gamma_is_drawn_uniformly_in_its_range_by_seed_and_independently_of_the_noise():
    gammas = noise.sample_gamma(0.9, 0.95, range(2000)).double()
    assert gammas.shape == (2000,) and 0.9 <= gammas.min() < 0.901 and 0.949 < gammas.max() <= 0.95
    shares = torch.histc((gammas - 0.9) / 0.05, bins=4, min=0, max=1) / 2000
    assert shares.tolist() == pytest.approx([0.25] * 4, abs=0.04)
    assert noise.sample_gamma(0.9, 0.95, [5])[0] == gammas[5]
    seeds = range(0, 10 ** 6, 500)
    for other in (noise.sample_noise((2000, 1, 1, 1), seeds).flatten(), torch.stack(
            [torch.rand((), generator=torch.Generator().manual_seed(seed)) for seed in seeds])):
        assert abs(torch.corrcoef(torch.stack([noise.sample_gamma(0, 1, seeds), other]))[0, 1]) < 0.09
