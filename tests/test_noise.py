"""noise.py: equations 1 to 6."""

import math
import re

import pytest
import torch

import noise


def batch(dtype=torch.float32):
    x = torch.randn(4, 3, 8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    eps = torch.randn(4, 3, 8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.to(dtype), eps.to(dtype)


def test_gamma_and_sigma_are_the_papers_pairs():
    assert noise.gamma_to_sigma(0.95) == pytest.approx(0.22942, abs=1e-5)
    assert noise.sigma_to_gamma(0.8) == pytest.approx(1 / 1.64)
    assert math.sqrt(1 - 0.95) == pytest.approx(0.2236, abs=1e-4)  # the paper's "0.22"
    for sigma in (0.0, 0.22, 0.8, 7.0):
        assert noise.gamma_to_sigma(noise.sigma_to_gamma(sigma)) == pytest.approx(sigma)
    assert torch.allclose(noise.gamma_to_sigma(torch.tensor([0.5, 1.0])), torch.tensor([1.0, 0.0]))


def test_the_table_in_the_header_is_right():
    rows = re.findall(r"^    (0\.\d+) +(0\.\d+) +(0\.\d+)", noise.__doc__, re.M)
    assert len(rows) == 3
    for gamma, sigma, root in (map(float, row) for row in rows):
        assert sigma == pytest.approx(math.sqrt(1 / gamma - 1), abs=1e-4) and root == pytest.approx(
            math.sqrt(1 - gamma), abs=1e-4)


def test_equation_1_by_hand():
    x, eps = torch.full((1, 1, 1, 2), 0.5), torch.tensor([[[[2.0, -1.0]]]])
    assert noise.simple_additive_noise(x, eps, 0.25).flatten().tolist() == [1.0, 0.25]


def test_equation_5_by_hand():
    x, eps = torch.full((1, 1, 1, 2), 0.5), torch.tensor([[[[2.0, -1.0]]]])
    assert noise.scaled_additive_noise(x, eps,
                                       0.36).flatten().tolist() == pytest.approx([0.3 + 1.6, 0.3 - 0.8])


def test_the_two_forms_of_equation_5_agree():
    x, eps = batch(torch.float64)
    for gamma in (0.95, 0.5, 0.1):
        sigma = noise.gamma_to_sigma(gamma)
        torch.testing.assert_close(noise.scaled_additive_noise(x, eps, gamma),
                                   noise.simple_additive_noise(x, eps, sigma) / math.sqrt(1 + sigma**2))


def test_a_gamma_per_image_is_that_images_gamma():
    x, eps = batch()
    gammas = torch.tensor([0.0, 0.3, 0.95, 1.0])
    together = noise.scaled_additive_noise(x, eps, gammas)
    for i, gamma in enumerate(gammas.tolist()):
        torch.testing.assert_close(together[i:i + 1],
                                   noise.scaled_additive_noise(x[i:i + 1], eps[i:i + 1], gamma))
    assert torch.equal(together[0], eps[0]) and torch.equal(together[3], x[3])  # pure noise, clean image
    sigmas = torch.tensor([0.0, 0.3, 0.95, 2.0])
    torch.testing.assert_close(noise.simple_additive_noise(x, eps, sigmas)[2], x[2] + 0.95 * eps[2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_float_dtype_stays_itself_and_is_right_to_its_precision(dtype):
    x, eps = batch(dtype)
    wanted = math.sqrt(0.95) * x.double() + math.sqrt(0.05) * eps.double()
    for gamma in (0.95, torch.full((4, ), 0.95, dtype=torch.float64)):
        noisy = noise.scaled_additive_noise(x, eps, gamma)
        assert noisy.dtype == dtype
        assert (noisy.double() - wanted).abs().max() <= 4 * torch.finfo(dtype).eps * 4
    assert noise.simple_additive_noise(x, eps, 0.8).dtype == dtype
    assert noise.denoising_loss(x, eps).dtype == torch.float32


def test_unit_variance_stays_unit_variance():
    generator = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 64, 3, 50, 50, generator=generator)
    for gamma in (0.95, 0.5, 0.05):
        assert noise.scaled_additive_noise(x, eps, gamma).var().item() == pytest.approx(1, abs=0.01)


def test_the_loss_is_the_squared_norm_divided_by_the_number_of_elements():
    x, eps = batch()
    norms = [torch.linalg.vector_norm(x[i] - eps[i]).item()**2 for i in range(4)]
    assert noise.denoising_loss(x, eps).item() == pytest.approx(sum(norms) / 4 / (3 * 8 * 6), rel=1e-5)
    assert noise.denoising_loss(torch.zeros(64, 3, 50, 50), noise.sample_noise(
        (64, 3, 50, 50), range(64))).item() == pytest.approx(1, abs=0.01)


def test_removing_the_true_noise_gives_the_image_back():
    x, eps = batch(torch.float64)
    gamma = torch.tensor([0.9, 0.5, 0.1, 1.0], dtype=torch.float64)
    torch.testing.assert_close(noise.remove_noise(noise.scaled_additive_noise(x, eps, gamma), eps, gamma), x)


def test_an_images_noise_depends_on_its_seed_and_on_nothing_else():
    together = noise.sample_noise((3, 3, 5, 7), [11, 12, 13])
    torch.manual_seed(99)
    assert torch.equal(noise.sample_noise((2, 3, 5, 7), torch.tensor([13, 11])), together[[2, 0]])
    assert not torch.equal(together[0], together[1])
    many = noise.sample_noise((32, 3, 64, 64), range(32))
    assert many.mean().abs() < 0.01 and abs(many.std() - 1) < 0.01


def test_gamma_is_drawn_uniformly_between_its_bounds():
    gammas = noise.sample_gamma(0.9, 0.95, range(2000))
    assert gammas.shape == (2000, ) and 0.9 <= gammas.min() < 0.901 and 0.949 < gammas.max() <= 0.95
    assert gammas.mean().item() == pytest.approx(0.925, abs=0.001)
    assert torch.equal(noise.sample_gamma(0.9, 0.95, [5]), gammas[5:6])
    assert noise.sample_gamma(0, 1, range(2000)).std().item() == pytest.approx(math.sqrt(1 / 12), abs=0.01)


@pytest.mark.parametrize("call", [
    lambda x: noise.scaled_additive_noise(x, x, 1.5), lambda x: noise.scaled_additive_noise(x, x, -0.1),
    lambda x: noise.scaled_additive_noise(x, x, torch.tensor([0.5, float("nan")])),
    lambda x: noise.gamma_to_sigma(0.0), lambda x: noise.remove_noise(x, x, 0),
    lambda x: noise.sample_gamma(0.5, 1.1, [0])
])
def test_a_gamma_out_of_range_is_refused_with_the_range(call):
    with pytest.raises(ValueError, match=r"gamma must be in [\[(]0, 1\]"):
        call(torch.zeros(2, 3, 4, 4))


@pytest.mark.parametrize("sigma", [-0.1, float("inf"), float("nan"), torch.tensor([0.1, -1.0])])
def test_a_sigma_out_of_range_is_refused_with_the_range(sigma):
    with pytest.raises(ValueError, match="sigma must be a finite number >= 0"):
        noise.simple_additive_noise(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4), sigma)
    with pytest.raises(ValueError, match="low <= high"):
        noise.sample_gamma(0.9, 0.8, [0])
