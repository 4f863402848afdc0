"""Stand-ins for Google's R50+ViT-B_16.npz: its 354 arrays (heads left out) with values drawn from a seed.

jax_hybrid_vit_b16.npz holds what the ORIGINAL JAX model answers for make_weights(0) and make_image(0), NCHW
float32: stride2[:, ::8, ::7, ::7], stride4[:, ::8, ::5, ::5], stride8[:, ::8, ::3, ::3], stride16[:, ::4].
"""
import zlib

import numpy as np


def key_shapes():
    """{name: shape} of the published file."""
    shapes = {"conv_root/kernel": (7, 7, 3, 64), "embedding/kernel": (1, 1, 1024, 768), "cls": (1, 1, 768),
              "embedding/bias": (768,), "Transformer/posembed_input/pos_embedding": (1, 197, 768)}
    inputs, group_norms = 64, {"gn_root": 64}
    for block, (units, width) in enumerate(((3, 64), (4, 128), (9, 256)), start=1):
        for unit in range(1, units + 1):
            outputs = 4 * width
            kernels = {"1": (1, inputs, width), "2": (3, width, width), "3": (1, width, outputs)}
            if unit == 1:
                kernels["_proj"] = (1, inputs, outputs)
            for name, (side, *channels) in kernels.items():
                shapes[f"block{block}/unit{unit}/conv{name}/kernel"] = (side, side, *channels)
                group_norms[f"block{block}/unit{unit}/gn{name}"] = channels[1]
            inputs = outputs
    norms = ["Transformer/encoder_norm"]
    for layer in range(12):
        name = f"Transformer/encoderblock_{layer}"
        norms += [f"{name}/LayerNorm_0", f"{name}/LayerNorm_2"]
        attention = f"{name}/MultiHeadDotProductAttention_1"
        for part in ("query", "key", "value"):
            shapes.update({f"{attention}/{part}/kernel": (768, 12, 64), f"{attention}/{part}/bias": (12, 64)})
        shapes.update({
            f"{attention}/out/kernel": (12, 64, 768), f"{attention}/out/bias": (768,),
            f"{name}/MlpBlock_3/Dense_0/kernel": (768, 3072), f"{name}/MlpBlock_3/Dense_0/bias": (3072,),
            f"{name}/MlpBlock_3/Dense_1/kernel": (3072, 768), f"{name}/MlpBlock_3/Dense_1/bias": (768,)})
    for part in ("scale", "bias"):
        shapes.update({f"{norm}/{part}": (768,) for norm in norms})
        shapes.update({f"{norm}/{part}": (1, 1, 1, count) for norm, count in group_norms.items()})
    return shapes


def make_weights(seed):
    """{name: float32 array}, each a function of its name and the seed: N(0, 1) from RandomState(crc32(name) +
    seed), scaled so that activations stay of order one."""
    weights = {}
    for name, shape in key_shapes().items():
        random = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
        value = random.standard_normal(shape).astype(np.float32)
        if name.endswith("scale"):
            value = 1 + 0.1 * value
        elif name.endswith("kernel"):
            heads = any(part in name for part in ("query", "key", "value"))
            fan = np.prod(shape) / (shape[1] * shape[2] if heads else shape[-1])
            value = value / np.sqrt(np.float32(fan))
        else:
            value = (0.5 if name == "cls" or name.endswith("pos_embedding") else 0.1) * value
        weights[name] = value.astype(np.float32)
    return weights


def make_image(seed):
    """(2, 3, 224, 224) float32 in [-1, 1]."""
    image = np.random.RandomState(1000 + seed).uniform(-1, 1, (2, 224, 224, 3)).astype(np.float32)
    return np.ascontiguousarray(image.transpose(0, 3, 1, 2))
