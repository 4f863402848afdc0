"""Noise, targets and the loss of denoising pretraining: equations 1 to 6 of Brempong et al. (2022).

x and e (`eps`) are (B, C, H, W); results have x's dtype. gamma in [0, 1] and sigma >= 0 are floats, or (B,)
with a value per image.

PAPER SILENT on the pixel range, to which gamma and sigma refer: here [-1, 1], as the published encoder
expects: x = (value - 127.5) / 127.5 of 8 bits. Noisy images are never clipped. Eq. 5 keeps a variance of 1;
photographs have about 0.25.

Eqs. 1 and 5 differ by a factor: sqrt(gamma) x + sqrt(1 - gamma) e = (x + sigma e) / sqrt(1 + sigma^2), with

    gamma   sigma = sqrt(1/gamma - 1)  sqrt(1 - gamma)  where the paper uses it
    0.95    0.2294                     0.2236           main setting (Table 4)
    0.6098  0.8000                     0.6247           DeP in Table 2

PAPER SILENT on the unit of its "optimal noise magnitude", 0.22 (4.1): here sqrt(1 - gamma) at gamma = 0.95.
(Table 4's caption says sigma, but its values are gamma.)
"""
import torch
import torch.nn.functional as F


def sigma_to_gamma(sigma):
    """gamma = 1 / (1 + sigma^2)."""
    return 1 / (1 + sigma ** 2)


def simple_additive_noise(x, eps, sigma):
    """Eq. 1: x~ = x + sigma e."""
    return (x + per_image(sigma, x) * eps).to(x.dtype)


def scaled_additive_noise(x, eps, gamma):
    """Eq. 5: x~ = sqrt(gamma) x + sqrt(1 - gamma) e."""
    gamma = per_image(gamma, x)
    return (gamma.sqrt() * x + (1 - gamma).sqrt() * eps).to(x.dtype)


def denoising_loss(prediction, target):
    """Eq. 2 (target = x: predict the image) and Eqs. 3, 4, 6 (target = e: predict the noise).

    Both (B, C, H, W). Returns a float32 scalar: the MEAN, so that predicting 0 has loss 1 on unit noise. The
    paper's squared norm is a sum; a factor changes little for Adam.
    """
    return F.mse_loss(prediction.float(), target.float())


def remove_noise(x_noisy, eps, gamma):
    """Solve Eq. 5 for x, for display. gamma in (0, 1]."""
    gamma = per_image(gamma, x_noisy)
    return ((x_noisy - (1 - gamma).sqrt() * eps) / gamma.sqrt()).to(x_noisy.dtype)


def sample_noise(shape, seeds, device="cpu"):
    """e ~ N(0, I) of shape (B, C, H, W), float32. Image b has its own generator, seeded with seeds[b].

    So its noise depends on no batch or process. CPU and GPU generators differ.
    """
    generators = [torch.Generator(device).manual_seed(int(seed)) for seed in seeds]
    return torch.stack([torch.randn(shape[1:], generator=g, device=device) for g in generators])


def sample_gamma(low, high, seeds):
    """gamma ~ U(low, high), one per image (4.4, Table 4): (B,) float32 on the CPU.

    The seed is seeds[b] + 1: with seeds[b], gamma would depend on the noise.
    """
    generators = [torch.Generator().manual_seed(int(seed) + 1) for seed in seeds]
    return low + (high - low) * torch.stack([torch.rand((), generator=g) for g in generators])


def per_image(value, x):
    """Shape a float or (B,) to multiply (B, C, H, W), in float32 or finer: bf16 is too coarse."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.as_tensor(value, dtype=dtype, device=x.device).reshape(-1, 1, 1, 1)
